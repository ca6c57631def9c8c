"""The objects of the REST interface, with its names and bounds, and its times.

Payloads and results are ``msgspec.Raw``: bytes that are passed on, never parsed and written again.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

#: Of every path of the REST interface
PREFIX = "/v1/codeq"
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
#: The value of ``resultKey`` once a task has a result record.
RESULT_KEY = "codeq:results"
COMMANDS_MAX = 100
COMMAND_BYTES_MAX = 256
WORKER_ID_BYTES_MAX = 256
CLAIM_WAIT_SECONDS_MAX = 30
RESULT_WAIT_SECONDS_MAX = 60
CLEANUP_LIMIT_MAX = 10_000
DEAD_IDS_MAX = 1_000
TOPIC_TIERS_MAX, TOPIC_TIER_MAX, TOPIC_ATTEMPTS_MAX = 10, 10, 100
TOPIC_CONSUMERS_MAX, TOPIC_NAME_CHARS_MAX = 10_000, 63
DELIVERY_MODES = ("fanout", "group", "hash")


#: What is trimmed from texts on every surface: Unicode's white space, without the four separators
#: U+001C to U+001F that ``str.strip`` takes away too
BLANKS = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


def is_command(text: str) -> bool:
    """Whether a text, trimmed, can be a command: 1 to 256 bytes without control characters."""
    return 0 < len(text.encode()) <= COMMAND_BYTES_MAX and not any(map(_is_control, text))


def _is_control(char: str) -> bool:
    return unicodedata.category(char) == "Cc"


# --- what the schema of a member says beyond its type --------------------------------------------
# Decoding does not look at it: what is out of bounds is refused by the handlers, with their texts.
# A bound that is a text is the setting of that name; ``needs`` are members that a handler asks for.


def _also(description: str = "", /, **schema: Any) -> Meta:
    return Meta(description=description or None, extra_json_schema=schema)


def _either(*names: str) -> dict[str, Any]:
    """The schema of an object of one of these types."""
    return {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]}


_CONTROL = r"\u0000-\u001f\u007f-\u009f"
_BLANK = r"\t\n\u000b\f\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_INK = f"[^{_CONTROL}{_BLANK}]"
COMMAND_PATTERN = f"^[{_BLANK}]*{_INK}(?:[^{_CONTROL}]{{0,254}}{_INK})?[{_BLANK}]*$"
TENANT_PATTERN = "^[a-z][a-z0-9-]{1,62}$"
TOPIC_NAME_PATTERN = "^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$"
BASE64_PATTERN = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2,3})?=*$"
_COMMAND = _also(
    "Trimmed; 1 to 256 bytes of UTF-8 without control characters; case-sensitive.",
    pattern=COMMAND_PATTERN,
)
_COMMAND_OR_BLANK = f"^[{_BLANK}]*$|{COMMAND_PATTERN}"
_INT32 = _also(minimum=INT32_MIN, maximum=INT32_MAX)
_COUNT = _also(minimum=0)
_ANY = _also("Any JSON value; its bytes are kept.")

_TIERS = _also(minItems=1, maxItems=TOPIC_TIERS_MAX, uniqueItems=True)
_STREAMS = _also(
    "Open streams; a kind that is off is left out.",
    propertyNames={"enum": ["producer", "worker"]},
)
_TOPIC_ATTEMPTS = _also(minimum=1, maximum=TOPIC_ATTEMPTS_MAX)

Time = Annotated[str, _also("RFC 3339, in UTC.", format="date-time")]
Status = Annotated[str, _also(enum=["PENDING", "IN_PROGRESS", "COMPLETED", "FAILED"])]
EndStatus = Annotated[str, _also(enum=["COMPLETED", "FAILED"])]
Tier = Annotated[int, _also(minimum=0, maximum=TOPIC_TIER_MAX)]
Count = Annotated[int, _COUNT]
_ANYTHING_ELSE = {"description": "Anything else is refused in its place."}
_ITEM_OF_CREATES = {"anyOf": [{"$ref": "#/components/schemas/CreateBody"}, _ANYTHING_ELSE]}
_ITEM_OF_RESULTS = {"anyOf": [{"$ref": "#/components/schemas/ResultBody"}, _ANYTHING_ELSE]}
CREATES = {"minItems": 1, "maxItems": "limits.createBatch", "items": _ITEM_OF_CREATES}
CREATED_ITEMS = {"items": _either("CreatedItem", "ItemRefusal")}
WorkerId = Annotated[
    str | None, _also("At most 256 bytes. Default: the subject of the token.", maxLength=256)
]
Attempt = Annotated[
    int | None, _also("Another number than that of the task's attempts is refused as not-owner.")
]


# --- answers -------------------------------------------------------------------------------------


class Task(Struct, rename="camel", omit_defaults=True):
    """A task as REST shows it; times are RFC 3339 in UTC; ``payload`` is the payload's text."""

    id: str
    command: str
    payload: Annotated[str, _also("The text of the payload, byte for byte as it was sent.")]
    priority: Annotated[int, _INT32]
    status: Status
    last_known_location: Annotated[
        str, _also(enum=["PENDING_LIST", "DELAYED_ZSET", "INPROG_SET", "DLQ_SET", "NONE"])
    ]
    attempts: Count
    max_attempts: Annotated[int, _also(minimum=1)]
    tenant_id: str
    created_at: Time
    updated_at: Time
    webhook: str = ""
    trace_parent: str = ""
    trace_state: str = ""
    worker_id: str = ""
    lease_until: Time = ""
    error: str = ""
    result_key: Annotated[str, _also(const=RESULT_KEY)] = ""

    def json(self, type: Any = Any) -> Any:
        """The payload read as JSON, as a value of ``type`` (a msgspec Struct, a dataclass, ...).
        Raises msgspec.DecodeError when it is something else."""
        return msgspec.json.decode(self.payload, type=type)


