"""Idempotency keys over restarts with another window or another clock (I7, T31)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from codeq.engine import keys
from codeq.engine.clock import FakeClock
from codeq.engine.store import Store
from tests.node import Node

HOUR_MS = 3_600_000
MIDNIGHT_MS = 1_700_006_400_000  # a border of days


def reopened(node: Node, **settings: Any) -> None:
    """Restarts with other settings."""
    node.close()
    node.settings |= settings
    node._open()


@pytest.mark.parametrize("hours", [1, 2, 5, 7, 24 * 30])
def test_I7_T31_keys_are_known_when_the_window_has_changed(tmp_path: Path, hours: int) -> None:
    node = Node(tmp_path / "data", FakeClock(MIDNIGHT_MS - 30 * 60_000))
    made = {f"key-{i}": node.create(key=f"key-{i}") for i in range(30)}
    for window in (hours, 24, hours):
        reopened(node, idempotency_window_seconds=window * 3600)
        assert {key: node.create(key=key) for key in made} == made
    node.advance(31 * 60_000)  # beyond a border of the days
    assert {key: node.create(key=key) for key in made} == made
    node.clock.advance(hours * HOUR_MS)
    assert node.create(key="key-0") != made["key-0"], "the window is over"
    assert node.faults == []
    node.close()


def test_T31_keys_of_another_window_are_removed_when_they_are_over(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", retention_seconds=60)
    for i in range(20):
        node.finish(node.create(key=f"key-{i}"), *[v.id for v in node.claim()])
    reopened(node, idempotency_window_seconds=60)
    node.advance(200_000)
    assert list(node.shard._store.scan(b"k", b"l")) == []
    node.close()


def test_T31_filing_keys_again_can_be_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "REFILED_AT_ONCE", 7)
    node = Node(tmp_path / "data")
    made = {f"key-{i}": node.create(key=f"key-{i}") for i in range(40)}
    node.close()
    write = Store.write
    for most in range(1, 12):
        left = most

        def written(self: Store, *given: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            write(self, *given)

        node.settings["idempotency_window_seconds"] = 3600 if most % 2 else 7200
        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", written)
            try:
                node._open()
                node.close()
            except KeyboardInterrupt:
                pass
    node._open()
    assert {key: node.create(key=key) for key in made} == made
    assert len(list(node.shard._store.scan(b"k", b"l"))) == 40
    node.close()


def test_T31_of_two_entries_for_one_key_the_later_counts(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", idempotency_window_seconds=3600)
    first = node.create(key="a")
    node.advance(2 * HOUR_MS)
    second = node.create(key="a")
    assert second != first
    for window in (360_000, 3600, 360_000):
        reopened(node, idempotency_window_seconds=window)
        assert node.create(key="a") == second
    node.close()


@pytest.mark.parametrize("back_ms", [2, HOUR_MS, 30 * HOUR_MS])
def test_I7_T31_a_clock_set_back_over_a_restart_loses_no_key(tmp_path: Path, back_ms: int) -> None:
    node = Node(tmp_path / "data", FakeClock(MIDNIGHT_MS + 1))
    made = node.create(key="a")
    node.close()
    node.clock = FakeClock(MIDNIGHT_MS + 1 - back_ms, seed=9)
    node._open()
    assert node.create(key="a") == made
    again = node.create(key="b")
    node.restart()
    assert (node.create(key="a"), node.create(key="b")) == (made, again)
    node.close()
