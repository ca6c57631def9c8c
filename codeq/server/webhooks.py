"""Results on their way to the webhooks of their tasks, until they were taken or given up.

The pending ones stand in the store, in the order of the ends; a window of them is in memory
(``window.py``). Tries and waits are in memory: a restart begins them anew.
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
from codeq.engine.deliveries import Outcome, Owed
from codeq.engine.shard import Shard
from codeq.model import ExhaustedWebhook, rfc3339
from codeq.server import artifacts
from codeq.server.callbacks import Callbacks
from codeq.server.limits import TASK_RESULT
from codeq.server.request import promise
from codeq.server.window import HOST_MAX, WINDOW_MAX, Window

log = logging.getLogger("codeq.webhooks")

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
    ``exhausted_by`` those of each tenant.
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
        self._loop = asyncio.get_running_loop()
        self._window = Window(
            shard.deliveries,
            callbacks.places,
            self._admit,
            host_max=host_max,
            window_max=window_max,
        )
        self._later: list[tuple[int, int, Pending]] = []
        self._numbers = itertools.count()
        self._timer: tuple[int, Any] | None = None
        self.exhausted: deque[ExhaustedWebhook] = deque(maxlen=EXHAUSTED_KEPT)
        self.exhausted_count = 0
        self.exhausted_by: dict[str, int] = {}

    def start(self) -> None:
        """Takes up what is pending and what comes."""
        self._window.start()

    async def stop(self) -> None:
        """Reads and schedules nothing more; tries under way are ended by ``Callbacks.stop``."""
        if self._timer is not None:
            self._timer[1]()
        await self._window.stop()

    @property
    def held(self) -> int:
        """Deliveries in memory."""
        return self._window.held

    def _admit(self, owed: Owed, host: str) -> None:
        self._submit(Pending(owed, host))

    def _submit(self, pending: Pending) -> None:
        job = partial(self._attempt, pending)
        self._callbacks.places.submit(pending.owed.tenant, pending.host, job)

    def _drop(self, pending: Pending) -> None:
        self._window.drop(pending.owed.tenant, pending.host)

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
