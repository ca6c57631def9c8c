"""Every refusal codeq can give, in one table.

A refusal is a value inside the server (the number of a row) and one exception outside it. Only the
edges turn a row into a status: REST by ``slug`` and ``http``, the streams by ``grpc`` and
``stream_message``. No text is ever compared.
"""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """One row: what the outside sees of a refusal.

    ``number`` is the ``cq_code`` of csrc/codeq.h, or ``None`` for a refusal that only an edge
    makes. ``message`` is the exact REST text, ``stream_message`` the text in an ack where it
    differs.
    """

    number: int | None
    slug: str
    http: int
    grpc: str
    message: str
    stream_message: str


def _row(number: int | None, slug: str, message: str, stream_message: str | None = None) -> Refusal:
    http, grpc = SLUGS[slug]
    return Refusal(number, slug, http, grpc, message, stream_message or message)


def _edge(slug: str, message: str, http: int | None = None) -> Refusal:
    """A refusal that only an edge makes; ``http`` where its status is not that of the slug."""
    row = _row(None, slug, message)
    return row if http is None else row._replace(http=http)


#: slug -> (HTTP status, gRPC code name)
SLUGS: dict[str, tuple[int, str]] = {
    "validation-error": (400, "INVALID_ARGUMENT"),
    "unauthenticated": (401, "UNAUTHENTICATED"),
    "permission-denied": (403, "PERMISSION_DENIED"),
    "not-owner": (403, "PERMISSION_DENIED"),
    "not-found": (404, "NOT_FOUND"),
    "conflict": (409, "ALREADY_EXISTS"),
    "not-in-progress": (409, "FAILED_PRECONDITION"),
    "payload-too-large": (413, "RESOURCE_EXHAUSTED"),
    "unprocessable": (422, "INVALID_ARGUMENT"),
    "rate-limited": (429, "RESOURCE_EXHAUSTED"),
    "internal": (500, "INTERNAL"),
    "unavailable": (503, "UNAVAILABLE"),
}

OK = 0
COMMAND_REQUIRED = _row(1, "validation-error", "invalid command", "command is required")
COMMAND_INVALID = _row(2, "validation-error", "invalid command")
WEBHOOK_INVALID = _row(3, "validation-error", "invalid webhook url")
RUN_AT_INVALID = _row(4, "validation-error", "invalid 'runAt' (use RFC3339)")
DELAY_INVALID = _row(
    5, "validation-error", "invalid 'delaySeconds' (must be >= 0)", "delaySeconds must be >= 0"
)
PRIORITY_INVALID = _row(6, "validation-error", "invalid priority")
KEY_INVALID = _row(7, "validation-error", "invalid idempotencyKey")
BODY_INVALID = _row(8, "validation-error", "invalid body")
PAYLOAD_TOO_LARGE = _row(9, "payload-too-large", "payload too large")
RESULT_TOO_LARGE = _row(10, "payload-too-large", "result too large")
KEY_CONFLICT = _row(11, "conflict", "idempotency key used with a different request")
UNAVAILABLE = _row(12, "unavailable", "unavailable")
NOT_FOUND = _row(13, "not-found", "not-found")
TASK_NOT_FOUND = _row(14, "not-found", "task not found")
NOT_IN_PROGRESS = _row(15, "not-in-progress", "not-in-progress")
NOT_OWNER = _row(16, "not-owner", "not-owner")
STATUS_INVALID = _row(17, "validation-error", "invalid status")
ERROR_REQUIRED = _row(18, "validation-error", "error required when status=FAILED")
RESULT_JSON_INVALID = _row(19, "validation-error", "invalid result", "invalid result_json")
ARTIFACT_INVALID = _row(20, "validation-error", "invalid artifacts")
NOT_PENDING = _row(21, "conflict", "task is not pending")
WORKER_ID_INVALID = _row(22, "validation-error", "invalid workerId")
PRIORITY_NO_TIER = _row(23, "validation-error", "priority not in topic tiers")

