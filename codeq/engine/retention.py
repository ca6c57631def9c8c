"""Removal: what nobody needs any more leaves the store in ranges, old records that are still needed
move forward, so that no straggler holds the log.

Runs once a second beside the work. The log of chunks is only ever cut at its tail. Directory
entries and webhook entries begin with the highest sequence they rest on and go when that is below
the tail.
"""

from __future__ import annotations

from collections.abc import Mapping

from codeq.engine._engine import Engine
from codeq.engine.journal import Journal, Runner
from codeq.engine.keys import Keys
from codeq.engine.reader import chunk_key
from codeq.engine.store import Store

#: entries looked at per prefix and run; at 256 tasks an entry this keeps up with any rate
ENTRIES_MAX = 2_048
#: sequences of one segment, the step in which the log is cut
SEGMENT_CHUNKS = 512
#: chunks carried forward per run: one group must stay small
CARRY_CHUNKS_MAX = SEGMENT_CHUNKS

_PREFIXES = (b"d", b"e", b"w")


class Retention:
    """Keeps the store as small as its settings allow."""

    def __init__(
        self, engine: Engine, store: Store, runner: Runner, journal: Journal, keys: Keys
    ) -> None:
        self._engine = engine
        self._store = store
        self._runner = runner
        self._journal = journal
        self._keys = keys
        self._reading = False
        self._keys_end = b""

    def run(self, now_ms: int) -> None:
        """One round; reads happen on the read helper thread, removals with the next commit
        group."""
        self._remove_keys(now_ms)
        trimmed = self._engine.trim(now_ms)
        if trimmed is not None:
            begin, end = trimmed
            self._journal.delete_range(chunk_key(begin), chunk_key(end))
            self._journal.delete_range(b"s", b"s" + (end // SEGMENT_CHUNKS).to_bytes(8, "big"))
            self._journal.kick()
        if not self._reading:
            self._reading = True
            tail = self._engine.tail
            carried = self._engine.straggler_chunks()
            self._runner.read(
                lambda: (self._entries_below(tail), self._segment(carried)),
                lambda found: self._found(found, now_ms),
            )

    def _remove_keys(self, now_ms: int) -> None:
        begin, end = self._keys.expired(now_ms)
        if end != self._keys_end:
            self._keys_end = end
            self._journal.delete_range(begin, end)
            self._journal.kick()

    def _entries_below(self, tail: int) -> list[tuple[bytes, bytes]]:
        """Ranges of directory and webhook entries that rest on nothing any more."""
        ranges = []
        for prefix in _PREFIXES:
            end = None
            for key, value in self._store.scan(prefix, prefix + b"\xff" * 9, ENTRIES_MAX):
                if int.from_bytes(value[:8], "big") >= tail:
                    break
                end = key + b"\0"
            if end is not None:
                ranges.append((prefix, end))
        return ranges

    def _segment(self, chunks: tuple[int, int] | None) -> Mapping[int, bytes]:
        if chunks is None:
            return {}
        begin, end = chunks
        scan = self._store.scan(chunk_key(begin), chunk_key(end), CARRY_CHUNKS_MAX)
        return {int.from_bytes(key[1:], "big"): value for key, value in scan}

    def _found(self, found: object, now_ms: int) -> None:
        self._reading = False
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, tuple)
        ranges, chunks = found
        for begin, end in ranges:
            self._journal.delete_range(begin, end)
        for sequence, chunk in chunks.items():
            self._engine.carry(sequence, chunk, now_ms)
        if ranges or chunks:
            self._journal.kick()
