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

#: number -> row, for every refusal an item of a batch can have
BY_NUMBER: dict[int, Refusal] = {
    row.number: row
    for row in list(globals().values())
    if isinstance(row, Refusal) and row.number is not None
}


class CodeqError(Exception):
    """What a client of codeq sees of a refusal or a fault.

    ``slug`` is the stable name of the refusal, ``message`` its text, ``http`` the HTTP status.
    """

    def __init__(self, slug: str, message: str) -> None:
        super().__init__(f"{slug}: {message}")
        self.slug = slug
        self.message = message
        self.http = SLUGS.get(slug, (500, ""))[0]


class StoreError(CodeqError):
    """The data folder cannot be used, or a write to it failed. The message names folder or key."""

    def __init__(self, message: str) -> None:
        super().__init__("unavailable", message)
