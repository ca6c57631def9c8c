"""The Readys of one worker stream, from their arrival until a message has used them up.

Readys for the same commands form a lane. Of each lane some are parked at the shard: as many as
their messages together are probably no more than PARKED_BYTES, an eighth of what a single message
may hold. So small assignments share a commit group and large ones go one by one. Nothing more is
parked while an assignment is unwritten: a reader that stalls holds few tasks, and their leases,
behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from codeq import errors
from codeq.config import Config
from codeq.engine.shard import ClaimRequest, Delivery, Shard, Waiter
from codeq.model import BLANKS, COMMAND_BYTES_MAX, COMMANDS_MAX
from codeq.server.auth import Principal

PARKED_MAX = 64
PARKED_BYTES = 512 * 1024
#: What an assignment adds to each stored task (id, status, lease end, attempts, times, lengths),
#: besides the worker id.
TASK_OVERHEAD_BYTES = 128
#: Commands lists whose check a stream remembers, and the bytes of one worth remembering.
CHECKED_LISTS_MAX = 64
CHECKED_BYTES_MAX = 1024


class ReadyRefused(Exception):
    """The Ready is answered with a ServerError of this code and text."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Commands(NamedTuple):
    """The queues of a Ready: the named ones, or None for every queue of the tenant."""

    names: tuple[bytes, ...] | None
    in_order: bool


class Lane:
    """The Readys of one stream that ask for the same commands, in order of arrival."""

    __slots__ = ("commands", "parked", "size", "waiting")

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self.size = sum(map(len, commands.names or ()))
        self.waiting: deque[Ready] = deque()
        self.parked = 0


class Ready:
    """One Ready. A count of 1 or less asks for a single task, not for a batch of one."""

    __slots__ = ("count", "lane", "lease_ms")

    def __init__(self, lane: Lane, lease_ms: int, count: int) -> None:
        self.lane = lane
        self.lease_ms = lease_ms
        self.count = count


class Assignment(NamedTuple):
    """Tasks claimed for a Ready and not yet accepted by the transport."""

    ready: Ready
    delivery: Delivery

    def encode(self) -> bytes:
        return self.delivery.encode(self.ready.count <= 1)


