"""The objects of the REST interface, with its names and bounds, and its times.

Payloads and results are ``msgspec.Raw``: bytes that are passed on, never parsed and written again.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache

from msgspec import UNSET, Raw, Struct, UnsetType

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
#: The value of ``resultKey`` once a task has a result record.
RESULT_KEY = "codeq:results"
COMMANDS_MAX = 100
WORKER_ID_BYTES_MAX = 256
CLAIM_WAIT_SECONDS_MAX = 30
RESULT_WAIT_SECONDS_MAX = 60


# --- answers -------------------------------------------------------------------------------------


class Task(Struct, rename="camel", omit_defaults=True):
    """A task as REST shows it; times are RFC 3339 in UTC; ``payload`` is the payload's text."""

    id: str
    command: str
    payload: str
    priority: int
    status: str
    last_known_location: str
    attempts: int
    max_attempts: int
    tenant_id: str
    created_at: str
    updated_at: str
    webhook: str = ""
    trace_parent: str = ""
    trace_state: str = ""
    worker_id: str = ""
    lease_until: str = ""
    error: str = ""
    result_key: str = ""


class ResultRecord(Struct, rename="camel", omit_defaults=True):
    """What is known of an ended task; ``result`` is any JSON value."""

    task_id: str
    status: str
    completed_at: str
    result: Raw | UnsetType = UNSET
    error: str = ""
    artifacts: Raw | UnsetType = UNSET


class QueueStats(Struct, rename="camel", omit_defaults=True):
    """Depths of one queue. ``tenant_id`` is filled for operators only."""

    command: str
    ready: int
    delayed: int
    in_progress: int
    dlq: int
    tenant_id: str = ""


class Queues(Struct):
    """Answer of GET /admin/queues."""

    queues: list[QueueStats]


class QueuePause(Struct):
    """Answer of pause and resume."""

    command: str
    paused: bool


class TaskPage(Struct, rename="camel", omit_defaults=True):
    """A part of a list of tasks; ``next_cursor`` leads to the next one, if there is any. Dead
    letters of a queue with a topic policy have that policy's ``dead_letter_topic_ref`` beside
    them."""

    tasks: list[Task]
    next_cursor: str = ""
    dead_letter_topic_ref: str = ""


class TopicPolicy(Struct, rename="camel", omit_defaults=True):
    """The rules of a topic; a retention and number of consumers of 0 are left out."""

    priority_tiers: tuple[int, ...]
    max_attempts: int
    dead_letter_topic_ref: str
    retention_seconds: int = 0
    max_consumers: int = 0


class TopicShown(Struct, rename="camel"):
    """Answer of PUT and GET /admin/topics/{topicName}."""

    topic_id: str
    tenant_id: str
    topic_name: str
    policy: TopicPolicy
    version: int
    created_at: str
    updated_at: str


class OverviewQueue(Struct, rename="camel", omit_defaults=True):
    """One queue of the overview: depths; counts since the start of the process, ``failed`` without
    dead letters; how long its oldest ready task has been ready, 0 when none is."""

    command: str
    ready: int
    delayed: int
    in_progress: int
    dlq: int
    created: int
    claimed: int
    completed: int
    failed: int
    dead: int
    expired_leases: int
    oldest_ready_seconds: float
    paused: bool
    dead_letter_topic_ref: str = ""
    tenant_id: str = ""


class WorkerLeases(Struct, rename="camel", omit_defaults=True):
    """How many leases a worker id holds."""

    worker_id: str
    leases: int
    tenant_id: str = ""


class ExhaustedWebhook(Struct, rename="camel"):
    """A webhook that was given up; ``error`` is what came of its last try."""

    tenant_id: str
    task_id: str
    command: str
    host: str
    tries: int
    error: str
    at: str


class OverviewWebhooks(Struct, rename="camel"):
    """Webhooks that have not been taken yet, and the last ones given up of so many."""

    pending: int
    exhausted_count: int
    exhausted: list[ExhaustedWebhook]


class DurationsBucket(Struct):
    """So many took at most ``le`` seconds; ``le`` null is all."""

    le: float | None
    count: int


