"""Ended tasks are kept for as long as promised, to the millisecond, and then go."""

from __future__ import annotations

from pathlib import Path

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
