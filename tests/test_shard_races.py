"""What may come between two steps of one piece of work: removal, carrying, a clock that steps, an
answer or a read that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from codeq import errors
from codeq.engine import _engine, _wire, retention
from codeq.engine._wire import Creates, Finishes
from codeq.engine.store import Store

from .engine_disk import claim, claimed, engine, finish, make
from .node import Node

SETTINGS: dict[str, Any] = {
    "retention_seconds": 1,
    "idempotency_window_seconds": 1,
    "straggler_slack_bytes": 0,
    "payload_memory_bytes": 0,
}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "data", **SETTINGS)
    node.shard._stop_maintenance()  # the tests say when
    yield node
    node.close()


def pass_segment(node: Node) -> None:
    """Moves the log on by more than a segment; nothing of it is needed a second later."""
    node.create_batch([{"payload": b"x" * 8200, "command": "mass"}] * 520, tenant="mass")
    views = node.claim(None, tenant="mass", count=520, bytes_max=64 << 20)
    node.finish(*[view.id for view in views], tenant="mass")
    node.clock.advance(2000)
    node.shard.journal.kick()
    node.settle()


def remove(node: Node) -> None:
    """One round of removal, whole."""
    node.shard._retention.run(node.clock.now_ms())
    node.settle()


def hold_reads(node: Node, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Reads stand still from now on; returns what lets them go on."""
    held: list[tuple[Callable[[], object], Callable[[object], None]]] = []
    read = node.runner.read
    monkeypatch.setattr(node.runner, "read", lambda work, done: held.append((work, done)))

    def release() -> None:
        monkeypatch.setattr(node.runner, "read", read)
        for work, done in held:
            read(work, done)
        node.settle()

    return release


