"""A runner that does nothing by itself: threads, loop and timers of a whole node in one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from codeq.engine.clock import FakeClock, Timers


class ManualRunner:
    """Runs helper work at once, but gives its result to the loop later; timers follow the fake
    clock.

    ``hold_syncs`` keeps finished syncs back until ``release``, to look at what waits for them.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.hold_syncs = False
        self.held: list[Callable[[], None]] = []
        self._soon: deque[Callable[[], None]] = deque()
        self.timers = Timers()

    def run(self, work: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        error: BaseException | None = None
        try:
            work()
        except Exception as failure:
            error = failure
        if self.hold_syncs:
            self.held.append(lambda: done(error))
        else:
            self._soon.append(lambda: done(error))

    def read(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        result = work()
        self._soon.append(lambda: done(result))

    def aside(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        self._soon.append(lambda: done(work()))

    def soon(self, call: Callable[[], None]) -> None:
        self._soon.append(call)

    def at(self, when_ms: int, call: Callable[[], None]) -> Callable[[], None]:
        return self.timers.add(when_ms, call)

    def release(self) -> None:
        """Lets the held syncs end."""
        held, self.held = self.held, []
        self._soon.extend(held)
        self.settle()

    def settle(self) -> None:
        """Runs the loop until nothing is left to do at this moment of the clock."""
        while self._soon:
            self._soon.popleft()()
            if not self._soon and (found := self.timers.due(self.clock.now_ms())):
                self._soon.append(found[1])

    def advance(self, ms: int) -> None:
        """Moves the clock on, stopping at every timer on the way."""
        end_ms = self.clock.now_ms() + ms
        while found := self.timers.due(end_ms):
            when_ms, call = found
            self.clock.advance(max(0, when_ms - self.clock.now_ms()))
            self._soon.append(call)
            self.settle()
        self.clock.advance(end_ms - self.clock.now_ms())
        self.settle()
