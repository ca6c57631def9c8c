"""Rate limits: how many tasks, claims, cleanups and webhooks each caller may ask for.

A token bucket per scope, tenant and subject (for webhooks: URL). A request of n tasks is admitted
when min(n, burst) tokens are there and pays n, so its bucket may go below zero. Buckets that are
full and idle are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from codeq.config import RateLimit, RateLimitBucket
from codeq.engine.clock import Clock
from codeq.errors import CodeqError
from codeq.server.auth import Principal

#: A token in units that refill in whole numbers: requestsPerMinute of them each ms
TOKEN = 60_000
#: Buckets looked at in each call, so that those that are full and idle go
SWEPT = 2


class Operation(NamedTuple):
    """What is limited: the scope whose settings count, and the name in answers and metrics."""

    scope: str
    name: str


CREATE_TASK = Operation("producer", "create_task")
CLAIM = Operation("worker", "claim")
CLEANUP = Operation("admin", "cleanup")
TASK_RESULT = Operation("webhook", "task_result")
QUEUE_READY = Operation("webhook", "queue_ready")
OPERATIONS = (CREATE_TASK, CLAIM, CLEANUP, TASK_RESULT, QUEUE_READY)


class RateLimited(CodeqError):
    """The bucket has not enough tokens; it will have them in ``retry_after_seconds`` (>= 1)."""

    def __init__(self, operation: Operation, retry_after_seconds: int) -> None:
        super().__init__("rate-limited", "rate limit exceeded", retry_after_seconds)
        self.operation = operation


class Bucket:
    """Tokens as of a moment."""

    __slots__ = ("at_ms", "units")

    def __init__(self, units: int, at_ms: int) -> None:
        self.units = units
        self.at_ms = at_ms


class Buckets:
    """The buckets of one scope, by tenant and subject."""

    def __init__(self, settings: RateLimitBucket) -> None:
        self.on = settings.requests_per_minute > 0 and settings.burst_size > 0
        self._per_ms = settings.requests_per_minute
        self._full = settings.burst_size * TOKEN
        self._buckets: OrderedDict[tuple[str, str], Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def missing_ms(self, holder: tuple[str, str], count: int, now_ms: int) -> int:
        """0 if a request of ``count`` is admitted now, else ms until it would be."""
        self._sweep(now_ms)
        bucket = self._buckets.get(holder)
        if bucket is None:
            return 0
        missing = min(count * TOKEN, self._full) - self._refilled(bucket, now_ms)
        return max(0, -(-missing // self._per_ms))

    def pay(self, holder: tuple[str, str], count: int, now_ms: int) -> None:
        """Takes ``count`` tokens, whether they are there or not."""
        bucket = self._buckets.get(holder)
        if bucket is None:
            bucket = self._buckets[holder] = Bucket(self._full, now_ms)
        bucket.units = self._refilled(bucket, now_ms) - count * TOKEN
        bucket.at_ms = now_ms

    def _refilled(self, bucket: Bucket, now_ms: int) -> int:
        return min(self._full, bucket.units + (now_ms - bucket.at_ms) * self._per_ms)

    def _sweep(self, now_ms: int) -> None:
        """Looks at the buckets in turn, a few in each call; so none of them takes long."""
        for _ in range(min(SWEPT, len(self._buckets))):
            holder, bucket = self._buckets.popitem(last=False)
            if self._refilled(bucket, now_ms) < self._full:
                self._buckets[holder] = bucket


class Limits:
    """All buckets of the process; both edges, and whoever sends webhooks, share them.

    ``hits`` counts what was refused or put off, by operation.
    """

    def __init__(self, settings: RateLimit, clock: Clock) -> None:
        self._clock = clock
        self._scopes = {
            "producer": Buckets(settings.producer),
            "worker": Buckets(settings.worker),
            "admin": Buckets(settings.admin),
            "webhook": Buckets(settings.webhook),
        }
        self.hits = dict.fromkeys(OPERATIONS, 0)

    def require(self, operation: Operation, principal: Principal, count: int = 1) -> None:
        """Refuses (RateLimited) what ``admit`` would refuse now, without paying: for use before
        anything costly is done."""
        buckets = self._scopes[operation.scope]
        if not buckets.on:
            return
        holder = (principal.tenant, principal.subject)
        missing_ms = buckets.missing_ms(holder, count, self._clock.now_ms())
        if missing_ms:
            self.hits[operation] += 1
            raise RateLimited(operation, max(1, -(-missing_ms // 1000)))

    def admit(self, operation: Operation, principal: Principal, count: int = 1) -> None:
        """Pays for a request of ``count`` tasks; raises RateLimited."""
        self.require(operation, principal, count)
        self.pay(operation, principal, count)

    def pay(self, operation: Operation, principal: Principal, count: int) -> None:
        """Pays for what an admitted request turned out to get."""
        buckets = self._scopes[operation.scope]
        if buckets.on and count > 0:
            buckets.pay((principal.tenant, principal.subject), count, self._clock.now_ms())

    def wait_ms(self, operation: Operation, tenant: str, url: str) -> int:
        """For webhooks: 0 and a token is paid, or the ms after which to ask again."""
        buckets = self._scopes[operation.scope]
        if not buckets.on:
            return 0
        now_ms = self._clock.now_ms()
        missing_ms = buckets.missing_ms((tenant, url), 1, now_ms)
        if missing_ms:
            self.hits[operation] += 1
        else:
            buckets.pay((tenant, url), 1, now_ms)
        return missing_ms

    def held(self, scope: str) -> int:
        """Buckets of a scope in memory."""
        return len(self._scopes[scope])
