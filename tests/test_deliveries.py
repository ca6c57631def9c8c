"""Pending webhooks in the store: seen after the sync, whole whatever happens to the log, gone for
good once removed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codeq.engine import deliveries
from codeq.engine.deliveries import Outcome, Owed
from codeq.engine.store import Store
from codeq.errors import OK, StoreError

from .node import Node

URL = "https://example.com/hook"
#: Ended tasks go at once, so that the log that holds them is cut
FORGETFUL = {
    "retention_seconds": 0,
    "idempotency_window_seconds": 1,
    "fsync_on_commit": False,
    "lease_grace_seconds": 0,
}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "data", lease_grace_seconds=0)
    yield made
    made.close()


def owed(node: Node) -> list[Owed]:
    """Every entry, page by page."""
    found: list[Owed] = []
    begin: bytes | None = deliveries.PREFIX
    while begin is not None:
        pages: list[Any] = []
        node.shard.deliveries.page(begin, node.shard.deliveries.end, pages.append)
        node.settle()
        found += pages[0].owed
        begin = pages[0].next
    return found


def load(node: Node, key: bytes) -> Outcome | None:
    got: list[Outcome | None] = []
    node.shard.deliveries.load(key, got.append)
    node.settle()
    assert len(got) == 1
    return got[0]


def remove(node: Node, entry: Owed) -> None:
    load(node, entry.key)
    node.shard.deliveries.remove(entry)
    node.settle()


def entries(node: Node) -> dict[bytes, bytes]:
    return dict(node.shard._store.scan(deliveries.PREFIX, deliveries.LAST))


def ended(node: Node, count: int = 1, tenant: str = "t", **fields: Any) -> list[str]:
    batch = node.create_batch([{"webhook": URL, **fields}] * count, tenant=tenant)
    node.claim(count=count, tenant=tenant)
    ids = [batch.task_id(index) for index in range(count)]
    told = [{"task_id": i, "result": b'{"n": 1}', "artifacts": b"[1]"} for i in ids]
    node.finish_batch(told, tenant=tenant)
    return ids


def grow_log(node: Node, groups: int = 300) -> None:
    """More than a segment of log and a bucket of tasks, and all of it over."""
    for _ in range(groups):
        node.create()
        node.finish(node.claim()[0].id)


def test_an_entry_is_announced_after_the_sync_and_not_before(node: Node) -> None:
    told: list[bytes] = []
    node.shard.deliveries.committed = told.append
    task_id = node.create(webhook=URL, trace_parent="00-aa-bb-01", trace_state="x=1")
    node.claim()
    node.runner.hold_syncs = True
    with pytest.raises(AssertionError):
        node.finish(task_id)
    assert told == [] and node.shard.deliveries.end == deliveries.PREFIX
    node.runner.hold_syncs = False
    node.runner.release()
    (end,) = told
    (entry,) = owed(node)
    assert entry.key < end == node.shard.deliveries.end
    assert entry[1:] == (URL, "t", "job")
    assert node.shard.deliveries.pending == 1


def test_what_is_told_of_an_end(node: Node) -> None:
    (task_id,) = ended(node, trace_parent="00-aa-bb-01", trace_state="x=1")
    (entry,) = owed(node)
    outcome = load(node, entry.key)
    assert outcome == Outcome(
        *(task_id, URL, "t", "job", True, b'{"n": 1}', "", b"[1]"),
        *(node.clock.now_ms(), "00-aa-bb-01", "x=1"),
    )


def test_T15_every_end_leaves_a_delivery(node: Node) -> None:
    """A failed result, a nack and a lease that used the last attempt up."""
    failed, nacked, expired = (node.create(webhook=URL, max_attempts=1) for _ in range(3))
    for _ in range(3):
        node.claim(lease_ms=5_000)
    node.finish_batch([{"task_id": failed, "status": "FAILED", "error": "broken"}])
    node.nack(nacked, reason="tired")
    node.advance(6_000)
    told = {}
    for entry in owed(node):
        outcome = load(node, entry.key)
        assert outcome is not None and not outcome.completed
        told[outcome.task_id] = outcome.error
    assert told == {failed: "broken", nacked: "tired", expired: "LEASE_EXPIRED"}


def test_a_dead_letter_that_is_requeued_owes_both_ends(node: Node) -> None:
    task_id = node.create(webhook=URL, max_attempts=1)
    node.claim()
    node.nack(task_id)
    assert node.shard.engine.requeue(owed_id(node), b"t", node.clock.now_ms()) == 0
    node.shard.journal.kick()
    node.settle()
    node.claim()
    node.finish(task_id)
    first, second = (load(node, entry.key) for entry in owed(node))
    assert first is not None and (first.completed, first.error) == (False, "MAX_ATTEMPTS")
    assert second is not None and second.completed


def test_a_task_that_ends_twice_in_one_commit_is_owed_once(node: Node) -> None:
    """And lets the log go when that is over, as every other."""
    task_id = node.create(webhook=URL, max_attempts=1)
    node.claim()
    answers: list[Any] = []
    shard, done = node.shard, lambda *told: answers.append(told[0])
    shard.nack(task_id, "t", "w", "s", 0, "tired", done)
    shard.queues.requeue("t", "job", [task_id], 1, done)
    shard.cancel(task_id, "t", done)
    node.settle()
    assert answers == [OK, 1, OK]
    (entry,) = owed(node)
    assert shard.deliveries.pending == 1 and shard.deliveries.pending_by == {"t": 1}
    remove(node, entry)
    assert shard.deliveries.pending == 0 and shard.deliveries.hold(0) > 1 << 62


def test_entries_of_one_commit_are_all_announced_in_whatever_order_they_ended(node: Node) -> None:
    batch = node.create_batch([{"webhook": URL}] * 3)
    node.claim(count=3)
    ids = [batch.task_id(index) for index in range(3)]
    node.finish(ids[2], ids[0], ids[1])
    told = [load(node, entry.key) for entry in owed(node)]
    assert [None if outcome is None else outcome.task_id for outcome in told] == ids


def owed_id(node: Node) -> bytes:
    ((_, value),) = entries(node).items()
    return value[1:17]


def test_T18_entries_survive_a_restart_and_go_for_good(node: Node) -> None:
    ids = ended(node, 3)
    node.restart()
    assert node.shard.deliveries.pending == 3
    found = owed(node)
    told = [load(node, entry.key) for entry in found]
    assert [outcome and outcome.task_id for outcome in told] == ids
    remove(node, found[1])
    assert node.shard.deliveries.pending == 2
    node.restart()
    assert [entry.key for entry in owed(node)] == [found[0].key, found[2].key]
    assert load(node, found[1].key) is None, "it was delivered"


def test_T18_what_each_tenant_is_owed_is_known_after_a_restart(tmp_path: Path) -> None:
    """Also of ends that were copied out of the log; a tenant that is owed nothing takes no room."""
    node = Node(tmp_path / "data", **FORGETFUL)
    ended(node, 3, tenant="acme")
    grow_log(node)
    node.advance(3_000)
    assert {value[0] for value in entries(node).values()} == {deliveries._WHOLE}
    ended(node, 2, tenant="acme")
    ended(node, 1, tenant="other")
    for _ in range(2):
        assert node.shard.deliveries.pending_by == {"acme": 5, "other": 1}
        node.restart()
    last = owed(node)[-1]
    assert last.tenant == "other"
    remove(node, last)
    remove(node, owed(node)[0])
    for _ in range(2):
        assert node.shard.deliveries.pending_by == {"acme": 4}
        assert node.shard.deliveries.pending == 4
        node.restart()
    node.close()


def test_T18_an_end_stays_readable_beyond_its_keeping_time(tmp_path: Path) -> None:
    """The log that holds it is cut, the delivery is not lost, and nobody else's log is kept."""
    node = Node(tmp_path / "data", **FORGETFUL)
    ids = ended(node, 5)
    grow_log(node)
    assert node.get(ids[0]) is None, "its keeping time is over"
    node.advance(3_000)
    assert node.shard.engine.tail >= 512, "the log was cut behind it"
    values = entries(node)
    assert all(value[0] == deliveries._WHOLE for value in values.values()), "copied out before"
    node.restart()
    for entry, task_id in zip(owed(node), ids, strict=True):
        outcome = load(node, entry.key)
        assert outcome is not None and outcome.task_id == task_id
        assert (outcome.url, outcome.result, outcome.completed) == (URL, b'{"n": 1}', True)
        node.shard.deliveries.remove(entry)
    node.settle()
    assert entries(node) == {} and node.shard.deliveries.pending == 0
    node.close()


