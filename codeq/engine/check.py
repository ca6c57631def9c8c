"""Is a data folder sound, and what of a damaged one can be kept.

A check reads everything and changes nothing. A repair writes what is sound into a new store, lets
that start, and puts it in the place of the old one, whose files are kept aside. What a repair keeps
is a state that could have been: records that fit to each other by the rules of the start. What it
gives up it lists. A task whose last records are lost is as it was before them, so it may be done
again; one that is known to have ended is never done again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from codeq.engine import folder, keys
from codeq.engine._engine import Engine
from codeq.engine._salvage import EMPTY_CHUNK, Salvage, created_in, read_directory, task_number
from codeq.engine._views import directory_without
from codeq.engine._wire import format_id
from codeq.engine.clock import Clock
from codeq.engine.deliveries import rests_on
from codeq.engine.reader import chunk_key
from codeq.engine.recovery import META_KEY, recover
from codeq.engine.store import FolderLock, Store
from codeq.engine.stored import BUCKET_TASKS
from codeq.engine.survey import CHUNKS_END, EVERYTHING, Survey
from codeq.errors import StoreError

#: entries made again from the chunks, and not copied
_MADE_AGAIN = (b"d", b"e", b"s")
BATCH_BYTES = 4 << 20
KEYS_AT_ONCE = 500
#: by which keys are filed when nobody knows the window; the start files them again
WINDOW_MS = 86_400_000

Entry = tuple[bytes, bytes]
Keyed = tuple[bytes, bytes, bytes, int, int]  # id, tenant, key, created ms, end of the key ms


class Report(msgspec.Struct, kw_only=True, rename="camel"):
    """What a check found. ``damage``: what is not as it was written; ``given_up``: what a repair
    cannot keep; ``kept_aside``: where the old files are after a repair."""

    folder: str
    sound: bool = True
    repaired: bool = False
    sequence: int = 0
    synced: int = 0
    chunks: int = 0
    records: dict[str, int] = {}
    live_tasks: int = 0
    ended_tasks: int = 0
    dead_letters: int = 0
    directories: int = 0
    keys: int = 0
    webhooks: int = 0
    damage: list[str] = []
    given_up: list[str] = []
    kept_aside: str = ""


def check(path: Path, clock: Clock, *, repair: bool = False, anyway: bool = False) -> Report:
    """Looks at all that is kept in a data folder that no server uses; with ``repair`` makes a
    damaged one fit to start, with ``anyway`` also writes a sound one anew. Raises StoreError: not a
    data folder, in use, or no way to repair it."""
    if not path.is_dir() or not any(entry.name != "LOCK" for entry in path.iterdir()):
        raise StoreError(f"there is no codeq store in {path}")
    lock = FolderLock(path)
    try:
        if repair:
            folder.finish(path)
        elif folder.is_unfinished(path):
            unfinished = "a repair or restore of the folder was interrupted"
            return Report(folder=str(path), sound=False, damage=[unfinished])
        if not any(folder.content(path)):
            raise StoreError(f"there is no codeq store in {path}")
        with tempfile.TemporaryDirectory(prefix="codeq-check-") as scratch:
            return _check(path, Path(scratch), clock, repair, anyway)
    finally:
        lock.release()


def _check(path: Path, scratch: Path, clock: Clock, repair: bool, anyway: bool) -> Report:
    survey = Survey(path, scratch)
    try:
        found = Found(survey, clock)
        found.load(None)
        report = found.report()
        if not repair or (report.sound and not anyway):
            return report
        live = _rebuild(survey, clock, folder.staged(path))
    finally:
        survey.close()
    assert live == report.live_tasks
    aside = folder.adopt(path)
    report.repaired = True
    report.kept_aside = "" if aside is None else str(aside)
    return report


def _rebuild(survey: Survey, clock: Clock, stage: Path) -> int:
    """Writes what can be kept into the folder ``stage`` and starts it; returns the live tasks."""
    target = Store(stage)
    try:
        Found(survey, clock).load(target)
        target.flush()
        target.sync(target.sequence())
        meta = survey.meta
        engine = Engine(seed=0, shard_count=meta.num_shards, payload_memory_bytes=0)
        recover(engine, target, clock, meta.num_shards, 0, meta.key_window_ms)
        engine.verify()
    finally:
        target.close()
    for file in stage.iterdir():
        if file.name.startswith("LO"):  # LOCK, LOG
            file.unlink()
    folder.sync_all(stage)
    return engine.live_tasks


class Found:
    """The chunks of a survey put together again, each record by the rules of the start."""

    def __init__(self, survey: Survey, clock: Clock) -> None:
        self._survey = survey
        self._source = survey.source
        self._now_ms = max(clock.now_ms(), survey.last_id_ms)
        self._salvage = Salvage(
            shard_count=survey.meta.num_shards,
            tail=survey.tail,
            next_seq=survey.next_sequence,
            next_number=survey.next_number,
            last_id_ms=survey.last_id_ms,
        )
        self._damage: list[str] = []
        self._given_up: list[str] = []
        self._gaps: list[tuple[int, int]] = []  # task numbers that were created in lost chunks
        self._top = -1  # highest number created so far
        self._in_gap = False
        self._bound: set[bytes] = set()  # idempotency keys without a sound entry, as filed
        self._target: Store | None = None
        self._puts: list[Entry] = []
        self._put_bytes = 0

    def load(self, target: Store | None) -> None:
        """Reads all that is sound; ``target`` gets what is to be kept."""
        self._target = target
        keyed: list[Keyed] = []
        for sequence, chunk in self._chunks():
            self._look_for_gap(sequence, chunk)
            kept = self._salvage.chunk(chunk, self._survey.gone, keyed)
            self._put(chunk_key(sequence), kept)
            self._made(self._salvage.entries())
            if len(keyed) >= KEYS_AT_ONCE:
                self._check_keys(keyed)
        self._end_gap(self._survey.next_number if self._survey.head_sound else 0)
        try:
            rest = self._salvage.done(self._now_ms)
        except ValueError as error:
            raise StoreError(f"data folder {self._survey.path}: {error}") from error
        # After numbers were left out the bucket that was being filled is closed now.
        self._made(rest, compare=self._survey.head_sound)
        self._write()
        self._check_keys(keyed)
        self._copy_entries()
        self._name_lost()

    def report(self) -> Report:
        survey, salvage = self._survey, self._salvage
        damage = survey.damage + self._damage
        refused = [
            f"a record ({kind}) of task number {number}, which does not fit to what is left"
            for kind, number in salvage.refused
        ]
        return Report(
            folder=str(survey.path),
            sound=not damage and not refused,
            sequence=survey.sequence,
            synced=survey.synced,
            chunks=survey.chunks,
            records=salvage.records,
            live_tasks=salvage.live_tasks,
            ended_tasks=salvage.ended_tasks,
            dead_letters=salvage.dead_letters,
            directories=survey.directories,
            keys=survey.keys,
            webhooks=survey.webhooks,
            damage=damage,
            given_up=survey.given_up + self._given_up + refused,
        )

    # --- chunks

    def _chunks(self) -> Iterator[tuple[int, bytes]]:
        """Every chunk of the log in a row; an empty one stands for each that is lost."""
        survey = self._survey
        expected = survey.tail
        begin = chunk_key(survey.tail)
        for key, chunk in self._source.scan(begin, CHUNKS_END, lambda *_: None):
            sequence = int.from_bytes(key[1:], "big")
            yield from ((lost, EMPTY_CHUNK) for lost in range(expected, sequence))
            yield sequence, EMPTY_CHUNK if sequence in survey.lost else chunk
            expected = sequence + 1
        yield from ((lost, EMPTY_CHUNK) for lost in range(expected, survey.next_sequence))

    def _look_for_gap(self, sequence: int, chunk: bytes) -> None:
        """Numbers rise with the log: those between two chunks were created in the lost ones."""
        if not self._survey.lost:
            return
        if sequence in self._survey.lost:
            self._in_gap = True
            return
        numbers = [task_number(i) for i in created_in(chunk)]
        fresh = [number for number in numbers if number > self._top]
        if fresh:
            self._end_gap(min(fresh))
            self._top = max(fresh)

    def _end_gap(self, end: int) -> None:
        if self._in_gap and self._top + 1 < end:
            self._gaps.append((self._top + 1, end))
        self._in_gap = False

    def _name_lost(self) -> None:
        """Lists what stood in lost chunks, as far as that can be told."""
        survey = self._survey
        for begin, end in survey.lost:
            ids = [i for n in range(begin, end) for i in survey.named.get(n, ())]
            lost = [format_id(i) for i in ids if not self._known(task_number(i))]
            what = f"chunk {begin}" if end == begin + 1 else f"chunks {begin} to {end - 1}"
            tasks = f": tasks {', '.join(lost)}" if lost else ""
            self._given_up.append(
                f"{what}{tasks}; tasks that were only changed there are as they were before"
            )
        for begin, end in self._gaps:
            self._given_up.append(
                f"tasks with the numbers {begin} to {end - 1}, where they are not kept by a later "
                "record"
            )

    # --- entries

    def _made(self, entries: Sequence[Entry], *, compare: bool = True) -> None:
        """Entries that belong beside the chunks: they should be there, and are put."""
        there = self._source.get([key for key, _ in entries])
        for (key, value), found in zip(entries, there, strict=True):
            if key[:1] not in (b"d", b"e"):
                self._put(key, value)
                continue
            left = self._without_purged(key, value, found)
            if left is None:
                continue
            self._put(key, left)
            if compare and self._target is None and not self._survey.lost:
                self._compare(key, left, found)

    def _without_purged(self, key: bytes, value: bytes, there: bytes | None) -> bytes | None:
        """The directory without the tasks that were taken away; None when it has no other.

        When chunks are lost, and with them the records that say so, the one that stands there
        knows as well; then the repair leaves all their records out."""
        survey = self._survey
        used = [number for number, _, _ in _used(key, value)]
        if there is not None and survey.lost and key not in survey.bad_entries:
            kept = {number for number, _, _ in _used(key, there)}
            survey.gone.update(n for n in used if n not in kept and n not in survey.purged)
        away = [n for n in used if n in survey.purged or n in survey.gone]
        if len(away) == len(used):
            return None
        return directory_without(value, away) if away else value

    def _compare(self, key: bytes, value: bytes, there: bytes | None) -> None:
        name = f"directory (key {key[:1].decode()}{key[1:].hex()})"
        if key in self._survey.bad_entries:
            return
        if there is None:
            self._damage.append(f"{name} is missing")
        elif not set(_used(key, value)) <= set(read_directory(key, there) or ()):
            self._damage.append(f"{name} does not fit to the chunks")

    def _check_keys(self, keyed: list[Keyed]) -> None:
        """Every task with an idempotency key that still binds has an entry; one that is missing is
        made again, without its request."""
        window_ms = self._survey.meta.key_window_ms or WINDOW_MS
        binding = [k for k in keyed if self._now_ms < min(k[4], k[3] + window_ms)]
        keyed.clear()
        places = [_places(one, window_ms) for one in binding]
        there = self._source.get([place for own in places for place in own])
        gone = self._survey.gone | self._survey.purged
        for i, (task_id, tenant, key, created_ms, _) in enumerate(binding):
            found = there[2 * i : 2 * i + 2]
            sound = [
                value
                for place, value in zip(places[i], found, strict=True)
                if value is not None and place not in self._survey.bad_entries
            ]
            if sound or places[i][0] in self._bound or task_number(task_id) in gone:
                continue
            self._bound.add(places[i][0])
            self._damage.append(
                f"idempotency key {key.decode('utf-8', 'replace')!r} of tenant "
                f"{tenant.decode('utf-8', 'replace')} has no sound entry (task "
                f"{format_id(task_id)}); a repair binds it again, to any request"
            )
            known = keys.Known(task_id, keys.UNKNOWN_REQUEST, created_ms)
            self._put(places[i][0], keys.entry_of(known))

    def _copy_entries(self) -> None:
        """Keeps what cannot be made again. The key of a task that is lost is free all the same."""
        for key, value in self._source.scan(*EVERYTHING, lambda *_: None):
            kind = key[:1]
            if kind in _MADE_AGAIN or key in self._survey.bad_entries or key == b"mhead":
                continue
            if self._target is None or key == META_KEY:
                continue
            if kind != b"w" or self._can_rest(key, value):
                self._put(key, value)
        self._put(META_KEY, msgspec.json.encode(self._survey.meta))
        self._write()

    def _can_rest(self, key: bytes, value: bytes) -> bool:
        """Whether what a pending webhook rests on is kept."""
        resting = rests_on(key, value)
        if resting is None:
            return True
        survey, number = self._survey, task_number(resting.task_id)
        away = survey.gone | {refused for _, refused in self._salvage.refused}
        records = (resting.created, resting.ended)
        return (
            number not in away
            and min(records) >= survey.tail
            and not any(record in survey.lost for record in records)
        )

    def _known(self, number: int) -> bool:
        """Whether the task is among those that are kept."""
        if self._salvage.knows(number):
            return True
        if number in self._survey.gone:
            return False
        where = [
            b"d" + (number // BUCKET_TASKS).to_bytes(8, "big"),
            b"e" + number.to_bytes(8, "big"),
        ]
        there = (self._target or self._source).get(where)
        return any(
            number == found and min(created, ended) >= self._survey.tail
            for key, value in zip(where, there, strict=True)
            if value is not None
            for found, created, ended in read_directory(key, value) or ()
        )

    # --- writing

    def _put(self, key: bytes, value: bytes) -> None:
        if self._target is None:
            return
        self._puts.append((key, value))
        self._put_bytes += len(key) + len(value)
        if self._put_bytes >= BATCH_BYTES:
            self._write()

    def _write(self) -> None:
        if self._target is not None and self._puts:
            self._target.write(self._puts)
            self._puts, self._put_bytes = [], 0


def _used(key: bytes, value: bytes) -> list[tuple[int, int, int]]:
    return read_directory(key, value) or []


def _places(keyed: Keyed, window_ms: int) -> list[bytes]:
    """Where the entry of a keyed task stands; the second when the clock had been set back."""
    _, tenant, key, created_ms, _ = keyed
    hashed = keys.hash_of(tenant, key)
    return [keys.key_of(hashed, created_ms + plus, window_ms) for plus in (0, window_ms)]
