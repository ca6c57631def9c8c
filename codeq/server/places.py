"""Whose POST goes out next: bounded in all, by host and by tenant, and what is slow cannot fill it.

Nobody knows before a try how long it will take, so a place once given may be gone for as long as a
try lasts. What bounds the harm is how many places may be given to whom. What a tenant sends to a
host has a standing: new, before a first try is over; quick, when its last try took a second at most
and none that runs has taken longer; else slow. What is not quick leaves places free that only the
quick can take, what is slow leaves some to the new, in all and for each tenant.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from codeq.engine.clock import Clock

log = logging.getLogger("codeq.callbacks")

#: Standings, the best first
QUICK, NEW, SLOW = range(3)
STANDINGS = (QUICK, NEW, SLOW)
#: A try that takes no longer is quick
QUICK_SECONDS = 1
#: Of so many pairs of tenant and host it is remembered how the last try was
KNOWN_MAX = 65_536

Job = Callable[[], Awaitable[None]]


def parts(count: int) -> tuple[int, ...]:
    """Of so many places what may be taken by standing, each with those that are worse: the new and
    the slow together get at most three quarters, the slow at most half."""
    return count, count - count // 4, count - count // 2


class Held:
    """How many places are taken."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = [0, 0, 0]  # by standing: with it or a worse one

    def may_begin(self, standing: int, most: tuple[int, ...]) -> bool:
        return all(self._held[i] < most[i] for i in range(standing + 1))

    def hold(self, standing: int, more: int) -> None:
        for i in range(standing + 1):
            self._held[i] += more


class Tenant(Held):
    """A tenant's places, its lanes by host, and those that may have a place: by standing, then by
    how many they have."""

    __slots__ = ("lanes", "name", "ready")

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.lanes: dict[str, Lane] = {}
        self.ready: tuple[list[dict[Lane, None]], ...] = ([], [], [])

    def put(self, lane: Lane, standing: int) -> None:
        """Puts the lane behind those of its standing that have as many places."""
        ready = self.ready[standing]
        while len(ready) <= len(lane.running):
            ready.append({})
        lane.ready_as, lane.ready_in = standing, ready[len(lane.running)]
        lane.ready_in[lane] = None

    def first(self, standing: int) -> Lane | None:
        """The lane that is next: one with the fewest places, so that those that keep theirs for
        long do not end up with all of them."""
        return next((lane for lanes in self.ready[standing] for lane in lanes), None)


