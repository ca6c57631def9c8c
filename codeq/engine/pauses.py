"""Paused queues: claims pass them over, across restarts, whether they have tasks or not.

On disk: an entry (entries.py) under `pq`, which says when the pause was made.
"""

from __future__ import annotations

import struct

from codeq.engine._engine import Engine
from codeq.engine.entries import entry_key, entry_value, open_entry
from codeq.engine.journal import Journal
from codeq.engine.store import Store

PREFIX = b"pq"
END = b"pr"
_AT_MS = struct.Struct("<q")


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
        key = entry_key(PREFIX, tenant, command)
        self._journal.put(key, entry_value(key, _AT_MS.pack(now_ms)))

    def resume(self, tenant: bytes, command: bytes) -> None:
        """Takes a pause back; claims that wait are served with the open group."""
        if (tenant, command) not in self._paused:
            return
        self._engine.resume(tenant, command)
        del self._paused[tenant, command]
        self._journal.delete(entry_key(PREFIX, tenant, command))


def read_entry(key: bytes, value: bytes) -> tuple[bytes, bytes]:
    """Tenant and command of an entry; StoreError when it is damaged."""
    entry = open_entry("paused queue", key, value)
    return entry.tenant, entry.name
