"""RocksDB: write, sync, get, scan. The only file that imports rocksdict.

What rocksdict releases the GIL in decides who calls what: ``write`` holds it and belongs to the
loop thread; ``sync`` and ``get`` with a list release it and belong to helper threads.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    Options,
    Rdict,
    WriteBatch,
    WriteOptions,
)

from codeq.errors import StoreError

log = logging.getLogger("codeq.store")

WRITE_BUFFER_BYTES = 32 << 20
WRITE_BUFFERS = 4
RECYCLED_LOGS = 4
BLOCK_CACHE_BYTES = 128 << 20
MAX_WAL_BYTES = 256 << 20
#: Prefix of the keys of chunks, and the column family they stand in. They come in rising order and
#: have files of their own, which do not overlap: compaction moves these instead of rewriting them.
CHUNKS, LOG = b"c", "log"
#: name of the file that remembers what the last sync covered
SYNCED_NAME = "SYNCED"
_SYNCED = struct.Struct("<QQ")  # sequence number, its complement

Deletion = tuple[bytes, bytes]  # a range of keys [from, to)


def _options(cache: Cache) -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(WRITE_BUFFER_BYTES)
    options.set_max_write_buffer_number(WRITE_BUFFERS)
    options.set_recycle_log_file_num(RECYCLED_LOGS)
    options.set_max_total_wal_size(MAX_WAL_BYTES)
    options.set_compression_type(DBCompressionType.none())
    # Chunks come in rising key order and go by range: compaction mostly moves files. The triggers
    # are raised so that a burst is not slowed down before a range deletion catches up with it.
    options.set_level_zero_file_num_compaction_trigger(32)
    options.set_level_zero_slowdown_writes_trigger(64)
    options.set_level_zero_stop_writes_trigger(96)
    options.set_target_file_size_base(64 << 20)
    options.set_max_bytes_for_level_base(512 << 20)
    options.set_max_background_jobs(2)
    options.set_keep_log_file_num(4)
    options.set_stats_dump_period_sec(0)
    blocks = BlockBasedOptions()
    blocks.set_block_cache(cache)
    blocks.set_block_size(16 << 10)
    blocks.set_bloom_filter(10, False)
    options.set_block_based_table_factory(blocks)
    return options


class Store:
    """One RocksDB folder, opened by one process. Keys and values are bytes.

    Raises StoreError, with the folder's name, when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._synced_fd = -1
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Any: the types of rocksdict do not know that in raw mode all is bytes
            _check_families(path)
            cache = Cache(BLOCK_CACHE_BYTES)
            options = _options(cache)
            options.create_missing_column_families(True)
            self._db: Any = Rdict(
                str(path),
                options,
                column_families={LOG: _options(cache)},
                access_type=AccessType.read_write(),
            )
            self._log: Any = self._db.get_column_family(LOG)
            self._log_handle: Any = self._db.get_column_family_handle(LOG)
        except StoreError:
            raise
        except Exception as error:  # rocksdict raises bare Exception
            raise StoreError(_open_failure(path, str(error))) from error
        self._write_options = WriteOptions()
        self._synced_fd = os.open(path / SYNCED_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def synced_sequence(self) -> int:
        """The sequence number the last noted sync covered; 0 when none was noted."""
        data = os.pread(self._synced_fd, _SYNCED.size, 0)
        if len(data) < _SYNCED.size:
            return 0
        sequence, complement = _SYNCED.unpack(data)
        return sequence if sequence ^ complement == (1 << 64) - 1 else 0

    def sequence(self) -> int:
        """RocksDB's number of the newest write."""
        return int(self._db.latest_sequence_number())

    def write(
        self,
        puts: Sequence[tuple[bytes, bytes]],
        deletes: Sequence[bytes] = (),
        ranges: Sequence[Deletion] = (),
    ) -> None:
        """Writes everything as one atomic batch, not yet synced; puts come last, so that a range
        takes none of them. Holds the GIL."""
        batch = WriteBatch(raw_mode=True)
        log = self._log_handle
        for begin, end in ranges:
            batch.delete_range(begin, end, log if begin[:1] == CHUNKS else None)
        for key in deletes:
            batch.delete(key)
        put = batch.put
        for key, value in puts:
            if key[:1] == CHUNKS:
                put(key, value, log)
            else:
                put(key, value)
        self._db.write(batch, self._write_options)

    def sync(self, sequence: int) -> None:
        """Makes every write so far durable and notes that ``sequence`` is covered. Helper
        thread."""
        self._db.flush_wal(True)
        self.note_synced(sequence)

    def flush(self) -> None:
        """Writes what is in memory to tables: only then the logs before it and what removed ranges
        covered leave the disk. Releases the GIL; helper thread."""
        self._db.flush(True)
        self._log.flush(True)

    def note_synced(self, sequence: int) -> None:
        """Notes, without a sync of its own, that writes up to ``sequence`` are on disk."""
        os.pwrite(self._synced_fd, _SYNCED.pack(sequence, sequence ^ ((1 << 64) - 1)), 0)

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of the keys, None where absent; keys of chunks are not asked together with
        others. Releases the GIL. Raises StoreError."""
        try:
            found: list[bytes | None] = self._family(keys[0]).get(keys) if keys else []
        except Exception as error:  # rocksdict raises bare Exception
            raise StoreError(f"read of the store failed: {error}") from error
        return found

    def scan(self, begin: bytes, end: bytes, limit: int = 0) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values in [begin, end) in order, at most ``limit`` (0 = all)."""
        for count, (key, value) in enumerate(self._family(begin).items(from_key=begin)):
            if key >= end or (limit and count >= limit):
                return
            yield key, value

    def _family(self, key: bytes) -> Any:
        return self._log if key[:1] == CHUNKS else self._db

    def property_int(self, name: str) -> int:
        """A numeric property of RocksDB, such as ``rocksdb.is-write-stopped``; 0 when unknown."""
        return int(self._db.property_int_value(name) or 0)

    def free_bytes(self) -> int:
        """Bytes a normal process may still write on the file system of the folder."""
        stat = os.statvfs(self.path)
        return stat.f_bavail * stat.f_frsize

    def close(self) -> None:
        """Closes the folder; the lock is free afterwards."""
        self._log_handle = None  # a handle that is left keeps the folder locked
        self._log.close()
        self._db.close()
        os.close(self._synced_fd)


def _check_families(path: Path) -> None:
    """Refuses a folder that RocksDB knows but codeq did not make, before anything is written. A
    start that was killed leaves the default family alone, and that empty."""
    if not (path / "CURRENT").exists() or LOG in Rdict.list_cf(str(path)):
        return
    there = Rdict(str(path), Options(raw_mode=True), access_type=AccessType.read_only())
    empty = next(iter(there.keys()), None) is None
    there.close()
    if not empty:
        raise StoreError(f"data folder {path} holds something that is no codeq store")


def _open_failure(path: Path, reason: str) -> str:
    if "lock" in reason.lower() and ("hold" in reason.lower() or "unavailable" in reason.lower()):
        return f"data folder {path} is in use by another process"
    return f"cannot open data folder {path}: {reason}"
