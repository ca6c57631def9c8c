"""Ended tasks are kept for as long as promised, to the millisecond, and then go."""

from __future__ import annotations

from pathlib import Path

import pytest

from codeq.engine.deliveries import Page
from tests.engine_disk import NOW, Disk, claimed, finish, make
from tests.node import Node

KEEP_MS = 10_000


def test_T3_nothing_goes_a_millisecond_before_its_keeping_time_is_over(tmp_path: Path) -> None:
    disk = Disk(retention_ms=KEEP_MS, key_window_ms=0)
    for _ in range(5):
        ids = make(disk.engine, count=256, payload=b"x" * 4000)
        disk.commit()
        assert claimed(disk.engine, count=256) == ids
        assert finish(disk.engine, ids) == [0] * 256
        disk.commit()
    first = disk.chunks[min(disk.chunks)]
    assert disk.trim(NOW + KEEP_MS - 1) is None
    assert disk.chunks[min(disk.chunks)] == first
    assert disk.trim(NOW + KEEP_MS) is not None, "a whole segment of the log was over"


def test_T3_results_can_be_read_up_to_the_last_millisecond(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", retention_seconds=KEEP_MS // 1000)
    batch = node.create_batch([{"payload": b"%d" % i} for i in range(300)])
    ids = [batch.task_id(i) for i in range(300)]
    assert len(node.claim(count=300)) == 300
    assert node.finish(*ids) == bytes(300)
    node.advance(KEEP_MS - 1)
    for task_id in (ids[0], ids[-1]):  # read from disk, and from memory
        assert node.get(task_id).payload == b"%d" % ids.index(task_id)
    node.advance(1)
    assert [node.get(task_id) for task_id in (ids[0], ids[-1])] == [None, None]
    node.close()


def test_what_was_removed_leaves_a_full_disk_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path / "data", retention_seconds=KEEP_MS // 1000, disk_reserve_bytes=1)
    store = node.shard._store
    for _ in range(20):
        batch = node.create_batch([{"payload": b"x" * 8000}] * 100)
        node.claim(count=100, bytes_max=1 << 20)
        assert node.finish(*(batch.task_id(i) for i in range(100))) == bytes(100)
    node.advance(KEEP_MS + 5_000)
    assert node.shard.engine.tail > 0, "removed from the log"
    held = store.unflushed_bytes()
    assert held > 16_000_000, "and still on disk"
    monkeypatch.setattr(store, "free_bytes", lambda: 0)
    node.advance(2_000)
    assert store.unflushed_bytes() < held / 10
    node.close()


# --- removal keeps up

PREFIXES = (b"c", b"d", b"e", b"k", b"s", b"w")
NOT_ALWAYS = (b"e", b"w")
A_SECOND = 120  # tasks
LEVEL_SECONDS = 12


def entries(node: Node) -> dict[bytes, int]:
    """Keys in the store by prefix."""
    store = node.shard._store
    return {prefix: len(list(store.scan(prefix, prefix + b"\xff" * 20))) for prefix in PREFIXES}


def tell_all(node: Node) -> None:
    """Every webhook that is owed is told."""
    deliveries = node.shard.deliveries
    pages: list[Page] = []
    begin: bytes | None = b"w"
    while begin is not None:
        deliveries.page(begin, deliveries.end, pages.append)
        node.settle()
        begin = pages[-1].next
    keys = [owed.key for page in pages for owed in page.owed]
    for key in keys:
        deliveries.load(key, lambda _: None)
    node.settle()
    for key in keys:
        deliveries.remove(key)
    node.settle()


def live_a_second(node: Node, second: int) -> None:
    """Tasks with keys and webhooks that end in every way a worker ends them, and one that outlives
    its neighbours by half a minute."""
    keyed = {"payload": b"x" * 4000, "webhook": "https://example.com/", "max_attempts": 1}
    node.create_batch([{**keyed, "key": f"{second}-{i}"} for i in range(A_SECOND - 1)])
    node.create(payload=b"late", delay_seconds=30, max_attempts=1)
    ids = [view.id for view in node.claim(count=A_SECOND, bytes_max=4 << 20)]
    dead, failed, completed = ids[:10], ids[10:20], ids[20:]
    for task_id in dead:
        assert node.nack(task_id, 0)[2]
    assert not any(node.finish(*failed, status="FAILED") + node.finish(*completed))
    assert entries(node)[b"w"] == A_SECOND - 1
    tell_all(node)
    node.advance(1_000)


def test_T44_under_steady_load_every_kind_of_entry_levels_out_and_then_goes(
    tmp_path: Path,
) -> None:
    keep_seconds = KEEP_MS // 1000
    node = Node(
        tmp_path / "data",
        retention_seconds=keep_seconds,
        dead_retention_seconds=keep_seconds,
        idempotency_window_seconds=keep_seconds,
        straggler_slack_bytes=1 << 20,
    )
    seen = []
    for second in range(3 * LEVEL_SECONDS):
        live_a_second(node, second)
        seen.append(entries(node))
    middle, last = seen[LEVEL_SECONDS : 2 * LEVEL_SECONDS], seen[2 * LEVEL_SECONDS :]
    for prefix in PREFIXES:
        before = max(found[prefix] for found in middle)
        after = max(found[prefix] for found in last)
        assert before > 0 or prefix in NOT_ALWAYS
        assert after <= before * 1.2 + 2, (prefix, before, after)
    assert node.stats()[3] <= 10 * (keep_seconds + 1), "dead letters go as well"
    node.advance(31_000)
    for view in node.claim(count=1000):
        node.finish(view.id)
    node.advance(2 * KEEP_MS + 10_000)
    left = entries(node)
    assert left[b"k"] == left[b"w"] == 0
    assert left[b"c"] <= 3 * 512, "but for the newest segments, which are not full"
    assert left[b"s"] <= 4
    assert left[b"d"] + left[b"e"] <= 3 * 512
    assert node.stats() == (0, 0, 0, 0)
    assert node.shard.engine.queues(None) == []
    node.restart()
    assert node.stats() == (0, 0, 0, 0)
    node.close()