def carry_away(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records of what is live move forward, and their old chunks go, while reads are held."""
    with monkeypatch.context() as patch:
        patch.setattr(node.runner, "read", type(node.runner).read.__get__(node.runner))
        tail = node.shard.engine.tail
        while node.shard.engine.tail == tail:
            pass_segment(node)
            remove(node)
        remove(node)


def finish_soon(node: Node, task_id: str) -> None:
    """A result that is decided now and not yet written."""
    finishes = Finishes()
    finishes.add(task_id.encode(), b"COMPLETED", result=b"1")
    finishes.check(1 << 20, lenient_error=True)
    node.shard.finish(finishes, "t", "w", "s", lambda: None)


def two_stragglers(node: Node) -> str:
    """One has ended so long ago that its own entry goes with the next look; the other, which is
    older, is about to end."""
    ids = [node.create(), node.create()]
    assert len(node.claim(count=2, lease_ms=10**9)) == 2
    pass_segment(node)
    remove(node)
    node.finish(ids[1])
    node.shard._retention._reading = True  # removal without a look
    pass_segment(node)
    node.shard._retention._reading = False
    node.shard._retention._look(node.clock.now_ms())  # carries the other one on
    node.settle()
    node.shard._retention._reading = True
    pass_segment(node)
    node.shard._retention.run(node.clock.now_ms())
    node.settle()
    node.shard._retention._reading = False
    keys = [key for key, _ in node.shard._store.scan(b"e", b"f")]
    assert keys == [b"e" + (1).to_bytes(8, "big")]
    return ids[0]


@pytest.mark.parametrize("when", ["while it looks", "with the removal"])
def test_T44_removal_takes_no_entry_that_is_written_while_it_looks(node: Node, when: str) -> None:
    """Entries of detached tasks are removed as ranges of numbers, and tasks end in any order."""
    task_id = two_stragglers(node)
    if when == "with the removal":
        node.runner.hold_syncs = True
        node.shard.journal.put(b"x", b"")
        node.shard.journal.kick()
        node.settle()
    node.shard._retention._look(node.clock.now_ms())
    if when == "with the removal":
        node.settle()
    finish_soon(node, task_id)
    node.runner.hold_syncs = False
    node.runner.release()
    keys = [key for key, _ in node.shard._store.scan(b"e", b"f")]
    assert keys == [b"e" + (0).to_bytes(8, "big")]
    view = node.get(task_id)
    assert (view.state, view.result) == (_engine.COMPLETED, b"1")


def test_a_range_without_keys_leaves_them_out() -> None:
    parts = retention._without(b"e", b"e9\0", [b"e5", b"d1", b"e3", b"f"])
    assert parts == [(b"e", b"e3"), (b"e3\0", b"e5"), (b"e5\0", b"e9\0")]


def test_T44_an_entry_that_is_needed_long_keeps_no_other(node: Node) -> None:
    ids = [node.create() for _ in range(3)]
    assert len(node.claim(count=3, lease_ms=10**9)) == 3
    pass_segment(node)
    remove(node)
    node.finish(ids[1], ids[2])
    for _ in range(3):
        pass_segment(node)
    node.shard._retention._look(node.clock.now_ms())
    node.settle()
    node.finish(ids[0])
    remove(node)
    node.settle()
    keys = [key for key, _ in node.shard._store.scan(b"e", b"f")]
    assert keys == [b"e" + bytes(8)]


def test_a_task_that_is_carried_while_it_is_read_is_found(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = node.create(payload=b'"kept"')
    release = hold_reads(node, monkeypatch)
    got: list[Any] = []
    node.shard.get(task_id, "t", got.append)
    node.settle()
    carry_away(node, monkeypatch)
    release()
    assert [view.payload for view in got] == [b'"kept"']


def test_T19_a_claim_whose_tasks_are_carried_while_they_are_read_is_delivered(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create(payload=b'"kept"')
    release = hold_reads(node, monkeypatch)
    got: list[Any] = []
    node.shard.claim(node.request(got.append, lease_ms=10**9))
    node.settle()
    carry_away(node, monkeypatch)
    release()
    assert [view.payload for view in got[0].views()] == [b'"kept"']


@pytest.mark.parametrize("form", ["message", "views"])
def test_T19_a_delivery_that_waits_to_be_written_survives_carrying(
    node: Node, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    node.create(payload=b'"kept"')
    got: list[Any] = []
    node.shard.claim(node.request(got.append, lease_ms=10**9))
    node.settle()
    carry_away(node, monkeypatch)
    if form == "views":
        assert got[0].views()[0].payload == b'"kept"'
    else:
        _, tasks = _wire.decode_worker_server_event(got[0].encode(True))
        assert tasks[0].payload == b'"kept"'


def test_T44_a_segment_of_large_records_is_carried_a_few_at_a_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "CARRY_BYTES_MAX", 30_000)
    ids = [node.create(payload=b'"%d"' % i + b" " * 9000) for i in range(20)]
    assert len(node.claim(count=20, lease_ms=10**9)) == 20
    tail = node.shard.engine.tail
    carried = []
    carry = node.shard._store.write
    monkeypatch.setattr(
        node.shard._store,
        "write",
        lambda puts, *more: (carried.append(sum(len(v) for _, v in puts)), carry(puts, *more))[1],
    )
    while node.shard.engine.tail == tail:
        pass_segment(node)
        carried.clear()
        for _ in range(20):
            remove(node)
    assert max(carried) < 50_000
    for i, task_id in enumerate(ids):
        assert node.get(task_id).payload.strip() == b'"%d"' % i


def test_T44_a_straggler_behind_large_payloads_is_carried() -> None:
    """What the log weighs is what its chunks weigh, not their number."""
    core = engine(straggler_slack_bytes=6 << 20)
    make(core, count=1)
    ids = make(core, command=b"mass", count=520, payload=b"x" * 20_000)
    claimed(core, commands=[b"mass"], count=520)
    finish(core, ids)
    core.take()
    assert core.straggler_chunks() == (1, 512)
    assert claim(core) is not None


def test_T5_T51_a_step_of_the_clock_past_a_timer_is_noticed_within_a_second(tmp_path: Path) -> None:
    """A machine that slept: the timers know nothing of the time that passed."""
    node = Node(tmp_path / "data", backoff_policy="fixed", backoff_base_seconds=0)
    for _ in range(3):
        node.create_batch([{}] * 7_000)
    assert len(node.claim(count=30_000, lease_ms=3_600_000, bytes_max=1 << 30)) == 21_000
    due_ms, stop = node.shard._due or (0, lambda: None)
    stop()
    node.shard._due = (due_ms, lambda: None)  # a timer that will be an hour late
    node.clock.advance(3_600_000)
    node.advance(1000)
    assert node.shard.engine.stats(b"t", b"job") == (21_000, 0, 0, 0)
    node.close()


def test_T10_the_same_task_in_two_commits_of_one_batch_is_accepted_once(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", commit_results_max=2)
    ids = [node.create(), node.create()]
    node.claim(count=2)
    assert list(node.finish(*ids, ids[0])) == [0, 0, errors.NOT_IN_PROGRESS.number]
    node.close()


# --- failures


def test_an_answer_that_fails_keeps_no_other_from_leaving(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[str] = []

    def fail(view: object) -> None:
        raise RuntimeError("a bug of an edge")

    node.shard.get("no id", "t", fail)
    node.shard.queues.stats("t", "job", lambda counts: answers.append("stats"))
    node.shard.journal.after(lambda: fail(None))
    node.shard.journal.after(lambda: answers.append("after"))
    with caplog.at_level(logging.ERROR, "codeq.journal"):
        node.settle()
    assert answers == ["stats", "after"]
    assert "a bug of an edge" in caplog.text
    assert node.faults == []


def test_T6_a_group_that_cannot_be_closed_is_a_fault(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(type(node.shard._claims), "serve", lambda *_: 1 // 0)
        node.shard.get("no id", "t", answers.append)
        node.settle()
    assert len(node.faults) == 1 and "could not be closed" in node.faults[0]
    node.shard.get("no id", "t", answers.append)
    node.settle()
    assert answers == []


@pytest.mark.parametrize("what", ["get", "keys"])
def test_T6_a_store_that_cannot_be_read_is_a_fault(
    node: Node, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    task_id = node.create(payload=b"1", key="k")
    answers: list[object] = []
    with monkeypatch.context() as patch:
        if what == "keys":
            entry = next(node.shard._store.scan(b"k", b"l"))
            node.shard._store.write([(entry[0], entry[1][:-1] + b"?")])
        else:
            patch.setattr(node.shard._store, "_db", None)
            patch.setattr(node.shard._store, "_log", None)
        if what == "get":
            patch.setattr(node.runner, "read", lambda work, done: done(_outcome(work)))
            node.shard.get(task_id, "t", answers.append)
        else:
            creates = Creates()
            creates.add(b"job", b"1", key=b"k")
            node.shard.create(creates, "t", answers.append)
        node.settle()
    assert answers == []
    assert len(node.faults) == 1


def _outcome(work: Callable[[], object]) -> object:
    try:
        return work()
    except Exception as error:
        return error


def test_a_read_that_fails_names_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.close()
    with pytest.raises(errors.StoreError, match="read of the store failed"):
        store.get([b"a"])
