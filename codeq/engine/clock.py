"""The only door of the engine room to time, randomness and fault points.

Time is whole milliseconds since the epoch: the wall time at the start plus the monotonic clock,
moved only forwards to follow the wall clock. A test puts its own clock in.
"""

from __future__ import annotations

import heapq
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping

log = logging.getLogger("codeq.clock")

STEP_LOGGED_MS = 1000


class Clock:
    """The real clock. ``now_ms`` never goes backwards."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._behind_ms = 0  # how far the wall clock was set back when that was last logged
        self.faults = Faults.from_environment(os.environ)

    def now_ms(self) -> int:
        return (time.monotonic_ns() + self._offset_ns) // 1_000_000

    def monotonic_s(self) -> float:
        """Seconds for measuring durations; no relation to ``now_ms``."""
        return time.monotonic()

    def follow(self) -> int:
        """Moves forwards to the wall clock if that is ahead; returns the step in ms, 0 if none.

        Called now and then. A wall clock that was set back is not followed: leases and due times
        would otherwise stand still.
        """
        ahead_ns = time.time_ns() - time.monotonic_ns() - self._offset_ns
        step_ms = ahead_ns // 1_000_000
        if abs(step_ms + self._behind_ms) > STEP_LOGGED_MS:
            log.warning("the wall clock stepped by %d ms", step_ms + self._behind_ms)
            self._behind_ms = max(0, -step_ms)
        if ahead_ns <= 0:
            return 0
        self._offset_ns += ahead_ns
        return step_ms

    def entropy(self) -> int:
        """64 random bits to seed ids and jitter with."""
        return int.from_bytes(os.urandom(8), "little")


class FakeClock(Clock):
    """A clock that moves only when told to; for tests and simulations."""

    def __init__(self, now_ms: int = 1_700_000_000_000, seed: int = 1) -> None:
        self._now_ms = now_ms
        self._seed = seed
        self.faults = Faults({})

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic_s(self) -> float:
        return self._now_ms / 1000

    def follow(self) -> int:
        return 0

    def entropy(self) -> int:
        self._seed += 1
        return self._seed

    def advance(self, ms: int) -> None:
        self._now_ms += ms


class Timers:
    """Calls that are due at times of a clock that is moved; for tests."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._cancelled: set[int] = set()
        self._number = 0

    def add(self, when_ms: int, call: Callable[[], None]) -> Callable[[], None]:
        """Keeps a call; returns what cancels it."""
        self._number += 1
        number = self._number
        heapq.heappush(self._heap, (when_ms, number, call))
        return lambda: self._cancelled.add(number)

    def due(self, until_ms: int) -> tuple[int, Callable[[], None]] | None:
        """The earliest call that is due by then and its time, which is taken out; or None."""
        while self._heap and self._heap[0][0] <= until_ms:
            when_ms, number, call = heapq.heappop(self._heap)
            if number not in self._cancelled:
                return when_ms, call
            self._cancelled.discard(number)
        return None

    def times_ms(self) -> list[int]:
        """When the calls are due that nobody cancelled."""
        return sorted(when for when, number, _ in self._heap if number not in self._cancelled)


class Faults:
    """Named points at which a crash test lets the process die.

    ``CODEQ_FAULT=name:count`` in the environment kills the process with SIGKILL when the point
    ``name`` is passed for the ``count``-th time; with ``CODEQ_FAULT_ARMED=file`` it counts while
    that file exists. Without it a point costs one dictionary look-up.
    """

    def __init__(
        self,
        plan: Mapping[str, int],
        strike: Callable[[], None] | None = None,
        armed: Callable[[], bool] = lambda: True,
    ) -> None:
        self._left = dict(plan)
        self._strike = strike or _kill_self
        self._armed = armed

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Faults:
        name, _, count = environment.get("CODEQ_FAULT", "").partition(":")
        plan = {name: int(count or 1)} if name else {}
        file = environment.get("CODEQ_FAULT_ARMED", "")
        return cls(plan, armed=lambda: not file or os.path.exists(file))

    def point(self, name: str) -> None:
        """Passes the named point."""
        left = self._left.get(name)
        if left is None or not self._armed():
            return
        self._left[name] = left - 1
        if left == 1:
            self._strike()


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
