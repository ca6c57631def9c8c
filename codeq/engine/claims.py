"""Claims that wait: who asked, in which order, and what each was given.

Every claim passes through here, also one that will not wait: claims are served once per commit
group, in order of arrival, after all tasks of the group are in their queues.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from codeq.engine._engine import Claim, Engine
from codeq.engine._views import TaskView


class ClaimRequest(msgspec.Struct, frozen=True):
    """One wish for tasks.

    ``commands`` None means every queue of the tenant. ``in_order``: the queues in the order given,
    else the highest priority over all of them first. ``worker`` is the worker id of the lease.
    ``bytes_max`` bounds the encoded tasks together. ``wait`` False: ``deliver(None)`` when nothing
    is ready now. ``deliver`` is called once, after the claim is durable.
    """

    tenant: str
    commands: tuple[bytes, ...] | None
    in_order: bool
    worker: str
    subject: str
    count: int
    lease_ms: int
    bytes_max: int
    wait: bool
    deliver: Callable[[Delivery | None], None]


class Delivery:
    """Claimed tasks on their way to a worker. The edge must end it by ``accepted`` or
    ``give_back``."""

    def __init__(
        self,
        engine: Engine,
        claim: Claim,
        chunks: Mapping[int, bytes],
        give_back: Callable[[Claim], None],
    ) -> None:
        self._engine = engine
        self._claim = claim
        self._chunks = chunks
        self._give_back = give_back
        self.lease_until_ms = claim.lease_until_ms

    def __len__(self) -> int:
        return len(self._claim)

    def ids(self) -> list[bytes]:
        """The tasks that are still under this claim."""
        return self._claim.ids()

    def encode(self, single: bool) -> bytes:
        """The tasks as a workerpb.ServerEvent: one ``task``, or a ``task_batch``."""
        return self._engine.assignment(self._claim, single, self._chunks)

    def views(self) -> list[TaskView]:
        """The tasks for REST."""
        return self._engine.claimed_views(self._claim, self._chunks)

    def accepted(self) -> None:
        """The transport took the whole message: from now on the attempt counts."""
        self._engine.delivered(self._claim)

    def give_back(self) -> None:
        """Not delivered: the tasks go back at once, attempt unused."""
        self._give_back(self._claim)


class Waiter:
    """A claim that has not been answered."""

    __slots__ = ("_claims", "arrival", "cancelled", "lanes", "request")

    def __init__(self, claims: Claims, request: ClaimRequest, arrival: int) -> None:
        self._claims = claims
        self.request = request
        self.arrival = arrival
        self.cancelled = False
        commands: tuple[bytes | None, ...] = (
            (None,) if request.commands is None else request.commands
        )
        tenant = request.tenant.encode()
        self.lanes = [(tenant, command) for command in commands]

    def cancel(self) -> None:
        """Parked: forgotten, ``deliver`` is never called. Decided already: ``deliver`` is not
        called and the tasks go back, attempt unused."""
        self.cancelled = True
        self._claims.forget(self)


Lane = OrderedDict[Waiter, None]
LaneKey = tuple[bytes, bytes | None]


class Claims:
    """Parked claims by (tenant, command), and those that arrived since the last commit group.

    A lane holds the waiters that would take from one queue, in order of arrival; a claim over
    several queues stands in several lanes. The lane (tenant, None) holds those that take from every
    queue.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lanes: dict[LaneKey, Lane] = {}
        self._fresh: dict[Waiter, None] = {}
        self._touched: dict[LaneKey, None] = {}  # lanes whose queues got tasks
        self._arrivals = 0
        self.parked = 0
        self.parked_by: dict[str, int] = {}  # tenant

    def add(self, request: ClaimRequest) -> Waiter:
        """Takes up a claim; it is served with the open group at the earliest."""
        self._arrivals += 1
        waiter = Waiter(self, request, self._arrivals)
        self._fresh[waiter] = None
        return waiter

    def again(self, waiter: Waiter) -> None:
        """Takes up a claim once more whose tasks could not be delivered in time."""
        self._fresh = {waiter: None, **self._fresh}

    def forget(self, waiter: Waiter) -> None:
        """Drops a waiter that may be parked or fresh."""
        self._fresh.pop(waiter, None)
        self._unpark(waiter)

    def serve(
        self,
        now_ms: int,
        served: Callable[[Waiter, Claim | None], None],
        tasks_max: int,
        touched: Sequence[tuple[bytes, bytes]],
    ) -> bool:
        """Serves parked claims whose queues got tasks, then the fresh ones; parks what may wait.

        ``served(waiter, None)`` is said of a claim that found nothing and does not wait. Stops with
        False once ``tasks_max`` tasks are claimed: the other claims come first the next time.
        ``touched``: the queues that got tasks since the last call.
        """
        for tenant, command in touched if self.parked else ():
            self._touched[tenant, command] = self._touched[tenant, None] = None
        records_max = self._engine.pending_records + tasks_max
        if self._touched and not self._serve_parked(now_ms, served, records_max):
            return False
        for waiter in list(self._fresh):
            if self._engine.pending_records >= records_max:
                return False
            del self._fresh[waiter]
            claim = self._try(waiter, now_ms)
            if claim is None and waiter.request.wait:
                self._park(waiter)
            else:
                served(waiter, claim)
        return True

    def _serve_parked(
        self,
        now_ms: int,
        served: Callable[[Waiter, Claim | None], None],
        records_max: int,
    ) -> bool:
        keys, self._touched = self._touched, {}
        admitted: dict[LaneKey, Iterator[Waiter]] = {}  # lanes that do not serve every worker
        front = [
            (self._first(key).arrival, i, key) for i, key in enumerate(keys) if key in self._lanes
        ]
        heapq.heapify(front)
        while front:
            if self._engine.pending_records >= records_max:
                self._touched = dict.fromkeys(key for _, _, key in front)
                return False
            arrival, i, key = heapq.heappop(front)
            waiter = self._next(key, admitted)
            if waiter is not None and waiter.arrival == arrival:
                claim = self._try(waiter, now_ms)
                if claim is not None:
                    self._unpark(waiter)
                    served(waiter, claim)
                elif key not in admitted and self._engine.limited(*key):
                    admitted[key] = self._admitted(key)
                else:
                    continue  # nothing is left in the queues of this lane
                waiter = self._next(key, admitted)
            if waiter is not None:
                heapq.heappush(front, (waiter.arrival, i, key))
        return True

    def _next(self, key: LaneKey, admitted: Mapping[LaneKey, Iterator[Waiter]]) -> Waiter | None:
        """Who is to be tried next in the lane."""
        if key in admitted:
            return next(admitted[key], None)
        return self._first(key) if key in self._lanes else None

    def _admitted(self, key: LaneKey) -> Iterator[Waiter]:
        """The waiters of a lane that its queues let claim: what is left there is not for all."""
        tenant, command = key
        for waiter in list(self._lanes[key]):
            worker = waiter.request.worker.encode()
            while waiter in self._lanes.get(key, ()) and self._engine.limited(
                tenant, command, worker
            ):
                yield waiter

    def _try(self, waiter: Waiter, now_ms: int) -> Claim | None:
        request = waiter.request
        return self._engine.claim(
            request.tenant.encode(),
            request.commands,
            request.in_order,
            request.worker.encode(),
            request.subject.encode(),
            request.count,
            request.lease_ms,
            request.bytes_max,
            now_ms,
        )

    def _first(self, key: LaneKey) -> Waiter:
        return next(iter(self._lanes[key]))

    def _park(self, waiter: Waiter) -> None:
        for key in waiter.lanes:
            self._lanes.setdefault(key, OrderedDict())[waiter] = None
        self._count(waiter, 1)

    def _unpark(self, waiter: Waiter) -> None:
        found = False
        for key in waiter.lanes:
            lane = self._lanes.get(key)
            if lane is not None and waiter in lane:
                found = True
                del lane[waiter]
                if not lane:
                    del self._lanes[key]
        if found:
            self._count(waiter, -1)

    def _count(self, waiter: Waiter, more: int) -> None:
        tenant = waiter.request.tenant
        self.parked += more
        self.parked_by[tenant] = self.parked_by.get(tenant, 0) + more
        if not self.parked_by[tenant]:
            del self.parked_by[tenant]
