"""Cleanup: ended tasks taken away before retention takes them, on the word of their tenant.

A task in memory becomes one that is gone, with a record that says so. Of a task on disk only its
directory knows: that is written again without it, and a record says so for those who make
directories again. The other records themselves leave the disk with their chunk, when the keeping
time of all of it is over. A request looks at a bounded part of the numbers, and the next of the
same tenant goes on behind it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from codeq.engine._engine import Engine
from codeq.engine._views import directory_without
from codeq.engine.clock import Clock
from codeq.engine.journal import Journal, Runner
from codeq.engine.store import Store
from codeq.engine.stored import BUCKET_TASKS, ON_DISK, Found, Stored, Wanted, fault_of

#: records one request looks at, half of them in memory and half on disk
REQUEST_LOOKS_MAX = 10_000
#: with fewer left no directory can be read whole
DISK_LOOKS_MIN = 2 * BUCKET_TASKS
#: tasks taken away in one commit group
STEP_TASKS_MAX = 1_000
#: payload read before a step ends; cleanup needs none of it
STEP_BYTES_MAX = 8 << 20
#: tenants whose last request is remembered
PLACES_MAX = 10_000


@dataclass
class _Request:
    tenant: bytes
    before_ms: int
    left: int  # tasks that may still be taken away
    done: Callable[[int], None]
    begin: int  # the part of the numbers that is looked at now
    end: int
    legs: list[tuple[int, int]]  # those that come after it
    memory_looks: int = REQUEST_LOOKS_MAX // 2
    disk_looks: int = REQUEST_LOOKS_MAX // 2
    count: int = 0


class Cleanup:
    """Takes ended tasks away. One request at a time: directories are read, changed and written."""

    def __init__(
        self, engine: Engine, store: Store, clock: Clock, runner: Runner, journal: Journal
    ) -> None:
        self._engine = engine
        self._stored = Stored(store)
        self._clock = clock
        self._runner = runner
        self._journal = journal
        self._places: OrderedDict[bytes, int] = OrderedDict()  # where requests of a tenant stopped
        self._requests: deque[_Request] = deque()
        #: records looked at so far
        self.looked = 0

    def run(self, tenant: str, before_ms: int, limit: int, done: Callable[[int], None]) -> None:
        """Takes away at most ``limit`` ended tasks of the tenant whose keeping time ends by
        ``before_ms``; ``done`` gets how many, once that is durable."""
        owner, end = tenant.encode(), self._engine.next_number
        begin = min(self._places.get(owner, 0), end)
        self._requests.append(
            _Request(owner, before_ms, limit, done, begin, end, [(0, begin)] if begin else [])
        )
        if len(self._requests) == 1:
            self._journal.after(self._step)

    def _step(self) -> None:
        """What memory has of the next part, then what the disk has of the same."""
        request = self._requests[0]
        count, reached, looks = self._engine.forget(
            request.tenant,
            request.before_ms,
            request.begin,
            request.end,
            request.memory_looks,
            min(request.left, STEP_TASKS_MAX),
            self._clock.now_ms(),
        )
        self.looked += looks
        request.memory_looks -= looks
        request.count += count
        request.left -= count
        if request.left == 0:
            self._finish(request)
            return
        # Behind the group: a bucket that closes with it has its directory on disk then.
        self._journal.after(
            lambda: self._runner.read(
                lambda: self._read(request, reached), lambda found: self._got(request, found)
            )
        )

    def _read(self, request: _Request, reached: int) -> Found:
        return self._stored.tasks(
            Wanted(request.tenant, None, ON_DISK),
            request.begin,
            reached,
            request.disk_looks,
            min(request.left, STEP_TASKS_MAX),
            STEP_BYTES_MAX,
            lambda view: view.expires_ms <= request.before_ms,
        )

    def _got(self, request: _Request, found: object) -> None:
        if not isinstance(found, Found) or found.missing >= self._engine.tail:
            self._journal.fail(fault_of(found))
            return
        self._take_away(found)
        self.looked += found.looks
        request.disk_looks -= found.looks
        request.count += len(found.tasks)
        request.left -= len(found.tasks)
        request.begin = found.next
        if request.begin >= request.end and request.legs:
            request.begin, request.end = request.legs.pop()
        spent = request.left == 0 or request.memory_looks == 0
        if spent or request.disk_looks < DISK_LOOKS_MIN or request.begin >= request.end:
            self._finish(request)
        else:
            self._journal.after(self._step)

    def _take_away(self, found: Found) -> None:
        by_entry: dict[bytes, list[int]] = {}
        for place, _ in found.tasks:
            self._engine.gone(place.number, self._clock.now_ms())
            by_entry.setdefault(place.key, []).append(place.number)
        for key, numbers in by_entry.items():
            directory = found.directories.get(key)  # None: an entry of the task's own
            rest = None if directory is None else directory_without(directory, numbers)
            if rest is None:
                self._journal.delete(key)
            else:
                self._journal.put(key, rest)

    def _finish(self, request: _Request) -> None:
        self._places[request.tenant] = request.begin
        self._places.move_to_end(request.tenant)
        if len(self._places) > PLACES_MAX:
            self._places.popitem(last=False)
        self._journal.after(lambda: self._answer(request))

    def _answer(self, request: _Request) -> None:
        self._requests.popleft()
        if self._requests:
            self._journal.after(self._step)
        request.done(request.count)
