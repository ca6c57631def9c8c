"""Reading a log that may be damaged: which of its records fit together, and which entries belong
beside them."""

from collections.abc import Container
from typing import Self, final

EMPTY_CHUNK: bytes
"""A chunk without records, for the place of one that is lost."""

def read_head(value: bytes) -> tuple[int, int, int, int, int, int, int] | None:
    """Format, shard count, next number, time of the last id, next sequence, where a start begins
    to read, tail; None when it is damaged."""

def segment_sound(value: bytes) -> bool: ...
def read_directory(key: bytes, value: bytes) -> list[tuple[int, int, int]] | None:
    """(number, created chunk, ended chunk) of every ended task in a `d` or `e` entry; None when it
    is damaged."""

def task_number(task_id: bytes) -> int:
    """The number in the 16 bytes of an id."""

def chunk_sound(chunk: bytes, purged: set[int] | None = None) -> bool:
    """Whether frame and records are what was written; adds the numbers of tasks that were taken
    away to ``purged``."""

def created_in(chunk: bytes) -> list[bytes]:
    """Ids of the tasks that a damaged chunk seems to create or carry, as far as it can be read."""

@final
class Salvage:
    """Takes the chunks of a log from its tail on, one by one and without a gap, and keeps every
    record that fits to what came before. No payload stays in memory."""

    def __new__(
        cls, *, shard_count: int, tail: int, next_seq: int, next_number: int, last_id_ms: int
    ) -> Self: ...
    def chunk(
        self,
        chunk: bytes,
        gone: Container[int],
        keyed: list[tuple[bytes, bytes, bytes, int, int]],
    ) -> bytes:
        """Takes the next chunk, which is sound; returns what is left of it. Records of the numbers
        in ``gone`` are left out. Adds (id, tenant, key, created ms, key end ms) of creates with an
        idempotency key to ``keyed``."""
    def entries(self) -> list[tuple[bytes, bytes]]:
        """The `d` and `e` entries that came due since the last call."""
    def done(self, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Ends the reading; the rest of the entries, with those of the segments and the head.
        Raises ValueError when what is left contradicts itself."""
    def knows(self, number: int) -> bool:
        """Whether the task is in memory: live, a dead letter, or ended in an open bucket."""
    @property
    def refused(self) -> list[tuple[str, int]]:
        """Kind and task number of the records that did not fit."""
    @property
    def records(self) -> dict[str, int]:
        """How many records of each kind were kept."""
    @property
    def live_tasks(self) -> int: ...
    @property
    def dead_letters(self) -> int: ...
    @property
    def ended_tasks(self) -> int: ...
