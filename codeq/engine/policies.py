"""Topic policies: what admins laid down for the queue of the same name, across restarts, whether it
has tasks or not. The engine enforces them.

On disk: an entry (entries.py) under `pt`, which has the topic in MessagePack.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from codeq.engine._engine import Engine
from codeq.engine.clock import Clock
from codeq.engine.entries import entry_key, entry_value, open_entry
from codeq.engine.journal import Journal
from codeq.engine.store import Store

PREFIX = b"pt"
END = b"pu"


class Policy(msgspec.Struct, frozen=True, array_like=True):
    """The rules of one topic. ``priority_tiers`` ascend, each 0 to 31; ``retention_seconds`` and
    ``max_consumers`` 0 = the setting, and no limit."""

    priority_tiers: tuple[int, ...]
    max_attempts: int
    dead_letter_topic_ref: str
    retention_seconds: int = 0
    max_consumers: int = 0


class Topic(msgspec.Struct, frozen=True, array_like=True):
    """A policy and its history: ``version`` counts from 1."""

    policy: Policy
    version: int
    created_ms: int
    updated_ms: int


class Policies:
    """Every topic of a store. Made from it at the start, after the tasks and before any claim.

    A change counts for what is decided from then on: creates, claims, and ends of tasks.
    """

    def __init__(self, engine: Engine, store: Store, clock: Clock, journal: Journal) -> None:
        self._engine = engine
        self._clock = clock
        self._journal = journal
        self._topics: dict[tuple[str, str], Topic] = {}
        for key, value in store.scan(PREFIX, END):
            tenant, name, topic = read_entry(key, value)
            self._topics[tenant, name] = topic
            self._govern(tenant, name, topic.policy)
        engine.count_consumers()

    def find(self, tenant: str, name: str) -> Topic | None:
        """The topic of this name, as decided last."""
        return self._topics.get((tenant, name))

    def get(self, tenant: str, name: str, done: Callable[[Topic | None], None]) -> None:
        """The same, once it is durable."""
        topic = self.find(tenant, name)
        self._journal.after(lambda: done(topic))

    def put(
        self, tenant: str, name: str, policy: Policy, done: Callable[[Topic, bool], None]
    ) -> None:
        """Sets a policy: ``done(topic, whether it is new)`` once it is durable. An equal one leaves
        the topic as it was."""
        known = self.find(tenant, name)
        now_ms = self._clock.now_ms()
        if known is None:
            topic = Topic(policy, 1, now_ms, now_ms)
        elif known.policy == policy:
            topic = known
        else:
            topic = Topic(policy, known.version + 1, known.created_ms, now_ms)
        if topic is not known:
            self._topics[tenant, name] = topic
            self._govern(tenant, name, policy)
            self._engine.count_consumers()
            key = _key(tenant, name)
            self._journal.put(key, entry_value(key, msgspec.msgpack.encode(topic)))
        self._journal.after(lambda: done(topic, known is None))

    def delete(self, tenant: str, name: str, done: Callable[[], None]) -> None:
        """Takes a topic away, if it is there."""
        if self._topics.pop((tenant, name), None) is not None:
            self._engine.govern(tenant.encode(), name.encode())
            self._engine.count_consumers()
            self._journal.delete(_key(tenant, name))
        self._journal.after(done)

    def _govern(self, tenant: str, name: str, policy: Policy) -> None:
        self._engine.govern(
            tenant.encode(),
            name.encode(),
            sum(1 << tier for tier in policy.priority_tiers),
            policy.max_attempts,
            policy.max_consumers,
            policy.retention_seconds * 1000,
        )


def _key(tenant: str, name: str) -> bytes:
    return entry_key(PREFIX, tenant.encode(), name.encode())


def read_entry(key: bytes, value: bytes) -> tuple[str, str, Topic]:
    """Tenant, name and topic of an entry; StoreError when it is damaged."""
    entry = open_entry("topic policy", key, value)
    topic = msgspec.msgpack.decode(entry.body, type=Topic)
    return entry.tenant.decode(), entry.name.decode(), topic
