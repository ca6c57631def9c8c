"""Traps that only show on a whole node: a real store, a real engine, a fake clock."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codeq.engine import _engine
from tests.node import Node

DAY_MS = 86_400_000
BATCH = 1_000
MANY_BYTES = 64 << 20


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(
        tmp_path / "data",
        retention_seconds=10,
        dead_retention_seconds=20,
        idempotency_window_seconds=5,
        backoff_policy="fixed",
        backoff_base_seconds=0,
        straggler_slack_bytes=0,
        lease_grace_seconds=0,
    )
    yield node
    node.close()


def claim_batches(node: Node, count: int) -> list[str]:
    """Ids in order of delivery; the tasks stay leased."""
    ids: list[str] = []
    while len(ids) < count:
        views = node.claim(count=BATCH, bytes_max=MANY_BYTES, lease_ms=DAY_MS)
        assert views, f"nothing is ready after {len(ids)} tasks"
        ids += [view.id for view in views]
    return ids


def test_T1_150000_tasks_of_one_queue_and_priority_drain_also_after_a_restart(node: Node) -> None:
    made: list[str] = []
    for number in range(150):
        batch = node.create_batch([{"payload": b"%d" % number}] * BATCH)
        made += [batch.task_id(index) for index in range(BATCH)]
    assert node.stats() == (150_000, 0, 0, 0)
    seen = claim_batches(node, 50_000)
    node.restart()
    assert node.stats() == (100_000, 0, 50_000, 0)
    seen += claim_batches(node, 100_000)
    assert seen == made
    assert node.claim() == []
    for begin in range(0, 150_000, BATCH):
        assert node.finish(*made[begin : begin + BATCH]) == bytes(BATCH)
    assert node.stats() == (0, 0, 0, 0)


def churn(node: Node, segments: int) -> None:
    """So many lives that the log grows by more than these segments of 512 chunks."""
    for _ in range(segments * 9):
        batch = node.create_batch([{"command": "churn", "payload": b"x" * 8_000}] * 64)
        node.claim(("churn",), count=64, bytes_max=MANY_BYTES)
        assert node.finish(*(batch.task_id(index) for index in range(64))) == bytes(64)


@pytest.mark.parametrize("restart", [False, True])
def test_T2_no_live_task_goes_by_age(node: Node, restart: bool) -> None:
    waiting = node.create(payload=b'"waits"')
    delayed = node.create(payload=b'"25 h"', delay_seconds=25 * 3600)
    held = node.create("held")
    assert [view.id for view in node.claim(("held",), lease_ms=9 * DAY_MS)] == [held]
    for _ in range(3):
        churn(node, 1)
        node.clock.advance(DAY_MS // 3)
        node.advance(3_000)
        if restart:
            node.restart()
    assert node.shard.engine.tail > 1, "the log behind them went"
    assert [node.get(task_id).state for task_id in (waiting, delayed, held)] == [
        _engine.READY,
        _engine.DELAYED,
        _engine.LEASED,
    ]
    node.clock.advance(5 * DAY_MS)
    node.advance(1_000)
    assert [(view.id, view.payload) for view in node.claim(count=9)] == [
        (waiting, b'"waits"'),
        (delayed, b'"25 h"'),
    ]
    assert node.finish(waiting, delayed, held) == bytes(3)


def test_T3_keeping_counts_once_and_from_the_end(node: Node) -> None:
    task_id = node.create()
    node.claim()
    node.advance(50_000)
    assert node.heartbeat(task_id) == 0
    assert node.finish(task_id) == b"\0"
    ended_ms = node.clock.now_ms()
    for _ in range(3):
        node.advance(3_000)
        assert node.get(task_id).expires_ms == ended_ms + 10_000
        assert node.finish(task_id) == b"\0", "a repeated result is answered, and moves nothing"
    node.advance(999)
    assert node.get(task_id).state == _engine.COMPLETED
    node.advance(1)
    assert node.get(task_id) is None


@pytest.mark.parametrize("what", ["heartbeat", "abandon"])
def test_T3_claims_and_heartbeats_leave_no_trail(node: Node, what: str) -> None:
    task_id = node.create()
    node.claim()
    for _ in range(1_600):
        if what == "heartbeat":
            assert node.heartbeat(task_id, DAY_MS) == 0
        else:
            assert node.abandon(task_id) == 0
            assert len(node.claim()) == 1
    node.advance(3_000)
    assert len(list(node.shard._store.scan(b"c", b"d"))) < 1_100, "chunks of the newest segments"
    assert node.get(task_id).state == _engine.LEASED


def test_T5_thousands_of_leases_each_end_in_time_without_any_poll(node: Node) -> None:
    dice = random.Random(5)
    ends: dict[str, int] = {}
    node.create_batch([{}] * 3_000)
    now_ms = node.clock.now_ms()
    for _ in range(300):
        lease_ms = dice.randrange(1_000, 30_000)
        for view in node.claim(count=10, lease_ms=lease_ms):
            ends[view.id] = now_ms + lease_ms
    for task_id in dice.sample(sorted(ends), 500):
        lease_ms = dice.randrange(1_000, 30_000)
        assert node.heartbeat(task_id, lease_ms) == 0
        ends[task_id] = now_ms + lease_ms
    for _ in range(60):
        node.advance(dice.randrange(100, 900))
        now_ms = node.clock.now_ms()
        back = sum(end_ms <= now_ms for end_ms in ends.values())
        assert node.stats() == (back, 0, 3_000 - back, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_T8_an_end_is_one_write_alone_or_in_a_batch(
    node: Node, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    batch = node.create_batch([{"webhook": "https://example.com/hook"}] * count)
    node.claim(count=count)
    writes: list[list[bytes]] = []
    store, write = node.shard._store, node.shard._store.write

    def noted(puts: Any, *more: Any) -> None:
        writes.append(sorted(key[:1] for key, _ in puts))
        write(puts, *more)

    monkeypatch.setattr(store, "write", noted)
    ids = [batch.task_id(index) for index in range(count)]
    failed = {"task_id": ids[0], "status": "FAILED", "error": "no"}
    assert node.finish_batch([failed, *({"task_id": i} for i in ids[1:])]).codes == bytes(count)
    assert writes == [[b"c", b"m", *[b"w"] * count]]
    node.restart()
    assert node.get(ids[0]).error == "no"
    assert [node.get(task_id).has_record for task_id in ids] == [True] * count


def test_T44_records_keys_dead_letters_and_entries_all_go(node: Node) -> None:
    kept = node.create("kept", payload=b'"kept"')
    fill_the_log(node, 12)
    tail = node.shard.engine.tail
    assert node.stats() == (0, 0, 0, 0)
    assert tail > 512, "the log was cut"
    check_entries(node)
    assert [view.payload for view in node.claim(("kept",))] == [b'"kept"']
    assert node.finish(kept) == b"\0"
    own = list(node.shard._store.scan(b"e", b"f"))
    assert len(own) == 1, "it outlived its bucket"
    fill_the_log(node, 12)
    assert node.shard.engine.tail > int.from_bytes(own[0][1][:8], "big")
    check_entries(node)
    assert node.get(kept) is None


def fill_the_log(node: Node, laps: int) -> None:
    """Tasks with keys, webhooks and large payloads that end, one in 128 as a dead letter; and the
    time after which all of it may go."""
    for lap in range(laps):
        items = [
            {"payload": b"x" * 8_000, "key": f"{lap}-{number}", "webhook": "https://example.com/"}
            for number in range(127)
        ]
        batch = node.create_batch([*items, {"max_attempts": 1}])
        assert len(node.claim(count=128, bytes_max=MANY_BYTES)) == 128
        assert node.finish(*(batch.task_id(index) for index in range(127))) == bytes(127)
        assert node.nack(batch.task_id(127)) == (0, 0, True)
        node.advance(2_000)
    node.advance(40_000)


def check_entries(node: Node) -> None:
    """Nothing on disk rests on what is gone."""
    store, tail = node.shard._store, node.shard.engine.tail
    assert all(int.from_bytes(key[1:], "big") >= tail for key, _ in store.scan(b"c", b"d"))
    assert list(store.scan(b"k", b"l")) == [], "keys whose window is over"
    for prefix in (b"d", b"e", b"w"):
        for key, value in store.scan(prefix, prefix + b"\xff" * 9):
            assert int.from_bytes(value[:8], "big") >= tail, key
    assert all(int.from_bytes(key[1:], "big") >= tail // 512 for key, _ in store.scan(b"s", b"t"))


def test_T45_claims_for_unknown_commands_leave_nothing_behind(node: Node) -> None:
    for number in range(2_000):
        assert node.claim((f"none-{number}",)) == []
        node.park([], (f"none-{number}", "none")).cancel()
    claims, engine = node.shard._claims, node.shard.engine
    assert (claims.parked, claims._lanes, claims._fresh) == (0, {}, {})
    assert engine.queues(None) == [] and engine.command_stats() == []
    assert engine.pending_records == 0
