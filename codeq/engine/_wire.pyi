"""Stream messages in, acknowledgements and batches out, bytes to bytes (csrc/wire.c)."""

from collections.abc import Mapping, Sequence
from typing import Final, final

from typing_extensions import disjoint_base

__pyx_capi__: dict[str, object]  # what other extensions cimport

class WireError(ValueError):
    """The bytes are not the message they should be: cut short, a bad tag, length or UTF-8 text."""

# kinds of decoded events
HELLO: Final[int]
CREATE: Final[int]
CREATE_BATCH: Final[int]
READY: Final[int]
RESULT: Final[int]
RESULT_BATCH: Final[int]
NACK: Final[int]
HEARTBEAT: Final[int]
ABANDON: Final[int]
UNKNOWN: Final[int]
# kinds of server events, for clients
HELLO_ACK: Final[int]
CREATE_ACKS: Final[int]
ERROR: Final[int]
TASKS: Final[int]
RESULT_ACKS: Final[int]
HEARTBEAT_ACK: Final[int]
NACK_ACK: Final[int]
ABANDON_ACK: Final[int]

#: name -> number of each ``cq_code`` in csrc/codeq.h, without the prefix ("OK", "NOT_OWNER", ...)
CODES: Final[dict[str, int]]

def set_messages(messages: Mapping[int, str]) -> None:
    """Sets the text that acknowledgements carry for each refusal number (from codeq.errors)."""

@final
class Creates:
    """A batch of creates: decoded from a stream message, or filled by ``add``.

    Items keep their order. ``codes`` holds one ``cq_code`` per item, 0 until something refuses it.
    """

    def __len__(self) -> int: ...
    def add(
        self,
        command: bytes,
        payload: bytes,
        *,
        priority: int = 0,
        webhook: bytes = b"",
        max_attempts: int = 0,
        key: bytes = b"",
        run_at_ms: int | None = None,
        delay_seconds: int = 0,
        trace_parent: bytes = b"",
        trace_state: bytes = b"",
        seq: int = 0,
    ) -> int:
        """Appends one create and returns its index. The bytes are kept alive by the batch."""
    def add_refused(self, number: int) -> int:
        """Appends an item that is refused already, so that positions stay those of the request."""
    def check(self, payload_bytes_max: int) -> None:
        """Trims command and key, fills an empty payload with ``null``, and sets the code of every
        item that breaks a bound of the contract (command, key, payload, webhook length, delay)."""
    def refuse(self, index: int, number: int) -> None: ...
    def trace(self, parent: bytes) -> list[tuple[bytes, bytes]]:
        """Gives this trace parent to every item without one; returns trace parent and trace state
        of the others."""
    def replay(self, index: int, task_id: bytes) -> None:
        """The item repeats an earlier create: it is accepted with that task's id (16 bytes)."""
    def alias(self, index: int, earlier: int) -> None:
        """The item repeats item ``earlier`` of this batch and shares its id and code."""
    @property
    def codes(self) -> bytes: ...
    @property
    def payload_bytes(self) -> int:
        """Bytes held by the batch, items and texts, for limits."""
    def keyed(self) -> list[tuple[int, bytes, bytes]]:
        """(index, key, request) of accepted items with an idempotency key; ``request`` is an
        unambiguous encoding of all that makes two requests the same."""
    def webhooks(self) -> list[tuple[int, str]]:
        """(index, url) of accepted items with a webhook."""
    def task_id(self, index: int) -> str:
        """Canonical text of the id, once the engine has accepted the item."""
    def id_bytes(self, index: int) -> bytes: ...
    def accepted_ids(self) -> list[bytes | None]:
        """The ids (16 bytes) of all items, None for a refused one."""
    def replayed(self, index: int) -> bool: ...

@final
class Finishes:
    """A batch of results: decoded from a stream message, or filled by ``add``."""

    def __len__(self) -> int: ...
    def add(
        self,
        task_id: bytes,
        status: bytes,
        *,
        result: bytes | None = None,
        error: bytes = b"",
        artifacts: bytes = b"",
        worker: bytes = b"",
    ) -> int: ...
    def add_refused(self, task_id: bytes, number: int) -> int: ...
    def check(self, result_bytes_max: int, *, lenient_error: bool) -> None:
        """Sets the code of malformed items: status, result_json, too large, blank error with FAILED
        (stored as ``unspecified failure`` when ``lenient_error``, the rule of the streams). A task
        id that is no UUID in canonical text gets TASK_NOT_FOUND. Errors over 8 KiB are cut."""
    def refuse(self, index: int, number: int) -> None: ...
    def accept(self, index: int, completed_ms: int, artifacts: bytes) -> None:
        """A repeated result: accepted as the first was, with the time and artifacts of that."""
    @property
    def codes(self) -> bytes: ...
    @property
    def payload_bytes(self) -> int: ...
    def task_id(self, index: int) -> str: ...
    def id_bytes(self, index: int) -> bytes: ...
    def completed_ms(self, index: int) -> int: ...
    def item(self, index: int) -> tuple[str, bytes | None, str, bytes, bytes]:
        """(status, result or None, error, artifacts, worker) as checked."""

