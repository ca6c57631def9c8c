"""What the generated protobuf classes read in a stream message, told as _wire tells it.

``PROTOBUF[stream](message)`` and ``OURS[stream](message)`` answer the same for every message;
REFUSED when it is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from codeq.engine import _wire
from tests.protos import producerpb, workerpb

REFUSED = "refused"
BYTES_MAX = 1 << 30
RUN_AT_INVALID = _wire.CODES["RUN_AT_INVALID"]


def serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString(deterministic=True))


def in_range(stamp: Any) -> bool:
    return -62135596800 <= stamp.seconds <= 253402300799 and 0 <= stamp.nanos <= 999999999


def settled(task: Any) -> tuple[int, Any]:
    """(code, task) with ``run_at`` in whole milliseconds, rounded up; without it when refused."""
    if not task.HasField("run_at"):
        return 0, task
    if not in_range(task.run_at):
        task.ClearField("run_at")
        return RUN_AT_INVALID, task
    ms = task.run_at.seconds * 1000 - (-task.run_at.nanos // 1000000)
    task.run_at.seconds, rest = divmod(ms, 1000)
    task.run_at.nanos = rest * 1000000
    return 0, task


def create_events(tasks: Sequence[Any]) -> list[bytes]:
    if len(tasks) == 1:
        return [serialized(producerpb.ProducerEvent(create=tasks[0]))]
    batch = producerpb.ProducerEvent(create_batch=producerpb.CreateTaskBatch(tasks=tasks))
    return [serialized(batch)] if tasks else []


def result_events(results: Sequence[Any]) -> list[bytes]:
    if len(results) == 1:
        return [serialized(workerpb.WorkerEvent(result=results[0]))]
    batch = workerpb.WorkerEvent(result_batch=workerpb.ResultBatch(results=results))
    return [serialized(batch)] if results else []


def parsed(kind: Any, message: bytes) -> Any:
    event = kind()
    event.ParseFromString(message)
    event.DiscardUnknownFields()
    return event


def producer_event(message: bytes) -> object:
    event = parsed(producerpb.ProducerEvent, message)
    member = event.WhichOneof("event")
    if member == "hello":
        return _wire.HELLO, event.hello.token
    if member is None:
        return _wire.UNKNOWN, None
    kind = _wire.CREATE if member == "create" else _wire.CREATE_BATCH
    tasks = [event.create] if member == "create" else list(event.create_batch.tasks)
    pairs = [settled(task) for task in tasks]
    return kind, bytes(code for code, _ in pairs), create_events([task for _, task in pairs])


def worker_event(message: bytes) -> object:
    event = parsed(workerpb.WorkerEvent, message)
    member = event.WhichOneof("event")
    if member is None:
        return _wire.UNKNOWN, None
    inner = getattr(event, member)
    match member:
        case "hello":
            return _wire.HELLO, (inner.token, inner.worker_id)
        case "ready":
            commands = tuple(command.encode() for command in inner.commands)
            return _wire.READY, (commands, inner.lease_seconds, inner.count)
        case "nack":
            return _wire.NACK, (inner.task_id, inner.delay_seconds, inner.reason)
        case "heartbeat":
            return _wire.HEARTBEAT, (inner.task_id, inner.extend_seconds)
        case "abandon":
            return _wire.ABANDON, inner.task_id
        case "result":
            return _wire.RESULT, b"\0", result_events([inner])
    results = list(inner.results)
    return _wire.RESULT_BATCH, bytes(len(results)), result_events(results)


def producer_server_event(message: bytes) -> object:
    event = parsed(producerpb.ServerEvent, message)
    member = event.WhichOneof("event")
    match member:
        case None:
            return _wire.UNKNOWN, None
        case "hello_ack":
            return _wire.HELLO_ACK, (event.hello_ack.tenant_id, event.hello_ack.subject)
        case "error":
            return _wire.ERROR, (event.error.code, event.error.message)
    acks = [event.create_ack] if member == "create_ack" else event.create_ack_batch.acks
    return _wire.CREATE_ACKS, [(a.seq, a.ok, a.task_id, a.error_message) for a in acks]


def stamp_ms(task: Any, name: str) -> int:
    stamp = getattr(task, name)
    if not task.HasField(name) or not in_range(stamp):
        return 0
    return int(stamp.seconds * 1000 + stamp.nanos // 1000000)


def worker_server_event(message: bytes) -> object:
    event = parsed(workerpb.ServerEvent, message)
    member = event.WhichOneof("event")
    if member is None:
        return _wire.UNKNOWN, None
    inner = getattr(event, member)
    match member:
        case "hello_ack":
            return _wire.HELLO_ACK, (inner.worker_id, inner.tenant_id)
        case "error":
            return _wire.ERROR, (inner.code, inner.message)
        case "task":
            return _wire.TASKS, [task_fields(inner.task)] if inner.HasField("task") else []
        case "task_batch":
            return _wire.TASKS, [task_fields(task) for task in inner.tasks]
        case "result_ack":
            return _wire.RESULT_ACKS, [ack_fields(inner)]
        case "result_ack_batch":
            return _wire.RESULT_ACKS, [ack_fields(ack) for ack in inner.acks]
        case "heartbeat_ack":
            return _wire.HEARTBEAT_ACK, ack_fields(inner)
        case "abandon_ack":
            return _wire.ABANDON_ACK, ack_fields(inner)
    return _wire.NACK_ACK, (*ack_fields(inner), inner.applied_delay_seconds, inner.dlq)


def ack_fields(ack: Any) -> tuple[str, bool, str]:
    return ack.task_id, ack.ok, ack.error_message


def task_fields(task: Any) -> tuple[object, ...]:
    return (
        task.id, task.command, task.payload, task.priority, task.webhook, task.max_attempts,
        task.status, task.worker_id, task.lease_until, task.attempts, task.tenant_id,
        stamp_ms(task, "created_at"), stamp_ms(task, "updated_at"),
    )  # fmt: skip


def client_task_fields(task: _wire.ClientTask) -> tuple[object, ...]:
    return (
        task.id, task.command, task.payload, task.priority, task.webhook, task.max_attempts,
        task.status, task.worker_id, task.lease_until, task.attempts, task.tenant_id,
        task.created_ms, task.updated_ms,
    )  # fmt: skip


def told(decoded: tuple[int, object]) -> object:
    """The content of a decoded event, laid open."""
    kind, content = decoded
    if isinstance(content, _wire.Creates):
        return kind, content.codes, _wire.encode_creates(content, BYTES_MAX)
    if isinstance(content, _wire.Finishes):
        return kind, content.codes, _wire.encode_results(content, BYTES_MAX)
    if isinstance(content, _wire.Tasks):
        return kind, [client_task_fields(content[index]) for index in range(len(content))]
    return decoded


def guarded(read: Callable[[bytes], object], refusal: type[Exception]) -> Callable[[bytes], object]:
    def answer(message: bytes) -> object:
        try:
            return read(message)
        except refusal:
            return REFUSED

    return answer


PROTOBUF: dict[str, Callable[[bytes], object]] = {
    "producer": guarded(producer_event, DecodeError),
    "producer_server": guarded(producer_server_event, DecodeError),
    "worker": guarded(worker_event, DecodeError),
    "worker_server": guarded(worker_server_event, DecodeError),
}
OURS: dict[str, Callable[[bytes], object]] = {
    "producer": guarded(lambda m: told(_wire.decode_producer_event(m)), _wire.WireError),
    "producer_server": guarded(
        lambda m: told(_wire.decode_producer_server_event(m)), _wire.WireError
    ),
    "worker": guarded(lambda m: told(_wire.decode_worker_event(m)), _wire.WireError),
    "worker_server": guarded(lambda m: told(_wire.decode_worker_server_event(m)), _wire.WireError),
}
EVENTS: dict[str, Any] = {
    "producer": producerpb.ProducerEvent,
    "producer_server": producerpb.ServerEvent,
    "worker": workerpb.WorkerEvent,
    "worker_server": workerpb.ServerEvent,
}
