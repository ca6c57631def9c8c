"""What an operator asks of whole queues: how deep they are, and dead letters requeued or purged,
waiting tasks ended, queues paused and resumed.

An operation over many tasks goes in steps, each in a commit group of its own, so that no one holds
the loop; it answers when the last step is on disk. A step passes every task at most once, in
creation order, so an operation ends however fast new tasks come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from codeq.engine._engine import Engine
from codeq.engine._wire import parse_id
from codeq.engine.clock import Clock
from codeq.engine.journal import Journal
from codeq.engine.pauses import Pauses

#: tasks one step changes, so many records in its commit group
STEP_TASKS_MAX = 1_000
#: tasks one step looks at to find those
STEP_LOOKS_MAX = 10_000

#: command, ready, delayed, in progress, dead letters, and the tenant
Depths = tuple[str, int, int, int, int, str]
Counted = Callable[[int], None]
#: changes so many dead letters of a queue, from a number on: (how many, the number to go on with)
ManyDead = Callable[[bytes, bytes, int, int, int], tuple[int, int]]


class Queues:
    """Operations on the queues of one engine; ``done`` is called once they are durable."""

    def __init__(self, engine: Engine, clock: Clock, journal: Journal, pauses: Pauses) -> None:
        self._engine = engine
        self._clock = clock
        self._journal = journal
        self._pauses = pauses

    # --- depths, from counters: they cost the same however many tasks there are

    def stats(self, tenant: str, command: str, done: Callable[[Depths], None]) -> None:
        """The depths of one queue."""
        counts = self._engine.stats(tenant.encode(), command.encode())
        self._journal.after(lambda: done((command, *counts, tenant)))

    def all(self, tenant: str | None, done: Callable[[list[Depths]], None]) -> None:
        """The depths of the queues with a live task or dead letter; None = of every tenant."""
        rows = self._engine.queues(None if tenant is None else tenant.encode())
        found: list[Depths] = [
            (command.decode("utf-8", "replace"), ready, delayed, leased, dead, owner.decode())
            for owner, command, ready, delayed, leased, dead in rows
        ]
        self._journal.after(lambda: done(found))

    # --- dead letters

    def requeue(
        self, tenant: str, command: str, ids: Sequence[str] | None, limit: int, done: Counted
    ) -> None:
        """Makes dead letters ready again, as new: those of ``ids`` that are dead letters of this
        queue, or the ``limit`` oldest. ``done`` gets how many."""
        if ids is None:
            many = self._engine.requeue_many
            self._dead_step(many, tenant.encode(), command.encode(), 0, limit, 0, done)
        else:
            self._dead_ids(self._engine.requeue, tenant, command, ids, done)

    def purge_dead(
        self, tenant: str, command: str, ids: Sequence[str] | None, limit: int, done: Counted
    ) -> None:
        """Takes dead letters and their records away, likewise."""
        if ids is None:
            many = self._engine.purge_many
            self._dead_step(many, tenant.encode(), command.encode(), 0, limit, 0, done)
        else:
            self._dead_ids(self._engine.purge, tenant, command, ids, done)

    def _dead_ids(
        self,
        change: Callable[[bytes, bytes, int, bytes], int],
        tenant: str,
        command: str,
        ids: Sequence[str],
        done: Counted,
    ) -> None:
        now_ms = self._clock.now_ms()
        found = [task_id for task_id in map(parse_id, ids) if task_id is not None]
        codes = [change(i, tenant.encode(), now_ms, command.encode()) for i in found]
        self._journal.after(lambda: done(codes.count(0)))

    def _dead_step(
        self,
        many: ManyDead,
        tenant: bytes,
        command: bytes,
        begin: int,
        left: int,
        before: int,
        done: Counted,
    ) -> None:
        step = min(left, STEP_TASKS_MAX)
        count, begin = many(tenant, command, begin, step, self._clock.now_ms())
        total = before + count
        if count < step or count == left:
            self._journal.after(lambda: done(total))
            return
        rest = (many, tenant, command, begin, left - count, total, done)
        self._journal.after(partial(self._dead_step, *rest))

    # --- waiting tasks

    def purge_waiting(
        self, tenant: str, command: str, *, ready: bool, delayed: bool, done: Counted
    ) -> None:
        """Ends the ready or delayed tasks that are there now, as cancel does."""
        queue = (tenant.encode(), command.encode())
        self._waiting_step(queue, (ready, delayed), 0, self._engine.next_number, 0, done)

    def _waiting_step(
        self,
        queue: tuple[bytes, bytes],
        which: tuple[bool, bool],
        begin: int,
        end: int,
        before: int,
        done: Counted,
    ) -> None:
        count, begin = self._engine.cancel_many(
            *queue, *which, begin, end, STEP_LOOKS_MAX, STEP_TASKS_MAX, self._clock.now_ms()
        )
        total = before + count
        if begin >= end:
            self._journal.after(lambda: done(total))
        else:
            self._journal.after(partial(self._waiting_step, queue, which, begin, end, total, done))

    # --- pauses

    def pause(self, tenant: str, command: str, done: Callable[[], None]) -> None:
        """Claims pass the queue over until it is resumed; creates go on."""
        self._pauses.pause(tenant.encode(), command.encode(), self._clock.now_ms())
        self._journal.after(done)

    def resume(self, tenant: str, command: str, done: Callable[[], None]) -> None:
        """Takes a pause back; claims that wait are served."""
        self._pauses.resume(tenant.encode(), command.encode())
        self._journal.after(done)

    def paused(self, tenant: str, command: str) -> bool:
        """Whether the queue is paused at the moment."""
        return (tenant.encode(), command.encode()) in self._pauses
