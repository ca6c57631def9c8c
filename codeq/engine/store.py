"""RocksDB: write, sync, get, scan. The only file that imports rocksdict.

What rocksdict releases the GIL in decides who calls what: ``write`` holds it and belongs to the
loop thread; ``sync`` and ``get`` with a list release it and belong to helper threads.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    Checkpoint,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteOptions,
)

from codeq.engine import folder
from codeq.engine._files import links_and_size, write_at
from codeq.errors import StoreError

log = logging.getLogger("codeq.store")

WRITE_BUFFER_BYTES = 32 << 20
#: One more than the usual four: the removal of old chunks has one of its own
WRITE_BUFFERS = 5
RECYCLED_LOGS = 4
#: of a write buffer; about ten bits for each of the entries of idempotency keys that it can hold
BUFFER_FILTER_RATIO = 0.02
BLOCK_CACHE_BYTES = 128 << 20
#: of each table, where all of a long range is wanted
READAHEAD_BYTES = 4 << 20
MAX_WAL_BYTES = 256 << 20
#: Prefix of the keys of chunks, and the column family they stand in. They come in rising order and
#: have files of their own, which do not overlap: compaction moves these instead of rewriting them.
CHUNK_PREFIX, LOG = b"c", "log"
#: So many entries written since the last cut of the log, as many chunks as a write buffer holds,
#: make the next cut worth a table of its own
CUT_CHUNKS_MIN = 4_096
#: Nor is one begun while so many tables wait for compaction, since RocksDB would wait for it
LEVEL0_TABLES_MAX = 48
#: name of the file that remembers what the last sync covered
SYNCED_NAME = "SYNCED"
_SYNCED = struct.Struct("<QQ")  # sequence number, its complement
_LISTED = struct.Struct("<QQQ")  # behind it: number and size of the MANIFEST, complement of both
_ONES = (1 << 64) - 1

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


def _filter_buffers(options: Options) -> None:
    """A bloom filter of the entries in each write buffer: most keys that are looked up are not
    there, as the idempotency key of each new task."""
    options.set_memtable_prefix_bloom_ratio(BUFFER_FILTER_RATIO)
    options.set_memtable_whole_key_filtering(True)


class Store:
    """One RocksDB folder, opened by one process. Keys and values are bytes.

    Raises StoreError, with the folder's name, when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._synced_fd = -1
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder.require_store_or_empty(path)
            _check_families(path)
            _check_log(path)
            cache = Cache(BLOCK_CACHE_BYTES)
            options = _options(cache)
            _filter_buffers(options)
            # Tables go to the disk as they are written: in the kernel's cache they would pile up,
            # and the sync of a commit would wait behind all of it.
            options.set_use_direct_io_for_flush_and_compaction(folder.takes_direct_writes(path))
            options.create_missing_column_families(True)
            # Any: the types of rocksdict do not know that in raw mode all is bytes
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
        self._cuts: list[Deletion] = []  # of chunks, that wait for a table of their own
        self._removed_end = CHUNK_PREFIX  # behind the last chunk that was removed
        self._cut_sequence = self.sequence()  # at the last cut
        self._apart = False  # the chunks' write buffer was empty after the last write
        self._manifest = Manifest(path)
        self._synced_fd = os.open(path / SYNCED_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

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
        takes none of them. Holds the GIL. Under load ranges of chunks go a few writes later.

        A range in one table with new chunks makes that table reach from the oldest chunk to the
        newest, and compaction writes everything in between again. So it waits until it can have a
        table of its own: when a good part of a table is in the write buffer and none is on its way
        to disk, a new buffer is begun after this write. Then ``cut_due`` is True, and ``cut`` is to
        come before the next write.
        """
        batch = WriteBatch(raw_mode=True)
        log = self._log_handle
        cuts = [cut for cut in ranges if cut[0][:1] == CHUNK_PREFIX]
        if cuts and self.sequence() - self._cut_sequence < CUT_CHUNKS_MIN:
            self._remove_chunks(batch, cuts)
            cuts = []
        for begin, end in ranges:
            if begin[:1] != CHUNK_PREFIX:
                batch.delete_range(begin, end)
        for key in deletes:
            batch.delete(key)
        put = batch.put
        for key, value in puts:
            if key[:1] == CHUNK_PREFIX:
                put(key, value, log)
            else:
                put(key, value)
        self._db.write(batch, self._write_options)
        self._cuts += cuts
        if self._cuts:
            self._apart = self._begin_buffer()

    @property
    def put_off(self) -> bool:
        """Whether there are chunks that ``write`` was to remove and has not yet."""
        return bool(self._cuts)

    @property
    def cut_due(self) -> bool:
        """Whether what was put off can go in a table of its own now."""
        return self._apart

    def cut(self) -> None:
        """Removes what was put off."""
        batch = WriteBatch(raw_mode=True)
        self._remove_chunks(batch, self._cuts)
        self._db.write(batch, self._write_options)
        if self._apart:
            self._log.flush(False)
        self._cuts, self._apart = [], False

    def _remove_chunks(self, batch: WriteBatch, ranges: Sequence[Deletion]) -> None:
        self._cut_sequence = self.sequence()
        for begin, end in ranges:
            batch.delete_range(begin, end, self._log_handle)
            self._removed_end = end

    def _begin_buffer(self) -> bool:
        """Begins a new write buffer for chunks, if the one at hand is worth a table and none is
        being written to one: those would become one table. Does not wait for the disk."""
        if (
            self._log_number("num-immutable-mem-table") > 0
            or self._log_number("cur-size-active-mem-table") < WRITE_BUFFER_BYTES // 2
            or self._log_number("num-files-at-level0") > LEVEL0_TABLES_MAX
        ):
            return False
        self._log.flush(False)
        return True

    def _log_number(self, name: str) -> int:
        return int(self._log.property_value(f"rocksdb.{name}") or 0)

    def sync(self, sequence: int) -> None:
        """Makes every write so far durable and notes that ``sequence`` is covered. Helper
        thread."""
        self._db.flush_wal(True)
        self.note_synced(sequence)
        listed = self._manifest.synced()
        if listed is not None:
            write_at(self._synced_fd, listed, _SYNCED.size)

    def note_synced(self, sequence: int) -> None:
        """Notes, without a sync of its own, that writes up to ``sequence`` are on disk."""
        write_at(self._synced_fd, _synced_bytes(sequence), 0)

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        """The values of the keys, None where absent; keys of chunks are not asked together with
        others. Releases the GIL. Raises StoreError."""
        return _get(self._family(keys[0]), keys) if keys else []

    def scan(
        self, begin: bytes, end: bytes, limit: int = 0, *, ahead: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values in [begin, end) in order, at most ``limit`` (0 = all). Raises StoreError
        where the folder is damaged. Holds the GIL. ``ahead``: the range is long and all of it is
        wanted, so each of its tables is read in large steps."""
        for count, entry in enumerate(_walk(self._family(begin), begin, end, ahead=ahead)):
            if limit and count >= limit:
                return
            yield entry

    def _family(self, key: bytes) -> Any:
        return self._log if key[:1] == CHUNK_PREFIX else self._db

    def free_bytes(self) -> int:
        """Bytes a normal process may still write on the file system of the folder."""
        return folder.free_bytes(self.path)

    def unflushed_bytes(self) -> int:
        """Bytes that ``flush`` would write to tables."""
        name = "rocksdb.cur-size-all-mem-tables"
        return sum(int(family.property_int_value(name) or 0) for family in (self._db, self._log))

    def flush(self) -> None:
        """Writes to tables what so far stands in the log only; not before then do the logs leave
        the disk. Any thread; releases the GIL."""
        try:
            self._log.flush(True)
            self._db.flush(True)
        except Exception as error:  # rocksdict raises bare Exception
            raise StoreError(f"flush of the store failed: {error}") from error

    def reclaim(self) -> None:
        """Has what was removed leave the disk now: the logs, and the tables of removed chunks,
        which the next compaction would take with it. Any thread; releases the GIL."""
        self.flush()
        try:
            self._log.compact_range(CHUNK_PREFIX, self._removed_end)
        except Exception as error:  # rocksdict raises bare Exception
            raise StoreError(f"compaction of the store failed: {error}") from error

    def checkpoint(self, to: Path) -> None:
        """Makes the new folder ``to``, on the same file system, hold what the store holds now.
        Holds the GIL, for long unless ``flush`` was called just before. Files that are written to
        later are not shared."""
        try:
            Checkpoint(self._db).create_checkpoint(str(to))
            folder.unshare(to, ".log")
        except Exception as error:  # rocksdict raises bare Exception
            raise StoreError(f"checkpoint of the store failed: {error}") from error

    def close(self) -> None:
        """Closes the folder; the lock is free afterwards."""
        self._log_handle = None  # a handle that is left keeps the folder locked
        self._log.close()
        self._db.close()
        os.close(self._synced_fd)
        self._manifest.close()


class Manifest:
    """RocksDB's list of its tables. It is read up to where it breaks off, as if there had been no
    more; so it is noted how long it was, once that is on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._number = self._size = 0
        self._open()

    def synced(self) -> bytes | None:
        """What to note: None when the list is as it was at the last call."""
        links, size = links_and_size(self._fd)
        if links == 0:  # RocksDB has begun another one
            self._open()
            _, size = links_and_size(self._fd)
        if size == self._size:
            return None
        os.fsync(self._fd)
        self._size = size
        return _LISTED.pack(self._number, self._size, self._number ^ self._size ^ _ONES)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        self.close()
        name = (self._path / "CURRENT").read_text().strip()
        self._number = int(name.rpartition("-")[2])
        self._size = 0
        self._fd = os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC)


def cut_manifest(path: Path) -> str | None:
    """Says that the list of tables is shorter than it was, if that can be told."""
    try:
        noted = (path / SYNCED_NAME).read_bytes()[_SYNCED.size :]
        current = (path / "CURRENT").read_text().strip()
        there = (path / current).stat().st_size
    except (OSError, UnicodeDecodeError):
        return None  # other checks will tell
    if len(noted) != _LISTED.size:
        return None
    number, size, check = _LISTED.unpack(noted)
    if number ^ size ^ _ONES != check or f"MANIFEST-{number:06}" != current or there >= size:
        return None
    return f"{current} has {there} of its {size} bytes"


class Reading:
    """A folder opened without any change to it, by a process that keeps every server out.

    ``skip``: records of the log behind a damaged one are read as well; else reading ends there, as
    a start would. ``scratch`` is an empty folder for links to the files and for what RocksDB wants
    to write down. Raises StoreError.
    """

    def __init__(self, path: Path, scratch: Path, *, skip: bool = False) -> None:
        self._path = path
        self._view = scratch / "view"
        _link(path, self._view)
        self._open(self._view, skip)

    @classmethod
    def listed_again(cls, path: Path, scratch: Path) -> Reading:
        """Opens the tables and logs that can be read, whatever the lists of RocksDB say.

        RocksDB drops what its logs say of a family that no table belongs to, hence a table of
        ours."""
        reading = cls.__new__(cls)
        reading._path, reading._view = path, scratch / "view"
        _link(path, reading._view, ".sst", ".log")
        options = Options(raw_mode=True)
        options.set_db_log_dir(str(scratch))
        try:
            table = _table_of_family(scratch / "family")
            shutil.copyfile(table, reading._view / f"{_highest_number(path) + 1:06}.sst")
            Rdict.repair(str(reading._view), options)
        except Exception as error:  # rocksdict raises bare Exception
            raise StoreError(reading._words(error)) from error
        reading._open(reading._view, skip=True)
        return reading

    def _open(self, path: Path, skip: bool) -> None:
        options = Options(raw_mode=True)
        options.set_db_log_dir(str(path.parent))
        options.create_if_missing(False)
        if skip:
            options.set_wal_recovery_mode(DBRecoveryMode.skip_any_corrupted_record())
        try:
            families = {LOG: Options(raw_mode=True)} if LOG in Rdict.list_cf(str(path)) else None
            self._db: Any = Rdict(str(path), options, families, AccessType.read_only(False))
            self._log: Any = self._db.get_column_family(LOG) if families else None
        except Exception as error:  # rocksdict raises bare Exception
            raise StoreError(self._words(error)) from error

    def _words(self, error: Exception) -> str:
        words = error.message if isinstance(error, StoreError) else str(error)
        return words.replace(str(self._view), str(self._path))

    def unreadable(self) -> list[str]:
        """Names of the tables that were left out when the files were listed again."""
        return sorted(file.name for file in (self._view / "lost").glob("*.sst"))

    def sequence(self) -> int:
        """RocksDB's number of the newest write that was found."""
        return int(self._db.latest_sequence_number())

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        """As of Store; None also where it cannot be read, which ``scan`` tells."""
        family = self._family(keys[0]) if keys else None
        if family is None:
            return [None] * len(keys)
        try:
            return _get(family, keys)
        except StoreError:
            return [None] if len(keys) == 1 else [v for key in keys for v in self.get([key])]

    def scan(
        self, begin: bytes, end: bytes, lost: Callable[[bytes, bytes, str], None]
    ) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values in [begin, end) in order. Where blocks cannot be read ``lost`` is told
        the last key before, the first key or bound behind, and RocksDB's words."""
        family = self._family(begin)
        key = begin
        while family is not None:
            try:
                for entry in _walk(family, key, end, ahead=True):
                    yield entry
                    key = entry[0] + b"\0"
                return
            except StoreError as error:
                behind = _readable_from(family, key, end)
                lost(key, behind, self._words(error))
                key = behind

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        self._db.close()

    def _family(self, key: bytes) -> Any:
        return self._log if key[:1] == CHUNK_PREFIX else self._db


class FolderLock:
    """Keeps servers away from a folder; StoreError when one is at work there."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        if (path / "LOCK").exists():
            self._fd = os.open(path / "LOCK", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._fd)
                raise StoreError(f"data folder {path} is in use by another process") from None

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def synced_sequence(path: Path) -> int:
    """What the file SYNCED of a folder says; 0 when it says nothing."""
    try:
        return _synced_of((path / SYNCED_NAME).read_bytes())
    except FileNotFoundError:
        return 0


def write_synced(path: Path, sequence: int) -> None:
    """Gives a folder its file SYNCED."""
    (path / SYNCED_NAME).write_bytes(_synced_bytes(sequence))


def _link(path: Path, to: Path, *suffixes: str) -> None:
    """Makes the new folder ``to`` hold links to the files of ``path`` with these suffixes, or to
    all; one that rocksdict writes anew at each opening is left out."""
    to.mkdir()
    for file in folder.content(path):
        wanted = not suffixes or file.suffix in suffixes
        if wanted and file.name not in ("LOCK", "rocksdict-config.json"):
            (to / file.name).symlink_to(file.resolve())


def _table_of_family(path: Path) -> Path:
    """A table that belongs to the family of chunks, with a key that is none."""
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    there: Any = Rdict(str(path), options, {LOG: Options(raw_mode=True)})
    chunks = there.get_column_family(LOG)
    chunks.put(b"\0", b"")
    chunks.flush(True)
    chunks.close()
    there.close()
    return next(path.glob("*.sst"))


def _highest_number(path: Path) -> int:
    return max((int(f.stem) for f in path.iterdir() if f.stem.isdecimal()), default=0)


def _synced_of(data: bytes) -> int:
    if len(data) < _SYNCED.size:
        return 0
    sequence, complement = _SYNCED.unpack(data[: _SYNCED.size])
    return int(sequence) if sequence ^ complement == _ONES else 0


def _synced_bytes(sequence: int) -> bytes:
    return _SYNCED.pack(sequence, sequence ^ _ONES)


def _get(family: Any, keys: list[bytes]) -> list[bytes | None]:
    try:
        found: list[bytes | None] = family.get(keys)
    except Exception as error:  # rocksdict raises bare Exception
        raise StoreError(f"read of the store failed: {error}") from error
    return found


def _walk(family: Any, begin: bytes, end: bytes, *, ahead: bool) -> Iterator[tuple[bytes, bytes]]:
    """Not ``items()``, which ends at a damaged block as if nothing came behind it."""
    options = ReadOptions()
    if ahead:
        options.set_readahead_size(READAHEAD_BYTES)
    at = family.iter(options)
    at.seek(begin)
    while at.valid():
        key = at.key()
        if key >= end:
            return
        yield key, at.value()
        at.next()
    try:
        at.status()
    except Exception as error:  # rocksdict raises bare Exception
        raise StoreError(f"read of the store failed: {error}") from error


KEY_BYTES_MAX = 32


def _readable_from(family: Any, key: bytes, end: bytes) -> bytes:
    """The least key behind a damaged block from which reading goes on, or ``end``."""
    at = family.iter()

    def readable(number: int) -> bool:
        at.seek(number.to_bytes(KEY_BYTES_MAX, "big"))
        if at.valid():
            return True
        try:
            at.status()
        except Exception:  # rocksdict raises bare Exception
            return False
        return True

    low, top = (int.from_bytes(bound.ljust(KEY_BYTES_MAX, b"\0"), "big") for bound in (key, end))
    step = 1 << 8 * (KEY_BYTES_MAX - min(len(key), KEY_BYTES_MAX))
    high = min(low + step, top)
    while high < top and not readable(high):
        low, step = high, step * 2
        high = min(low + step, top)
    while high - low > 1:
        middle = (low + high) // 2
        if readable(middle):
            high = middle
        else:
            low = middle
    return end if high == top else high.to_bytes(KEY_BYTES_MAX, "big")


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


def _check_log(path: Path) -> None:
    """RocksDB opens without an error after a damaged byte in the middle of its log, drops what
    follows, and may remove it for good; the noted number tells before that happens."""
    cut = cut_manifest(path)
    if cut is not None:
        raise StoreError(f"data folder {path} is damaged: {cut}; see codeq check")
    synced, logs = synced_sequence(path), logs_of(path)
    if not synced or not logs:
        return
    with tempfile.TemporaryDirectory(prefix="codeq-") as scratch:
        try:
            reading = Reading(path, Path(scratch))
        except StoreError:
            return  # the opening itself will say what is wrong
        found = reading.sequence()
        reading.close()
    if found < synced:
        FolderLock(path).release()  # of a folder in use one may see anything
        raise StoreError(
            f"data folder {path} lost a part of its log ({', '.join(logs)}): writes up to number "
            f"{synced} were synced, only {found} came back; see codeq check"
        )


def logs_of(path: Path) -> list[str]:
    """Names of RocksDB's logs that hold something."""
    return sorted(file.name for file in path.glob("*.log") if file.stat().st_size)


def _open_failure(path: Path, reason: str) -> str:
    if "lock" in reason.lower() and ("hold" in reason.lower() or "unavailable" in reason.lower()):
        return f"data folder {path} is in use by another process"
    return f"cannot open data folder {path}: {reason}"
