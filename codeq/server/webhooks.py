"""Results on their way to the webhooks of their tasks, until they were taken or given up.

The pending ones stand in the store, in the order of the ends; a window of them is in memory. The
window has room for so many of each host, so that a host with a long line keeps none of the others
waiting; what has no room stays in the store and is read when there is. Tries and waits are in
memory: a restart begins them anew.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections import deque
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from codeq.config import Config
from codeq.engine.deliveries import PREFIX, Outcome, Owed, Page
from codeq.engine.shard import Shard
from codeq.model import ExhaustedWebhook, rfc3339
from codeq.server import artifacts
from codeq.server.callbacks import Callbacks, host_of
from codeq.server.limits import TASK_RESULT
from codeq.server.request import promise

log = logging.getLogger("codeq.webhooks")

#: Pending deliveries in memory, of one host and of all
HOST_MAX = 1_024
WINDOW_MAX = 16_384
#: Deliveries given up that the overview still shows
EXHAUSTED_KEPT = 100

_encode = msgspec.json.Encoder().encode
_NULL = Raw(b"null")


class ResultBody(msgspec.Struct, rename="camel"):
    """What a result webhook receives."""

    task_id: str
    event_type: str
    status: str
    result: Raw
    error: str
    artifacts: Raw
    completed_at: str


class Host:
    """The deliveries of one host that are in memory, and where in the store the others begin."""

    __slots__ = ("count", "more")

    def __init__(self) -> None:
        self.count = 0
        self.more: bytes | None = None  # all of its keys in memory are below


class Pending:
    """One delivery in memory."""

    __slots__ = ("host", "owed", "tries")

    def __init__(self, owed: Owed, host: str) -> None:
        self.owed = owed
        self.host = host
        self.tries = 0


class Webhooks:
    """Sends what is pending. Make it inside the loop; it begins with ``start``.

    ``exhausted`` are the last deliveries given up, ``exhausted_count`` counts all since the start,
    ``exhausted_by`` those of each tenant; ``held`` and ``held_by`` count what is in memory.
    """

    def __init__(
        self,
        shard: Shard,
        callbacks: Callbacks,
        config: Config,
        *,
        host_max: int = HOST_MAX,
        window_max: int = WINDOW_MAX,
    ) -> None:
        self._deliveries = shard.deliveries
        self._shard = shard
        self._callbacks = callbacks
        self._tries_max = config.result_webhook_max_attempts
        self._base_ms = config.result_webhook_base_backoff_seconds * 1000
        self._longest_ms = config.result_webhook_max_backoff_seconds * 1000
        self._host_max = host_max
        self._window_max = window_max
        self._loop = asyncio.get_running_loop()
        self._hosts: dict[str, Host] = {}
        self._hungry: dict[str, None] = {}  # hosts with room for what they have in the store
        self._at = PREFIX  # what is in the store before this was looked at
        self._end = PREFIX
        self._wake = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._later: list[tuple[int, int, Pending]] = []
        self._numbers = itertools.count()
        self._timer: tuple[int, Any] | None = None
        self.held = 0
        self.held_by: dict[str, int] = {}
        self.exhausted: deque[ExhaustedWebhook] = deque(maxlen=EXHAUSTED_KEPT)
        self.exhausted_count = 0
        self.exhausted_by: dict[str, int] = {}

    def start(self) -> None:
        """Takes up what is pending and what comes."""
        self._deliveries.committed = self._committed
        self._reader = self._loop.create_task(self._read())
        self._committed(self._deliveries.end)

    async def stop(self) -> None:
        """Reads and schedules nothing more; tries under way are ended by ``Callbacks.stop``."""
        self._deliveries.committed = None
        if self._timer is not None:
            self._timer[1]()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    # --- the window

    def _committed(self, end: bytes) -> None:
        self._end = end
        self._wake.set()

    async def _read(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while True:
                if self._at < self._end and self.held < self._window_max:
                    await self._read_new()
                elif self._hungry and self.held < self._window_max:
                    await self._read_more(next(iter(self._hungry)))
                else:
                    break

    async def _read_new(self) -> None:
        end = self._end
        page = await self._page(self._at, end)
        for owed in page.owed:
            if self.held == self._window_max:
                self._at = owed.key
                return
            name = host_of(owed.url)
            host = self._hosts.setdefault(name, Host())
            if host.more is None and host.count < self._host_max:
                self._admit(host, name, owed)
            elif host.more is None:
                host.more = owed.key
        self._at = page.next or end

    async def _read_more(self, name: str) -> None:
        """Takes deliveries of one host out of what was passed over."""
        host = self._hosts[name]
        assert host.more is not None
        page = await self._page(host.more, self._at)
        for owed in page.owed:
            if host_of(owed.url) != name:
                continue
            if host.count == self._host_max or self.held == self._window_max:
                host.more = owed.key
                break
            self._admit(host, name, owed)
        else:
            host.more = page.next
        if host.more is None or host.count > self._host_max // 2:
            self._hungry.pop(name, None)
        self._forget(name, host)

    async def _page(self, begin: bytes, end: bytes) -> Page:
        answer, done = promise(self._loop)
        self._deliveries.page(begin, end, done)
        page: Page = await answer
        return page

    def _admit(self, host: Host, name: str, owed: Owed) -> None:
        host.count += 1
        self._hold(owed.tenant, 1)
        self._submit(Pending(owed, name))

    def _submit(self, pending: Pending) -> None:
        self._callbacks.places.submit(pending.host, partial(self._attempt, pending))

    def _drop(self, pending: Pending) -> None:
        """A delivery is over: there is room for another."""
        host = self._hosts[pending.host]
        host.count -= 1
        self._hold(pending.owed.tenant, -1)
        if host.more is not None and host.count <= self._host_max // 2:
            self._hungry[pending.host] = None
        self._forget(pending.host, host)
        self._wake.set()

    def _hold(self, tenant: str, more: int) -> None:
        self.held += more
        self.held_by[tenant] = self.held_by.get(tenant, 0) + more
        if not self.held_by[tenant]:
            del self.held_by[tenant]

    def _forget(self, name: str, host: Host) -> None:
        if not host.count and host.more is None:
            self._hosts.pop(name, None)

    # --- one delivery

    async def _attempt(self, pending: Pending) -> None:
        owed = pending.owed
        wait_ms = self._callbacks.limits.wait_ms(TASK_RESULT, owed.tenant, owed.url)
        if wait_ms:
            self._wait(pending, wait_ms)
            return
        answer, done = promise(self._loop)
        self._deliveries.load(owed.key, done)
        outcome: Outcome | None = await answer
        if outcome is None:
            self._drop(pending)
            return
        trace = (outcome.trace_parent, outcome.trace_state)
        failure = await self._callbacks.post(TASK_RESULT, owed.url, body_of(outcome), trace)
        self._callbacks.count(TASK_RESULT.name, owed.command, not failure)
        pending.tries += 1
        if failure and pending.tries < self._tries_max:
            self._deliveries.release(owed.key)
            self._wait(pending, self._backoff_ms(pending.tries))
            return
        if failure:
            self._give_up(pending, outcome, failure)
        self._deliveries.remove(owed)
        self._drop(pending)

    def _backoff_ms(self, tries: int) -> int:
        return min(self._base_ms << min(tries - 1, 40), self._longest_ms)

    def _give_up(self, pending: Pending, outcome: Outcome, failure: str) -> None:
        entry = ExhaustedWebhook(
            outcome.tenant,
            outcome.task_id,
            outcome.command,
            pending.host,
            pending.tries,
            failure,
            rfc3339(self._shard.clock.now_ms()),
        )
        self.exhausted_count += 1
        self.exhausted_by[entry.tenant_id] = self.exhausted_by.get(entry.tenant_id, 0) + 1
        self.exhausted.append(entry)
        log.warning(
            "the webhook of task %s at %s was given up after %d tries: %s",
            outcome.task_id,
            pending.host,
            pending.tries,
            failure,
        )

    # --- waiting for the next try

    def _wait(self, pending: Pending, wait_ms: int) -> None:
        due_ms = self._shard.clock.now_ms() + wait_ms
        heapq.heappush(self._later, (due_ms, next(self._numbers), pending))
        self._arm()

    def _arm(self) -> None:
        due_ms = self._later[0][0]
        if self._timer is not None:
            if self._timer[0] <= due_ms:
                return
            self._timer[1]()
        self._timer = (due_ms, self._shard.at(due_ms, self._due))

    def _due(self) -> None:
        self._timer = None
        now_ms = self._shard.clock.now_ms()
        while self._later and self._later[0][0] <= now_ms:
            self._submit(heapq.heappop(self._later)[2])
        if self._later:
            self._arm()


def body_of(outcome: Outcome) -> bytes:
    """The JSON that the webhook receives; of an artifact with content it has the path."""
    shown = artifacts.shown(outcome.task_id, outcome.artifacts)
    return _encode(
        ResultBody(
            outcome.task_id,
            outcome.command,
            "COMPLETED" if outcome.completed else "FAILED",
            _NULL if outcome.result is None else Raw(outcome.result),
            "" if outcome.completed else outcome.error,
            _NULL if shown is UNSET else shown,
            rfc3339(outcome.ended_ms),
        )
    )
