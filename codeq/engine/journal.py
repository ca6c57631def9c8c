"""Group commit: decisions collect in the open group, answers wait until the group is on disk.

While one sync runs the next group collects. When the sync ends, the group takes in the events at
hand and becomes one RocksDB write on the loop thread and one sync on the helper thread. At low load
an answer waits for one sync, at high load thousands share it.

    decide ... decide      open group g+1 collects
    [ write g ][ sync g  ] -> answers of g leave -> [ write g+1 ][ sync g+1 ]

A write or sync that fails is never retried and never acknowledged: ``fault`` is called once,
nothing of this journal moves afterwards, and a restart recovers from disk. An answer that fails
keeps no other answer from leaving; a store that cannot be read is a fault as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from codeq.engine.clock import Clock
from codeq.engine.store import Store
from codeq.errors import StoreError

log = logging.getLogger("codeq.journal")

Done = Callable[[], None]


class Runner(Protocol):
    """What the journal and the shard need of the world: threads and timers, bound to one loop."""

    def run(self, work: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        """Runs ``work`` on the sync helper thread, then ``done(error)`` on the loop. One at a
        time."""

    def read(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        """Runs ``work`` on the read helper thread, then ``done(result or exception)`` on the
        loop."""

    def aside(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        """As ``read``, on a thread of its own for work that may take long."""

    def soon(self, call: Done) -> None:
        """Calls ``call`` on the loop after the events at hand."""

    def at(self, when_ms: int, call: Done) -> Callable[[], None]:
        """Calls ``call`` at ``when_ms`` of the clock, never before; returns a function that
        cancels."""


class Journal:
    """Makes the decisions of one engine durable, a group at a time.

    ``close_group`` is called once per group, before it is written: last decisions may be added
    there. ``take`` hands out the puts of the engine. ``fault`` is told a failure in one line.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        runner: Runner,
        *,
        close_group: Done,
        take: Callable[[], list[tuple[bytes, bytes]]],
        fault: Callable[[str], None],
        sync: bool = True,
    ) -> None:
        self._store = store
        self._clock = clock
        self._runner = runner
        self._close_group = close_group
        self._take = take
        self._fault = fault
        self._sync = sync
        self._changes: dict[bytes, bytes | None] = {}  # of the open group, None = removed
        self._ranges: list[tuple[bytes, bytes]] = []
        self._waiting: list[Done] = []
        self._committing: list[Done] = []
        self._scheduled = False
        self._wanted = False
        self._broken = False
        self._write_began_s = 0.0
        self._sync_began_s: float | None = None
        #: called with (write + sync, sync) in seconds after each group
        self.observe: Callable[[float, float], None] | None = None
        self.groups = 0

    # --- what the shard says

    def put(self, key: bytes, value: bytes) -> None:
        """Adds one entry of the shard's own to the open group; of each key its last word counts."""
        self._changes[key] = value

    def delete(self, key: bytes) -> None:
        """Removes one key with the open group, likewise."""
        self._changes[key] = None

    def delete_range(self, begin: bytes, end: bytes) -> None:
        """Removes the keys in [begin, end) with the open group; chunks soon after it."""
        self._ranges.append((begin, end))

    def cut(self) -> bool:
        """Removes the chunks of written groups' ranges that the store has put off; whether there
        were any. Nothing rests on it: a later sync makes it durable."""
        if self._broken or not self._store.put_off:
            return False
        self._clock.faults.point("before-cut")
        try:
            self._store.cut()
        except Exception as error:  # rocksdict raises bare Exception
            self.fail(f"write to the store failed: {error}")
            return False
        self._clock.faults.point("after-cut")
        return True

    def after(self, done: Done) -> None:
        """Calls ``done`` once everything decided so far is durable; never before this call
        returns."""
        self._waiting.append(done)
        self.kick()

    def kick(self) -> None:
        """Has the open group committed, after the events at hand and the sync that runs."""
        if self._sync_began_s is not None:
            self._wanted = True
        elif not self._scheduled and not self._broken:
            self._scheduled = True
            self._runner.soon(self._commit)

    @property
    def syncing_s(self) -> float:
        """How long the running sync has been running, 0 when none is."""
        return 0.0 if self._sync_began_s is None else self._clock.monotonic_s() - self._sync_began_s

    def stop(self) -> None:
        """Nothing is written or answered from now on; what helper threads still report is
        dropped."""
        self._broken = True

    def fail(self, message: str) -> None:
        """The store cannot be trusted any more: from now on nothing is written or answered."""
        if not self._broken:
            self._broken = True
            self._fault(message)

    # --- one group

    def _commit(self) -> None:
        if self._broken or self._sync_began_s is not None:
            self._scheduled = False
            self._wanted = True
            return
        self._scheduled = True  # what closing the group adds is part of it
        try:
            self._close_group()
            puts = self._take()
        except Exception as error:  # half a group must not be written, nor wait for ever
            log.exception("the commit group could not be closed")
            self.fail(f"the commit group could not be closed: {error!r}")
            return
        self._scheduled = self._wanted = False
        changes, ranges, waiting = self._changes, self._ranges, self._waiting
        self._changes, self._ranges, self._waiting = {}, [], []
        puts += [(key, value) for key, value in changes.items() if value is not None]
        deletes = [key for key, value in changes.items() if value is None]
        if not puts and not deletes and not ranges:
            self._answer(waiting)
            return
        self._write(puts, deletes, ranges, waiting)

    def _write(
        self,
        puts: Sequence[tuple[bytes, bytes]],
        deletes: Sequence[bytes],
        ranges: Sequence[tuple[bytes, bytes]],
        waiting: list[Done],
    ) -> None:
        point = self._clock.faults.point
        self._write_began_s = self._clock.monotonic_s()
        if self._store.cut_due and not self.cut():
            return
        point("before-write")
        if ranges:
            point("before-removal-write")
        try:
            self._store.write(puts, deletes, ranges)
            sequence = self._store.sequence()
        except Exception as error:  # rocksdict raises bare Exception
            self.fail(f"write to the store failed: {error}")
            return
        point("after-write")
        if ranges:
            point("after-removal-write")
        self.groups += 1
        self._committing = waiting
        self._sync_began_s = self._clock.monotonic_s()
        if self._sync:
            self._runner.run(lambda: self._store.sync(sequence), self._synced)
        else:
            self._runner.soon(lambda: self._synced(None))

    def _synced(self, error: BaseException | None) -> None:
        if self._broken:
            return
        if error is not None:
            self.fail(f"sync of the store failed: {error}")
            return
        now_s = self._clock.monotonic_s()
        began_s = self._sync_began_s
        assert began_s is not None
        if self.observe is not None:
            self.observe(now_s - self._write_began_s, now_s - began_s)
        self._clock.faults.point("after-sync")
        self._sync_began_s = None
        answers, self._committing = self._committing, []
        if self._wanted:
            self._scheduled = True
            # Two turns of the loop: with the second come the bodies of requests that are at hand.
            self._runner.soon(lambda: self._runner.soon(self._commit))
        self._answer(answers)

    def _answer(self, answers: list[Done]) -> None:
        if answers and not self._broken:
            self._clock.faults.point("before-ack")
            for done in answers:
                self._call(done)

    def _call(self, done: Done) -> None:
        try:
            done()
        except StoreError as error:
            self.fail(error.message)
        except Exception:
            log.exception("an answer failed")
