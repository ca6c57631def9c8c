"""The clock: whole milliseconds, forwards only, steps of the wall clock logged once."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from codeq.engine.clock import Clock, Faults


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Wall and monotonic time in ns, moved by the test."""
    now = {"wall": 1_700_000_000_000_000_000, "monotonic": 5_000_000_000}
    monkeypatch.setattr(time, "time_ns", lambda: now["wall"])
    monkeypatch.setattr(time, "monotonic_ns", lambda: now["monotonic"])
    return now


def move(now: dict[str, int], ms: int, step_ms: int = 0) -> None:
    now["monotonic"] += ms * 1_000_000
    now["wall"] += (ms + step_ms) * 1_000_000


def test_now_is_the_wall_time_plus_what_has_passed(wall: dict[str, int]) -> None:
    clock = Clock()
    move(wall, 1_500)
    assert clock.now_ms() == 1_700_000_001_500


def test_a_step_forwards_is_followed_and_logged(
    wall: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    move(wall, 100, step_ms=5_000)
    assert clock.now_ms() == 1_700_000_000_100, "only follow looks at the wall clock"
    with caplog.at_level(logging.WARNING):
        assert clock.follow() == 5_000
    assert clock.now_ms() == 1_700_000_005_100
    assert [record.message for record in caplog.records] == ["the wall clock stepped by 5000 ms"]


def test_a_step_back_is_not_followed_and_logged_once(
    wall: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    move(wall, 100, step_ms=-60_000)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            before_ms = clock.now_ms()
            assert clock.follow() == 0
            move(wall, 1_000)
            assert clock.now_ms() == before_ms + 1_000
    assert [record.message for record in caplog.records] == ["the wall clock stepped by -60000 ms"]


def test_small_drift_is_followed_in_silence(
    wall: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    move(wall, 1_000, step_ms=3)
    with caplog.at_level(logging.WARNING):
        assert clock.follow() == 3
    assert caplog.records == []


def test_a_fault_point_strikes_at_its_count() -> None:
    struck: list[str] = []
    faults = Faults({"after-write": 3}, lambda: struck.append("now"))
    for passed in range(1, 6):
        faults.point("after-write")
        faults.point("elsewhere")
        assert len(struck) == (passed >= 3)


def test_a_fault_point_counts_while_it_is_armed(tmp_path: Path) -> None:
    struck: list[str] = []
    armed = tmp_path / "armed"
    faults = Faults({"after-write": 2}, lambda: struck.append("now"), armed.exists)
    for passed in range(4):
        faults.point("after-write")
        if passed == 1:
            armed.touch()
    assert struck == ["now"]
