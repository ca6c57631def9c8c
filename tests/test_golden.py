"""A store that an earlier codeq wrote is read, task by task (golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codeq.engine._engine import COMPLETED, DEAD, DELAYED, FAILED, LEASED, READY
from codeq.engine.check import check
from codeq.engine.clock import FakeClock
from codeq.engine.store import Store
from tests.golden.make import SETTINGS, seen
from tests.node import Node

GOLDEN = Path(__file__).parent / "golden"


def golden(path: Path, name: str) -> tuple[Node, list[dict[str, Any]]]:
    """A node on a folder that holds the entries of the file, and what its tasks should be."""
    content = json.loads((GOLDEN / name).read_text())
    entries = [(bytes.fromhex(k), bytes.fromhex(v)) for k, v in content["entries"].items()]
    store = Store(path)
    store.write(entries)
    store.sync(store.sequence())
    store.close()
    clock = FakeClock(content["now"])
    assert check(path, clock).sound
    return Node(path, clock, lease_grace_seconds=0, **SETTINGS), content["tasks"]


@pytest.mark.parametrize("name", sorted(file.name for file in GOLDEN.glob("store-*.json")))
def test_a_golden_store_is_read_task_by_task(tmp_path: Path, name: str) -> None:
    node, tasks = golden(tmp_path / "data", name)
    prefixes = {key[:1] for key, _ in node.shard._store.scan(b"\0", b"\xff")}
    assert prefixes >= {b"d", b"e", b"k", b"m", b"s", b"w"}
    states = {task["state"] for task in tasks}
    assert states == {READY, DELAYED, LEASED, COMPLETED, FAILED, DEAD}
    assert [seen(node.get(task["id"], task["tenant"])) for task in tasks] == tasks
    node.shard.engine.verify()
    [keyed] = [task for task in tasks if task["command"] == "ready"]
    again = {"key": "a key", "trace_parent": "x", "priority": 9, "command": "ready"}
    assert node.create(**again) == keyed["id"]
    waiting = {t["id"] for t in tasks if t["tenant"] == "t" and t["state"] == READY}
    assert {view.id for view in node.claim(None, count=100)} >= waiting
    node.close()
