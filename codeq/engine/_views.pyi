"""Tasks as replies show them, from a slot in memory or from the chunks and directories on disk."""

from collections.abc import Iterable, Mapping
from typing import final

from codeq.model import Task

__pyx_capi__: dict[str, object]  # what other extensions cimport

class CorruptRecord(ValueError):
    """Bytes read from the store are not what was written; the text says which chunk or key."""

@final
class TaskView:
    """What one task is at one moment, for replies. Times are ms since the epoch, 0 = none.

    When ``body_chunk`` is not None the body (command, payload, ...) is on disk only: get that chunk
    from the store and call ``fill`` before reading the fields above the line.
    """

    id: str
    id_bytes: bytes
    command: str
    payload: bytes
    priority: int
    webhook: str
    max_attempts: int
    tenant: str
    created_ms: int
    trace_parent: str
    trace_state: str
    # --- state
    state: int  # READY, DELAYED, LEASED, COMPLETED, FAILED, DEAD
    attempts: int
    updated_ms: int
    due_ms: int  # delayed: due time; leased: end of the lease
    worker: str
    error: str
    # --- of an ended task
    ended_ms: int
    expires_ms: int
    has_record: bool
    record_chunk: int | None  # chunk of the ended record; fill reads error and the two below
    result: bytes | None  # JSON text, None when none was sent
    artifacts: bytes  # JSON text of a list, empty when none
    ended_worker: str  # who ended it, for repeated results
    ended_subject: str
    body_chunk: int | None

    @property
    def number(self) -> int:
        """Its place in creation order, over all tenants."""
    def fill(self, chunks: Mapping[int, bytes]) -> None:
        """Reads body and, if ended, the ended record from the chunks; raises CorruptRecord, and
        KeyError when id or tenant (unless that is empty) is another."""
    def task(self, status: str, place: str) -> Task:
        """The task as REST shows it, with these words for its state. Payload bytes that are no
        UTF-8 show as U+FFFD."""

def lack_chunks(views: list[TaskView | None]) -> bool:
    """Whether one of them needs ``fill``."""

def directory_entries(key: bytes, value: bytes) -> list[tuple[int, int, int]]:
    """(number, created chunk, ended chunk) of the tasks that an entry under `d` or `e` has; raises
    CorruptRecord."""

def directory_without(value: bytes, numbers: Iterable[int]) -> bytes | None:
    """The directory of a bucket without these numbers; None when it has no other."""

def stored_view(
    chunks: Mapping[int, bytes],
    number: int,
    created: int,
    ended: int,
    tenant: bytes | None,
    command: bytes | None,
) -> TaskView | None:
    """The task of a directory entry, with its body; it still needs ``fill`` for its end. None when
    it is of another tenant or command (None = any). Raises CorruptRecord."""
