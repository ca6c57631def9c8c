"""Removal: what nobody needs any more leaves the store in ranges, old records that are still needed
move forward, so that no straggler holds the log.

Runs once a second beside the work. The log of chunks is only ever cut at its tail, and not where
pending webhooks rest on it. Directory entries begin with the highest sequence they rest on and go
when that is below the tail. A range of them is found while others may be written into it: those are
left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from codeq.engine._engine import Engine
from codeq.engine._views import CorruptRecord
from codeq.engine.clock import Clock
from codeq.engine.deliveries import Deliveries
from codeq.engine.journal import Journal, Runner
from codeq.engine.keys import Keys
from codeq.engine.reader import SEGMENT_CHUNKS, chunk_key
from codeq.engine.store import CHUNK_PREFIX, Store

#: entries looked at per prefix at a time; when there are more, the next look follows at once
ENTRIES_MAX = 2_048
#: entries looked at per prefix at a time behind the first that is needed
SWEEP_MAX = 512
#: bytes of chunks read to carry records forward, per run: one group must stay small
CARRY_BYTES_MAX = 8 << 20

_PREFIXES = (b"d", b"e")

Range = tuple[bytes, bytes]  # of keys, [from, to)


class Found(NamedTuple):
    """What one look at the store brought."""

    ranges: list[Range]
    keys: list[bytes]
    more: bool  # entries are left to look at
    chunks: Mapping[int, bytes]  # to carry
    end: int  # sequence behind the last of them


class Retention:
    """Keeps the store as small as its settings allow."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        clock: Clock,
        runner: Runner,
        journal: Journal,
        keys: Keys,
        deliveries: Deliveries,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._store = store
        self._runner = runner
        self._journal = journal
        self._keys = keys
        self._deliveries = deliveries
        self._reading = False
        self._swept: dict[bytes, bytes] = {}  # by prefix: where the next sweep begins
        self._written: set[bytes] = set()  # keys of entries written since the look began
        self._carried = 0  # sequence up to which the oldest segment has been carried
        self._keys_end = b""
        self._removed = False  # something, since the last ``reclaim``
        self._reclaiming = False
        # Chunks that the last run of the server was to remove and has not: unread, since they may
        # be damaged, and nobody needs them.
        self._journal.delete_range(CHUNK_PREFIX, chunk_key(self._engine.tail))

    def run(self, now_ms: int) -> None:
        """One round; reads happen on the read helper thread, removals with the next commit
        group."""
        self._remove_keys(now_ms)
        self._removed |= self._journal.cut()
        keep = self._deliveries.hold(self._engine.expired(now_ms))
        trimmed = self._engine.trim(now_ms, keep)
        if trimmed is not None:
            begin, end = trimmed
            self._removes()
            self._journal.delete_range(chunk_key(begin), chunk_key(end))
            self._journal.delete_range(b"s", b"s" + (end // SEGMENT_CHUNKS).to_bytes(8, "big"))
            self._journal.kick()
        if not self._reading:
            self._look(now_ms)

    def reclaim(self) -> None:
        """The disk is short of space: has what was removed leave it soon, not only when the next
        tables are full and have been compacted."""
        if self._removed and not self._reclaiming:
            self._removed, self._reclaiming = False, True
            self._journal.after(self._reclaim)

    def _reclaim(self) -> None:
        self._journal.cut()
        self._runner.aside(self._store.reclaim, self._reclaimed)

    def _reclaimed(self, error: object) -> None:
        self._reclaiming = False
        if error is not None:
            self._journal.fail(f"write to the store failed: {error}")

    def _removes(self) -> None:
        self._clock.faults.point("in-retention")
        self._removed = True

    def written(self, puts: Sequence[tuple[bytes, bytes]]) -> None:
        """These are written with the open group."""
        if self._reading:
            self._written.update(key for key, _ in puts if key[:1] in _PREFIXES)

    def _look(self, now_ms: int) -> None:
        self._reading = True
        tail = self._engine.tail
        segment = self._engine.straggler_chunks()
        self._journal.kick()  # asking may have closed the last bucket
        self._runner.read(
            lambda: self._read(tail, segment), lambda found: self._found(found, now_ms)
        )

    def _read(self, tail: int, segment: tuple[int, int] | None) -> Found:
        ranges, keys, more = self._entries_below(tail)
        return Found(ranges, keys, more, *self._chunks(segment))

    def _remove_keys(self, now_ms: int) -> None:
        begin, end = self._keys.expired(now_ms)
        if end != self._keys_end:
            self._keys_end = end
            self._removes()
            self._journal.delete_range(begin, end)
            self._journal.kick()

    def _entries_below(self, tail: int) -> tuple[list[Range], list[bytes], bool]:
        """Ranges and keys of directory entries that rest on nothing any more, and whether there
        may be more of them."""
        ranges = []
        keys: list[bytes] = []
        more = False
        for prefix in _PREFIXES:
            gone = []
            for key, value in self._store.scan(prefix, prefix + b"\xff" * 9, ENTRIES_MAX):
                if int.from_bytes(value[:8], "big") >= tail:
                    keys += self._sweep(prefix, key, tail)
                    break
                gone.append(key)
            if gone:
                ranges.append((prefix, gone[-1] + b"\0"))
            more |= len(gone) == ENTRIES_MAX
        return ranges, keys, more

    def _sweep(self, prefix: bytes, first: bytes, tail: int) -> list[bytes]:
        """The same, a few entries at a time, behind one that is needed: tasks do not end in the
        order of their numbers, and one that waited long must not keep the entries of others."""
        begin = max(first, self._swept.get(prefix, b""))
        seen = list(self._store.scan(begin, prefix + b"\xff" * 9, SWEEP_MAX))
        self._swept[prefix] = seen[-1][0] + b"\0" if len(seen) == SWEEP_MAX else b""
        return [key for key, value in seen if int.from_bytes(value[:8], "big") < tail]

    def _chunks(self, segment: tuple[int, int] | None) -> tuple[Mapping[int, bytes], int]:
        """The next chunks of the segment to carry, at least one, and where they end."""
        chunks: dict[int, bytes] = {}
        if segment is None:
            return chunks, 0
        begin, end = segment
        if begin < self._carried < end:
            begin = self._carried
        size = 0
        for key, value in self._store.scan(chunk_key(begin), chunk_key(end)):
            if chunks and size + len(value) > CARRY_BYTES_MAX:
                return chunks, max(chunks) + 1
            size += len(value)
            chunks[int.from_bytes(key[1:], "big")] = value
        return chunks, 0  # the whole segment: the next look begins where it must

    def _found(self, found: object, now_ms: int) -> None:
        written, self._written = self._written, set()
        self._reading = False
        if not isinstance(found, Found):
            self._journal.fail(f"a look for what may go failed: {found}")
            return
        if found.ranges or found.keys or found.chunks:
            self._removes()
        for begin, end in found.ranges:
            for part in _without(begin, end, written):
                self._journal.delete_range(*part)
        for key in found.keys:
            if key not in written:
                self._journal.delete(key)
        self._carried = found.end
        try:
            for sequence, chunk in found.chunks.items():
                self._engine.carry(sequence, chunk, now_ms)
        except CorruptRecord as error:
            self._journal.fail(f"the store is damaged: {error}")
            return
        if found.ranges or found.keys or found.chunks:
            self._journal.kick()
        if found.more:
            self._journal.after(lambda: None if self._reading else self._look(now_ms))


def _without(begin: bytes, end: bytes, keys: Collection[bytes]) -> list[Range]:
    """The range without these keys."""
    parts = []
    for key in sorted(key for key in keys if begin <= key < end):
        parts.append((begin, key))
        begin = key + b"\0"
    return [*parts, (begin, end)]
