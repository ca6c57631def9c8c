"""Pending webhooks: what the end of a task still owes to a URL, until it was told or given up.

The engine writes an entry `w` + sequence of the chunk with the end + number in the same commit as
the end, so entries stand in the order of the ends, but for those of one chunk. It says only whose
it is and where the task's records stand, and these are read when the delivery is made. As long as
an entry rests on them the log is not cut there: ``hold`` says how far it may be. When the keeping
time of everything else in that part of the log is over, what is still owed is copied out of it into
the entries, so that one receiver that is down does not keep the log of all others.

An entry is seen by nobody before the commit that holds it is synced. Nothing here grows with the
number of entries but one count for each 512 chunks of log they rest on, and one for each tenant
that is owed something.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple

import msgspec

from codeq.engine._engine import COMPLETED, Engine
from codeq.engine._views import CorruptRecord, TaskView
from codeq.engine._wire import format_id
from codeq.engine.journal import Journal, Runner
from codeq.engine.reader import LOOKS_MAX, SEGMENT_CHUNKS, chunks_of, get_chunks
from codeq.engine.store import Store
from codeq.errors import StoreError

PREFIX = b"w"
LAST = PREFIX + b"\xff" * 17
#: Entries looked at in one read
PAGE_ENTRIES = 128
#: Bytes of entries after which a read ends early
PAGE_BYTES = 4 << 20
#: Chunks read together; one may have megabytes
CHUNKS_AT_ONCE = 8

_WHOLE = 2  # version of an entry that has everything in it
_RESTS_ON_LOG = 3  # version of an entry that says where the records stand
_ID_BYTES = 16
_RESTING_BYTES = 1 + _ID_BYTES + 8  # then the length of the tenant, and the tenant
_NOTHING_HELD = (1 << 64) - 1
_UNKNOWN = -1  # segment of an entry that is being loaded


class Owed(NamedTuple):
    """An entry as far as it must be known to wait for its turn."""

    key: bytes
    url: str
    tenant: str
    command: str


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """How a task ended, as its webhook is told. ``result`` and ``artifacts`` are JSON texts;
    ``result`` None = none was sent, ``artifacts`` empty = none."""

    task_id: str
    url: str
    tenant: str
    command: str
    completed: bool
    result: bytes | None
    error: str
    artifacts: bytes
    ended_ms: int
    trace_parent: str
    trace_state: str


class Page(NamedTuple):
    """Entries in the order of their keys; the next read goes on at ``next``, None = at the end."""

    owed: list[Owed]
    next: bytes | None


class Resting(NamedTuple):
    """An entry whose records stand in the log: its task, the chunks with creation and end, and
    whose it is."""

    task_id: bytes
    created: int
    ended: int
    tenant: str


class _Gone(Enum):
    GONE = 0


class _Missing(CorruptRecord):
    """The log does not have what an entry rests on, unless that was copied out just now."""


class _Copies(NamedTuple):
    puts: list[tuple[bytes, bytes]]
    segments: list[int]  # that of each
    next: bytes


_GONE = _Gone.GONE


class Deliveries:
    """The entries of one store. Deciding what to send when is the caller's.

    ``pending`` counts the entries, ``pending_by`` those of each tenant that has any. ``committed``
    is called, when set, after each commit that holds new entries, with the key behind the last of
    them.
    """

    def __init__(self, engine: Engine, store: Store, runner: Runner, journal: Journal) -> None:
        self._engine = engine
        self._store = store
        self._runner = runner
        self._journal = journal
        self._held: dict[int, int] = {}  # by segment: entries whose created record stands there
        self._loaded: dict[bytes, int | None] = {}  # in work: their segment, None when copied out
        self._removed: set[bytes] = set()  # removed since the look for copies began
        self._looking = False
        self._look_from = PREFIX
        self.pending = 0
        self.pending_by: dict[str, int] = {}
        self.end = PREFIX  # key behind the last entry that is known to be on disk
        self.committed: Callable[[bytes], None] | None = None
        try:
            self._count()
        except CorruptRecord as error:
            raise StoreError(f"data folder {store.path} is damaged: {error}") from error

    # --- what the shard says and asks

    def written(self, puts: Sequence[tuple[bytes, bytes]]) -> None:
        """These are written with the open group."""
        # By key: a task that ends, is requeued and ends again in one chunk puts its entry twice.
        owed = {key: value for key, value in puts if key[:1] == PREFIX}
        for key, value in owed.items():
            self._add(_resting(key, value))
        if owed:  # in the order of their ends, which in one chunk need not be that of their keys
            self._journal.after(partial(self._announce, max(owed) + b"\0"))

    def hold(self, expired: int) -> int:
        """Sequence at which the log must not be cut for now. When only entries need what is before
        ``expired``, copying them out begins."""
        self._look(expired)
        return min(self._held) * SEGMENT_CHUNKS if self._held else _NOTHING_HELD

    # --- what the sender asks

    def page(self, begin: bytes, end: bytes, done: Callable[[Page], None]) -> None:
        """Some entries in [begin, end); ``end`` is at most what ``committed`` was told."""

        def got(result: object) -> None:
            if isinstance(result, Page):
                done(result)
            else:
                self._fail(result)

        self._runner.read(lambda: self._read_page(begin, end), got)

    def load(self, key: bytes, done: Callable[[Outcome | None], None]) -> None:
        """The whole of an entry, None when it is gone. The caller ends with ``remove`` or
        ``release``."""
        self._loaded[key] = _UNKNOWN
        self._load(key, done, 1)

    def remove(self, owed: Owed) -> None:
        """A loaded entry was delivered or given up: it goes with the open group."""
        segment = self._loaded.pop(owed.key)
        if segment is not None:
            self._release_segment(segment)
        self._tally(owed.tenant, -1)
        if self._looking:
            self._removed.add(owed.key)
        self._journal.delete(owed.key)
        self._journal.kick()

    def release(self, key: bytes) -> None:
        """A loaded entry is to be tried again later."""
        self._loaded.pop(key)

    # --- reading

    def _count(self) -> None:
        for key, value in self._store.scan(PREFIX, LAST):
            self.end = key + b"\0"
            if value[:1] == bytes([_WHOLE]):
                self._tally(_whole(key, value).tenant, 1)
            else:
                self._add(_resting(key, value))

    def _add(self, resting: Resting) -> None:
        self._tally(resting.tenant, 1)
        self._hold(resting.created // SEGMENT_CHUNKS)

    def _tally(self, tenant: str, more: int) -> None:
        self.pending += more
        self.pending_by[tenant] = self.pending_by.get(tenant, 0) + more
        if not self.pending_by[tenant]:
            del self.pending_by[tenant]

    def _announce(self, end: bytes) -> None:
        self.end = end
        if self.committed is not None:
            self.committed(end)

    def _read_page(self, begin: bytes, end: bytes) -> Page:
        """On the read helper thread."""
        entries, following = self._entries(begin, end)
        resting = {key: _resting(key, value) for key, value in entries if value[0] != _WHOLE}
        views = self._views(resting, bodies_only=True)
        owed = []
        for key, value in entries:
            if key in resting:
                view = views.get(key)
                if view is not None:  # else it was copied out and its log cut meanwhile
                    owed.append(Owed(key, view.webhook, view.tenant, view.command))
                elif (again := self._store.get([key])[0]) is not None:
                    owed.append(_owed(key, _whole(key, again)))
            else:
                owed.append(_owed(key, _whole(key, value)))
        return Page(owed, following)

    def _entries(self, begin: bytes, end: bytes) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
        entries: list[tuple[bytes, bytes]] = []
        size = 0
        for key, value in self._store.scan(begin, end):
            if len(entries) == PAGE_ENTRIES or size > PAGE_BYTES:
                return entries, key
            entries.append((key, value))
            size += len(value)
        return entries, None

    def _views(self, resting: dict[bytes, Resting], *, bodies_only: bool) -> dict[bytes, TaskView]:
        """What the log has of these entries; some may be missing. On the read helper thread."""
        views = {}
        keys = sorted(resting, key=lambda key: resting[key].created)
        for at in range(0, len(keys), CHUNKS_AT_ONCE):
            part = keys[at : at + CHUNKS_AT_ONCE]
            wanted = {resting[key].created for key in part}
            if not bodies_only:
                wanted |= {resting[key].ended for key in part}
            chunks = get_chunks(self._store, wanted)
            for key in part:
                if (view := _view(resting[key], chunks, bodies_only=bodies_only)) is not None:
                    views[key] = view
        return views

    def _load(self, key: bytes, done: Callable[[Outcome | None], None], look: int) -> None:
        def got(result: object) -> None:
            if result is _GONE:
                del self._loaded[key]
                done(None)
            elif isinstance(result, tuple):
                outcome, segment = result
                if self._loaded[key] == _UNKNOWN:  # else it was copied out since it was read
                    self._loaded[key] = segment
                done(outcome)
            elif isinstance(result, _Missing) and look < LOOKS_MAX:  # likewise, and the log cut
                self._load(key, done, look + 1)
            else:
                self._fail(result)

        self._runner.read(lambda: self._read_outcome(key), got)

    def _read_outcome(self, key: bytes) -> tuple[Outcome, int | None] | _Gone | _Missing:
        """On the read helper thread."""
        value = self._store.get([key])[0]
        if value is None:
            return _GONE
        if value[0] == _WHOLE:
            return _whole(key, value), None
        resting = _resting(key, value)
        view = self._views({key: resting}, bodies_only=False).get(key)
        if view is None:
            return _lacking(key)
        return _outcome(view), resting.created // SEGMENT_CHUNKS

    def _fail(self, error: object) -> None:
        self._journal.fail(f"a look for pending webhooks failed: {error}")

    # --- what the entries hold

    def _hold(self, segment: int) -> None:
        self._held[segment] = self._held.get(segment, 0) + 1

    def _release_segment(self, segment: int) -> None:
        self._held[segment] -= 1
        if not self._held[segment]:
            del self._held[segment]

    def _look(self, expired: int) -> None:
        """Copies out of the log before ``expired`` some of what is owed, and goes on while there
        is any."""
        end = expired // SEGMENT_CHUNKS
        if self._looking or not any(segment < end for segment in self._held):
            return
        self._looking = True
        # Behind the group: what was removed before is gone from disk then.
        self._journal.after(
            lambda: self._runner.read(
                lambda: self._read_copies(expired), partial(self._copy, expired)
            )
        )

    def _read_copies(self, expired: int) -> _Copies:
        """On the read helper thread."""
        end = expired // SEGMENT_CHUNKS
        entries, following = self._entries(self._look_from, LAST)
        resting = {key: _resting(key, value) for key, value in entries if value[0] != _WHOLE}
        wanted = {k: r for k, r in resting.items() if r.created // SEGMENT_CHUNKS < end}
        puts: list[tuple[bytes, bytes]] = []
        size = 0
        for key in wanted:
            found = self._read_outcome(key)
            if isinstance(found, _Missing):
                raise found
            if found is _GONE:  # delivered since the scan
                continue
            puts.append((key, _encode(found[0])))
            size += len(puts[-1][1])
            if size > PAGE_BYTES:
                following = key
                break
        segments = [wanted[key].created // SEGMENT_CHUNKS for key, _ in puts]
        return _Copies(puts, segments, following or PREFIX)

    def _copy(self, expired: int, found: object) -> None:
        removed, self._removed = self._removed, set()
        self._looking = False
        if not isinstance(found, _Copies):
            self._fail(found)
            return
        self._look_from = found.next
        for (key, value), segment in zip(found.puts, found.segments, strict=True):
            if key in removed:
                continue
            self._journal.put(key, value)
            self._release_segment(segment)
            if key in self._loaded:
                self._loaded[key] = None
        if found.puts or found.next != PREFIX:
            self._journal.after(lambda: self._look(expired))


def rests_on(key: bytes, value: bytes) -> Resting | None:
    """Where the records of an entry stand; None when it has everything in it. Raises
    CorruptRecord."""
    if value[:1] == bytes([_WHOLE]):
        _whole(key, value)
        return None
    return _resting(key, value)


def _resting(key: bytes, value: bytes) -> Resting:
    bare, said = value[:_RESTING_BYTES], value[_RESTING_BYTES:]
    whole = len(key) == 17 and len(bare) == _RESTING_BYTES and value[0] == _RESTS_ON_LOG
    if not whole or int.from_bytes(said[:4], "little") != len(said) - 4:
        raise _damaged(key)
    created = int.from_bytes(bare[1 + _ID_BYTES :], "big")
    ended = int.from_bytes(key[1:9], "big")
    return Resting(bare[1 : 1 + _ID_BYTES], created, ended, said[4:].decode("utf-8", "replace"))


def _damaged(key: bytes) -> CorruptRecord:
    return CorruptRecord(f"the pending webhook {key.hex()} is damaged")


def _lacking(key: bytes) -> _Missing:
    return _Missing(f"the log lacks what the pending webhook {key.hex()} rests on")


def _view(resting: Resting, chunks: dict[int, bytes], *, bodies_only: bool) -> TaskView | None:
    view = TaskView()
    view.id_bytes, view.id = resting.task_id, format_id(resting.task_id)
    view.body_chunk = resting.created
    view.record_chunk = None if bodies_only else resting.ended
    if not chunks_of(view) <= chunks.keys():
        return None
    try:
        view.fill(chunks)
    except KeyError:
        raise CorruptRecord(f"chunk {resting.created} has another task than {view.id}") from None
    return view


def _outcome(view: TaskView) -> Outcome:
    return Outcome(
        view.id,
        view.webhook,
        view.tenant,
        view.command,
        view.state == COMPLETED,
        view.result,
        view.error,
        view.artifacts,
        view.ended_ms,
        view.trace_parent,
        view.trace_state,
    )


def _owed(key: bytes, outcome: Outcome) -> Owed:
    return Owed(key, outcome.url, outcome.tenant, outcome.command)


def _encode(outcome: Outcome) -> bytes:
    body = bytes([_WHOLE]) + msgspec.msgpack.encode(outcome)
    return body + zlib.crc32(body).to_bytes(4, "little")


def _whole(key: bytes, value: bytes) -> Outcome:
    body, check = value[:-4], value[-4:]
    if body[:1] != bytes([_WHOLE]) or zlib.crc32(body).to_bytes(4, "little") != check:
        raise _damaged(key)
    return msgspec.msgpack.decode(body[1:], type=Outcome)
