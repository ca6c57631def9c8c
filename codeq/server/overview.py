"""The state of the server in one answer: queues, leases, streams, claims, webhooks, the process.

An admin is shown what is of the own tenant; what is of the process as a whole is shown to all.
Everything is counted where it happens and only read here, so it costs the same with more tasks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from codeq import __version__
from codeq.engine.shard import Shard
from codeq.model import (
    Durations,
    DurationsBucket,
    Overview,
    OverviewMemory,
    OverviewQueue,
    OverviewWebhooks,
    WorkerLeases,
    rfc3339,
)
from codeq.server.metrics import LATENCY_BUCKETS, Histogram, Metrics

if TYPE_CHECKING:
    from codeq.server.webhooks import Webhooks

#: Workers that are listed
WORKERS_MAX = 1_000
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STATM = Path("/proc/self/statm")


class Overviews:
    """Makes overviews. ``webhooks`` is set once they are sent; until then none is exhausted."""

    def __init__(self, shard: Shard, metrics: Metrics) -> None:
        self._shard = shard
        self._metrics = metrics
        self._started_s = shard.clock.monotonic_s()
        self.webhooks: Webhooks | None = None

    def make(
        self, tenant: str | None, limit: int, done: Callable[[Overview], None], *, operator: bool
    ) -> None:
        """The overview as of now, once all it says is durable. ``tenant`` None = of all;
        ``limit``: so many queues; ``operator``: entries carry their tenant."""
        shard = self._shard
        clock = shard.clock
        key = None if tenant is None else tenant.encode()
        rows, more, live = shard.engine.tallies(key, limit)
        workers, more_workers = self._workers(key, operator=operator)
        overview = Overview(
            version=__version__,
            at=rfc3339(clock.now_ms()),
            uptime_seconds=round(clock.monotonic_s() - self._started_s, 3),
            queues=[self._queue(*row, operator=operator) for row in rows],
            queues_left_out=more,
            latency_bounds_seconds=LATENCY_BUCKETS,
            leases=workers,
            leases_left_out=more_workers,
            live_tasks=live,
            streams=self._metrics.open_streams(tenant),
            waiting_claims=(
                shard.waiting_claims if tenant is None else shard.waiting_claims_of(tenant)
            ),
            webhooks=self._webhooks(tenant),
            commits=_durations(self._metrics.commit),
            syncs=_durations(self._metrics.sync),
            memory=OverviewMemory(_resident_bytes(), shard.engine.body_bytes),
            disk_free_bytes=shard.disk_free_bytes,
        )
        shard.journal.after(lambda: done(overview))

    def _queue(
        self,
        tenant: bytes,
        command: bytes,
        depths: tuple[int, int, int, int],
        counts: tuple[int, int, int, int, int, int],
        since_ms: int | None,
        latency: tuple[int, ...],
        *,
        operator: bool,
    ) -> OverviewQueue:
        owner, name = tenant.decode(), command.decode("utf-8", "replace")
        topic = self._shard.policies.find(owner, name)
        age_ms = 0 if since_ms is None else max(0, self._shard.clock.now_ms() - since_ms)
        return OverviewQueue(
            name,
            *depths,
            *counts,
            age_ms / 1000,
            self._shard.queues.paused(owner, name),
            "" if topic is None else topic.policy.dead_letter_topic_ref,
            owner if operator else "",
            latency if any(latency) else (),
        )

    def _workers(self, tenant: bytes | None, *, operator: bool) -> tuple[list[WorkerLeases], int]:
        """Who holds leases, by name."""
        held: dict[tuple[bytes, bytes], int] = {}
        for owner, worker, leases in self._shard.engine.leases(tenant):
            held[worker, owner] = held.get((worker, owner), 0) + leases
        shown = sorted(held)[:WORKERS_MAX]
        workers = [
            WorkerLeases(
                worker.decode("utf-8", "replace"),
                held[worker, owner],
                owner.decode() if operator else "",
            )
            for worker, owner in shown
        ]
        return workers, len(held) - len(shown)

    def _webhooks(self, tenant: str | None) -> OverviewWebhooks:
        webhooks, deliveries = self.webhooks, self._shard.deliveries
        by_tenant = deliveries.pending_by
        pending = deliveries.pending if tenant is None else by_tenant.get(tenant, 0)
        if webhooks is None:
            return OverviewWebhooks(pending, 0, [])
        listed = [one for one in webhooks.exhausted if tenant in (None, one.tenant_id)]
        count = webhooks.exhausted_by.get(tenant, 0) if tenant else webhooks.exhausted_count
        return OverviewWebhooks(pending, count, listed)


def _durations(histogram: Histogram) -> Durations:
    buckets = [DurationsBucket(le, count) for le, count in histogram.buckets()]
    return Durations(histogram.count, histogram.sum_s, buckets)


def _resident_bytes() -> int:
    """Memory of the process that is in RAM; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0