# --- tokens
HEADER_MISSING = _edge("unauthenticated", "missing Authorization header")
FORMAT_INVALID = _edge("unauthenticated", "invalid Authorization format")
TOKEN_INVALID = _edge("unauthenticated", "invalid token")
SUBJECT_MISSING = _edge("unauthenticated", "missing subject")
EVENT_TYPES_MISSING = _edge("unauthenticated", "missing eventTypes")
SCOPES_MISSING = _edge("unauthenticated", "missing scope")
SCOPE_DENIED = _edge("permission-denied", "missing scope")
TENANT_INVALID = _edge("permission-denied", "invalid tenant claims")
ADMIN_ONLY = _edge("permission-denied", "admin only")
OPERATOR_ONLY = _edge("permission-denied", "operator only")
EVENT_TYPE_DENIED = _edge("permission-denied", "event type not allowed")
PRODUCERS_OFF = _edge("unavailable", "producer validator not configured")
WORKERS_OFF = _edge("unavailable", "worker validator not configured")
KEYS_UNAVAILABLE = _edge("unavailable", "token keys cannot be fetched")

# --- requests over REST; {} stands for a number or a name
PATH_UNKNOWN = _edge("not-found", "not found")
HEADERS_TOO_LARGE = _edge("validation-error", "request headers too large", 431)
BODY_TOO_LARGE = _edge("payload-too-large", "request body too large")
BODY_STALLED = _edge("validation-error", "request body stalled", 408)
BYTES_SPENT = _edge("unavailable", "too many bytes in hand")
RATE_LIMITED = _edge("rate-limited", "rate limit exceeded")
INTERNAL = _edge("internal", "internal error")
BATCH_TOO_LARGE = _edge("validation-error", "batch size exceeds maximum of {}")
COUNT_TOO_LARGE = _edge("validation-error", "count exceeds maximum of {}")
TASK_ABSENT = _edge("not-found", "not found")
RESULT_ABSENT = _edge("not-found", "result not found")
LIMIT_INVALID = _edge("validation-error", "invalid limit")
TENANT_NAME_INVALID = _edge("validation-error", "invalid tenant")
CURSOR_INVALID = _edge("validation-error", "invalid cursor")
STATE_INVALID = _edge("validation-error", "invalid state")
BEFORE_INVALID = _edge("validation-error", "invalid 'before' (use RFC3339)")
BACKUP_EXISTS = _edge("conflict", "backup {} exists")
BACKUP_NAME_INVALID = _edge("validation-error", "invalid name")
CALLBACK_INVALID = _edge("validation-error", "invalid callback url")
MODE_INVALID = _edge("validation-error", "invalid deliveryMode")
GROUP_REQUIRED = _edge("validation-error", "groupId is required")
GROUP_INVALID = _edge("validation-error", "invalid groupId")
TOPIC_BODY_INVALID = _edge("validation-error", "invalid request body: {}")
TOPIC_INVALID = _edge("unprocessable", "invalid {}: {}")
TOPIC_ABSENT = _edge("not-found", 'queue topic "{}" not found')
TOPICS_UNAVAILABLE = _edge("unavailable", "queue topic administration unavailable: {}")
DELETION_POLICY_REQUIRED = _edge("validation-error", "deletionPolicy=Delete is required")
SUBSCRIPTIONS_FULL = _edge("unavailable", "too many subscriptions")

#: number -> row, for every refusal an item of a batch can have
BY_NUMBER: dict[int, Refusal] = {
    row.number: row
    for row in list(globals().values())
    if isinstance(row, Refusal) and row.number is not None
}


class CodeqError(Exception):
    """What a client of codeq sees of a refusal or a fault.

    ``slug`` is the stable name of the refusal, ``message`` its text, ``http`` the HTTP status.
    ``retry_after_seconds`` is when a server wants to be asked again; 0 = it did not say.
    """

    def __init__(self, slug: str, message: str, retry_after_seconds: int = 0) -> None:
        super().__init__(f"{slug}: {message}")
        self.slug = slug
        self.message = message
        self.http = SLUGS.get(slug, (500, ""))[0]
        self.retry_after_seconds = retry_after_seconds


class StoreError(CodeqError):
    """The data folder cannot be used, or a write to it failed. The message names folder or key."""

    def __init__(self, message: str) -> None:
        super().__init__("unavailable", message)
