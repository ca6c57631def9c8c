"""The engine's view of a task as the objects of the REST interface."""

from __future__ import annotations

from msgspec import UNSET, Raw

from codeq.engine.shard import TaskView
from codeq.errors import Refusal
from codeq.model import RESULT_KEY, ItemRefusal, ResultRecord, Task, rfc3339
from codeq.server import artifacts

# The engine's state numbers
READY, DELAYED, LEASED, COMPLETED, FAILED, DEAD = range(1, 7)
#: ``status`` and ``lastKnownLocation`` by state
PLACES = {
    READY: ("PENDING", "PENDING_LIST"),
    DELAYED: ("PENDING", "DELAYED_ZSET"),
    LEASED: ("IN_PROGRESS", "INPROG_SET"),
    COMPLETED: ("COMPLETED", "NONE"),
    FAILED: ("FAILED", "NONE"),
    DEAD: ("FAILED", "DLQ_SET"),
}


def task_of(view: TaskView) -> Task:
    """The task as REST shows it. Payload bytes that are no UTF-8 show as U+FFFD."""
    status, place = PLACES[view.state]
    leased = view.state == LEASED
    return Task(
        view.id,
        view.command,
        view.payload.decode("utf-8", "replace"),
        view.priority,
        status,
        place,
        view.attempts,
        view.max_attempts,
        view.tenant,
        rfc3339(view.created_ms),
        rfc3339(view.updated_ms),
        view.webhook,
        view.trace_parent,
        view.trace_state,
        view.worker if leased else "",
        rfc3339(view.due_ms) if leased else "",
        view.error,
        RESULT_KEY if view.has_record else "",
    )


def record_of(view: TaskView) -> ResultRecord:
    """The result record of an ended task."""
    return record(
        view.id,
        PLACES[view.state][0],
        view.ended_ms,
        view.result,
        view.error,
        view.artifacts,
    )


def record(
    task_id: str, status: str, ended_ms: int, result: bytes | None, error: str, kept: bytes
) -> ResultRecord:
    """A result record, with the artifacts that are kept of it; a COMPLETED one always has a
    result."""
    if result is None and status == "COMPLETED":
        result = b"null"
    return ResultRecord(
        task_id,
        status,
        rfc3339(ended_ms),
        UNSET if result is None else Raw(result),
        "" if status == "COMPLETED" else error,
        artifacts.shown(task_id, kept),
    )


def item_refusal(row: Refusal, task_id: str = "") -> ItemRefusal:
    """What stands in a batch's answer in the place of a refused item."""
    return ItemRefusal(row.slug, row.message, row.message, task_id)
