"""Reads of tasks: from memory where it is, else from the store, always as durable as what they
show.

A task that is not in memory has a directory entry, which leads to the chunks of its created and its
ended record. Both steps are one list-get each on the read helper thread. Records may move to
another chunk between the two: then the task is looked up again. That a task is not there is said
after one more sync. A store that cannot be read is a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar, cast

from codeq.engine._engine import Engine
from codeq.engine._views import CorruptRecord, TaskView, lack_chunks
from codeq.engine.journal import Journal, Runner
from codeq.engine.store import CHUNK_PREFIX, Store

#: sequences of one segment, the step in which the log is cut
SEGMENT_CHUNKS = 512
#: a record moves at most once a second, so a second look finds it
LOOKS_MAX = 3
Views = list[TaskView | None]
T = TypeVar("T")


def chunk_key(sequence: int) -> bytes:
    """The store key of a chunk."""
    return CHUNK_PREFIX + sequence.to_bytes(8, "big")


def get_chunks(store: Store, sequences: Iterable[int]) -> dict[int, bytes]:
    """The chunks that exist among the sequences. Belongs on a helper thread."""
    wanted = sorted(set(sequences))
    values = store.get([chunk_key(sequence) for sequence in wanted])
    return {s: v for s, v in zip(wanted, values, strict=True) if v is not None}


class Reader:
    """Answers what tasks are, after the commit group of the newest decision is synced."""

    def __init__(self, engine: Engine, store: Store, runner: Runner, journal: Journal) -> None:
        self._engine = engine
        self._store = store
        self._runner = runner
        self._journal = journal

    def views(
        self,
        ids: Sequence[bytes | None],
        tenant: bytes,
        now_ms: int,
        done: Callable[[Views], None],
    ) -> None:
        """Complete views of the tasks as memory has them now; None where there is none."""
        self._views(ids, tenant, now_ms, done, 1)

    def _views(
        self,
        ids: Sequence[bytes | None],
        tenant: bytes,
        now_ms: int,
        done: Callable[[Views], None],
        look: int,
    ) -> None:
        views: Views = [None if i is None else self._engine.view(i, tenant) for i in ids]
        absent = [n for n, i in enumerate(ids) if i is not None and views[n] is None]
        fill = partial(self._fill, views, tenant, now_ms, done, look)
        if absent:
            self._journal.after(partial(self._look_up, ids, absent, views, tenant, fill))
        else:
            self._journal.after(fill)

    def chunks(self, sequences: Iterable[int], done: Callable[[Mapping[int, bytes]], None]) -> None:
        """The chunks that exist among the sequences."""
        wanted = set(sequences)
        if wanted:
            self._read(lambda: get_chunks(self._store, wanted), done)
        else:
            done({})

    def _read(self, work: Callable[[], T], done: Callable[[T], None]) -> None:
        def got(result: object) -> None:
            if isinstance(result, BaseException):
                self._journal.fail(f"a read failed: {result}")
                return
            try:
                done(cast(T, result))
            except CorruptRecord as error:
                self._journal.fail(f"the store is damaged: {error}")

        self._runner.read(work, got)

    def _look_up(
        self,
        ids: Sequence[bytes | None],
        absent: list[int],
        views: Views,
        tenant: bytes,
        fill: Callable[[], None],
    ) -> None:
        keys = [self._engine.directory_keys(ids[n] or b"") for n in absent]

        def got(values: Sequence[bytes | None]) -> None:
            at = 0
            for n, own in zip(absent, keys, strict=True):
                found = values[at : at + len(own)]
                at += len(own)
                views[n] = self._engine.view_stored(ids[n] or b"", tenant, found)
            if any(views[n] is None for n in absent):
                self._journal.after(fill)  # what took it away may be written and not synced
            else:
                fill()

        asked = [key for own in keys for key in own]
        self._read(lambda: self._store.get(asked), got)

    def _fill(
        self,
        views: Views,
        tenant: bytes,
        now_ms: int,
        done: Callable[[Views], None],
        look: int,
    ) -> None:
        if not lack_chunks(views):  # the usual case: memory has it all, so none has ended
            done(views)
            return
        needed = [set[int]() if view is None else chunks_of(view) for view in views]

        def got(chunks: Mapping[int, bytes]) -> None:
            moved = [n for n, own in enumerate(needed) if not own <= chunks.keys()]
            ids = [
                view.id_bytes if view is not None and n in moved else None
                for n, view in enumerate(views)
            ]
            filled = [
                None if n in moved else _filled(view, chunks, now_ms)
                for n, view in enumerate(views)
            ]
            if not moved:
                done(filled)
            elif look == LOOKS_MAX:
                raise CorruptRecord(f"chunk {min(needed[moved[0]])} is missing")
            else:
                self._views(ids, tenant, now_ms, partial(_merge, filled, moved, done), look + 1)

        self.chunks(set[int]().union(*needed), got)


def chunks_of(view: TaskView) -> set[int]:
    """The chunks that the view still lacks."""
    return {s for s in (view.body_chunk, view.record_chunk) if s is not None}


def _merge(
    filled: Views, moved: Sequence[int], done: Callable[[Views], None], found: Views
) -> None:
    for n in moved:
        filled[n] = found[n]
    done(filled)


def _filled(view: TaskView | None, chunks: Mapping[int, bytes], now_ms: int) -> TaskView | None:
    if view is None:
        return None
    try:
        view.fill(chunks)
    except KeyError:  # another task's number
        return None
    if view.has_record and view.expires_ms <= now_ms:
        return None
    return view