class ArtifactLink(Struct):
    """One artifact as it is shown."""

    name: str
    url: str


class ResultRecord(Struct, rename="camel", omit_defaults=True):
    """What is known of an ended task; ``result`` is any JSON value."""

    task_id: str
    status: EndStatus
    completed_at: Time
    result: Annotated[Raw | UnsetType, _ANY] = UNSET
    error: str = ""
    artifacts: Annotated[
        Raw | UnsetType,
        _also(type="array", minItems=1, items={"$ref": "#/components/schemas/ArtifactLink"}),
    ] = UNSET

    def json(self, type: Any = Any) -> Any:
        """The result read as JSON, as ``Task.json``; None when there is none."""
        return None if self.result is UNSET else msgspec.json.decode(self.result, type=type)

    def files(self) -> list[ArtifactLink]:
        """The artifacts, by name and address."""
        return (
            []
            if self.artifacts is UNSET
            else msgspec.json.decode(self.artifacts, type=list[ArtifactLink])
        )


class QueueStats(Struct, rename="camel", omit_defaults=True):
    """Depths of one queue. ``tenant_id`` is filled for operators only."""

    command: str
    ready: Count
    delayed: Count
    in_progress: Count
    dlq: Count
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

    priority_tiers: Annotated[tuple[Tier, ...], _TIERS]
    max_attempts: Annotated[int, _TOPIC_ATTEMPTS]
    dead_letter_topic_ref: str
    retention_seconds: Annotated[int, _also(minimum=1)] = 0
    max_consumers: Annotated[int, _also(minimum=1)] = 0


class TopicShown(Struct, rename="camel"):
    """Answer of PUT and GET /admin/topics/{topicName}."""

    topic_id: str
    tenant_id: str
    topic_name: str
    policy: TopicPolicy
    version: Annotated[int, _also(minimum=1)]
    created_at: Time
    updated_at: Time


