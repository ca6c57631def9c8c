"""The engine's view of a task as the objects of the REST interface."""

from __future__ import annotations

from msgspec import UNSET, Raw

from codeq.engine.shard import TaskView
from codeq.errors import Refusal
from codeq.model import ItemRefusal, ResultRecord, Task, rfc3339
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
    """The task as REST shows it."""
    return view.task(*PLACES[view.state])


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