class Durations(Struct):
    """How long something took, since the start: how often, seconds in all, and by length."""

    count: int
    seconds: float
    buckets: list[DurationsBucket]


class OverviewMemory(Struct, rename="camel"):
    """Bytes of the process in RAM, and of the payloads that it holds."""

    resident_bytes: int
    payload_bytes: int


class Overview(Struct, rename="camel"):
    """Answer of GET /admin/overview. The members ``...LeftOut`` say how many more there are."""

    version: str
    at: str
    uptime_seconds: float
    queues: list[OverviewQueue]
    queues_left_out: int
    leases: list[WorkerLeases]
    leases_left_out: int
    live_tasks: int
    streams: dict[str, int]
    waiting_claims: int
    webhooks: OverviewWebhooks
    commits: Durations
    syncs: Durations
    memory: OverviewMemory
    disk_free_bytes: int


class Requeued(Struct):
    """How many dead letters became ready again."""

    requeued: int


class Purged(Struct):
    """How many tasks were ended, or dead letters taken away."""

    purged: int


class Cleaned(Struct):
    """How many ended tasks were taken away, and by which bounds."""

    deleted: int
    before: str
    limit: int


class BackupMade(Struct):
    """Answer of POST /admin/backup."""

    path: str
    bytes: int


class ItemRefusal(Struct, rename="camel", omit_defaults=True):
    """Stands in a batch's answer where the refused item was; ``task_id`` for results only."""

    code: str
    message: str
    error: str
    task_id: str = ""


class CreatedItem(Struct):
    """An accepted item of a batch of creates."""

    task: Task


class ResultItem(Struct, rename="camel"):
    """An accepted item of a batch of results."""

    task_id: str
    result: ResultRecord


class Results(Struct):
    """Answer of both batch routes, in the order of the request."""

    results: list[CreatedItem | ResultItem | ItemRefusal]


class Tasks(Struct):
    """Answer of a batch claim."""

    tasks: list[Task]


class TaskResult(Struct):
    """Answer of GET /tasks/{id}/result for an ended task."""

    task: Task
    result: ResultRecord


class Subscribed(Struct, rename="camel"):
    """Answer of POST /workers/subscriptions."""

    subscription_id: str
    expires_at: str


class AvailableQueue(Struct, rename="camel"):
    """A queue that has work; ``queue_depth`` are its ready tasks."""

    event_type: str
    queue_depth: int


class SubscriptionKept(Struct, rename="camel"):
    """Answer of a subscription's heartbeat."""

    subscription_id: str
    expires_at: str
    available: list[AvailableQueue]


# --- requests; None is absent --------------------------------------------------------------------


class CreateBody(Struct, rename="camel"):
    """Body of POST /tasks and item of POST /tasks/batch."""

    command: str | None = None
    payload: Raw = Raw()
    priority: int | None = None
    webhook: str | None = None
    max_attempts: int | None = None
    idempotency_key: str | None = None
    run_at: str | None = None
    delay_seconds: int | None = None


class CreateBatchBody(Struct):
    """The object form of a batch of creates."""

    tasks: list[CreateBody] | None = None


class RawCreateBatchBody(Struct):
    """The same with items not looked at, to find out which of them are bad."""

    tasks: list[Raw] | None = None


class ClaimBody(Struct, rename="camel"):
    """Body of POST /tasks/claim and, with ``count``, of POST /tasks/claim/batch."""

    commands: list[str] | None = None
    lease_seconds: int | None = None
    wait_seconds: int | None = None
    worker_id: str | None = None
    count: int | None = None


class LeaseBody(Struct, rename="camel"):
    """Body of heartbeat, abandon and nack; each reads its own fields."""

    worker_id: str | None = None
    attempt: int | None = None
    extend_seconds: int | None = None
    delay_seconds: int | None = None
    reason: str | None = None


class Artifact(Struct, rename="camel"):
    """One artifact of a result as sent."""

    name: str | None = None
    url: str | None = None
    content_base64: str | None = None
    content_type: str | None = None


