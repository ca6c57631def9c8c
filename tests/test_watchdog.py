"""The watchdog against a loop that is really held."""

from __future__ import annotations

import asyncio
import logging

import pytest

from codeq.server.watchdog import HELD_SECONDS, Watchdog


def hold_until_seen(watchdog: Watchdog) -> None:
    watchdog._place = ""  # it may have seen another before
    while not watchdog._place:
        pass


def test_a_held_loop_is_measured_and_the_place_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "codeq.watchdog")

    async def held() -> list[float]:
        late: list[float] = []
        probed = asyncio.Event()

        def observe(seconds: float) -> None:
            late.append(seconds)
            if seconds > HELD_SECONDS:
                probed.set()

        watchdog = Watchdog(observe, lambda: len(late))
        watchdog.start()
        hold_until_seen(watchdog)
        await probed.wait()
        watchdog.stop()
        return late

    late = asyncio.run(held())
    assert max(late) > HELD_SECONDS
    assert any("test_watchdog.hold_until_seen" in record.message for record in caplog.records)


def test_probes_come_more_often_while_there_is_work() -> None:
    async def count(work: list[int]) -> list[float]:
        intervals: list[float] = []
        enough = asyncio.Event()

        def observe(_: float) -> None:
            intervals.append(watchdog._interval)
            if len(intervals) == 3:
                enough.set()

        watchdog = Watchdog(observe, lambda: work.pop(0))
        watchdog.start()
        await enough.wait()
        watchdog.stop()
        return intervals

    assert asyncio.run(count([1, 2, 3])) == [0.1, 0.01, 0.01]
    assert asyncio.run(count([1, 1, 1])) == [0.1, 0.01, 0.1]