class OverviewQueue(Struct, rename="camel", omit_defaults=True):
    """One queue of the overview: depths; counts since the start of the process, ``failed`` without
    dead letters; how long its oldest ready task has been ready, 0 when none is. ``latency_counts``
    are its ends on every path by the time since the create, one count for each bound of
    ``latency_bounds_seconds`` and one for what took longer; left out while nothing has ended."""

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
    latency_counts: tuple[Count, ...] = ()


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
    latency_bounds_seconds: tuple[float, ...]
    leases: list[WorkerLeases]
    leases_left_out: int
    live_tasks: int
    streams: Annotated[dict[str, int], _STREAMS]
    waiting_claims: int
    webhooks: OverviewWebhooks
    commits: Durations
    syncs: Durations
    memory: OverviewMemory
    disk_free_bytes: int


class Requeued(Struct):
    """How many dead letters became ready again."""

    requeued: Count


class Purged(Struct):
    """How many tasks were ended, or dead letters taken away."""

    purged: Count


class Cleaned(Struct):
    """How many ended tasks were taken away, and by which bounds."""

    deleted: Count
    before: Time
    limit: Annotated[int, _also(minimum=1, maximum=CLEANUP_LIMIT_MAX)]


class BackupMade(Struct):
    """Answer of POST /admin/backup."""

    path: str
    bytes: Count


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


class CreatedItems(Struct):
    """Answer of POST /tasks/batch to an object, in the order of the request."""

    results: Annotated[list[Any], _also(**CREATED_ITEMS)]


class ResultItems(Struct):
    """Answer of POST /tasks/batch/results, in the order of the request."""

    results: Annotated[list[Any], _also(items=_either("ResultItem", "ItemRefusal"))]


class LeaseKept(Struct):
    """Answer of POST /tasks/{id}/heartbeat."""

    ok: bool


class GivenBack(Struct):
    """Answer of POST /tasks/{id}/abandon."""

    status: Annotated[str, _also(const="requeued")]


class Nacked(Struct, rename="camel"):
    """Answer of POST /tasks/{id}/nack; a dead letter is not delayed."""

    status: Annotated[str, _also(enum=["requeued", "dlq"])]
    delay_seconds: Count


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
    expires_at: Time


class AvailableQueue(Struct, rename="camel"):
    """A queue that has work; ``queue_depth`` are its ready tasks."""

    event_type: str
    queue_depth: Count


class SubscriptionKept(Struct, rename="camel"):
    """Answer of a subscription's heartbeat."""

    subscription_id: str
    expires_at: Time
    available: list[AvailableQueue]


class RaftStatus(Struct, rename="camel"):
    """Answer of GET /raft/status."""

    enabled: bool
    num_groups: Count


class Health(Struct):
    """Answer of GET /healthz and GET /readyz."""

    status: Annotated[str, _also(const="ok")]


class ErrorBody(Struct):
    """The one shape of every error; ``error`` repeats ``message``."""

    code: str
    message: str
    error: str


class RateLimitedBody(ErrorBody, rename="camel", kw_only=True):
    """What 429 says: which bucket is empty, and for how long."""

    scope: str
    operation: str
    retry_after_seconds: Annotated[int, _also(minimum=1)]


class UnprocessableBody(ErrorBody, kw_only=True):
    """422 of a topic, with the member or part of the path that is wrong."""

    field: str


class ResultAbsentBody(ErrorBody, kw_only=True):
    """404 of a task that has not ended, with its status."""

    status: Annotated[str, _also(enum=["PENDING", "IN_PROGRESS"])]


# --- requests; None is absent --------------------------------------------------------------------