class Readys:
    """All Readys of one stream. ``wake`` is called when ``take`` may have something new."""

    def __init__(
        self,
        shard: Shard,
        config: Config,
        principal: Principal,
        worker: str,
        wake: Callable[[], None],
    ) -> None:
        self._shard = shard
        self._clock = shard.clock
        self._streams = config.streams
        self._principal = principal
        self._worker = worker
        self._task_overhead_bytes = TASK_OVERHEAD_BYTES + len(worker.encode())
        self._wake = wake
        self._checked: dict[tuple[bytes, ...], Commands] = {}
        self._lanes: dict[Commands, Lane] = {}
        self._lane_bytes = 0
        self._to_park: dict[Lane, None] = {}  # lanes that may have Readys to park
        self._parked: dict[Ready, Waiter] = {}
        self._claimed: deque[Assignment] = deque()
        self._unwritten = 0  # claimed ones and the one being written
        self._open = 0
        self._window = 1
        self._typical_bytes = 0
        self._dropped = False

    @property
    def too_many(self) -> bool:
        """Whether more Readys, or longer lists of commands, wait than the settings allow."""
        streams = self._streams
        return self._open > streams.readys_max or self._lane_bytes > streams.inflight_bytes

    @property
    def claimed(self) -> bool:
        """Whether there are assignments to write."""
        return bool(self._claimed)

    def add(self, names: tuple[bytes, ...], lease_ms: int, count: int) -> None:
        """Takes up a Ready as it was sent; raises ReadyRefused."""
        commands = self._checked.get(names) or self._check(names)
        lane = self._lanes.get(commands)
        if lane is None:
            lane = self._lanes[commands] = Lane(commands)
            self._lane_bytes += lane.size
        self._open += 1
        lane.waiting.append(Ready(lane, lease_ms, min(count, self._streams.ready_count_max)))
        self._to_park[lane] = None
        self._park()

    def take(self) -> Assignment | None:
        """The next assignment to write. A claim whose lease is over goes back instead, and its
        Ready waits on."""
        while self._claimed:
            ready, delivery = assignment = self._claimed.popleft()
            if delivery.lease_until_ms > self._clock.now_ms():
                return assignment
            self._unwritten -= 1
            delivery.give_back()
            ready.lane.waiting.appendleft(ready)
            self._to_park[ready.lane] = None
        self._park()
        return None

    def written(self, assignment: Assignment, size: int) -> None:
        """The transport has accepted the assignment, a message of ``size`` bytes."""
        assignment.delivery.accepted()
        self._unwritten -= 1
        self._open -= 1
        self._typical_bytes = max(size, self._typical_bytes - self._typical_bytes // 8)
        self._window = max(1, min(PARKED_MAX, PARKED_BYTES // self._typical_bytes))
        self._close_if_empty(assignment.ready.lane)
        self._park()

    def drop(self) -> None:
        """Forgets every Ready; claims that ``take`` has not handed out go back, attempt unused."""
        self._dropped = True
        for waiter in self._parked.values():
            waiter.cancel()
        self._parked.clear()
        while self._claimed:
            self._claimed.popleft().delivery.give_back()
        self._lanes.clear()
        self._to_park.clear()

    def _check(self, names: tuple[bytes, ...]) -> Commands:
        """The queues meant by the commands of a Ready."""
        if names:
            commands = Commands(_allowed(names, self._principal), in_order=True)
        elif self._principal.any_command:
            commands = Commands(None, in_order=False)
        else:
            commands = Commands(self._principal.event_types, in_order=False)
        if sum(map(len, names)) <= CHECKED_BYTES_MAX:
            if len(self._checked) >= CHECKED_LISTS_MAX:
                self._checked.clear()
            self._checked[names] = commands
        return commands

    def _park(self) -> None:
        """Parks Readys of the lanes where one arrived or was served, up to the window of each."""
        if self._unwritten or self._dropped:
            return
        for lane in self._to_park:
            while lane.waiting and lane.parked < self._window:
                ready = lane.waiting.popleft()
                lane.parked += 1
                self._parked[ready] = self._shard.claim(self._request(ready))
        self._to_park.clear()

    def _request(self, ready: Ready) -> ClaimRequest:
        count = max(ready.count, 1)
        bytes_max = self._streams.send_bytes
        commands = ready.lane.commands
        return ClaimRequest(
            tenant=self._principal.tenant,
            commands=commands.names,
            in_order=commands.in_order,
            worker=self._worker,
            subject=self._principal.subject,
            count=count,
            lease_ms=ready.lease_ms,
            bytes_max=max(bytes_max - count * self._task_overhead_bytes, bytes_max // 2),
            wait=True,
            deliver=partial(self._deliver, ready),
        )

    def _deliver(self, ready: Ready, delivery: Delivery | None) -> None:
        del self._parked[ready]
        assert delivery is not None  # a claim that waits is answered with tasks
        lane = ready.lane
        lane.parked -= 1
        self._to_park[lane] = None
        self._claimed.append(Assignment(ready, delivery))
        self._unwritten += 1
        self._wake()

    def _close_if_empty(self, lane: Lane) -> None:
        if not lane.waiting and not lane.parked and self._lanes.get(lane.commands) is lane:
            del self._lanes[lane.commands]
            self._lane_bytes -= lane.size


def _allowed(names: tuple[bytes, ...], principal: Principal) -> tuple[bytes, ...]:
    """The commands trimmed, without blank and repeated ones; raises ReadyRefused."""
    trimmed = dict.fromkeys(name.decode().strip(BLANKS).encode() for name in names)
    trimmed.pop(b"", None)
    if not trimmed or not all(map(principal.may_claim, trimmed)):
        raise ReadyRefused("PermissionDenied", "event type not allowed")
    if len(trimmed) > COMMANDS_MAX:
        raise ReadyRefused("InvalidArgument", f"more than {COMMANDS_MAX} commands")
    if any(len(name) > COMMAND_BYTES_MAX for name in trimmed):
        raise ReadyRefused("InvalidArgument", errors.COMMAND_INVALID.message)
    return tuple(trimmed)
