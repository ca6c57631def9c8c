"""One client process of the load bench: what all roles share."""

from __future__ import annotations

import asyncio
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from hdrh.histogram import HdrHistogram

from codeq.bench.plan import PAYLOAD_FRAME_BYTES, Role
from codeq.bench.tally import ACKNOWLEDGED, CREATED, DELIVERED, FINISHED, Tally

PUBLISH_SECONDS = 0.02
ROOM_SECONDS = 0.001
DRAIN_SECONDS = 30.0
#: As fast as it goes, the delivery of so many tasks is timed once: noting a time is not free.
TIMED_ONE_IN = 16
SHORTEST_NS, LONGEST_NS, DIGITS = 1_000, 600_000_000_000, 3


def times() -> HdrHistogram:
    """An empty histogram of times in ns, good to three digits."""
    return HdrHistogram(SHORTEST_NS, LONGEST_NS, DIGITS)


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def pace(due: Callable[[int], int], ended: threading.Event, begin: Callable[[range], None]) -> None:
    """Begins call after call at ``due(number)`` in ns, those that are due together at once.

    On a thread, since a timer of the event loop is up to a millisecond early or late.
    """
    begun = number = 0
    while not ended.wait(max(0, due(begun) - time.monotonic_ns()) / 1e9):
        now_ns = time.monotonic_ns()
        while due(number) <= now_ns:
            number += 1
        begin(range(begun, number))
        begun = number


class Client:
    """One role at work: what the roles share."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.tally = Tally(Path(role.tally))
        self.built = 0  # payloads
        self.created = 0
        self.refused = 0
        self.stopping = asyncio.Event()
        self._waiting: deque[asyncio.Future[None]] = deque()  # calls without room
        self.acknowledgements = times()  # of calls, from the moment they were due
        self.deliveries = times()  # of tasks, likewise
        self._text = "x" * max(0, role.payload_bytes - PAYLOAD_FRAME_BYTES)
        self._one_in = 1 if role.per_second else TIMED_ONE_IN
        self._cpu_s = cpu_seconds()

    def payload(self, due_ns: int) -> dict[str, Any]:
        """JSON of the wished size, built anew for each task, as a program would."""
        number = self.built
        self.built = number + 1
        sent = due_ns if number % self._one_in == 0 else 0
        return {"sent": sent, "n": number, "to": "a@b.example", "text": self._text}

    def handle(self, payload: dict[str, Any]) -> dict[str, Any]:
        """About 40 bytes of JSON."""
        if payload["sent"] and self.tally.noting:
            self.deliveries.record_value(time.monotonic_ns() - payload["sent"])
        return {"n": payload["n"], "done": "with pleasure"}

    def acknowledged(self, due_ns: int, made: int, refused: int) -> None:
        """A call of the producer was answered."""
        self.created += made
        self.refused += refused
        self.tally.put(self.role.slot, CREATED, self.created)
        if self.tally.noting:
            self.acknowledgements.record_value(time.monotonic_ns() - due_ns)

    def worked(self, delivered: int, finished: int, acknowledged: int) -> None:
        """How far the worker is by now."""
        counts = ((DELIVERED, delivered), (FINISHED, finished), (ACKNOWLEDGED, acknowledged))
        for column, count in counts:
            self.tally.put(self.role.slot, column, count)

    def command(self) -> str:
        """The queue of the next create."""
        role = self.role
        return role.command if role.queues == 1 else f"{role.command}-{self.built % role.queues}"

    async def calls(self) -> AsyncIterator[int]:
        """The moments, in ns, at which calls are due: now, as long as not too many lives are open
        and nobody says stop."""
        while not self.stopping.is_set():
            if self._waiting or self._room() < 0:
                await self._wait_for_room()
            yield time.monotonic_ns()

    def _room(self) -> int:
        """Lives that may still be opened, less than 0 when there are too many."""
        window = self.role.window
        return window - self._open() if window else sys.maxsize

    async def _wait_for_room(self) -> None:
        """In turn; one timer looks for all."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        if len(self._waiting) == 1:
            self._look_later()
        await waiter

    def _look_later(self) -> None:
        asyncio.get_running_loop().call_later(ROOM_SECONDS, self._look)

    def _look(self) -> None:
        room = self._room()
        while self._waiting and room >= 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                room -= self.role.batch
        if self._waiting:
            self._look_later()

    def _open(self) -> int:
        return 0 if self.stopping.is_set() else self.created - self.tally.total(ACKNOWLEDGED)

    async def schedule(self, call: Callable[[int], Awaitable[None]]) -> None:
        """Makes calls at a fixed rate, whether or not the earlier ones were answered."""
        began_ns, step_ns = time.monotonic_ns(), 1e9 * self.role.batch / self.role.per_second
        loop, ended = asyncio.get_running_loop(), threading.Event()
        under_way = set()

        def due(number: int) -> int:
            return began_ns + int(number * step_ns)

        def begin(numbers: range) -> None:
            for number in numbers:
                task = asyncio.ensure_future(call(due(number)))
                under_way.add(task)
                task.add_done_callback(under_way.discard)

        def begin_soon(numbers: range) -> None:
            loop.call_soon_threadsafe(begin, numbers)

        pacing = loop.run_in_executor(None, pace, due, ended, begin_soon)
        await self.stopping.wait()
        ended.set()
        await pacing
        await asyncio.gather(*under_way)

    async def drained(self) -> None:
        """Returns when everything created has been acknowledged, or is not going to be."""
        await self.stopping.wait()
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._left() and time.monotonic() < deadline:
            await asyncio.sleep(PUBLISH_SECONDS)

    def _left(self) -> bool:
        return self.tally.total(ACKNOWLEDGED) < self.tally.total(CREATED)

    def report(self) -> dict[str, Any]:
        return {
            "cpu_seconds": cpu_seconds() - self._cpu_s,
            "refused": self.refused,
            "acknowledgements": self.acknowledgements.encode().decode(),
            "deliveries": self.deliveries.encode().decode(),
        }
