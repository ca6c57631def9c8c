"""Idempotency keys: which task a create with this key already made.

On disk: `k` + generation (4 bytes) + 128-bit hash of tenant and key; the value holds the task's id,
the hash of the request and the time of the create. A generation is one window long, so a look-up
asks this generation and the one before, and a generation that is over goes as one range. An entry
stays when its task is purged or cleaned up: a key whose task is gone is free all the same.
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
_PREFIX = b"k"


class _Known(msgspec.Struct, frozen=True):
    task_id: bytes
    request: bytes
    created_ms: int


class Keys:
    """Finds replays in a batch before it is decided and notes the keys of what was made.

    ``window_ms`` is how long a key binds; ``lenient`` answers a different request under a known key
    with the original task instead of a conflict.
    """

    def __init__(self, engine: Engine, store: Store, window_ms: int, *, lenient: bool) -> None:
        self._engine = engine
        self._store = store
        self._window_ms = window_ms
        self._lenient = lenient
        self._open: dict[bytes, _Known] = {}  # keys of the group that is not written yet

    def resolve(
        self, creates: Creates, tenant: str, now_ms: int, begin: int, end: int
    ) -> list[tuple[int, bytes, bytes]]:
        """Marks replays, repeats inside the batch and conflicts among the items [begin, end).

        Returns (index, key hash, request hash) of the items that will be new tasks. The look-up
        runs on the loop thread: it must see what was decided before, and a bloom filter answers
        most of it.
        """
        keyed = [
            (index, _hash(tenant.encode() + b"\0" + key), _hash(request))
            for index, key, request in creates.keyed()
            if begin <= index < end
        ]
        if not keyed:
            return []
        known = self._known([hashed for _, hashed, _ in keyed], now_ms)
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
        codes = creates.codes
        for index, hashed, request in fresh:
            if codes[index] == errors.OK:
                task_id = creates.id_bytes(index)
                self._open[hashed] = _Known(task_id, request, now_ms)
                entry = _ENTRY.pack(_VERSION, task_id, request, now_ms)
                puts.append(
                    (self._key(hashed, now_ms), entry + zlib.crc32(entry).to_bytes(4, "little"))
                )
        return puts

    def written(self) -> None:
        """The open group is in the store: its keys are found there from now on."""
        self._open.clear()

    def expired(self, now_ms: int) -> tuple[bytes, bytes]:
        """The range of generations in which no key binds any more."""
        generation = max(0, now_ms // self._window_ms - 1)
        return _PREFIX, _PREFIX + generation.to_bytes(4, "big")

    def _known(self, hashes: list[bytes], now_ms: int) -> list[_Known | None]:
        ask = []
        for hashed in hashes:
            ask += [self._key(hashed, now_ms), self._key(hashed, now_ms - self._window_ms)]
        values = self._store.get(ask)
        found = [
            self._binding(
                self._open.get(hashed) or _decode(values[2 * i] or values[2 * i + 1]), now_ms
            )
            for i, hashed in enumerate(hashes)
        ]
        return self._with_task(found)

    def _with_task(self, found: list[_Known | None]) -> list[_Known | None]:
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

    def _binding(self, known: _Known | None, now_ms: int) -> _Known | None:
        if known is None or now_ms >= known.created_ms + self._window_ms:
            return None
        return known

    def _same(self, request: bytes, other: bytes) -> bool:
        return self._lenient or request == other

    def _key(self, hashed: bytes, at_ms: int) -> bytes:
        return _PREFIX + max(0, at_ms // self._window_ms).to_bytes(4, "big") + hashed


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _decode(value: bytes | None) -> _Known | None:
    if value is None:
        return None
    entry, check = value[: _ENTRY.size], value[_ENTRY.size :]
    if zlib.crc32(entry).to_bytes(4, "little") != check:
        raise errors.StoreError("an idempotency key entry is damaged (prefix k)")
    version, task_id, request, created_ms = _ENTRY.unpack(entry)
    if version != _VERSION:
        raise errors.StoreError(f"an idempotency key entry has the unknown version {version}")
    return _Known(task_id, request, created_ms)