class ResultBody(Struct, rename="camel"):
    """Body of POST /tasks/{id}/result and, with ``task_id``, item of POST /tasks/batch/results."""

    task_id: str | None = None
    status: str | None = None
    result: Raw = Raw()
    error: str | None = None
    artifacts: list[Artifact] | None = None
    worker_id: str | None = None
    attempt: int | None = None


class SubscribeBody(Struct, rename="camel"):
    """Body of POST /workers/subscriptions."""

    callback_url: str | None = None
    event_types: list[str] | None = None
    ttl_seconds: int | None = None
    delivery_mode: str | None = None
    group_id: str | None = None
    min_interval_seconds: int | None = None


class SubscriptionHeartbeatBody(Struct, rename="camel"):
    """Body of POST /workers/subscriptions/{id}/heartbeat."""

    ttl_seconds: int | None = None
    wait_seconds: int | None = None


class ResultBatchBody(Struct, rename="camel"):
    """Body of POST /tasks/batch/results."""

    results: list[ResultBody] | None = None
    worker_id: str | None = None


class RawResultBatchBody(Struct, rename="camel"):
    """The same with items not looked at, to find out which of them are bad."""

    results: list[Raw] | None = None
    worker_id: str | None = None


class DeadBody(Struct):
    """Body of requeue and purge of dead letters."""

    ids: list[str] | None = None
    limit: int | None = None


class PurgeBody(Struct):
    """Body of the purge of a queue."""

    state: str | None = None


class CleanupBody(Struct):
    """Body of POST /admin/tasks/cleanup."""

    limit: int | None = None
    before: str | None = None


class TopicBody(Struct, rename="camel", forbid_unknown_fields=True):
    """Body of PUT /admin/topics/{topicName}."""

    priority_tiers: list[int] | None = None
    max_attempts: int | None = None
    dead_letter_topic_ref: str | None = None
    retention_seconds: int | None = None
    max_consumers: int | None = None


class BackupBody(Struct):
    """Body of POST /admin/backup."""

    name: str


# --- times ---------------------------------------------------------------------------------------

_DURATION_PART = re.compile(r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(ns|us|µs|ms|s|m|h)", re.ASCII)
_DURATION = re.compile(f"(?:{_DURATION_PART.pattern})+", re.ASCII)
_UNIT_NS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d+))?(?:[Zz]|([+-])([01]\d|2[0-3]):([0-5]\d))",
    re.ASCII,
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: What ``rfc3339`` can write: the years 1 to 9999
TIME_MIN_MS, TIME_MAX_MS = -62_135_596_800_000, 253_402_300_799_999


@lru_cache(maxsize=1024)
def _seconds_text(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).isoformat()[:19]


@lru_cache(maxsize=1024)
def rfc3339(time_ms: int) -> str:
    """RFC 3339 text in UTC, with milliseconds, of a time in ms since the epoch."""
    seconds, ms = divmod(time_ms, 1000)
    return f"{_seconds_text(seconds)}.{ms:03d}Z"


def parse_rfc3339(text: str) -> int | None:
    """Milliseconds since the epoch, rounded up; None when the text is not RFC 3339."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        return None
    day, clock, fraction, sign, hours, minutes = match.groups()
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}+00:00")
    except ValueError:
        return None
    ms = round((moment - _EPOCH).total_seconds()) * 1000
    if fraction is not None:
        digits = fraction.ljust(3, "0")
        ms += int(digits[:3]) + (1 if digits[3:].strip("0") else 0)
    if sign is not None:
        offset_ms = (int(hours) * 60 + int(minutes)) * 60_000
        ms += -offset_ms if sign == "+" else offset_ms
    return ms


def parse_duration_ns(text: str) -> int | None:
    """Nanoseconds of a duration such as ``60s``, ``1m30s`` or ``1.5h``; None when it is none."""
    if text == "0":
        return 0
    if not _DURATION.fullmatch(text):
        return None
    total = Decimal(0)
    for number, unit in _DURATION_PART.findall(text):
        total += Decimal(number) * _UNIT_NS[unit]
    return int(total)
