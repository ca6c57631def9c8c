"""What stands in a data folder that may be damaged: a first look that only tells sound from not.

Nothing here changes the folder. What cannot be read or is not what was written becomes a line of
``damage``; the numbers of what is there are what a salvage needs (check.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path

from codeq.engine import keys, pauses, policies, subscriptions
from codeq.engine._salvage import (
    chunk_sound,
    created_in,
    read_directory,
    read_head,
    segment_sound,
    task_number,
)
from codeq.engine._views import CorruptRecord
from codeq.engine._wire import format_id
from codeq.engine.deliveries import rests_on
from codeq.engine.reader import SEGMENT_CHUNKS, chunk_key
from codeq.engine.recovery import FORMAT, HEAD_KEY, META_KEY, Meta, read_meta
from codeq.engine.store import Reading, cut_manifest, logs_of, synced_sequence
from codeq.engine.stored import BUCKET_TASKS
from codeq.errors import StoreError

CHUNKS_END = b"d"
EVERYTHING = (b"\0", b"\xff")
#: numbers left out behind the highest that is known to be used, when the head cannot be trusted
NUMBERS_LEFT_OUT = 1 << 20
CHUNK_CREATES = 32
_RULES: dict[bytes, tuple[str, Callable[[bytes, bytes], object]]] = {
    pauses.PREFIX: ("pause of queue", pauses.read_entry),
    policies.PREFIX: ("topic policy", policies.read_entry),
    subscriptions.PREFIX: ("subscription", subscriptions.read_entry),
}


class Ranges:
    """Ascending ranges [begin, end) of sequence numbers."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int) -> None:
        """Adds numbers behind all that are there."""
        if self._ends and self._ends[-1] == begin:
            self._ends[-1] = end
        elif begin < end:
            self._begins.append(begin)
            self._ends.append(end)

    def __contains__(self, number: object) -> bool:
        assert isinstance(number, int)
        at = bisect_right(self._begins, number) - 1
        return at >= 0 and number < self._ends[at]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._begins, self._ends, strict=True)

    def __bool__(self) -> bool:
        return bool(self._begins)


