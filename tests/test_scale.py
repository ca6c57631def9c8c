"""One node with many of everything, small enough for the suite; benches/scale.py goes further.

Costs are counted in work done (claims tried, records a group, bytes), never in time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benches import scale
from codeq.engine import recovery
from codeq.engine import shard as shard_module
from codeq.engine._wire import Creates
from codeq.engine.claims import Claims
from codeq.engine.clock import FakeClock
from codeq.engine.shard import GROUP_CLAIMS_MAX, GROUP_DUE_MAX, TICK_TASKS_MAX
from tests.node import Node

BATCH = 1000


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(
        tmp_path / "data",
        backoff_policy="fixed",
        backoff_base_seconds=0,
    )
    yield made
    made.close()


def make(node: Node, count: int, queues: int = 1, **fields: Any) -> list[str]:
    """Tasks of queue-0, queue-1, ... in turn; returns their ids."""
    ids = []
    for begin in range(0, count, BATCH):
        creates = Creates()
        for number in range(begin, min(begin + BATCH, count)):
            creates.add(b"queue-%d" % (number % queues), b"{}", **fields)
        node.shard.create(creates, "t", lambda _: None)
        node.settle()
        assert not any(creates.codes)
        ids += [creates.task_id(index) for index in range(len(creates))]
    return ids


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a claim is tried at the engine, from now on: the length of the list."""
    tries: list[int] = []
    attempt = Claims._try

    def counting(self: Claims, *args: Any) -> Any:
        tries.append(1)
        return attempt(self, *args)

    monkeypatch.setattr(Claims, "_try", counting)
    return tries


