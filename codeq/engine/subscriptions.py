"""Wishes to be told that a queue has work: who is told, when, and who waits for it.

A subscription stands in the store under `ps` + its id and ends with its time to live. A commit
group in which queues got tasks asks here once, and only when there are subscriptions; those told
are told after that group is synced. Between two notifications of one subscription lies at least its
interval. What becomes ready meanwhile is not lost: one of these queues is told when the interval is
over, if it still has work then. A paused queue has no work for anybody; it is told when it is
resumed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import msgspec

from codeq.engine._engine import Engine
from codeq.engine.clock import Clock
from codeq.engine.journal import Journal, Runner
from codeq.engine.pauses import Pauses
from codeq.engine.store import Store
from codeq.errors import StoreError

PREFIX = b"ps"
END = b"pt"
#: Subscriptions of one tenant
TENANT_MAX = 10_000
#: Queues one subscription remembers to be told of when its interval is over
WAITING_MAX = 100
#: Queues in the answer to a long poll
AVAILABLE_MAX = 1_000
MINUTE_MS = 60_000

Mode = Literal["fanout", "group", "hash"]
Queue = tuple[bytes, bytes | None]  # tenant and command; None = every command
Available = list[tuple[str, int]]  # command and ready tasks
Ready = Sequence[tuple[bytes, bytes, int]]  # tenant, command, ready tasks


class Subscription(msgspec.Struct, frozen=True, array_like=True):
    """One wish. ``url`` empty = read by long poll only; ``commands`` None = every queue of the
    tenant; ``number`` rises with each subscription made."""

    id: str
    tenant: str
    number: int
    url: str
    commands: tuple[str, ...] | None
    mode: Mode
    group: str
    ttl_ms: int
    interval_ms: int
    expires_ms: int


class Member:
    """A subscription in memory, and what it waits for."""

    __slots__ = ("busy", "next_ms", "stop_timer", "subscription", "waiting")

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.next_ms = 0  # no notification before
        self.busy = False  # one is on its way
        self.waiting: dict[bytes, None] = {}  # queues to tell of
        self.stop_timer: Callable[[], None] | None = None

    @property
    def queues(self) -> list[Queue]:
        """Where it stands in the index."""
        one = self.subscription
        tenant = one.tenant.encode()
        commands = (None,) if one.commands is None else one.commands
        return [(tenant, None if name is None else name.encode()) for name in commands]


class Poll:
    """Somebody who waits for work of a subscription. ``cancel`` forgets it."""

    def __init__(self, polls: dict[Queue, dict[Poll, None]], queues: Iterable[Queue]) -> None:
        self._polls = polls
        self._queues = list(queues)
        self.stop_timer: Callable[[], None] = lambda: None
        self.look: Callable[[], None] = lambda: None
        for queue in self._queues:
            polls.setdefault(queue, {})[self] = None

    def cancel(self) -> None:
        self.stop_timer()
        for queue in self._queues:
            others = self._polls.get(queue, {})
            others.pop(self, None)
            if not others:
                self._polls.pop(queue, None)


class Subscriptions:
    """All subscriptions of a store.

    ``notify(subscription, command, ready tasks, done)`` is to tell one, and calls ``done`` when
    that is over, however it went. Nobody is told as long as it is None.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        runner: Runner,
        journal: Journal,
        clock: Clock,
        pauses: Pauses,
        cleanup_ms: int,
    ) -> None:
        self._engine = engine
        self._pauses = pauses
        self._runner = runner
        self._journal = journal
        self._clock = clock
        self._cleanup_ms = cleanup_ms
        self._members: dict[str, Member] = {}
        self._by_queue: dict[Queue, dict[str, Member]] = {}
        self._per_tenant: dict[str, int] = {}
        self._polls: dict[Queue, dict[Poll, None]] = {}
        self._turns: dict[tuple[str, str], int] = {}  # number told last, by tenant and group
        self._quiet: dict[Queue, int] = {}  # until when all have it on their list
        self.notify: Callable[[Subscription, str, int, Callable[[], None]], None] | None = None
        stored = [read_entry(key, value) for key, value in store.scan(PREFIX, END)]
        for subscription in sorted(stored, key=lambda one: one.number):
            self._enter(subscription)
        self._number = max((one.number for one in stored), default=0)
        self._stop_cleanup = self._arm_cleanup()

    @property
    def wanted(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._by_queue)

    def stop(self) -> None:
        """No timer is left."""
        self._stop_cleanup()
        for member in self._members.values():
            if member.stop_timer is not None:
                member.stop_timer()

    def active(self) -> dict[str, int]:
        """Subscriptions by command; those for every queue count under ``*``."""
        now_ms = self._clock.now_ms()
        counts: dict[str, int] = {}
        for member in self._members.values():
            if member.subscription.expires_ms > now_ms:
                for name in member.subscription.commands or ("*",):
                    counts[name] = counts.get(name, 0) + 1
        return counts

    # --- making and keeping

    def add(
        self,
        subscription_id: str,
        tenant: str,
        *,
        url: str,
        commands: tuple[str, ...] | None,
        mode: Mode,
        group: str,
        ttl_ms: int,
        interval_ms: int,
        done: Callable[[Subscription | None], None],
    ) -> None:
        """Makes a subscription; ``done(None)``: the tenant has too many."""
        if self._per_tenant.get(tenant, 0) >= TENANT_MAX:
            self._clean()
        if self._per_tenant.get(tenant, 0) >= TENANT_MAX:
            self._journal.after(lambda: done(None))
            return
        self._number += 1
        expires_ms = self._clock.now_ms() + ttl_ms
        made = Subscription(
            subscription_id,
            tenant,
            self._number,
            url,
            commands,
            mode,
            group,
            ttl_ms,
            interval_ms,
            expires_ms,
        )
        self._enter(made)
        self._put(made)
        self._journal.after(lambda: done(made))

    def renew(
        self,
        subscription_id: str,
        tenant: str,
        ttl_ms: int | None,
        wait_ms: int,
        may: Callable[[bytes], bool],
        done: Callable[[Subscription | None, Available], None],
    ) -> Poll | None:
        """Prolongs a subscription (``ttl_ms`` None: by its own time to live), but not to end inside
        the wait, and says which of its queues that ``may`` allows have work: at once, or as soon
        as one has within ``wait_ms``. ``done(None, [])``: the tenant has no such subscription.

        Returns a handle while it waits; who cancels it is not called back.
        """
        now_ms = self._clock.now_ms()
        member = self._members.get(subscription_id)
        if member is None or not _is_live(member, tenant, now_ms):
            self._journal.after(lambda: done(None, []))
            return None
        old = member.subscription
        ttl_ms = max(old.ttl_ms if ttl_ms is None else ttl_ms, wait_ms)
        renewed = msgspec.structs.replace(old, expires_ms=now_ms + ttl_ms)
        member.subscription = renewed
        self._put(renewed)
        available = self._available(renewed, may)
        if available or wait_ms <= 0:
            self._journal.after(lambda: done(renewed, available))
            return None
        return self._poll(member, wait_ms, may, done)

    def _poll(
        self,
        member: Member,
        wait_ms: int,
        may: Callable[[bytes], bool],
        done: Callable[[Subscription | None, Available], None],
    ) -> Poll:
        poll = Poll(self._polls, member.queues)
        self._journal.after(lambda: None)  # the new end is durable even when nothing comes
        renewed = member.subscription

        def look(*, over: bool) -> None:
            available = self._available(renewed, may)
            if available or over:
                poll.cancel()
                self._journal.after(lambda: done(renewed, available))

        poll.look = partial(look, over=False)
        poll.stop_timer = self._runner.at(self._clock.now_ms() + wait_ms, partial(look, over=True))
        return poll

    def _available(self, subscription: Subscription, may: Callable[[bytes], bool]) -> Available:
        tenant = subscription.tenant.encode()
        if subscription.commands is None:
            names = [row[1] for row in self._engine.queues(tenant) if row[2]]
        else:
            names = [name.encode() for name in subscription.commands]
        rows = [(name, self._work(tenant, name)) for name in names]
        found = [(name.decode("utf-8", "replace"), n) for name, n in rows if n and may(name)]
        return found[:AVAILABLE_MAX]

    def _work(self, tenant: bytes, command: bytes) -> int:
        """Tasks of the queue that a claim could take."""
        paused = (tenant, command) in self._pauses
        return 0 if paused else self._engine.ready_count(tenant, command)

    # --- a group of commits brought tasks

    def touched(self, queues: Sequence[tuple[bytes, bytes]]) -> None:
        """These queues got tasks in the group that is being closed. What its claims took at once is
        nobody else's work."""
        ready = []
        for tenant, command in queues:
            if self._listens((tenant, command)) or self._listens((tenant, None)):
                count = self._work(tenant, command)
                if count:
                    ready.append((tenant, command, count))
        if ready:
            self._journal.after(partial(self._tell, ready))

    def _listens(self, queue: Queue) -> bool:
        return queue in self._by_queue

    def _tell(self, ready: Ready) -> None:
        now_ms = self._clock.now_ms()
        for tenant, command, count in ready:
            for queue in ((tenant, command), (tenant, None)):
                for poll in list(self._polls.get(queue, ())):
                    poll.look()
            if self.notify is not None and self._quiet.get((tenant, command), 0) <= now_ms:
                self._push(tenant, command, count, now_ms)

    def _push(self, tenant: bytes, command: bytes, count: int, now_ms: int) -> None:
        members = self._pushed_to(tenant, command, now_ms)
        for member in self._chosen(members, now_ms):
            if command in member.waiting:
                continue
            if not member.busy and member.next_ms <= now_ms:
                self._send(member, command, count)
            elif len(member.waiting) < WAITING_MAX:
                member.waiting[command] = None
                self._arm(member)
        if all(command in member.waiting for member in members):
            ends = [member.next_ms for member in members if not member.busy]
            self._quiet[(tenant, command)] = min(ends, default=now_ms)

    def _pushed_to(self, tenant: bytes, command: bytes, now_ms: int) -> list[Member]:
        """Who could be told by POST, in the order in which they were made."""
        named = self._by_queue.get((tenant, command), {}).values()
        every = self._by_queue.get((tenant, None), {}).values()
        members = [
            member
            for member in (*named, *every)
            if member.subscription.url and member.subscription.expires_ms > now_ms
        ]
        return sorted(members, key=lambda member: member.subscription.number)

    def _chosen(self, members: Sequence[Member], now_ms: int) -> list[Member]:
        chosen = [member for member in members if member.subscription.mode == "fanout"]
        hashed = [member for member in members if member.subscription.mode == "hash"]
        if hashed:
            chosen.append(hashed[now_ms // MINUTE_MS % len(hashed)])
        groups: dict[str, list[Member]] = {}
        for member in members:
            if member.subscription.mode == "group":
                groups.setdefault(member.subscription.group, []).append(member)
        chosen += [self._in_turn(group, those) for group, those in groups.items()]
        return chosen

    def _in_turn(self, group: str, members: Sequence[Member]) -> Member:
        turn = (members[0].subscription.tenant, group)
        last = self._turns.get(turn, 0)
        later = (member for member in members if member.subscription.number > last)
        member = next(later, members[0])
        self._turns[turn] = member.subscription.number
        return member

    # --- one member

    def _send(self, member: Member, command: bytes, count: int) -> None:
        assert self.notify is not None
        one = member.subscription
        member.busy = True
        member.next_ms = self._clock.now_ms() + one.interval_ms
        self.notify(one, command.decode("utf-8", "replace"), count, partial(self._told, member))

    def _told(self, member: Member) -> None:
        member.busy = False
        if member.waiting:
            self._arm(member)

    def _arm(self, member: Member) -> None:
        if member.stop_timer is None and not member.busy:
            member.stop_timer = self._runner.at(member.next_ms, partial(self._catch_up, member))

    def _catch_up(self, member: Member) -> None:
        """The interval is over: tells of the first queue waited for that still has work."""
        member.stop_timer = None
        now_ms = self._clock.now_ms()
        one = member.subscription
        if not _is_live(member, one.tenant, now_ms) or self._members.get(one.id) is not member:
            member.waiting.clear()
            return
        tenant = one.tenant.encode()
        while member.waiting:
            command = next(iter(member.waiting))
            del member.waiting[command]
            self._quiet.pop((tenant, command), None)
            count = self._work(tenant, command)
            if count:
                member.busy = True
                self._journal.after(partial(self._send, member, command, count))
                return

    # --- the store

    def _put(self, subscription: Subscription) -> None:
        body = msgspec.msgpack.encode(subscription)
        check = zlib.crc32(body).to_bytes(4, "little")
        self._journal.put(PREFIX + subscription.id.encode(), bytes([1]) + body + check)

    def _enter(self, subscription: Subscription) -> None:
        member = Member(subscription)
        self._members[subscription.id] = member
        tenant = subscription.tenant
        self._per_tenant[tenant] = self._per_tenant.get(tenant, 0) + 1
        for queue in member.queues:
            self._by_queue.setdefault(queue, {})[subscription.id] = member
        self._quiet.clear()

    def _leave(self, member: Member) -> None:
        one = member.subscription
        del self._members[one.id]
        self._per_tenant[one.tenant] -= 1
        if not self._per_tenant[one.tenant]:
            del self._per_tenant[one.tenant]
        for queue in member.queues:
            del self._by_queue[queue][one.id]
            if not self._by_queue[queue]:
                del self._by_queue[queue]
        self._journal.delete(PREFIX + one.id.encode())

    def _arm_cleanup(self) -> Callable[[], None]:
        return self._runner.at(self._clock.now_ms() + self._cleanup_ms, self._cleanup)

    def _cleanup(self) -> None:
        self._stop_cleanup = self._arm_cleanup()
        self._clean()

    def _clean(self) -> None:
        """Forgets what has ended."""
        now_ms = self._clock.now_ms()
        ended = [m for m in self._members.values() if m.subscription.expires_ms <= now_ms]
        for member in ended:
            self._leave(member)
        self._quiet.clear()
        groups = {(m.subscription.tenant, m.subscription.group) for m in self._members.values()}
        self._turns = {turn: last for turn, last in self._turns.items() if turn in groups}
        if ended:
            self._journal.kick()


def _is_live(member: Member, tenant: str, now_ms: int) -> bool:
    one = member.subscription
    return one.tenant == tenant and one.expires_ms > now_ms


def read_entry(key: bytes, value: bytes) -> Subscription:
    """What an entry says; StoreError when it is damaged."""
    version, body, check = value[:1], value[1:-4], value[-4:]
    if version != bytes([1]) or zlib.crc32(body).to_bytes(4, "little") != check:
        raise StoreError(f"the subscription {key.decode('utf-8', 'replace')} is damaged")
    return msgspec.msgpack.decode(body, type=Subscription)