class Survey:
    """Opens the folder ``path`` for reading and looks at every chunk and entry once."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self.path = path
        self.damage: list[str] = []
        self.given_up: list[str] = []
        self.chunks = self.directories = self.webhooks = self.keys = 0
        self.lost = Ranges()  # chunks that are missing or damaged
        self.named: dict[int, list[bytes]] = {}  # by damaged chunk: ids that it seems to hold
        self.purged: set[int] = set()  # numbers of tasks that were taken away
        self.gone: set[int] = set()  # numbers of tasks that have ended, and whose records are lost
        self.bad_entries: set[bytes] = set()  # keys of entries that are not what was written
        self.head_sound = True
        self._top_number = -1
        self._top_sequence = 0
        self._top_ms = 0
        self.synced = synced_sequence(path)
        self.source, self.sequence = self._open(scratch)
        self._read_head()
        self._look_at_chunks()
        self._look_at_entries()
        self._look_at_segments()

    def close(self) -> None:
        self.source.close()

    # --- opening

    def _open(self, scratch: Path) -> tuple[Reading, int]:
        cut = cut_manifest(self.path)
        if cut is not None:
            return self._open_again(scratch, cut)
        try:
            source = Reading(self.path, _new(scratch / "listed"))
        except StoreError as error:
            return self._open_again(scratch, f"the folder cannot be opened: {error.message}")
        found = source.sequence()
        if found < self.synced:
            self._note_lost_log(found)
            source.close()
            source = Reading(self.path, _new(scratch / "skipping"), skip=True)
        return source, found

    def _open_again(self, scratch: Path, why: str) -> tuple[Reading, int]:
        """Reads the tables and logs that can be read, whatever the lists of RocksDB say."""
        source = Reading.listed_again(self.path, _new(scratch / "again"))
        found = source.sequence()
        self.head_sound = False
        self.damage.append(why)
        if source.unreadable() or ".sst" in why:
            names = ", ".join(source.unreadable()) or "that is named above"
            self.given_up.append(f"table {names}: all that stood only there")
        if found < self.synced:
            self._note_lost_log(found)
        return source, found

    def _note_lost_log(self, found: int) -> None:
        self.head_sound = False
        logs = ", ".join(logs_of(self.path)) or "no log is left"
        self.damage.append(
            f"the log ({logs}) is damaged: writes up to number {self.synced} were synced, only "
            f"{found} can be read in a row"
        )
        self.given_up.append(
            f"writes with the numbers {found + 1} to {self.synced}, but for what is found again "
            "behind the damage: tasks may be missing, and others as they were before"
        )

    # --- head and format

    def _has_log(self) -> bool:
        """Whether there was ever a task: the first one brings the head, too."""
        return any(
            True
            for prefix in (b"c", b"d", b"e", b"s")
            for _ in self.source.scan(prefix, prefix + b"\xff" * 9, lambda *_: None)
        )

    def _read_head(self) -> None:
        values = self.source.get([HEAD_KEY, META_KEY])
        head = None if values[0] is None else read_head(values[0])
        meta = None if values[1] is None else read_meta(values[1])
        if head is None:
            head = (FORMAT, 0, 0, 0, 0, 0, 0)
            if values[0] is not None or self._has_log():
                self._entry_damaged("head", HEAD_KEY, "missing" if values[0] is None else "damaged")
                self.head_sound = False
        if meta is None:
            self._entry_damaged("format", META_KEY, "missing" if values[1] is None else "damaged")
            meta = Meta(format=FORMAT, num_shards=head[1] or 1)
        if {meta.format, head[0]} != {FORMAT}:
            raise StoreError(
                f"data folder {self.path} has format {meta.format}, this codeq reads {FORMAT}"
            )
        self.meta = meta
        _, _, self._next_number, self._last_id_ms, self.next_sequence, self.start, self.tail = head

    def _entry_damaged(self, what: str, key: bytes, how: str = "damaged") -> None:
        name = key.decode() if key[:1] == b"m" else key[:1].decode() + key[1:].hex()
        self.damage.append(f"{what} (key {name}) is {how}")
        self.bad_entries.add(key)

    # --- chunks

    def _look_at_chunks(self) -> None:
        begin = chunk_key(self.tail)
        expected = self.tail
        for key, chunk in self.source.scan(begin, CHUNKS_END, self._unreadable("chunks")):
            sequence = int.from_bytes(key[1:], "big")
            if not self.tail:  # the head is lost: the log begins with what is there
                self.tail = expected = self.start = max(1, sequence)
            self._missing(expected, sequence)
            expected = sequence + 1
            self.chunks += 1
            if not chunk_sound(chunk, self.purged):
                self.damage.append(f"chunk {sequence} is damaged")
                self.named[sequence] = created_in(chunk)
                self.lost.add(sequence, expected)
            if not self.head_sound or sequence >= self.next_sequence:
                self._saw_ids(created_in(chunk))
        if expected > self.next_sequence:
            if self.head_sound:
                self.damage.append(f"head (key mhead) is older than chunk {expected - 1}")
            self.head_sound = False
            self.next_sequence = expected
        self._missing(expected, self.next_sequence)
        self.tail = max(self.tail, 1)
        self.next_sequence = max(self.next_sequence, self.tail)

    def _missing(self, begin: int, end: int) -> None:
        if begin < end:
            self.damage.append(f"{_chunks(begin, end)} missing")
            self.lost.add(begin, end)

    def _saw_ids(self, ids: list[bytes]) -> None:
        for task_id in ids:
            self._top_number = max(self._top_number, task_number(task_id))
            self._top_ms = max(self._top_ms, int.from_bytes(task_id[:6], "big"))

    def _unreadable(self, what: str) -> Callable[[bytes, bytes, str], None]:
        def lost(before: bytes, behind: bytes, why: str) -> None:
            self.damage.append(f"{what} behind {before.hex()} and before {behind.hex()}: {why}")

        return lost

    # --- entries beside the chunks

    def _look_at_entries(self) -> None:
        looks = {
            b"d": self._look_at_directory,
            b"e": self._look_at_directory,
            b"k": self._look_at_key,
            b"w": self._look_at_webhook,
            b"p": self._look_at_rule,
        }
        for key, value in self.source.scan(*EVERYTHING, self._unreadable("entries")):
            look = looks.get(key[:1])
            if look is not None:
                look(key, value)
        if self._top_sequence >= self.next_sequence:
            self.lost.add(self.next_sequence, self._top_sequence + 1)
            self.damage.append(f"{_chunks(self.next_sequence, self._top_sequence + 1)} missing")
            self.next_sequence = self._top_sequence + 1
            self.head_sound = False

    def _look_at_directory(self, key: bytes, value: bytes) -> None:
        found = read_directory(key, value)
        if found is None:
            self._entry_damaged("directory", key)
            return
        self.directories += 1
        for number, created, ended in found:
            self._top_number = max(self._top_number, number)
            self._top_sequence = max(self._top_sequence, created, ended)
            kept = min(created, ended) >= self.tail
            if kept and self.lost and (created in self.lost or ended in self.lost):
                self.gone.add(number)
                self._name_gone(number, created, ended)

    def _name_gone(self, number: int, created: int, ended: int) -> None:
        name = f"number {number}"
        if created not in self.lost:
            [chunk] = self.source.get([chunk_key(created)])
            ids = [i for i in created_in(chunk or b"") if task_number(i) == number]
            name = format_id(ids[0]) if ids else name
        lost = ended if ended in self.lost else created
        self.given_up.append(f"task {name}, which had ended: its record in chunk {lost} is lost")

    def _look_at_key(self, key: bytes, value: bytes) -> None:
        try:
            known = keys.read_entry(key, value)
        except StoreError:
            self._entry_damaged("idempotency key", key)
            return
        self.keys += 1
        self._saw_ids([known.task_id])

    def _look_at_webhook(self, key: bytes, value: bytes) -> None:
        try:
            resting = rests_on(key, value)
        except (CorruptRecord, ValueError):
            self._entry_damaged("pending webhook", key)
            self.given_up.append(f"pending webhook {key.hex()}")
            return
        self.webhooks += 1
        if resting is None:
            return
        self._saw_ids([resting.task_id])
        self._top_sequence = max(self._top_sequence, resting.created, resting.ended)
        if resting.created in self.lost or resting.ended in self.lost:
            self.given_up.append(f"pending webhook of task {format_id(resting.task_id)}")

    def _look_at_rule(self, key: bytes, value: bytes) -> None:
        what, read = _RULES.get(key[:2], ("", lambda *_: None))
        try:
            read(key, value)
        except StoreError:
            self._entry_damaged(what, key)
            name = key[2:].replace(b"\0", b" ").decode("utf-8", "replace")
            self.given_up.append(f"{what} {name}")

    def _look_at_segments(self) -> None:
        there = set()
        for key, value in self.source.scan(b"s", b"t", lambda *_: None):
            if segment_sound(value):
                there.add(int.from_bytes(key[1:], "big"))
            else:
                self._entry_damaged("segment", key)
        for segment in range(self.tail // SEGMENT_CHUNKS, self.start // SEGMENT_CHUNKS):
            key = b"s" + segment.to_bytes(8, "big")
            if segment not in there and key not in self.bad_entries:
                self._entry_damaged("segment", key, "missing")

    # --- where the next tasks go

    @property
    def next_number(self) -> int:
        """A number that no task was ever given. Without a head to trust many are left out: what
        was lost may have used them."""
        if self.head_sound:
            return self._next_number
        lost = max(NUMBERS_LEFT_OUT, CHUNK_CREATES * max(0, self.synced - self.sequence))
        used = max(self._next_number, self._top_number + 1)
        return (used + lost) // BUCKET_TASKS * BUCKET_TASKS + BUCKET_TASKS

    @property
    def last_id_ms(self) -> int:
        return max(self._last_id_ms, self._top_ms)


def _new(path: Path) -> Path:
    path.mkdir()
    return path


def _chunks(begin: int, end: int) -> str:
    return f"chunk {begin} is" if end == begin + 1 else f"chunks {begin} to {end - 1} are"
