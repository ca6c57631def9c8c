"""Ended tasks are kept for as long as promised, to the millisecond, and then go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from codeq.engine import store
from codeq.engine.check import check
from codeq.engine.deliveries import Page
from codeq.engine.reader import chunk_key
from codeq.engine.store import Deletion, Store
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


def table_bytes(node: Node) -> int:
    return sum(file.stat().st_size for file in node.path.glob("*.sst"))


def ended_tables(node: Node, tables: int) -> None:
    """So many tables of 256 KiB with tasks that have ended."""
    while len(list(node.path.glob("*.sst"))) < tables:
        batch = node.create_batch([{"payload": b"x" * 8000}] * 30)
        node.claim(count=30, bytes_max=1 << 20)
        assert node.finish(*(batch.task_id(i) for i in range(30))) == bytes(30)
        node.advance(1)


@pytest.mark.parametrize("put_off", [False, True])
def test_a_full_disk_gets_back_the_tables_of_what_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_off: bool
) -> None:
    monkeypatch.setattr(store, "WRITE_BUFFER_BYTES", 256 << 10)
    monkeypatch.setattr(store, "CUT_CHUNKS_MIN", 0 if put_off else 1 << 30)
    monkeypatch.setattr(Store, "cut_due", False)  # then only for want of room
    node = Node(tmp_path / "data", retention_seconds=KEEP_MS // 1000, disk_reserve_bytes=1 << 20)
    ended_tables(node, 60)
    full = table_bytes(node)
    room = node.shard._store.free_bytes
    monkeypatch.setattr(
        node.shard._store, "free_bytes", lambda: min(room(), full - table_bytes(node))
    )
    node.advance(1_000)
    assert node.create_batch([{}]).codes != bytes(1), "the disk is full"
    node.advance(KEEP_MS + 5_000)
    assert table_bytes(node) < full / 2
    assert node.create_batch([{}]).codes == bytes(1)
    node.close()


def test_damage_to_removed_chunks_does_not_keep_a_start_from_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand in their tables until compaction takes them; nobody needs to read them."""
    with monkeypatch.context() as patched:
        patched.setattr(store, "WRITE_BUFFER_BYTES", 256 << 10)
        node = Node(tmp_path / "data", retention_seconds=KEEP_MS // 1000)
    ended_tables(node, 20)
    oldest = min(node.path.glob("*.sst"))
    node.advance(KEEP_MS + 5_000)
    live = node.create()
    node.close()
    assert node.shard.engine.tail > 1
    held = table_bytes(node)
    damaged = bytearray(oldest.read_bytes())
    damaged[2000] ^= 1
    oldest.write_bytes(damaged)
    node = Node(tmp_path / "data", retention_seconds=KEEP_MS // 1000)
    node.advance(2_000)
    assert node.get(live).payload == b"{}"
    assert node.faults == []
    node.close()
    report = check(node.path, node.clock, repair=True, anyway=True)
    assert report.sound and report.repaired and not report.given_up
    assert table_bytes(node) < held, "without what was removed"
    node = Node(tmp_path / "data", retention_seconds=KEEP_MS // 1000)
    assert node.get(live).payload == b"{}"
    node.close()


# --- removal keeps up


@pytest.fixture
def small_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store in which 16 chunks of 4 KB are a table."""
    monkeypatch.setattr(store, "WRITE_BUFFER_BYTES", 64 << 10)
    monkeypatch.setattr(store, "CUT_CHUNKS_MIN", 8)
    small = Store(tmp_path / "small")
    yield small
    small.close()


def write_chunks(to: Store, begin: int, end: int, *ranges: Deletion) -> None:
    """Writes chunks of 4 KB, and ranges with them; then waits for the tables that were begun."""
    if to.cut_due:
        to.cut()
    to.write([(chunk_key(n), bytes([n % 256]) * 4096) for n in range(begin, end)], ranges=ranges)
    while to._log_number("num-immutable-mem-table"):
        pass


def chunks_of(one: Store) -> list[int]:
    return [int.from_bytes(key[1:], "big") for key, _ in one.scan(b"c", b"d")]


def test_old_chunks_go_in_a_table_without_new_ones(small_store: Store) -> None:
    write_chunks(small_store, 0, 10)
    write_chunks(small_store, 10, 12, (chunk_key(0), chunk_key(6)))
    assert chunks_of(small_store) == [*range(12)], "put off"
    write_chunks(small_store, 12, 14)
    assert chunks_of(small_store) == [*range(6, 14)]
    write_chunks(small_store, 14, 30)
    small_store.flush()
    tables = [(table["start_key"], table["end_key"]) for table in small_store._log.live_files()]
    assert (chunk_key(0), chunk_key(6)) in tables, "the range alone"
    assert not [begin for begin, end in tables if begin < chunk_key(6) and end > chunk_key(12)]


def test_old_chunks_go_at_once_where_few_were_written_since(small_store: Store) -> None:
    write_chunks(small_store, 0, 4)
    write_chunks(small_store, 4, 5, (chunk_key(0), chunk_key(3)))
    assert chunks_of(small_store) == [3, 4]


@pytest.mark.parametrize(
    ("name", "value"), [("num-immutable-mem-table", 1), ("num-files-at-level0", 49)]
)
def test_no_table_is_begun_that_rocksdb_would_wait_for(
    small_store: Store, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    number, write = small_store._log_number, small_store.write
    write([(chunk_key(n), bytes(4096)) for n in range(10)])
    with monkeypatch.context() as patched:
        patched.setattr(small_store, "_log_number", lambda n: value if n == name else number(n))
        write([(chunk_key(10), bytes(4096))], ranges=[(chunk_key(0), chunk_key(6))])
    assert small_store.put_off and not small_store.cut_due
    write([(chunk_key(11), bytes(4096))])
    assert small_store.cut_due


def test_what_was_put_off_goes_when_asked_for(small_store: Store) -> None:
    write_chunks(small_store, 0, 40)
    write_chunks(small_store, 40, 41, (chunk_key(0), chunk_key(30)))
    assert len(chunks_of(small_store)) == 41, "too little in the buffer for a table"
    small_store.cut()
    assert chunks_of(small_store) == [*range(30, 41)]


def test_a_start_removes_what_the_last_run_put_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path / "data", retention_seconds=KEEP_MS // 1000)
    with monkeypatch.context() as patched:
        patched.setattr(store, "CUT_CHUNKS_MIN", 0)
        patched.setattr(Store, "cut_due", False)
        patched.setattr(Store, "put_off", False)
        batch = node.create_batch([{"payload": b"x" * 8000}] * 600)
        node.claim(count=600, bytes_max=8 << 20)
        assert node.finish(*(batch.task_id(i) for i in range(600))) == bytes(600)
        node.advance(KEEP_MS + 5_000)
    assert chunks_of(node.shard._store)[0] < node.shard.engine.tail
    node.restart()
    node.advance(1_000)
    assert not [n for n in chunks_of(node.shard._store) if n < node.shard.engine.tail]
    node.close()


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
    every = [owed for page in pages for owed in page.owed]
    for owed in every:
        deliveries.load(owed.key, lambda _: None)
    node.settle()
    for owed in every:
        deliveries.remove(owed)
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