class CreateBody(Struct, rename="camel"):
    """Body of POST /tasks and item of POST /tasks/batch, where payload may be missing or null."""

    needs: ClassVar = ("command", "payload")
    command: Annotated[str | None, _COMMAND] = None
    payload: Annotated[
        Raw,
        _also(
            "Any JSON value but null, at most limits.payloadBytes; its bytes are kept.",
            **{"not": {"type": "null"}},
        ),
    ] = field(default_factory=Raw)
    priority: Annotated[int | None, _INT32] = None
    webhook: Annotated[
        str | None, _also("http or https, with a host that is not private.", maxLength=2048)
    ] = None
    max_attempts: Annotated[
        int | None, _also("0 and less: the default of the server.", maximum=INT32_MAX)
    ] = None
    idempotency_key: Annotated[
        str | None, _also("At most 512 bytes; blank is none.", maxLength=512)
    ] = None
    run_at: Annotated[
        str | None, _also("RFC 3339. Wins over delaySeconds.", format="date-time")
    ] = None
    delay_seconds: Annotated[int | None, _also(minimum=0, maximum=INT32_MAX)] = None


class CreateBatchBody(Struct):
    """The object form of a batch of creates."""

    tasks: list[CreateBody] | None = None


class RawCreateBatchBody(Struct):
    """The same with items not looked at, to find out which of them are bad."""

    tasks: Annotated[list[Raw], _also(**CREATES)]


class ClaimBody(Struct, rename="camel"):
    """Body of POST /tasks/claim."""

    commands: Annotated[
        list[str] | None,
        _also("Tried in this order, at most 100 different. None: all the token allows."),
    ] = None
    lease_seconds: Annotated[
        int | None, _also("0 and less: defaultLeaseSeconds. Cut to leaseMaxSeconds.")
    ] = None
    wait_seconds: Annotated[int | None, _also("0 to 30; cut to these bounds.")] = None
    worker_id: WorkerId = None


class ClaimBatchBody(ClaimBody, rename="camel", kw_only=True):
    """Body of POST /tasks/claim/batch."""

    count: Annotated[int, _also(minimum=1, maximum="limits.claimBatch")]


class LeaseBody(Struct, rename="camel"):
    """Body of POST /tasks/{id}/abandon, and what all calls of a lease may say."""

    worker_id: WorkerId = None
    attempt: Attempt = None


class HeartbeatBody(LeaseBody, rename="camel"):
    """Body of POST /tasks/{id}/heartbeat."""

    extend_seconds: Annotated[
        int | None, _also("0 and less: defaultLeaseSeconds. Cut to leaseMaxSeconds.")
    ] = None


class NackBody(LeaseBody, rename="camel"):
    """Body of POST /tasks/{id}/nack."""

    delay_seconds: Annotated[
        int | None,
        _also("0: at once. None or less than 0: by the backoff. Cut to nackDelayMaxSeconds."),
    ] = None
    reason: Annotated[str | None, _also("Cut to 8 KiB.")] = None


class Artifact(Struct, rename="camel"):
    """One artifact of a result as sent."""

    needs: ClassVar = ("name",)
    name: Annotated[
        str | None,
        _also(
            "One plain file name of at most 255 bytes.",
            pattern=r"^[^/\\\u0000-\u001f]+$",
            maxLength=255,
            **{"not": {"enum": [".", ".."]}},
        ),
    ] = None
    url: Annotated[str | None, _also("A link to a file elsewhere.")] = None
    content_base64: Annotated[
        str | None, _also("The file itself; kept with the task.", pattern=BASE64_PATTERN)
    ] = None
    content_type: Annotated[str | None, _also(pattern="^[ -~]*$", maxLength=255)] = None


class ResultBody(Struct, rename="camel"):
    """Body of POST /tasks/{id}/result and, with ``task_id``, item of POST /tasks/batch/results."""

    needs: ClassVar = ("status",)
    task_id: Annotated[str | None, _also("Of an item of a batch; else that of the path.")] = None
    status: Annotated[str | None, _also(enum=["COMPLETED", "FAILED"])] = None
    result: Annotated[Raw, _ANY] = field(default_factory=Raw)
    error: Annotated[str | None, _also("Not blank with FAILED. Cut to 8 KiB.")] = None
    artifacts: list[Artifact] | None = None
    worker_id: WorkerId = None
    attempt: Attempt = None


