"""Idempotency keys: which task a create with this key already made.

On disk: `k` + generation (4 bytes) + 128-bit hash of tenant and key; the value holds the task's id,
the hash of the request and the time of the create. A generation is one window long, so a look-up
asks this generation and the one before, and a generation that is over goes as one range. When the
window is another than that of the last start, ``refile`` gives every entry its new place. An entry
stays when its task is purged or cleaned up: a key whose task is gone is free all the same.

Time never goes back here, not even over a restart: it is at least that of the last task made.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from codeq import errors
from codeq.engine._engine import Engine
from codeq.engine._views import CorruptRecord
from codeq.engine._wire import Creates
from codeq.engine.store import Store

_ENTRY = struct.Struct("<B16s16sq")
_VERSION = 1
PREFIX, PREFIX_END = b"k", b"l"
#: stands for a request that nobody knows any more: every one is the same as it
UNKNOWN_REQUEST = bytes(16)
REFILED_AT_ONCE = 1_000


class Known(msgspec.Struct, frozen=True):
    """What an entry says: which task was made, for what request (hashed), and when."""

    task_id: bytes
    request: bytes
    created_ms: int


class Keys:
    """Finds replays in a batch before it is decided and notes the keys of what was made.

    ``window_ms`` is how long a key binds; ``lenient`` answers a different request under a known key
    with the original task instead of a conflict; ``floor_ms`` is the time of the last task made.
    """

    def __init__(
        self, engine: Engine, store: Store, window_ms: int, floor_ms: int, *, lenient: bool
    ) -> None:
        self._engine = engine
        self._store = store
        self._window_ms = window_ms
        self._floor_ms = floor_ms
        self._lenient = lenient
        self._open: dict[bytes, Known] = {}  # keys of the group that is not written yet

    def resolve(
        self, creates: Creates, tenant: str, now_ms: int, begin: int, end: int
    ) -> list[tuple[int, bytes, bytes]]:
        """Marks replays, repeats inside the batch and conflicts among the items [begin, end).

        Returns (index, key hash, request hash) of the items that will be new tasks. The look-up
        runs on the loop thread: it must see what was decided before, and a bloom filter answers
        most of it.
        """
        owner = tenant.encode()
        keyed = [
            (index, hash_of(owner, key), _hash(request))
            for index, key, request in creates.keyed()
            if begin <= index < end
        ]
        if not keyed:
            return []
        known = self._known([hashed for _, hashed, _ in keyed], max(now_ms, self._floor_ms))
        first: dict[bytes, tuple[int, bytes]] = {}
        fresh = []
        for (index, hashed, request), found in zip(keyed, known, strict=True):
            if found is not None:
                if self._same(found.request, request):
                    creates.replay(index, found.task_id)
                else:
                    creates.refuse(index, errors.KEY_CONFLICT.number or 0)
            elif hashed in first:
                earlier, earlier_request = first[hashed]
                if self._same(earlier_request, request):
                    creates.alias(index, earlier)
                else:
                    creates.refuse(index, errors.KEY_CONFLICT.number or 0)
            else:
                first[hashed] = (index, request)
                fresh.append((index, hashed, request))
        return fresh

    def note(
        self, creates: Creates, fresh: Sequence[tuple[int, bytes, bytes]], now_ms: int
    ) -> list[tuple[bytes, bytes]]:
        """The entries to write for the items of ``fresh`` that became tasks."""
        puts = []
        now_ms = max(now_ms, self._floor_ms)
        generation = generation_of(now_ms, self._window_ms)
        codes = creates.codes
        for index, hashed, request in fresh:
            if codes[index] == errors.OK:
                task_id = creates.id_bytes(index)
                known = self._open[hashed] = Known(task_id, request, now_ms)
                puts.append((generation + hashed, entry_of(known)))
        return puts

    def written(self) -> None:
        """The open group is in the store: its keys are found there from now on."""
        self._open.clear()

    def expired(self, now_ms: int) -> tuple[bytes, bytes]:
        """The range of generations in which no key binds any more."""
        oldest_ms = max(now_ms, self._floor_ms) - self._window_ms
        return PREFIX, generation_of(oldest_ms, self._window_ms)

    def _known(self, hashes: list[bytes], now_ms: int) -> list[Known | None]:
        window_ms = self._window_ms
        now, before = (generation_of(at_ms, window_ms) for at_ms in (now_ms, now_ms - window_ms))
        ask = [now + hashed for hashed in hashes] + [before + hashed for hashed in hashes]
        found = [self._open.get(hashed) for hashed in hashes]
        for i, value in enumerate(self._store.get(ask)):
            if value is not None:
                n = i % len(hashes)
                found[n] = found[n] or read_entry(ask[i], value)
        if not any(found):
            return found
        return self._with_task([self._binding(known, now_ms) for known in found])

    def _with_task(self, found: list[Known | None]) -> list[Known | None]:
        """Without those whose task is gone. One that left memory with the group before this one
        has its directory in the store already."""
        held = [known and self._engine.holds(known.task_id) for known in found]
        asked = {
            i: self._engine.directory_keys(k.task_id)
            for i, k in enumerate(found)
            if k is not None and held[i] is None
        }
        values = iter(self._store.get([key for keys in asked.values() for key in keys]))
        for i, keys in asked.items():
            known = found[i]
            assert known is not None
            try:
                own = [next(values) for _ in keys]
                held[i] = self._engine.holds_stored(known.task_id, own)
            except CorruptRecord as error:
                raise errors.StoreError(f"the store is damaged: {error}") from error
        return [known if held[i] else None for i, known in enumerate(found)]

    def _binding(self, known: Known | None, now_ms: int) -> Known | None:
        if known is None or now_ms >= known.created_ms + self._window_ms:
            return None
        return known

    def _same(self, request: bytes, other: bytes) -> bool:
        return self._lenient or request in (other, UNKNOWN_REQUEST)


def refile(store: Store, window_ms: int) -> None:
    """Gives every entry the place it has under this window; of two for one key the later counts.
    Can be interrupted and repeated. Raises StoreError at a damaged entry."""
    begin = PREFIX
    while seen := list(store.scan(begin, PREFIX_END, REFILED_AT_ONCE)):
        moved: dict[bytes, Known] = {}
        left = []
        for key, value in seen:
            known = read_entry(key, value)
            place = key_of(key[-16:], known.created_ms, window_ms)
            if place != key:
                left.append(key)
                moved[place] = _later(moved.get(place), known)
        there = store.get(list(moved))
        for place, found in zip(list(moved), there, strict=True):
            if found is not None and place not in left:
                moved[place] = _later(read_entry(place, found), moved[place])
        store.write([(place, entry_of(known)) for place, known in moved.items()], left)
        begin = seen[-1][0] + b"\0"


def key_of(hashed: bytes, at_ms: int, window_ms: int) -> bytes:
    """The key of an entry of this time."""
    return generation_of(at_ms, window_ms) + hashed


def generation_of(at_ms: int, window_ms: int) -> bytes:
    """What the keys of all entries of this time begin with."""
    return PREFIX + max(0, at_ms // window_ms).to_bytes(4, "big")


def hash_of(tenant: bytes, key: bytes) -> bytes:
    """What stands for a tenant's idempotency key on disk."""
    return _hash(tenant + b"\0" + key)


def entry_of(known: Known) -> bytes:
    """The value of an entry."""
    entry = _ENTRY.pack(_VERSION, known.task_id, known.request, known.created_ms)
    return entry + zlib.crc32(entry).to_bytes(4, "little")


def read_entry(key: bytes, value: bytes) -> Known:
    """What an entry says; StoreError with its key when it is damaged."""
    entry, check = value[: _ENTRY.size], value[_ENTRY.size :]
    if len(entry) < _ENTRY.size or zlib.crc32(entry).to_bytes(4, "little") != check:
        raise errors.StoreError(f"the store is damaged: idempotency key entry {key.hex()}")
    version, task_id, request, created_ms = _ENTRY.unpack(entry)
    if version != _VERSION:
        raise errors.StoreError(
            f"the idempotency key entry {key.hex()} has the unknown version {version}"
        )
    return Known(task_id, request, created_ms)


def _later(one: Known | None, other: Known) -> Known:
    return one if one is not None and one.created_ms > other.created_ms else other


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
