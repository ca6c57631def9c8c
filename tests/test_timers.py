"""What is due is done at its millisecond, not with the next look around."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codeq.engine.shard import MAINTENANCE_MS
from tests.node import Node


def test_T23_a_delayed_task_reaches_a_waiting_claim_at_its_millisecond(tmp_path: Path) -> None:
    node = Node(tmp_path / "data")
    between_looks_ms = MAINTENANCE_MS + MAINTENANCE_MS // 3
    task_id = node.create(run_at_ms=node.clock.now_ms() + between_looks_ms)
    got: list[Any] = []
    node.park(got)
    node.advance(between_looks_ms - 1)
    assert got == []
    node.advance(1)
    assert [view.id for view in got[0].views()] == [task_id]
    got[0].accepted()
    node.close()
