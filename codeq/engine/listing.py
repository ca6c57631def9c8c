"""Pages of tasks in creation order: those in memory, and ended ones that are on disk only.

The numbers in ids are dense and rise with the creates of all tenants, so a page is a part of the
numbers. What memory has of it is looked up first, then the directories on disk: a task moves only
from memory to disk, so none is missed, and one that moved in between counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from codeq.engine._engine import Engine
from codeq.engine._views import TaskView
from codeq.engine.clock import Clock
from codeq.engine.journal import Journal, Runner
from codeq.engine.reader import LOOKS_MAX, chunks_of, get_chunks
from codeq.engine.store import Store
from codeq.engine.stored import ON_DISK, Found, Stored, Wanted, fault_of

#: records one page looks at, half of them in memory and half on disk
PAGE_LOOKS_MAX = 10_000

#: the tasks, and the number to go on with; None = that was the last page
PageDone = Callable[[list[TaskView], int | None], None]


class Listing:
    """Answers what tasks there are, after the commit group of the newest decision is synced."""

    def __init__(
        self, engine: Engine, store: Store, clock: Clock, runner: Runner, journal: Journal
    ) -> None:
        self._engine = engine
        self._store = store
        self._stored = Stored(store)
        self._clock = clock
        self._runner = runner
        self._journal = journal
        #: records on disk looked at so far
        self.looked = 0

    def page(
        self, wanted: Wanted, begin: int, count_max: int, bytes_max: int, done: PageDone
    ) -> None:
        """The wanted tasks with numbers from ``begin`` on, complete: at most ``count_max``, about
        ``bytes_max`` of payload (one always fits), and no more than PAGE_LOOKS_MAX looked at; so a
        page may be short, or empty, and not the last."""
        self._page(wanted, begin, count_max, bytes_max, done, 1)

    def _page(
        self,
        wanted: Wanted,
        begin: int,
        count_max: int,
        bytes_max: int,
        done: PageDone,
        look: int,
    ) -> None:
        end = self._engine.next_number
        looks = PAGE_LOOKS_MAX // 2
        # One more than asked: it says that there is another page.
        limits = (looks, count_max + 1, bytes_max)
        now_ms = self._clock.now_ms()
        views, reached = self._engine.walk(*wanted, begin, end, *limits)

        def read() -> Found | None:
            needed = set[int]().union(*map(chunks_of, views))
            chunks = get_chunks(self._store, needed)
            if not needed <= chunks.keys():
                return None
            for view in views:
                view.fill(chunks)
            if not wanted.states & ON_DISK:
                return Found([], reached, 0, {}, -1)
            return self._stored.tasks(
                wanted, begin, reached, *limits, lambda view: view.expires_ms > now_ms
            )

        def got(found: object) -> None:
            if isinstance(found, Found) and found.missing < self._engine.tail:
                self.looked += found.looks
                page = _merged(views, found, now_ms)
                next_number = found.next if found.next < end else None
                done(*_cut(page, next_number, count_max, bytes_max))
            elif found is None and look < LOOKS_MAX:  # records moved to other chunks meanwhile
                self._page(wanted, begin, count_max, bytes_max, done, look + 1)
            else:
                self._journal.fail(fault_of(found))

        self._journal.after(partial(self._runner.read, read, got))


def _merged(views: list[TaskView], found: Found, now_ms: int) -> list[TaskView]:
    """Tasks of memory and disk below the number that both were looked at to, in order."""
    known = {view.id_bytes for view in views}
    tasks = views + [view for _, view in found.tasks if view.id_bytes not in known]
    return sorted(
        (
            view
            for view in tasks
            if view.number < found.next and not (view.has_record and view.expires_ms <= now_ms)
        ),
        key=lambda view: view.number,
    )


def _cut(
    tasks: list[TaskView], next_number: int | None, count_max: int, bytes_max: int
) -> tuple[list[TaskView], int | None]:
    size = 0
    for at, view in enumerate(tasks):
        size += len(view.payload)
        if at == count_max or (at > 0 and size > bytes_max):
            return tasks[:at], view.number
    return tasks, next_number