def groups(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records of each commit group from now on."""
    found: list[int] = []
    take = node.shard.journal._take

    def noting() -> list[tuple[bytes, bytes]]:
        found.append(node.shard.engine.pending_records)
        return take()

    monkeypatch.setattr(node.shard.journal, "_take", noting)
    return found


# --- queues


def test_T45_ten_thousand_queues_go_with_their_tasks(node: Node) -> None:
    """Each is there while it has a task, keeps its order among all others, and then is gone."""
    ids = make(node, 10_000, queues=10_000)
    engine = node.shard.engine
    assert len(engine.queues(None)) == 10_000
    got: list[str] = []
    while views := node.claim(None, count=BATCH, bytes_max=4 << 20):
        got += [view.id for view in views]
    assert got == ids, "over all queues the oldest first"
    for begin in range(0, len(ids), BATCH):
        assert not any(node.finish(*ids[begin : begin + BATCH]))
    assert engine.queues(None) == []
    node.restart()
    assert node.shard.engine.queues(None) == []


def test_T45_claims_of_unknown_commands_leave_nothing_behind(node: Node) -> None:
    make(node, 10, queues=10)
    got: list[Any] = []
    for number in range(0, 5_000, 5):
        unknown = tuple(f"unknown-{number + i}" for i in range(5))
        assert node.claim(unknown) == []
        node.park(got, unknown).cancel()
    assert node.shard.waiting_claims == 0
    assert node.shard._claims._lanes == {}
    assert node.shard._claims._touched == {}
    assert len(node.shard.engine.queues(None)) == 10
    assert got == []


def test_T45_a_claim_over_all_queues_looks_at_one(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(node, 3_000, queues=3_000)
    tries = counted(monkeypatch)
    for _ in range(100):
        assert len(node.claim(None)) == 1
    assert len(tries) == 100


# --- waiting


def test_T49_a_task_wakes_one_of_many_parked_claims(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 claims, also those over every queue and over a hundred: nobody is asked in vain."""
    got: list[tuple[str, Any]] = []

    def park(kind: str, commands: tuple[str, ...] | None, count: int) -> None:
        for _ in range(count):
            request = node.request(
                lambda delivery: got.append((kind, delivery)), commands, wait=True
            )
            node.shard.claim(request)

    for queue in range(900):
        park(f"queue-{queue}", (f"queue-{queue}",), 100)
    park("hundred", tuple(f"queue-{i}" for i in range(100)), 1_000)
    park("every", None, 9_000)
    node.settle()
    assert node.shard.waiting_claims == 100_000
    tries = counted(monkeypatch)
    node.advance(60_000)
    assert tries == [], "waiting asks nothing"
    for number, queue in enumerate((7, 7, 500, 899)):
        node.create(f"queue-{queue}")
        assert got[-1][0] == f"queue-{queue}", "who came first"
        assert len(got) == number + 1
        # The claim that is served, and a look each at what waits for the same queue or for all.
        assert len(tries) <= 4 * (number + 1)
    assert node.shard.waiting_claims == 99_996


def test_T49_nothing_runs_while_claims_wait(node: Node) -> None:
    """No timer of its own for any claim: only the maintenance that is there without them."""
    got: list[Any] = []
    timers = len(node.runner.timers.times_ms())
    for number in range(10_000):
        node.shard.claim(node.request(got.append, (f"queue-{number}",), wait=True))
    node.settle()
    groups_before = node.shard.journal.groups
    assert len(node.runner.timers.times_ms()) == timers
    node.advance(300_000)
    assert node.shard.journal.groups == groups_before
    assert got == []


def test_many_claims_share_a_group_up_to_a_limit_and_keep_their_turn(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group becomes one write, which holds the loop."""
    count = 3 * GROUP_CLAIMS_MAX // BATCH
    ids = make(node, count * BATCH)
    got: list[Any] = []
    for _ in range(count):
        node.shard.claim(node.request(got.append, ("queue-0",), count=BATCH, bytes_max=4 << 20))
    records = groups(node, monkeypatch)
    node.settle()
    assert [view.id for delivery in got for view in delivery.views()] == ids
    assert max(records) <= GROUP_CLAIMS_MAX + BATCH
    assert len([number for number in records if number]) == 3


def test_parked_claims_left_for_the_next_group_come_before_new_ones(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "GROUP_CLAIMS_MAX", 2)
    got: list[tuple[str, Any]] = []

    def ask(name: str) -> None:
        node.shard.claim(
            node.request(lambda found: got.append((name, found)), ("queue-0",), wait=True)
        )

    for number in range(5):
        ask(f"parked-{number}")
    node.settle()
    ids = make(node, 6)
    ask("new")
    node.settle()
    assert [name for name, _ in got] == [f"parked-{i}" for i in range(5)] + ["new"]
    assert [found.views()[0].id for _, found in got] == ids


# --- leases


def test_T51_fifty_thousand_leases_that_end_together_are_back_at_once(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps that hold the loop for a millisecond or two each, and in groups of bounded size."""
    ids = make(node, 50_000)
    for _ in range(50):
        assert len(node.claim(("queue-0",), count=BATCH, bytes_max=4 << 20)) == BATCH
    assert node.stats("queue-0") == (0, 0, 50_000, 0)
    records = groups(node, monkeypatch)
    node.advance(59_999)
    assert node.stats("queue-0") == (0, 0, 50_000, 0)
    node.advance(1)
    assert node.stats("queue-0") == (50_000, 0, 0, 0)
    assert sum(records) == 50_000
    assert max(records) <= GROUP_DUE_MAX + 2 * TICK_TASKS_MAX
    assert [view.id for view in node.claim(("queue-0",), count=10)] == ids[:10]
    node.restart()
    assert node.stats("queue-0") == (49_990, 0, 10, 0)


def test_T51_leases_that_end_behind_a_slow_disk_do_not_pile_up_in_one_group(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(node, 30_000)
    for _ in range(30):
        node.claim(("queue-0",), count=BATCH, bytes_max=4 << 20)
    records = groups(node, monkeypatch)
    node.runner.hold_syncs = True
    creates = Creates()
    creates.add(b"other", b"{}")
    node.shard.create(creates, "t", lambda _: None)
    node.advance(60_000)
    assert node.shard.engine.pending_records <= GROUP_DUE_MAX + TICK_TASKS_MAX
    node.runner.hold_syncs = False
    node.runner.release()
    node.advance(1)
    assert node.stats("queue-0") == (30_000, 0, 0, 0)
    assert max(records) <= GROUP_DUE_MAX + 2 * TICK_TASKS_MAX


# --- the way back, and the bench


def test_a_long_restart_logs_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Ticking(FakeClock):
        """Half a second between two looks."""

        def monotonic_s(self) -> float:
            self.looks = getattr(self, "looks", 0) + 1
            return self.looks / 2

    node = Node(tmp_path / "data", Ticking())
    make(node, 3_200)
    monkeypatch.setattr(recovery, "PROGRESS_CHUNKS", 10)
    with caplog.at_level(logging.INFO, "codeq.recovery"):
        node.restart()
    lines = [record.getMessage() for record in caplog.records if "recovering" in record.message]
    assert 2 <= len(lines) <= 4
    assert lines[0].startswith("recovering: ") and "chunks of the log read" in lines[0]
    node.close()


def test_the_bench_of_scale_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    small = "--tasks 2000 --queues 100 --claims 200 --streams 20 --leases 1000 --idle-seconds 0.1"
    assert scale.main([*small.split(), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert [len(part) for part in figures.values()] == [9, 4, 4, 4, 3]
    printed = capsys.readouterr().out
    for part in figures:
        assert part in printed
