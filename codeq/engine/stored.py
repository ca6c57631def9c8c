"""Ended tasks that are on disk only, in creation order, as their directories have them.

Reads belong on a helper thread: they go through many entries and chunks, a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from codeq.engine._engine import COMPLETED, FAILED
from codeq.engine._views import CorruptRecord, TaskView, directory_entries, stored_view
from codeq.engine.reader import get_chunks
from codeq.engine.store import Store

#: tasks of one directory; their numbers are neighbours
BUCKET_TASKS = 256
#: states of ended tasks that are on disk only
ON_DISK = 1 << COMPLETED | 1 << FAILED
T = TypeVar("T")
#: chunks in hand at a time; one may hold a payload or result of some MB
CHUNKS_MAX = 16


class Wanted(NamedTuple):
    """Which tasks a reader wants. None = of every tenant, every command; ``states`` has a bit for
    each state of the engine."""

    tenant: bytes | None
    command: bytes | None
    states: int


class Place(NamedTuple):
    """Where a task's records stand, and the entry that says so."""

    number: int
    created: int
    ended: int
    key: bytes


class Found(NamedTuple):
    """What a look at a part of the numbers brought."""

    tasks: list[tuple[Place, TaskView]]
    next: int  # the number to go on with
    looks: int  # entries looked at
    directories: dict[bytes, bytes]  # of the buckets in `tasks`, as they are now
    missing: int  # the newest chunk that was not there, -1 = none


class Stored:
    """Reads the ended tasks of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def tasks(
        self,
        wanted: Wanted,
        begin: int,
        end: int,
        looks_max: int,
        count_max: int,
        bytes_max: int,
        keep: Callable[[TaskView], bool],
    ) -> Found:
        """Complete tasks with numbers in [begin, end) that are wanted and that ``keep`` says yes
        to: at most ``count_max``, about ``bytes_max`` of payload. Raises CorruptRecord."""
        places, reached, looks, directories = self._places(begin, end, looks_max)
        found: list[tuple[Place, TaskView]] = []
        missing, size = -1, 0
        for part in _parts(places, lambda place: place.created):
            lacks, views = self._views(wanted, part)
            missing = max(missing, lacks)
            for place, view in views:
                if not (wanted.states >> view.state & 1 and keep(view)):
                    continue
                found.append((place, view))
                size += len(view.payload)
                if len(found) == count_max or size > bytes_max:
                    return Found(found, place.number + 1, looks, directories, missing)
        return Found(found, reached, looks, directories, missing)

    def _places(
        self, begin: int, end: int, looks_max: int
    ) -> tuple[list[Place], int, int, dict[bytes, bytes]]:
        """The places of at most ``looks_max`` tasks (half of them of each kind of entry; one
        entry at least is read), in order, and how far they go."""
        places: list[Place] = []
        directories: dict[bytes, bytes] = {}
        reached, looks = end, 0
        if begin >= end:
            return places, end, 0, directories
        first, last = _key(b"d", begin // BUCKET_TASKS), _key(b"d", (end - 1) // BUCKET_TASKS)
        for key, value in self._store.scan(first, last + b"\0"):
            entries = directory_entries(key, value)
            directories[key] = value
            places += [Place(*entry, key) for entry in entries]
            looks += max(1, len(entries))
            if looks + BUCKET_TASKS > looks_max // 2:
                reached = min(end, (int.from_bytes(key[1:], "big") + 1) * BUCKET_TASKS)
                break
        own = self._store.scan(_key(b"e", begin), _key(b"e", reached))
        for count, (key, value) in enumerate(own, 1):
            places += [Place(*entry, key) for entry in directory_entries(key, value)]
            looks += 1
            if count >= looks_max // 2:
                reached = int.from_bytes(key[1:], "big") + 1
                break
        return sorted(p for p in places if begin <= p.number < reached), reached, looks, directories

    def _views(
        self, wanted: Wanted, places: list[Place]
    ) -> tuple[int, list[tuple[Place, TaskView]]]:
        """The tasks at these places that are of the tenant and command, complete; and the newest
        chunk that was not there: its tasks were removed meanwhile."""
        missing = -1
        chunks = get_chunks(self._store, (place.created for place in places))
        mine = []
        for place in places:
            if place.created not in chunks:
                missing = max(missing, place.created)
                continue
            view = stored_view(chunks, *place[:3], wanted.tenant, wanted.command)
            if view is not None:
                mine.append((place, view))
        whole = []
        for part in _parts(mine, lambda pair: pair[0].ended):
            ends = get_chunks(self._store, (place.ended for place, _ in part))
            for place, view in part:
                if place.ended in ends:
                    view.fill(ends)
                    whole.append((place, view))
                else:
                    missing = max(missing, place.ended)
        return missing, whole


def fault_of(found: object) -> str:
    """Why a read of a helper thread brought nothing to go on with: it failed, or it lacks chunks
    that must be there."""
    if isinstance(found, CorruptRecord):
        return f"the store is damaged: {found}"
    if isinstance(found, BaseException):
        return f"a read failed: {found}"
    if isinstance(found, Found):
        return f"the store is damaged: chunk {found.missing} is missing"
    return "the store is damaged: of the chunks of the tasks in memory some are missing"


def _key(prefix: bytes, number: int) -> bytes:
    return prefix + number.to_bytes(8, "big")


def _parts(items: list[T], chunk_of: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in runs that need at most CHUNKS_MAX chunks each."""
    run: list[T] = []
    chunks: set[int] = set()
    for item in items:
        chunks.add(chunk_of(item))
        if len(chunks) > CHUNKS_MAX:
            yield run
            run, chunks = [], {chunk_of(item)}
        run.append(item)
    if run:
        yield run