def test_T18_many_ends_are_copied_out_a_part_at_a_time(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", **FORGETFUL)
    for _ in range(3):
        ended(node, 200)
        grow_log(node)
    newest = ended(node, 10)
    node.advance(5_000)
    assert node.shard.engine.tail >= 2 * 512
    whole = [value[0] == deliveries._WHOLE for value in entries(node).values()]
    assert len(whole) == 610 and whole[:600].count(True) >= 400 and not any(whole[600:])
    assert len(node.shard.deliveries._held) <= 3, "one count for each segment they rest on"
    last = [load(node, entry.key) for entry in owed(node)[-10:]]
    assert [outcome and outcome.task_id for outcome in last] == newest
    node.close()


def test_T18_the_log_is_held_until_the_copy_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path / "data", **FORGETFUL)
    (task_id,) = ended(node)
    grow_log(node)
    with monkeypatch.context() as slow:
        slow.setattr(node.shard.deliveries, "_look", lambda expired: None)
        node.advance(5_000)
        assert node.shard.engine.expired(node.clock.now_ms()) >= 512
        assert node.shard.engine.tail < 512, "not cut before it is copied out"
        outcome = load(node, owed(node)[0].key)
        assert outcome is not None and outcome.task_id == task_id
    node.advance(2_000)
    assert node.shard.engine.tail >= 512
    node.close()


@pytest.mark.parametrize("removed_first", [True, False])
def test_a_removal_that_meets_a_copy_is_not_undone(tmp_path: Path, removed_first: bool) -> None:
    node = Node(tmp_path / "data", **FORGETFUL)
    ended(node, 2)
    grow_log(node)
    first, second = owed(node)
    assert load(node, first.key) is not None
    node.shard.deliveries.hold(512)
    node.runner._soon.popleft()()  # reads, its answer comes with the next turn of the loop
    if not removed_first:
        node.runner._soon.popleft()()  # the copies stand in the open group
    node.shard.deliveries.remove(first)
    node.settle()
    assert list(entries(node)) == [second.key]
    assert node.shard.deliveries.pending == 1 and node.shard.deliveries._held == {}
    node.close()


def test_a_removal_not_yet_written_is_not_undone_by_a_look_for_copies(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", **FORGETFUL)
    ended(node, 2)
    grow_log(node)
    first, second = owed(node)
    assert load(node, first.key) is not None
    node.shard.deliveries.remove(first)
    node.shard.deliveries.hold(512)  # the removal stands in the open group
    node.settle()
    assert list(entries(node)) == [second.key]
    assert node.shard.deliveries.pending == 1 and node.shard.deliveries._held == {}
    node.close()


def test_an_entry_copied_while_it_is_tried_can_be_tried_again(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", **FORGETFUL)
    (task_id,) = ended(node)
    grow_log(node)
    (entry,) = owed(node)
    assert load(node, entry.key) is not None
    node.advance(2_000)
    assert node.shard.engine.tail >= 512
    node.shard.deliveries.release(entry.key)
    again = load(node, entry.key)
    assert again is not None and again.task_id == task_id
    node.shard.deliveries.remove(entry)
    node.settle()
    assert entries(node) == {} and node.shard.deliveries._held == {}
    node.close()


def test_a_damaged_entry_is_named(node: Node) -> None:
    ended(node)
    ((key, value),) = entries(node).items()
    node.shard.close()
    for bad in (value[:-1], value[:20], b"\1" + value[1:], b"\4" + value[1:]):
        store = Store(node.path)
        store.write([(key, bad)])
        store.close()
        with pytest.raises(StoreError, match=r"webhook .* is damaged"):
            node._open()
    store = Store(node.path)
    store.write([(key, value)])
    store.close()
    node._open()
