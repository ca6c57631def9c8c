"""Start of a data folder: is it ours, is it whole, and what did it hold."""

from __future__ import annotations

import logging

import msgspec

from codeq.engine._engine import Engine
from codeq.engine.clock import Clock
from codeq.engine.reader import CHUNK_PREFIX, chunk_key
from codeq.engine.store import Store
from codeq.errors import StoreError

log = logging.getLogger("codeq.recovery")

FORMAT = 2
META_KEY = b"mmeta"
HEAD_KEY = b"mhead"
#: Progress is logged at least so often while the log is read
PROGRESS_SECONDS = 2
PROGRESS_CHUNKS = 1_000  # between two looks at the clock


class Meta(msgspec.Struct, forbid_unknown_fields=False):
    """What a store says of itself, as JSON under `m` + "meta"."""

    format: int
    num_shards: int


def recover(
    engine: Engine, store: Store, clock: Clock, num_shards: int, lease_grace_ms: int
) -> None:
    """Checks the store and rebuilds the engine from it, in one pass over the log of chunks.

    Raises StoreError: not a store, a newer format, another shard count, a lost log, a damaged
    record.
    """
    _check_log(store)
    _check_meta(store, num_shards)
    began_s = clock.monotonic_s()
    try:
        chunks = _load(engine, store, clock, lease_grace_ms)
    except ValueError as error:  # CorruptRecord, or a head that another codeq wrote
        raise StoreError(f"data folder {store.path} is damaged: {error}") from error
    log.info(
        "recovered %d live tasks from %d chunks in %.2f s",
        engine.live_tasks,
        chunks,
        clock.monotonic_s() - began_s,
    )


def _check_log(store: Store) -> None:
    """RocksDB opens without an error after a damaged byte in the middle of its log and drops what
    follows; the noted number tells."""
    synced, found = store.synced_sequence(), store.sequence()
    if found < synced:
        raise StoreError(
            f"data folder {store.path} lost a part of its log: writes up to number {synced} were "
            f"synced, only {found} came back"
        )


def _check_meta(store: Store, num_shards: int) -> None:
    value = store.get([META_KEY])[0]
    if value is None:
        if next(store.scan(b"\0", b"\xff", 1), None) is not None:
            raise StoreError(f"data folder {store.path} holds something that is no codeq store")
        store.write([(META_KEY, msgspec.json.encode(Meta(format=FORMAT, num_shards=num_shards)))])
        store.sync(store.sequence())
        return
    try:
        meta = msgspec.json.decode(value, type=Meta)
    except msgspec.MsgspecError as error:
        raise StoreError(
            f"data folder {store.path} has an unreadable format entry: {error}"
        ) from error
    if meta.format != FORMAT:
        raise StoreError(
            f"data folder {store.path} has format {meta.format}, this codeq reads format {FORMAT}"
        )
    if meta.num_shards != num_shards:
        raise StoreError(
            f"data folder {store.path} was made with numShards {meta.num_shards}, not {num_shards}"
        )


def _load(engine: Engine, store: Store, clock: Clock, lease_grace_ms: int) -> int:
    start = engine.load_head(store.get([HEAD_KEY])[0])
    for key, value in store.scan(b"s", b"t"):
        engine.load_segment(key, value)
    count = 0
    logged_s = clock.monotonic_s()
    for key, value in store.scan(chunk_key(start), CHUNK_PREFIX + b"\xff" * 9):
        clock.faults.point("recovery")
        engine.load_chunk(int.from_bytes(key[1:], "big"), value)
        count += 1
        if count % PROGRESS_CHUNKS == 0 and clock.monotonic_s() >= logged_s + PROGRESS_SECONDS:
            logged_s = clock.monotonic_s()
            log.info("recovering: %d chunks read, %d live tasks so far", count, engine.live_tasks)
    engine.load_done(clock.now_ms(), lease_grace_ms)
    return count
