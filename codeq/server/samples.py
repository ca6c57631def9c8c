"""One example of each thing that routes take and answer, for the description of the API."""

from __future__ import annotations

from typing import Any

from msgspec import Raw, structs

from codeq.model import (
    RESULT_KEY,
    AvailableQueue,
    BackupMade,
    Cleaned,
    CreatedItem,
    CreatedItems,
    Durations,
    DurationsBucket,
    ItemRefusal,
    Overview,
    OverviewMemory,
    OverviewQueue,
    OverviewWebhooks,
    QueueStats,
    ResultItem,
    ResultItems,
    ResultRecord,
    Subscribed,
    SubscriptionKept,
    Task,
    TaskPage,
    TaskResult,
    TopicPolicy,
    TopicShown,
    WorkerLeases,
)
from codeq.server.metrics import LATENCY_BUCKETS

ID = "0197f3c0-5a00-7000-8000-000000000001"
_AT, _SOON = "2026-01-31T09:30:00.000Z", "2026-01-31T09:35:00.000Z"

CREATE: dict[str, Any] = {"command": "send", "payload": {"to": "a@example.com"}, "priority": 5}
CLAIM: dict[str, Any] = {"commands": ["send"], "leaseSeconds": 60, "waitSeconds": 10}
RESULT: dict[str, Any] = {"status": "COMPLETED", "result": {"sent": True}}

TASK = Task(
    id=ID,
    command="send",
    payload='{"to":"a@example.com"}',
    priority=5,
    status="PENDING",
    last_known_location="PENDING_LIST",
    attempts=0,
    max_attempts=5,
    tenant_id="acme",
    created_at=_AT,
    updated_at=_AT,
)
CLAIMED = structs.replace(
    TASK,
    status="IN_PROGRESS",
    last_known_location="INPROG_SET",
    attempts=1,
    worker_id="worker-1",
    lease_until=_SOON,
)
_ENDED = structs.replace(TASK, last_known_location="NONE", result_key=RESULT_KEY)
CANCELLED = structs.replace(_ENDED, status="FAILED", error="CANCELLED")
_DONE = structs.replace(_ENDED, status="COMPLETED", attempts=1)
_DEAD = structs.replace(
    CANCELLED, last_known_location="DLQ_SET", attempts=5, error="mail server is away"
)
PAGE = TaskPage([TASK], "0000000000ff")
DEAD_PAGE = TaskPage([_DEAD])
RECORD = ResultRecord(ID, "COMPLETED", _SOON, Raw(b'{"sent":true}'))
TASK_RESULT = TaskResult(_DONE, RECORD)
CREATED_ITEMS = CreatedItems(
    [CreatedItem(TASK), ItemRefusal("validation-error", "invalid command", "invalid command")]
)
RESULT_ITEMS = ResultItems(
    [ResultItem(ID, RECORD), ItemRefusal("not-owner", "not-owner", "not-owner", ID)]
)
QUEUE = QueueStats("send", ready=12, delayed=3, in_progress=4, dlq=1)
TOPIC = TopicShown("acme.send", "acme", "send", TopicPolicy((0, 5), 3, "send-dead"), 1, _AT, _AT)
_TIMES = Durations(2, 0.003, [DurationsBucket(0.001, 1), DurationsBucket(None, 2)])
OVERVIEW = Overview(
    version="0.1.0",
    at=_AT,
    uptime_seconds=3600.5,
    queues=[
        OverviewQueue(
            *("send", 12, 3, 4, 1, 120, 110, 90, 5, 1, 2, 0.25, False),
            latency_counts=(40, 30, 15, 6, 4, 1, *(0,) * 9),
        )
    ],
    queues_left_out=0,
    latency_bounds_seconds=LATENCY_BUCKETS,
    leases=[WorkerLeases("worker-1", 4)],
    leases_left_out=0,
    live_tasks=19,
    streams={"producer": 1, "worker": 2},
    waiting_claims=2,
    webhooks=OverviewWebhooks(0, 0, []),
    commits=_TIMES,
    syncs=_TIMES,
    memory=OverviewMemory(104857600, 4096),
    disk_free_bytes=10737418240,
)
CLEANED = Cleaned(12, _AT, 1000)
BACKUP = BackupMade("/var/lib/codeq-backups/monday", 1048576)
SUBSCRIBED = Subscribed("sub-0f0e0d0c0b0a09080706050403020100", _SOON)
SUBSCRIPTION_KEPT = SubscriptionKept(
    SUBSCRIBED.subscription_id, _SOON, [AvailableQueue("send", 12)]
)
