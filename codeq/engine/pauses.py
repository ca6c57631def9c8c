"""Paused queues: claims pass them over, across restarts, whether they have tasks or not.

On disk: `pq` + tenant + NUL + command; the value holds a version byte, the time of the pause, and
a checksum over key and value.
"""

from __future__ import annotations

import struct
import zlib

from codeq.engine._engine import Engine
from codeq.engine.journal import Journal
from codeq.engine.store import Store
from codeq.errors import StoreError

PREFIX = b"pq"
END = b"pr"
_ENTRY = struct.Struct("<Bq")
_VERSION = 1


class Pauses:
    """Which queues are paused. Made from the store at the start, before any claim."""

    def __init__(self, engine: Engine, store: Store, journal: Journal) -> None:
        self._engine = engine
        self._journal = journal
        self._paused: dict[tuple[bytes, bytes], None] = {}
        for key, value in store.scan(PREFIX, END):
            tenant, command = read_entry(key, value)
            self._paused[tenant, command] = None
            engine.pause(tenant, command)

    def __contains__(self, queue: tuple[bytes, bytes]) -> bool:
        return queue in self._paused

    def pause(self, tenant: bytes, command: bytes, now_ms: int) -> None:
        """Nothing is claimed from the queue from now on."""
        if (tenant, command) in self._paused:
            return
        self._engine.pause(tenant, command)
        self._paused[tenant, command] = None
        key = _key(tenant, command)
        self._journal.put(key, _value(key, now_ms))

    def resume(self, tenant: bytes, command: bytes) -> None:
        """Takes a pause back; claims that wait are served with the open group."""
        if (tenant, command) not in self._paused:
            return
        self._engine.resume(tenant, command)
        del self._paused[tenant, command]
        self._journal.delete(_key(tenant, command))


def _key(tenant: bytes, command: bytes) -> bytes:
    return PREFIX + tenant + b"\0" + command


def _value(key: bytes, at_ms: int) -> bytes:
    entry = _ENTRY.pack(_VERSION, at_ms)
    return entry + zlib.crc32(key + entry).to_bytes(4, "little")


def read_entry(key: bytes, value: bytes) -> tuple[bytes, bytes]:
    """Tenant and command of an entry; StoreError when it is damaged."""
    entry, check = value[: _ENTRY.size], value[_ENTRY.size :]
    tenant, nul, command = key.removeprefix(PREFIX).partition(b"\0")
    if not nul or zlib.crc32(key + entry).to_bytes(4, "little") != check:
        raise StoreError(f"the entry of a paused queue is damaged (key {key.hex()})")
    version, _ = _ENTRY.unpack(entry)
    if version != _VERSION:
        raise StoreError(f"the entry of a paused queue has the unknown version {version}")
    return tenant, command
