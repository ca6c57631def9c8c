"""The three layouts that journal_layouts.py compares: what one commit group writes and removes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

Put = tuple[bytes, bytes]
Range = tuple[bytes, bytes]

ID_BYTES = 16
CREATED_BYTES, CLAIMED_BYTES, ENDED_BYTES, RESULT_BYTES, PAYLOAD_BYTES = 330, 40, 90, 40, 200
CHUNK_RECORDS_MAX, CHUNK_BYTES_MAX = 32, 8192
BUCKET_TASKS, DIRECTORY_ENTRY_BYTES = 256, 6
CLAIM_LAG, END_LAG = 4, 8  # in groups: a task is claimed 4 groups after its create, ended 8 after
POOL_RECORDS = 8192
MB = 1 << 20


class Tape:
    """The records of each group, the same for all layouts: prepared tails behind fresh ids."""

    def __init__(self, batch: int) -> None:
        rng = random.Random(7)
        self.batch = batch
        self._suffix = rng.randbytes(ID_BYTES - 8)
        self._created = [_created_tail(rng) for _ in range(POOL_RECORDS)]
        self._claimed = [rng.randbytes(CLAIMED_BYTES - ID_BYTES) for _ in range(POOL_RECORDS)]
        self._ended = [_ended_tail(rng) for _ in range(POOL_RECORDS)]
        self.directory = rng.randbytes(BUCKET_TASKS * 2 * DIRECTORY_ENTRY_BYTES)
        self._ids: dict[int, list[bytes]] = {}

    def id_of(self, number: int) -> bytes:
        return number.to_bytes(8, "big") + self._suffix

    def ids(self, group: int) -> list[bytes]:
        """The ids of the tasks created in `group`; empty for a group before the first."""
        if group < 0:
            return []
        ids = self._ids.get(group)
        if ids is None:
            first = group * self.batch
            ids = self._ids[group] = [self.id_of(n) for n in range(first, first + self.batch)]
            self._ids.pop(group - END_LAG - 1, None)
        return ids

    def created(self, group: int) -> list[bytes]:
        return self._records(group, self._created)

    def claimed(self, group: int) -> list[bytes]:
        return self._records(group, self._claimed)

    def ended(self, group: int) -> list[bytes]:
        return self._records(group, self._ended)

    def _records(self, group: int, pool: list[bytes]) -> list[bytes]:
        start = group * self.batch % (POOL_RECORDS - self.batch + 1)
        tails = pool[start : start + self.batch]
        return [i + tail for i, tail in zip(self.ids(group), tails, strict=False)]


def _text(rng: random.Random, length: int) -> bytes:
    words = ("order", "customer", "amount", "currency", "address", "retry", "email", "state")
    pairs = (f'"{rng.choice(words)}":"{rng.getrandbits(40):x}"' for _ in range(length // 16 + 1))
    return ("{" + ",".join(pairs)).encode()[:length]


def _created_tail(rng: random.Random) -> bytes:
    header = rng.randbytes(CREATED_BYTES - PAYLOAD_BYTES - ID_BYTES - 40) + _text(rng, 40)
    return header + _text(rng, PAYLOAD_BYTES)


def _ended_tail(rng: random.Random) -> bytes:
    return rng.randbytes(ENDED_BYTES - RESULT_BYTES - ID_BYTES) + _text(rng, RESULT_BYTES)


# --- where it is written -------------------------------------------------------------------


class Layout:
    """Turns groups into puts and expired groups into ranges to delete."""

    name = ""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.tail = 0  # groups below it are removed

    def puts(self, group: int) -> list[Put]:
        """All keys and values of one commit group."""
        raise NotImplementedError

    def removal(self, until: int) -> list[Range]:
        """Ranges to delete when all tasks created in groups [self.tail, until) have expired."""
        raise NotImplementedError

    def first_keys(self) -> list[bytes]:
        """The first key that must still exist, one for each prefix."""
        raise NotImplementedError


class Keys(Layout):
    name = "keys"

    def puts(self, group: int) -> list[Put]:
        tape, claim, end = self.tape, group - CLAIM_LAG, group - END_LAG
        puts = [(b"b" + i, r) for i, r in zip(tape.ids(group), tape.created(group), strict=True)]
        puts += [(b"s" + i, r) for i, r in zip(tape.ids(claim), tape.claimed(claim), strict=True)]
        puts += [(b"e" + i, r) for i, r in zip(tape.ids(end), tape.ended(end), strict=True)]
        return puts

    def removal(self, until: int) -> list[Range]:
        low = self.tape.id_of(self.tail * self.tape.batch)
        high = self.tape.id_of(until * self.tape.batch)
        self.tail = until
        return [(prefix + low, prefix + high) for prefix in (b"b", b"e", b"s")]

    def first_keys(self) -> list[bytes]:
        first = self.tape.id_of(self.tail * self.tape.batch)
        return [b"b" + first, b"e" + first, b"s" + first]


class _Chunked(Layout):
    """A rising sequence of chunks, cut off at its tail."""

    def __init__(self, tape: Tape) -> None:
        super().__init__(tape)
        self._sequence = 0
        self._starts: deque[int] = deque()  # first sequence of each group from self.tail on

    def _chunk(self, records: list[bytes]) -> list[Put]:
        if not records:
            return []
        step = min(CHUNK_RECORDS_MAX, max(1, CHUNK_BYTES_MAX // len(records[0])))
        return [self._put(records[at : at + step]) for at in range(0, len(records), step)]

    def _put(self, records: list[bytes]) -> Put:
        key = _chunk_key(self._sequence)
        self._sequence += 1
        return key, b"".join(records)

    def _cut(self, until: int) -> Range:
        low = self._starts[0]
        for _ in range(until - self.tail):
            self._starts.popleft()
        self.tail = until
        return _chunk_key(low), _chunk_key(self._starts[0])


class Middle(_Chunked):
    name = "middle"

    def puts(self, group: int) -> list[Put]:
        tape, end, first = self.tape, group - END_LAG, self._sequence
        self._starts.append(first)
        puts = self._chunk(tape.created(group))
        puts += self._chunk(tape.claimed(group - CLAIM_LAG))
        where = first.to_bytes(8, "big")
        puts += [(b"e" + i, r + where) for i, r in zip(tape.ids(end), tape.ended(end), strict=True)]
        return puts

    def removal(self, until: int) -> list[Range]:
        tape = self.tape
        ends = b"e" + tape.id_of(self.tail * tape.batch), b"e" + tape.id_of(until * tape.batch)
        return [self._cut(until), ends]

    def first_keys(self) -> list[bytes]:
        return [_chunk_key(self._starts[0]), b"e" + self.tape.id_of(self.tail * self.tape.batch)]


class Chunks(_Chunked):
    name = "chunks"

    def __init__(self, tape: Tape) -> None:
        super().__init__(tape)
        self._closed = 0  # buckets whose directory is written
        self._open = 0  # buckets below it are removed

    def puts(self, group: int) -> list[Put]:
        tape = self.tape
        self._starts.append(self._sequence)
        puts = self._chunk(tape.created(group))
        claims, step = tape.ids(group - CLAIM_LAG), CHUNK_BYTES_MAX // ID_BYTES
        puts += [self._put(claims[at : at + step]) for at in range(0, len(claims), step)]
        puts += self._chunk(tape.ended(group - END_LAG))
        full = max(0, (group - END_LAG + 1) * tape.batch // BUCKET_TASKS)
        puts += [(_bucket_key(bucket), tape.directory) for bucket in range(self._closed, full)]
        self._closed = full
        return puts

    def removal(self, until: int) -> list[Range]:
        low, self._open = self._open, until * self.tape.batch // BUCKET_TASKS
        ranges = [self._cut(until)]
        if low != self._open:
            ranges.append((_bucket_key(low), _bucket_key(self._open)))
        return ranges

    def first_keys(self) -> list[bytes]:
        return [_chunk_key(self._starts[0]), _bucket_key(self._open)]


def _chunk_key(sequence: int) -> bytes:
    return b"c" + sequence.to_bytes(8, "big")


def _bucket_key(bucket: int) -> bytes:
    return b"d" + bucket.to_bytes(8, "big")


LAYOUTS: dict[str, Callable[[Tape], Layout]] = {"keys": Keys, "middle": Middle, "chunks": Chunks}