class Host:
    """The places that a host takes up, its lanes that wait for one, and how many lanes it has."""

    __slots__ = ("lanes", "name", "running", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.running = 0
        self.lanes = 0
        self.waiting: OrderedDict[Lane, None] = OrderedDict()


class Lane:
    """What one tenant sends to one host: the jobs that wait, and the places of those that run, the
    oldest first. Notifications have a line of their own and take turns with results. ``last``: how
    the last try was, None before the first is over."""

    __slots__ = ("host", "last", "lines", "ready_as", "ready_in", "running", "tenant", "turn")

    def __init__(self, tenant: Tenant, host: Host, last: Tried | None) -> None:
        self.tenant = tenant
        self.host = host
        self.last = last
        self.lines: tuple[deque[Job], deque[Job]] = (deque(), deque())
        self.running: dict[Place, None] = {}
        self.ready_as: int | None = None  # standing under which it may have a place
        self.ready_in: dict[Lane, None] = {}  # where it waits for that
        self.turn = 0

    def next(self) -> Job:
        """Takes the job that is to run next; one waits."""
        self.turn ^= 1
        return (self.lines[self.turn] or self.lines[self.turn ^ 1]).popleft()

    @property
    def waits(self) -> bool:
        return bool(self.lines[0] or self.lines[1])


class Tried(NamedTuple):
    """How a try was."""

    quick: bool
    failed: bool


class Place:
    """What a job holds while it runs, and longer, until everything in ``lookups`` is done.
    ``began_s``: when its POST began, None = there was none; ``failed``: whether it was in vain."""

    __slots__ = ("began_s", "failed", "lane", "lookups", "standing")

    def __init__(self, lane: Lane, standing: int) -> None:
        self.lane = lane
        self.standing = standing
        self.lookups: list[asyncio.Future[Any]] = []
        self.began_s: float | None = None
        self.failed = False


#: The place that the present task has
PLACE: ContextVar[Place | None] = ContextVar("place", default=None)


class Places:
    """Runs jobs, at most ``count`` at a time and ``per_host`` of one host. No tenant gets more than
    half of the places or two, one that is alone three quarters if they are for quick hosts, and of
    a host's none more than its part among those that use it now; a lane that is slow gets at most
    half of them, one that is new only one. Tenants take turns, and so do the standings; of a
    tenant's hosts the one with the fewest places is next."""

    def __init__(self, count: int, per_host: int, clock: Clock) -> None:
        self._clock = clock
        self._held = Held()
        self._most = parts(count)
        # not less than two, since a single one is gone with one slow host
        self._most_of_tenant = parts(min(count, max(2, count // 2)))
        # more quick ones only: others would keep places it may not have once it is not alone
        self._most_of_only = (min(count, max(2, count * 3 // 4)), *self._most_of_tenant[1:])
        self._per_host = per_host
        self._per_lane = (per_host, 1, (per_host + 1) // 2)  # by standing
        self._tenants: dict[str, Tenant] = {}
        self._hosts: dict[str, Host] = {}
        self._rings: tuple[dict[Tenant, None], ...] = ({}, {}, {})  # those with a lane to begin
        self._turn = 0
        self._known: OrderedDict[tuple[str, str], Tried] = OrderedDict()  # how the last try was
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def submit(self, tenant: str, host: str, job: Job, *, notification: bool = False) -> None:
        """Runs the job when there is a place. What it raises is logged."""
        lane = self._lane(tenant, host)
        lane.lines[notification].append(job)
        if lane.ready_as is None:  # else it would go to the end
            self._offer(lane)
        self._fill()

    def is_quick(self, tenant_name: str, host_name: str) -> bool:
        """Whether the host takes what the tenant sends, and at once: the last try did not fail and
        took a second at most, nor has one that runs taken longer."""
        last = self._known.get((tenant_name, host_name))
        tenant = self._tenants.get(tenant_name)
        lane = tenant.lanes.get(host_name) if tenant is not None else None
        return last == Tried(quick=True, failed=False) and not (lane and self._hangs(lane))

    async def stop(self) -> None:
        """Cancels what runs, forgets what waits."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- who may begin

    def _standing(self, lane: Lane) -> int:
        if lane.last is None:
            return NEW
        return QUICK if lane.last.quick and not self._hangs(lane) else SLOW

    def _hangs(self, lane: Lane) -> bool:
        oldest = next(iter(lane.running), None)
        return oldest is not None and self._takes_long(oldest)

    def _takes_long(self, place: Place) -> bool:
        if place.began_s is None:
            return False
        return self._clock.monotonic_s() - place.began_s > QUICK_SECONDS

    def _offer(self, lane: Lane) -> None:
        """Puts the lane where it belongs now: among those that may have a place, among those that
        wait for one of the host, or nowhere until one of its own is free."""
        if lane.ready_as is not None:
            del lane.ready_in[lane]
            lane.ready_as = None
        standing = self._standing(lane)
        if not lane.waits or len(lane.running) >= self._per_lane[standing]:
            return
        full = lane.host.running >= self._per_host
        if full or len(lane.running) >= self._part(lane.host, standing):
            lane.host.waiting[lane] = None
            return
        lane.tenant.put(lane, standing)
        self._enter(lane.tenant, standing)

    def _part(self, host: Host, standing: int) -> int:
        """What each of the tenants that use the host now may have of its places: rounded up, so
        that none is left over, but not for the slow, or they could leave the last tenant none."""
        if standing == SLOW:
            return max(1, self._per_host // host.lanes)
        return -(-self._per_host // host.lanes)

    def _enter(self, tenant: Tenant, standing: int) -> None:
        if tenant.first(standing) and self._may_have(tenant, standing):
            self._rings[standing].setdefault(tenant)

    def _may_have(self, tenant: Tenant, standing: int) -> bool:
        alone = len(self._tenants) == 1
        return tenant.may_begin(standing, self._most_of_only if alone else self._most_of_tenant)

    def _next(self) -> Lane | None:
        while any(self._may_begin(standing) for standing in STANDINGS):
            self._turn = (self._turn + 1) % len(STANDINGS)
            lane = self._next_of(self._turn) if self._may_begin(self._turn) else None
            if lane is not None:
                return lane
        return None

    def _may_begin(self, standing: int) -> bool:
        return bool(self._rings[standing]) and self._held.may_begin(standing, self._most)

    def _next_of(self, standing: int) -> Lane | None:
        """The next lane of the tenant whose turn it is, None when it cannot have a place now."""
        tenant = next(iter(self._rings[standing]))
        del self._rings[standing][tenant]
        lane = tenant.first(standing)
        if lane is None or not self._may_have(tenant, standing):
            return None  # it enters again when it may
        self._offer(lane)  # to the end, or elsewhere: time has passed, and others have begun
        self._enter(tenant, standing)
        return lane if lane.ready_as == standing else None

    # --- what runs

    def _fill(self) -> None:
        while not self._stopped:
            lane = self._next()
            if lane is None:
                return
            assert lane.ready_as is not None
            place = Place(lane, lane.ready_as)
            job = lane.next()
            self._count(place, 1)
            lane.running[place] = None
            self._offer(lane)
            task = asyncio.get_running_loop().create_task(self._run(place, job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, place: Place, job: Job) -> None:
        PLACE.set(place)
        try:
            await self._safely(place, job)
            if place.lookups:
                await asyncio.wait(place.lookups)
        finally:
            self._end(place)

    async def _safely(self, place: Place, job: Job) -> None:
        try:
            await job()
        except Exception:
            log.exception("a callback to %s failed", place.lane.host.name)

    def _end(self, place: Place) -> None:
        lane = place.lane
        if place.began_s is not None:
            self._know(lane, Tried(not self._takes_long(place), place.failed))
        del lane.running[place]
        self._count(place, -1)
        self._forget(lane)
        self._wake(lane.host)
        self._offer(lane)  # behind those that wait for the host
        for tenant in self._tenants.values() if len(self._tenants) == 1 else (lane.tenant,):
            for standing in STANDINGS:
                self._enter(tenant, standing)
        self._fill()

    def _wake(self, host: Host) -> None:
        """Offers the host's free places to those that wait for one, which may be thousands, until
        they are taken."""
        for _ in range(len(host.waiting)):
            if host.running >= self._per_host:
                return
            self._offer(host.waiting.popitem(last=False)[0])
            self._fill()

    def _count(self, place: Place, more: int) -> None:
        self._held.hold(place.standing, more)
        place.lane.tenant.hold(place.standing, more)
        place.lane.host.running += more

    def _know(self, lane: Lane, last: Tried) -> None:
        lane.last = last
        key = lane.tenant.name, lane.host.name
        self._known[key] = last
        self._known.move_to_end(key)
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)

    # --- what is known of lanes

    def _lane(self, tenant_name: str, host_name: str) -> Lane:
        tenant = self._tenants.get(tenant_name)
        if tenant is None:
            tenant = self._tenants[tenant_name] = Tenant(tenant_name)
        lane = tenant.lanes.get(host_name)
        if lane is None:
            host = self._hosts.setdefault(host_name, Host(host_name))
            host.lanes += 1
            last = self._known.get((tenant_name, host_name))
            lane = tenant.lanes[host_name] = Lane(tenant, host, last)
        return lane

    def _forget(self, lane: Lane) -> None:
        if lane.waits or lane.running:
            return
        del lane.tenant.lanes[lane.host.name]
        lane.host.lanes -= 1
        if not lane.host.lanes:
            del self._hosts[lane.host.name]
        if not lane.tenant.lanes:
            del self._tenants[lane.tenant.name]
