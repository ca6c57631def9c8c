"""Start of a data folder: is it ours, is it whole, and what did it hold."""

from __future__ import annotations

import logging

import msgspec

from codeq.engine import keys
from codeq.engine._engine import Engine
from codeq.engine._salvage import read_head
from codeq.engine.clock import Clock
from codeq.engine.reader import chunk_key
from codeq.engine.store import CHUNK_PREFIX, Store
from codeq.errors import StoreError

log = logging.getLogger("codeq.recovery")

FORMAT = 3
META_KEY = b"mmeta"
HEAD_KEY = b"mhead"
#: Progress is logged at least so often while the log is read
PROGRESS_SECONDS = 2
PROGRESS_CHUNKS = 1_000  # between two looks at the clock
#: entries that are written together with a head
NEVER_WITHOUT_HEAD = ((b"c", b"d"), (b"d", b"f"), (b"k", b"l"), (b"s", b"t"), (b"w", b"x"))


class Meta(msgspec.Struct, forbid_unknown_fields=False):
    """What a store says of itself, as JSON under `m` + "meta".

    ``key_window_ms`` is the window by which the idempotency keys are filed; 0 = not known.
    """

    format: int
    num_shards: int
    key_window_ms: int = 0


def recover(
    engine: Engine,
    store: Store,
    clock: Clock,
    num_shards: int,
    lease_grace_ms: int,
    key_window_ms: int,
) -> None:
    """Checks the store and rebuilds the engine from it, in one pass over the log of chunks. Files
    the idempotency keys again when their window has changed.

    Raises StoreError: not a store, another format or shard count, a damaged record.
    """
    _check_meta(store, num_shards, key_window_ms)
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


def last_id_ms(store: Store) -> int:
    """The time in the newest id of a store that was recovered; 0 when it has made none."""
    value = store.get([HEAD_KEY])[0]
    head = None if value is None else read_head(value)
    return 0 if head is None else head[3]


def _check_meta(store: Store, num_shards: int, key_window_ms: int) -> None:
    value = store.get([META_KEY])[0]
    if value is None:
        if next(store.scan(b"\0", b"\xff", 1), None) is not None:
            raise StoreError(f"data folder {store.path} holds something that is no codeq store")
        _write_meta(store, num_shards, key_window_ms)
        return
    meta = read_meta(value)
    if meta is None:
        raise StoreError(f"data folder {store.path} is damaged: its format (key mmeta)")
    if meta.format != FORMAT:
        raise StoreError(
            f"data folder {store.path} has format {meta.format}, this codeq reads format {FORMAT}"
        )
    if meta.num_shards != num_shards:
        raise StoreError(
            f"data folder {store.path} was made with numShards {meta.num_shards}, not {num_shards}"
        )
    if meta.key_window_ms != key_window_ms:
        keys.refile(store, key_window_ms)
        _write_meta(store, num_shards, key_window_ms)


def read_meta(value: bytes) -> Meta | None:
    """What the store says of itself; None when it cannot be read."""
    try:
        return msgspec.json.decode(value, type=Meta)
    except msgspec.MsgspecError:
        return None


def _write_meta(store: Store, num_shards: int, key_window_ms: int) -> None:
    meta = Meta(format=FORMAT, num_shards=num_shards, key_window_ms=key_window_ms)
    store.write([(META_KEY, msgspec.json.encode(meta))])
    store.sync(store.sequence())


def _load(engine: Engine, store: Store, clock: Clock, lease_grace_ms: int) -> int:
    head = store.get([HEAD_KEY])[0]
    if head is None and any(next(store.scan(*ends, 1), None) for ends in NEVER_WITHOUT_HEAD):
        raise ValueError("the head (key mhead) is missing")
    start = engine.load_head(head)
    for key, value in store.scan(b"s", b"t"):
        engine.load_segment(key, value)
    count = 0
    logged_s = clock.monotonic_s()
    for key, value in store.scan(chunk_key(start), CHUNK_PREFIX + b"\xff" * 9, ahead=True):
        clock.faults.point("recovery")
        engine.load_chunk(int.from_bytes(key[1:], "big"), value)
        count += 1
        if count % PROGRESS_CHUNKS == 0 and clock.monotonic_s() >= logged_s + PROGRESS_SECONDS:
            logged_s = clock.monotonic_s()
            log.info("recovering: %d chunks of the log read", count)
    engine.load_done(clock.now_ms(), lease_grace_ms)
    return count