class SubscribeBody(Struct, rename="camel"):
    """Body of POST /workers/subscriptions."""

    callback_url: Annotated[
        str | None, _also("http or https, with a host that is not private.", maxLength=2048)
    ] = None
    event_types: Annotated[
        list[Annotated[str, _also(pattern=_COMMAND_OR_BLANK)]] | None,
        _also("At most 100 different; blank ones are dropped. None: all the token allows."),
    ] = None
    ttl_seconds: Annotated[int | None, _also("0 and less: 300. Cut to 86400.")] = None
    delivery_mode: Annotated[
        str | None, _also("None or blank: fanout.", enum=[*DELIVERY_MODES, "", None])
    ] = None
    group_id: Annotated[str | None, _also("Trimmed, at most 256 bytes; needed for group.")] = None
    min_interval_seconds: Annotated[
        int | None, _also("0 and less: subscriptionMinIntervalSeconds.")
    ] = None


class SubscriptionHeartbeatBody(Struct, rename="camel"):
    """Body of POST /workers/subscriptions/{id}/heartbeat."""

    ttl_seconds: Annotated[int | None, _also("0 and less: as it is. Cut to 86400.")] = None
    wait_seconds: Annotated[int | None, _also("0 to 30; cut to these bounds.")] = None


class ResultBatchBody(Struct, rename="camel"):
    """Body of POST /tasks/batch/results."""

    results: list[ResultBody] | None = None
    worker_id: str | None = None


class RawResultBatchBody(Struct, rename="camel"):
    """The same with items not looked at, to find out which of them are bad."""

    results: Annotated[
        list[Raw], _also(minItems=1, maxItems="limits.resultBatch", items=_ITEM_OF_RESULTS)
    ]
    worker_id: WorkerId = None


class DeadBody(Struct):
    """Body of requeue and purge of dead letters."""

    ids: Annotated[list[str] | None, _also(maxItems=DEAD_IDS_MAX)] = None
    limit: Annotated[
        int | None, _also("Oldest first. None: 100.", minimum=1, maximum=INT32_MAX)
    ] = None


class PurgeBody(Struct):
    """Body of the purge of a queue."""

    needs: ClassVar = ("state",)
    state: Annotated[str | None, _also(enum=["ready", "delayed", "all"])] = None


class CleanupBody(Struct):
    """Body of POST /admin/tasks/cleanup."""

    limit: Annotated[int | None, _also("0 and less: 1000. Cut to 10000.")] = None
    before: Annotated[str | None, _also("RFC 3339. None: now.", format="date-time")] = None


class TopicBody(Struct, rename="camel", forbid_unknown_fields=True):
    """Body of PUT /admin/topics/{topicName}."""

    needs: ClassVar = ("priorityTiers", "maxAttempts", "deadLetterTopicRef")
    priority_tiers: Annotated[list[Tier] | None, _TIERS] = None
    max_attempts: Annotated[int | None, _TOPIC_ATTEMPTS] = None
    dead_letter_topic_ref: Annotated[
        str | None, _also("Another topic.", pattern=TOPIC_NAME_PATTERN)
    ] = None
    retention_seconds: Annotated[
        int | None, _also("0: as the server has it.", minimum=0, maximum=INT32_MAX)
    ] = None
    max_consumers: Annotated[
        int | None, _also("0: no limit.", minimum=0, maximum=TOPIC_CONSUMERS_MAX)
    ] = None


class BackupBody(Struct):
    """Body of POST /admin/backup."""

    name: Annotated[
        str,
        _also("One plain name, not hidden, of at most 200 bytes.", minLength=1, maxLength=200),
    ]


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
_MILLISECOND = timedelta(milliseconds=1)
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


def since_epoch_ms(time: datetime) -> int:
    """Milliseconds since the epoch of a time with a zone, rounded up."""
    return -((_EPOCH - time) // _MILLISECOND)


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
