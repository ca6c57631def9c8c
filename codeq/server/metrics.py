"""What a scrape shows: the counters of engine, journal and process, read when asked for."""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from codeq import __version__
from codeq.engine.shard import Shard
from codeq.server.limits import Limits

#: seconds from create to end
LATENCY_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
#: seconds of a commit, a sync, or a block of the loop
SHORT_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
OTHER = "_other"
#: One command's counts, as ``Engine.command_stats`` has them
CommandStats = tuple[str, tuple[int, ...], tuple[int, ...], float, tuple[int, ...], float]


class Histogram:
    """Counts of durations by bucket. ``observe`` is called from one thread."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SHORT_BUCKETS) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(SHORT_BUCKETS, seconds)] += 1
        self._sum_s += seconds

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self._counts)

    @property
    def sum_s(self) -> float:
        """Seconds of all together."""
        return self._sum_s

    def buckets(self) -> list[tuple[float | None, int]]:
        """How many took at most so many seconds; None = all."""
        return list(zip((*SHORT_BUCKETS, None), accumulate(self._counts), strict=True))

    def family(self, name: str, text: str) -> Metric:
        """The samples as the scrape wants them."""
        family = HistogramMetricFamily(name, text)
        family.add_metric([], _cumulative(SHORT_BUCKETS, self._counts), self._sum_s)
        return family


class Families(Collector):
    """What was read of the counters."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """The families."""
        return self._families

    def describe(self) -> Iterable[Metric]:
        """Nothing: keeps the registry from collecting at once."""
        return ()


class Metrics:
    """Everything one scrape shows.

    ``commit``, ``sync`` and ``loop_blocked`` are fed by the process; ``streams`` maps a kind of
    stream to a function that counts the open ones, of one tenant or (None) of all.
    """

    content_type = CONTENT_TYPE_PLAIN_0_0_4.encode()

    def __init__(self, shard: Shard, limits: Limits) -> None:
        self._shard = shard
        self.commit = Histogram()
        self.sync = Histogram()
        self.loop_blocked = Histogram()
        self.streams: dict[str, Callable[[str | None], int]] = {}
        self._limits = limits
        self._callbacks: dict[tuple[str, str, str], int] = {}
        self._called: set[str] = set()  # commands that have a label there
        self._process_registry = CollectorRegistry()
        ProcessCollector(registry=self._process_registry)
        GCCollector(registry=self._process_registry)

    def open_streams(self, tenant: str | None) -> dict[str, int]:
        """Open streams by kind, of one tenant or of all."""
        return {kind: count(tenant) for kind, count in self.streams.items()}

    def observe_commit(self, commit_s: float, sync_s: float) -> None:
        """One commit group: the time of write and sync together, and that of the sync."""
        self.commit.observe(commit_s)
        self.sync.observe(sync_s)

    def count_callback(self, kind: str, command: str, success: bool) -> None:
        """One try to tell a webhook or a subscription."""
        if command not in self._called:
            if len(self._called) < self._shard.settings.command_labels_max:
                self._called.add(command)
            else:
                command = OTHER
        labels = (kind, command, "success" if success else "failure")
        self._callbacks[labels] = self._callbacks.get(labels, 0) + 1

    def scrape(self) -> bytes:
        """The text of a scrape."""
        return self.prepare()()

    def prepare(self) -> Callable[[], bytes]:
        """Reads every counter now. What is returned makes the text of it, which takes much longer,
        in any thread."""
        read = CollectorRegistry()
        read.register(Families(list(self._families())))
        return lambda: generate_latest(read) + generate_latest(self._process_registry)

    def _families(self) -> Iterator[Metric]:
        stats = self._shard.engine.command_stats()
        yield from self._tasks(stats)
        yield from self._queues({name for name, *_ in stats})
        yield from self._webhooks()
        yield self.commit.family("codeq_commit_seconds", "Write and sync of a commit group.")
        yield self.sync.family("codeq_sync_seconds", "Sync of a commit group.")
        yield self.loop_blocked.family(
            "codeq_loop_blocked_seconds", "How late a timer of the event loop was."
        )
        yield from self._process()

    def _tasks(self, stats: list[CommandStats]) -> Iterator[Metric]:
        created = CounterMetricFamily(
            "codeq_task_created", "Tasks created, replays not counted.", labels=["command"]
        )
        claimed = CounterMetricFamily("codeq_task_claimed", "Claims.", labels=["command"])
        completed = CounterMetricFamily(
            "codeq_task_completed", "Ends of tasks, on every path.", labels=["command", "status"]
        )
        expired = CounterMetricFamily("codeq_lease_expired", "Leases over.", labels=["command"])
        latency = HistogramMetricFamily(
            "codeq_task_processing_latency_seconds",
            "From create to end.",
            labels=["command", "status"],
        )
        for name, counts, done, done_s, failed, failed_s in stats:
            created.add_metric([name], counts[0])
            claimed.add_metric([name], counts[1])
            completed.add_metric([name, "COMPLETED"], counts[2])
            completed.add_metric([name, "FAILED"], counts[3])
            expired.add_metric([name], counts[4])
            for status, buckets, sum_s in (
                ("COMPLETED", done, done_s),
                ("FAILED", failed, failed_s),
            ):
                latency.add_metric([name, status], _cumulative(LATENCY_BUCKETS, buckets), sum_s)
        yield from (created, claimed, completed, expired, latency)
        hits = CounterMetricFamily(
            "codeq_rate_limit_hits",
            "Refused, or webhooks put off, for lack of tokens.",
            labels=["scope", "operation"],
        )
        for operation, count in self._limits.hits.items():
            hits.add_metric(operation, count)
        yield hits

    def _queues(self, labels: set[str]) -> Iterator[Metric]:
        depths: dict[str, list[int]] = {}
        for row in self._shard.engine.queues(None):
            command, counts = row[1], row[2:]
            name = command.decode("utf-8", "replace")
            known = depths.setdefault(name if name in labels else OTHER, [0, 0, 0, 0])
            for place in range(4):
                known[place] += counts[place]
        depth = GaugeMetricFamily(
            "codeq_queue_depth", "Tasks by place, over all tenants.", labels=["command", "queue"]
        )
        dead = GaugeMetricFamily("codeq_dlq_depth", "Dead letters.", labels=["command"])
        oldest = GaugeMetricFamily(
            "codeq_oldest_ready_seconds",
            "How long the oldest ready task of any queue has been ready.",
            labels=["command"],
        )
        since, now_ms = self._shard.engine.ready_since(), self._shard.clock.now_ms()
        for name, known in depths.items():
            oldest.add_metric([name], max(0, now_ms - since.get(name, now_ms)) / 1000)
            for queue, count in zip(("ready", "delayed", "in_progress", "dlq"), known, strict=True):
                depth.add_metric([name, queue], count)
            dead.add_metric([name], known[3])
        yield from (depth, dead, oldest)

    def _webhooks(self) -> Iterator[Metric]:
        calls = CounterMetricFamily(
            "codeq_webhook_deliveries",
            "Tries to tell a webhook or a subscription.",
            labels=["kind", "command", "outcome"],
        )
        for labels, count in self._callbacks.items():
            calls.add_metric(labels, count)
        yield calls
        yield GaugeMetricFamily(
            "codeq_webhooks_pending",
            "Results that their webhooks have not taken yet.",
            self._shard.deliveries.pending,
        )
        active = GaugeMetricFamily(
            "codeq_subscriptions_active", "Subscriptions by command.", labels=["command"]
        )
        counts: dict[str, int] = {}
        for command, count in self._shard.subscriptions.active().items():
            full = len(counts) >= self._shard.settings.command_labels_max
            name = OTHER if full and command not in counts else command
            counts[name] = counts.get(name, 0) + count
        for name, count in counts.items():
            active.add_metric([name], count)
        yield active

    def _process(self) -> Iterator[Metric]:
        shard = self._shard
        yield GaugeMetricFamily(
            "codeq_waiting_claims", "Claims parked until a task comes.", shard.waiting_claims
        )
        streams = GaugeMetricFamily("codeq_streams", "Open streams.", labels=["kind"])
        for kind, count in self.open_streams(None).items():
            streams.add_metric([kind], count)
        yield streams
        yield GaugeMetricFamily(
            "codeq_live_tasks", "Tasks that have not ended.", shard.engine.live_tasks
        )
        yield GaugeMetricFamily(
            "codeq_disk_free_bytes", "Free space of the data folder.", shard.disk_free_bytes
        )
        build = InfoMetricFamily("codeq_build", "The program.")
        build.add_metric([], {"version": __version__, "python": platform.python_version()})
        yield build


def _cumulative(bounds: Iterable[float], counts: Iterable[int]) -> list[tuple[str, float]]:
    """Buckets as the scrape wants them: each holds all that is below it."""
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets
