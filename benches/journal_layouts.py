"""Which layout on disk carries the most task lives per second, with sync and with removal on?

A life is three records: *created* (about 330 bytes, 200 of them payload), *claimed* (about 40)
and *ended* (about 90, 40 of them result). Three layouts are compared:

``keys``
    One key per record: body ``b`` + id, claim ``s`` + id, end ``e`` + id.
    Removal: one ``delete_range`` per prefix over a run of ids.
``middle``
    Created and claimed records in chunks ``c`` + sequence of up to 32 records or 8 KB; each end
    its own key ``e`` + id, which also says where the created record stands.
    Removal: ``delete_range`` over runs of chunks and over runs of ids in ``e``.
``chunks``
    Everything in chunks; the claims of one batch share a record of 16 bytes a claim; one
    directory key ``d`` + bucket per 256 tasks, written when all of them have ended.
    Removal: ``delete_range`` from the tail of ``c`` and from the tail of ``d``.

Method: a commit group is one batch of creates, one of claims and one of ends. The main thread
collects a group while a helper thread syncs the one before (``flush_wal(True)``); when that sync
has ended the group becomes one ``db.write``. Ended tasks are removed after ``--retention``
seconds; what happens before one retention and a half has passed is warm-up and not counted.
The layouts alternate inside a run. Record bytes are joined from prepared pieces (half of them
text, so that compression finds something), because the question is about RocksDB reached
through rocksdict and not about a codec.

Not covered: reads, recovery, stragglers in old chunks, the network. Compare figures only within
one run of this program.

    python -m benches.journal_layouts --seconds 60 --batch 256 --batch 1024 --runs 2
    python -m benches.journal_layouts --sweep --seconds 30     # store options, layout ``chunks``
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import platform
import queue
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rocksdict import (
    BlockBasedOptions,
    Cache,
    DBCompactionStyle,
    DBCompressionType,
    Options,
    Rdict,
    WriteBatch,
)

from benches.layouts import END_LAG, LAYOUTS, MB, POOL_RECORDS, Layout, Range, Tape

REMOVAL_EVERY_S = 0.25


@dataclass(frozen=True)
class StoreOptions:
    """The RocksDB settings this bench may vary."""

    write_buffer_mb: int = 32
    recycle_log_file_num: int = 4
    compression: str = "none"
    style: str = "level"
    l0_trigger: int = 8
    bytes_per_sync_kb: int = 0
    background_jobs: int = 2

    def label(self) -> str:
        text = f"wb{self.write_buffer_mb} rec{self.recycle_log_file_num} {self.compression}"
        text += f" {self.style} l0={self.l0_trigger} jobs{self.background_jobs}"
        return text + (f" bps{self.bytes_per_sync_kb}k" if self.bytes_per_sync_kb else "")

    def build(self) -> Options:
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.enable_statistics()
        options.set_write_buffer_size(self.write_buffer_mb * MB)
        options.set_max_write_buffer_number(4)
        options.set_recycle_log_file_num(self.recycle_log_file_num)
        options.set_compression_type(getattr(DBCompressionType, self.compression)())
        if self.style == "universal":
            options.set_compaction_style(DBCompactionStyle.universal())
        options.set_level_zero_file_num_compaction_trigger(self.l0_trigger)
        options.set_level_zero_slowdown_writes_trigger(200)
        options.set_level_zero_stop_writes_trigger(400)
        options.set_soft_pending_compaction_bytes_limit(0)
        options.set_hard_pending_compaction_bytes_limit(0)
        options.set_max_background_jobs(self.background_jobs)
        options.set_max_bytes_for_level_base(512 * MB)
        options.set_target_file_size_base(64 * MB)
        options.set_bytes_per_sync(self.bytes_per_sync_kb << 10)
        table = BlockBasedOptions()
        table.set_block_cache(Cache(32 * MB))
        options.set_block_based_table_factory(table)
        return options


# --- writing it ----------------------------------------------------------------------------


class Syncer:
    """One helper thread that syncs the log; at most one sync is under way."""

    def __init__(self, db: Rdict) -> None:
        self._db = db
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._running = False
        self.seconds: list[float] = []
        self.cpu_s = 0.0
        self._thread = threading.Thread(target=self._work, name="sync")
        self._thread.start()

    def start(self) -> None:
        self._running = True
        self._asked.put(True)

    def wait(self) -> None:
        if self._running:
            failure = self._done.get()
            self._running = False
            if failure is not None:
                raise failure

    def stop(self) -> None:
        self._asked.put(False)
        self._thread.join()

    def _work(self) -> None:
        while self._asked.get():
            failure: BaseException | None = None
            start = time.perf_counter()
            try:
                self._db.flush_wal(True)
            except BaseException as error:  # handed to the main thread, which raises it
                failure = error
            self.seconds.append(time.perf_counter() - start)
            self.cpu_s = time.thread_time()
            self._done.put(failure)


@dataclass
class Meter:
    """Running totals; a copy taken at the end of warm-up is subtracted from the final one."""

    lives: int = 0
    wall_s: float = 0.0
    process_cpu_s: float = 0.0
    main_cpu_s: float = 0.0
    sync_cpu_s: float = 0.0
    put_cpu_s: float = 0.0
    write_cpu_s: float = 0.0
    wal_bytes: int = 0
    flush_bytes: int = 0
    compact_bytes: int = 0
    io_write_bytes: int = 0
    stall_us: int = 0

    def minus(self, other: Meter) -> Meter:
        names = [field.name for field in dataclasses.fields(self)]
        return Meter(**{name: getattr(self, name) - getattr(other, name) for name in names})


class Writer:
    """Runs one layout over one store: collect, write, sync, remove."""

    def __init__(
        self, layout: Layout, db: Rdict, options: Options, path: Path, retention_s: float
    ) -> None:
        self.layout = layout
        self.db = db
        self.meter = Meter()
        self.write_s: list[float] = []
        self.commit_at: list[float] = []
        self.disk_mb: list[float] = []
        self._options = options
        self._path = path
        self._retention_s = retention_s
        self._batch = layout.tape.batch
        self._group = 0
        self._ended_at: deque[float] = deque()  # of the groups from layout.tail on
        self._next_removal = time.perf_counter() + retention_s
        self._next_sample = 0.0
        self.syncer = Syncer(db)

    def run(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self._commit()

    def forget(self) -> None:
        """Drops the times of the warm-up."""
        for times in (self.write_s, self.commit_at, self.syncer.seconds):
            times.clear()

    def finish(self) -> None:
        try:
            self.syncer.wait()
        finally:
            self.syncer.stop()

    def read_meter(self) -> Meter:
        """A copy of the totals with the process and RocksDB counters read now."""
        meter = dataclasses.replace(self.meter)
        meter.wall_s = time.perf_counter()
        meter.process_cpu_s = time.process_time()
        meter.main_cpu_s = time.thread_time()
        meter.sync_cpu_s = self.syncer.cpu_s
        text = self._options.get_statistics() or ""
        meter.wal_bytes = _counter(text, "rocksdb.wal.bytes")
        meter.flush_bytes = _counter(text, "rocksdb.flush.write.bytes")
        meter.compact_bytes = _counter(text, "rocksdb.compact.write.bytes")
        meter.stall_us = _counter(text, "rocksdb.stall.micros")
        meter.io_write_bytes = _io_write_bytes()
        return meter

    def _commit(self) -> None:
        now = time.perf_counter()
        puts = self.layout.puts(self._group)
        ranges = self._expired(now)
        batch = WriteBatch(raw_mode=True)
        start = time.thread_time()
        put = batch.put
        for key, value in puts:
            put(key, value)
        for low, high in ranges:
            batch.delete_range(low, high)
        self.meter.put_cpu_s += time.thread_time() - start
        self.syncer.wait()
        self._write(batch)
        self.syncer.start()
        self._group += 1
        if self._group > END_LAG:
            self._ended_at.append(now)
            self.meter.lives += self._batch
        self._sample(now)

    def _write(self, batch: WriteBatch) -> None:
        cpu, start = time.thread_time(), time.perf_counter()
        self.db.write(batch)
        end = time.perf_counter()
        self.meter.write_cpu_s += time.thread_time() - cpu
        self.write_s.append(end - start)
        self.commit_at.append(end)

    def _expired(self, now: float) -> list[Range]:
        if now < self._next_removal:
            return []
        self._next_removal = now + REMOVAL_EVERY_S
        count = 0
        while self._ended_at and self._ended_at[0] < now - self._retention_s:
            self._ended_at.popleft()
            count += 1
        return self.layout.removal(self.layout.tail + count) if count else []

    def _sample(self, now: float) -> None:
        if now >= self._next_sample:
            self._next_sample = now + 1.0
            self.disk_mb.append(_disk_mb(self._path))


def _counter(text: str, name: str) -> int:
    found = re.search(rf"^{re.escape(name)} COUNT : (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _io_write_bytes() -> int:
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    found = re.search(r"^write_bytes: (\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _disk_mb(path: Path) -> float:
    total = 0
    for entry in os.scandir(path):
        try:
            total += entry.stat().st_blocks * 512
        except FileNotFoundError:  # removed by RocksDB since the listing
            continue
    return total / MB


# --- one cell of the table -----------------------------------------------------------------


@dataclass
class Cell:
    """The figures of one layout, batch and set of options in one run."""

    layout: str
    batch: int
    options: str
    lives_per_s: float
    write_cpu: float  # this and the next five: CPU seconds per 100,000 lives
    put_cpu: float
    build_cpu: float
    sync_cpu: float
    background_cpu: float
    process_cpu: float
    wal_bytes: float  # this and the next three: bytes per life
    flush_bytes: float
    compact_bytes: float
    io_bytes: float
    sync_p50_ms: float
    sync_p99_ms: float
    write_p50_ms: float
    write_p99_ms: float
    write_max_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    stall_s: float
    disk_mid_mb: float
    disk_end_mb: float
    disk_max_mb: float
    first_key_seek_ms: float


def measure(
    name: str, batch: int, store: StoreOptions, seconds: float, retention_s: float, scratch: Path
) -> Cell:
    """Runs one cell in a fresh store and removes it again."""
    path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=scratch))
    options = store.build()
    db = Rdict(str(path), options)
    try:
        writer = Writer(LAYOUTS[name](Tape(batch)), db, options, path, retention_s)
        try:
            warm_s = min(retention_s * 1.5, seconds / 2)
            writer.run(warm_s)
            before = writer.read_meter()
            writer.forget()
            writer.run(seconds - warm_s)
            spent = writer.read_meter().minus(before)
        finally:
            writer.finish()
        seek_ms = _check_removed(db, writer.layout)
        return _cell(writer, store, spent, seek_ms)
    finally:
        db.close()
        shutil.rmtree(path)


def _check_removed(db: Rdict, layout: Layout) -> float:
    """Each prefix must begin with the first key not removed; returns the slowest seek in ms."""
    slowest = 0.0
    for key in layout.first_keys():
        start = time.perf_counter()
        cursor = db.iter()
        cursor.seek(key[:1])
        slowest = max(slowest, time.perf_counter() - start)
        if not cursor.valid() or cursor.key() != key:
            raise AssertionError(f"{layout.name}: prefix {key[:1]!r} does not begin with {key!r}")
        del cursor  # a live iterator keeps the store locked after close
    return slowest * 1e3


def _cell(writer: Writer, store: StoreOptions, spent: Meter, seek_ms: float) -> Cell:
    per_100k, per_life = 1e5 / spent.lives, 1 / spent.lives
    writes = [s * 1e3 for s in writer.write_s]
    syncs = [s * 1e3 for s in writer.syncer.seconds]
    gaps = [(b - a) * 1e3 for a, b in itertools.pairwise(writer.commit_at)]
    disk = writer.disk_mb[len(writer.disk_mb) // 3 :]
    half = len(disk) // 2
    build = spent.main_cpu_s - spent.put_cpu_s - spent.write_cpu_s
    background = spent.process_cpu_s - spent.main_cpu_s - spent.sync_cpu_s
    return Cell(
        layout=writer.layout.name,
        batch=writer.layout.tape.batch,
        options=store.label(),
        lives_per_s=spent.lives / spent.wall_s,
        write_cpu=spent.write_cpu_s * per_100k,
        put_cpu=spent.put_cpu_s * per_100k,
        build_cpu=build * per_100k,
        sync_cpu=spent.sync_cpu_s * per_100k,
        background_cpu=background * per_100k,
        process_cpu=spent.process_cpu_s * per_100k,
        wal_bytes=spent.wal_bytes * per_life,
        flush_bytes=spent.flush_bytes * per_life,
        compact_bytes=spent.compact_bytes * per_life,
        io_bytes=spent.io_write_bytes * per_life,
        sync_p50_ms=percentile(syncs, 50),
        sync_p99_ms=percentile(syncs, 99),
        write_p50_ms=percentile(writes, 50),
        write_p99_ms=percentile(writes, 99),
        write_max_ms=max(writes),
        gap_p99_ms=percentile(gaps, 99),
        gap_max_ms=max(gaps),
        stall_s=spent.stall_us / 1e6,
        disk_mid_mb=statistics.fmean(disk[:half] or disk),
        disk_end_mb=statistics.fmean(disk[half:]),
        disk_max_mb=max(disk),
        first_key_seek_ms=seek_ms,
    )


def percentile(values: list[float], rank: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * rank / 100))] if ordered else 0.0


# --- the table -----------------------------------------------------------------------------

COLUMNS: list[tuple[str, str, str]] = [
    ("lives/s", "lives_per_s", ",.0f"),
    ("write", "write_cpu", ".3f"),
    ("put", "put_cpu", ".3f"),
    ("build", "build_cpu", ".3f"),
    ("sync", "sync_cpu", ".3f"),
    ("rocks bg", "background_cpu", ".3f"),
    ("process", "process_cpu", ".3f"),
    ("WAL B", "wal_bytes", ".0f"),
    ("flush B", "flush_bytes", ".0f"),
    ("compact B", "compact_bytes", ".0f"),
    ("io B", "io_bytes", ".0f"),
    ("sync p50", "sync_p50_ms", ".2f"),
    ("p99", "sync_p99_ms", ".2f"),
    ("write p50", "write_p50_ms", ".2f"),
    ("p99", "write_p99_ms", ".2f"),
    ("max", "write_max_ms", ".0f"),
    ("gap p99", "gap_p99_ms", ".1f"),
    ("max", "gap_max_ms", ".0f"),
    ("stall s", "stall_s", ".2f"),
    ("disk MB mid", "disk_mid_mb", ".0f"),
    ("end", "disk_end_mb", ".0f"),
    ("max", "disk_max_mb", ".0f"),
    ("seek ms", "first_key_seek_ms", ".1f"),
]
WORST_OF_RUNS = {"write_max_ms", "gap_max_ms", "disk_max_mb", "first_key_seek_ms"}

LEGEND = """\
write, put, build, sync, rocks bg, process: CPU seconds per 100,000 lives (db.write; filling the
WriteBatch; the rest of the main thread; the helper thread; RocksDB's own threads; everything).
WAL, flush, compact, io: bytes written per life (RocksDB's counters; write_bytes of /proc/self/io).
sync, write, gap (commit to commit), seek (first live key of a prefix): ms. stall: RocksDB's count.
Medians over the runs, except max and seek: the worst. disk: what the files occupy after the first
third of a cell; mid and end are the means of the two halves of that."""


def merge(cells: list[Cell]) -> dict[str, Any]:
    """One row of the table from the runs of one layout, batch and set of options."""
    row: dict[str, Any] = {name: getattr(cells[0], name) for name in ("layout", "batch", "options")}
    for _, field, _ in COLUMNS:
        values = [getattr(cell, field) for cell in cells]
        row[field] = max(values) if field in WORST_OF_RUNS else statistics.median(values)
    return row


def rows_of(cells: list[Cell]) -> list[dict[str, Any]]:
    grouped: dict[tuple[int, str, str], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.batch, cell.options, cell.layout), []).append(cell)
    return [merge(group) for group in grouped.values()]


def print_table(rows: list[dict[str, Any]], with_options: bool) -> None:
    names = ["batch", "layout", "options"] if with_options else ["batch", "layout"]
    lines = [names + [title for title, _, _ in COLUMNS]]
    for row in rows:
        figures = [format(row[field], spec) for _, field, spec in COLUMNS]
        lines.append([str(row[name]) for name in names] + figures)
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    print(LEGEND)


def print_ratios(rows: list[dict[str, Any]]) -> None:
    rates = {(row["batch"], row["layout"]): row["lives_per_s"] for row in rows}
    for batch in dict.fromkeys(row["batch"] for row in rows):
        for other in ("middle", "keys"):
            if (batch, "chunks") in rates and (batch, other) in rates:
                ratio = rates[batch, "chunks"] / rates[batch, other]
                print(f"batch {batch}: chunks / {other} = {ratio:.2f}")


def environment(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    git = ["git", "rev-parse", "--short", "--verify", "--quiet", "HEAD"]
    here = Path(__file__).parent
    commit = subprocess.run(git, cwd=here, capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    processor = model[1] if model else platform.processor()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.platform()}",
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "rocksdict": metadata.version("rocksdict"),
        "commit": commit.stdout.strip() or "none",
        "disk": f"append + fdatasync of 4 KB: p50 {probe_sync_ms(scratch):.2f} ms",
        "mode": f"sync on, removal on, retention {args.retention} s, {args.seconds} s a cell, "
        f"{args.runs} runs, GIL switch interval {args.switch_us} us"
        + (", quick" if args.quick else ""),
    }


def probe_sync_ms(scratch: Path) -> float:
    took = []
    with tempfile.TemporaryFile(dir=scratch, buffering=0) as file:
        for _ in range(200):
            start = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - start) * 1e3)
    return percentile(took, 50)


# --- the program ---------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    base = StoreOptions()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=60, help="length of one cell, warm-up included")
    add("--batch", type=int, action="append", help="tasks a batch, repeatable (256 and 1024)")
    add("--layout", choices=sorted(LAYOUTS), action="append", help="repeatable (all three)")
    add("--runs", type=int, default=2)
    add("--retention", type=float, default=6.0, help="seconds an ended task is kept")
    add("--quick", action="store_true", help="one short run: does it work at all?")
    add("--sweep", action="store_true", help="vary the store options, layout chunks")
    add("--json", type=Path, help="write the figures of every cell to this file")
    add("--dir", type=Path, help="where the scratch folder goes (the temporary folder)")
    add("--switch-us", type=int, default=100, help="GIL switch interval; Python's default is 5000")
    add("--write-buffer-mb", type=int, default=base.write_buffer_mb)
    add("--recycle-log-file-num", type=int, default=base.recycle_log_file_num)
    add("--compression", choices=("none", "lz4", "zstd"), default=base.compression)
    add("--style", choices=("level", "universal"), default=base.style)
    add("--l0-trigger", type=int, default=base.l0_trigger)
    add("--bytes-per-sync-kb", type=int, default=base.bytes_per_sync_kb)
    add("--background-jobs", type=int, default=base.background_jobs)
    args = parser.parse_args(argv)
    if args.quick:
        args.seconds, args.retention = min(args.seconds, 4.0), min(args.retention, 1.0)
        args.runs = 1
    args.batch = args.batch or [256, 1024]
    args.layout = args.layout or (["chunks"] if args.sweep else list(LAYOUTS))
    if not all(0 < batch <= POOL_RECORDS for batch in args.batch):
        parser.error(f"--batch must be between 1 and {POOL_RECORDS}")
    return args


def variants(args: argparse.Namespace) -> list[StoreOptions]:
    names = [field.name for field in dataclasses.fields(StoreOptions)]
    base = StoreOptions(**{name: getattr(args, name) for name in names})
    if not args.sweep:
        return [base]
    changes: list[dict[str, Any]] = [
        {},
        {"write_buffer_mb": 16},
        {"write_buffer_mb": 64},
        {"recycle_log_file_num": 0},
        {"compression": "lz4"},
        {"style": "universal"},
        {"l0_trigger": 32},
        {"bytes_per_sync_kb": 1024},
    ]
    return [dataclasses.replace(base, **change) for change in changes]


def cells(args: argparse.Namespace, scratch: Path) -> Iterator[Cell]:
    for run in range(args.runs):
        for batch in args.batch:
            for store in variants(args):
                for name in args.layout:
                    cell = measure(name, batch, store, args.seconds, args.retention, scratch)
                    note = f"run {run + 1}: {name} batch {batch} [{store.label()}] "
                    note += (
                        f"{cell.lives_per_s:,.0f} lives/s, longest write {cell.write_max_ms:.0f} ms"
                    )
                    print(note, file=sys.stderr, flush=True)
                    yield cell


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sys.setswitchinterval(args.switch_us / 1e6)
    with tempfile.TemporaryDirectory(prefix="journal-layouts-", dir=args.dir) as folder:
        facts = environment(args, Path(folder))
        measured = list(cells(args, Path(folder)))
    rows = rows_of(measured)
    for name, value in facts.items():
        print(f"{name}: {value}")
    if not args.sweep:
        print(f"options: {measured[0].options}")
    print_table(rows, with_options=args.sweep)
    print_ratios(rows)
    if args.json:
        facts["cells"] = [dataclasses.asdict(cell) for cell in measured]
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
