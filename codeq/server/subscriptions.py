"""Notifications of subscriptions: one POST, one try."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial

import msgspec

from codeq.engine.shard import Shard
from codeq.engine.subscriptions import Subscription
from codeq.model import rfc3339
from codeq.server.callbacks import Callbacks, host_of
from codeq.server.limits import QUEUE_READY

CLAIM_URL = "/v1/codeq/tasks/claim"

_encode = msgspec.json.Encoder().encode


class NotificationBody(msgspec.Struct, rename="camel"):
    """What a callback receives."""

    event_type: str
    available: bool
    queue_depth: int
    claim_url: str
    sent_at: str
    notification_id: str


class Notifier:
    """Tells the subscriptions that the shard names; ``stop`` ends that."""

    def __init__(self, shard: Shard, callbacks: Callbacks) -> None:
        self._shard = shard
        self._callbacks = callbacks
        shard.subscriptions.notify = self._notify

    def stop(self) -> None:
        self._shard.subscriptions.notify = None

    def _notify(
        self, subscription: Subscription, command: str, depth: int, done: Callable[[], None]
    ) -> None:
        url = subscription.url
        if self._callbacks.limits.wait_ms(QUEUE_READY, subscription.tenant, url):
            done()
            return
        job = partial(self._post, url, command, depth, done)
        self._callbacks.places.submit(subscription.tenant, host_of(url), job, notification=True)

    async def _post(self, url: str, command: str, depth: int, done: Callable[[], None]) -> None:
        sent_at = rfc3339(self._shard.clock.now_ms())
        notification_id = f"ntf-{secrets.token_hex(16)}"
        body = NotificationBody(command, True, depth, CLAIM_URL, sent_at, notification_id)
        try:
            failure = await self._callbacks.post(QUEUE_READY, url, _encode(body))
            self._callbacks.count(QUEUE_READY.name, command, not failure)
        finally:
            done()