def parse_id(text: str | bytes) -> bytes | None:
    """The 16 bytes of a canonical UUID text, or None."""

def format_id(task_id: bytes) -> str: ...
def json_valid(text: bytes) -> bool:
    """Whether the bytes are one JSON value in UTF-8 (RFC 8259), nested at most 512 deep."""

# --- server side -------------------------------------------------------------------------------

def decode_producer_event(message: bytes) -> tuple[int, object]:
    """(HELLO, token) · (CREATE, Creates of one) · (CREATE_BATCH, Creates) · (UNKNOWN, None)."""

def decode_worker_event(message: bytes) -> tuple[int, object]:
    """(HELLO, (token, worker_id)) · (READY, (commands: tuple[bytes, ...], lease_seconds, count)) ·
    (RESULT, Finishes of one) · (RESULT_BATCH, Finishes) · (NACK, (task_id, delay_seconds, reason))
    · (HEARTBEAT, (task_id, extend_seconds)) · (ABANDON, task_id) · (UNKNOWN, None). Texts are str,
    commands are bytes (untrimmed). The last member of the oneof in the message wins."""

def encode_create_acks(batches: Sequence[Creates], bytes_max: int) -> list[bytes]:
    """producerpb.ServerEvents with one ack per item in order: a create_ack when there is only one
    item in all, else create_ack_batches, each message at most ``bytes_max`` long."""

def encode_result_acks(batches: Sequence[Finishes], bytes_max: int) -> list[bytes]:
    """workerpb.ServerEvents with one ack per item in order, likewise (result_ack,
    result_ack_batch). STATUS_INVALID reads ``invalid status (must be COMPLETED or FAILED):
    "<s>"``."""

def encode_producer_hello_ack(tenant: str, subject: str) -> bytes: ...
def encode_worker_hello_ack(worker_id: str, tenant: str) -> bytes: ...
def encode_producer_error(code: str, message: str) -> bytes: ...
def encode_worker_error(code: str, message: str) -> bytes: ...
def encode_heartbeat_ack(task_id: str, number: int) -> bytes: ...
def encode_abandon_ack(task_id: str, number: int) -> bytes: ...
def encode_nack_ack(task_id: str, number: int, applied_delay_seconds: int, dlq: bool) -> bytes: ...

# --- client side -------------------------------------------------------------------------------

@final
class Tasks:
    """The tasks of one assignment message, borrowed from its bytes; fields are made when asked."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> ClientTask: ...

@disjoint_base
class ClientTask:
    """One task of an assignment message. ``created_ms``, ``updated_ms``: since the epoch."""

    id: str
    command: str
    payload: bytes
    priority: int
    webhook: str
    attempts: int
    max_attempts: int
    status: str
    worker_id: str
    lease_until: str
    tenant_id: str
    created_ms: int
    updated_ms: int

def encode_producer_hello(token: str) -> bytes: ...
def encode_worker_hello(token: str, worker_id: str) -> bytes: ...
def encode_creates(creates: Creates, bytes_max: int) -> list[bytes]:
    """ProducerEvents with all items: a create for one item, else create_batches of at most
    ``bytes_max`` each (an item larger than that stands alone)."""

def encode_ready(commands: Sequence[bytes], lease_seconds: int, count: int) -> bytes: ...
def encode_results(finishes: Finishes, bytes_max: int) -> list[bytes]:
    """WorkerEvents: a result for one item, else result_batches."""

def encode_nack(task_id: str, delay_seconds: int, reason: str) -> bytes: ...
def encode_heartbeat(task_id: str, extend_seconds: int) -> bytes: ...
def encode_abandon(task_id: str) -> bytes: ...
def decode_producer_server_event(message: bytes) -> tuple[int, object]:
    """(HELLO_ACK, (tenant, subject)) · (CREATE_ACKS, list[(seq, ok, task_id, error)]) ·
    (ERROR, (code, message)) · (UNKNOWN, None)."""

def decode_worker_server_event(message: bytes) -> tuple[int, object]:
    """(HELLO_ACK, (worker_id, tenant)) · (TASKS, Tasks) · (RESULT_ACKS, list[(task_id, ok, error)])
    · (HEARTBEAT_ACK | ABANDON_ACK, (task_id, ok, error)) ·
    (NACK_ACK, (task_id, ok, error, applied_delay_seconds, dlq)) · (ERROR, (code, message)) ·
    (UNKNOWN, None)."""
