"""Producer and worker sessions: message bytes in, message bytes out; no transport, no event loop.

Whoever moves the bytes (grpc_server.py, or a test) hands each message to ``receive`` while
``may_read`` allows it, asks ``take`` for the next message to write, says ``sent`` once the
transport has accepted it, and ends the stream with ``status`` as soon as the session is ``over``.

An event is *in hand* from ``receive`` until the transport has accepted its answer. Acknowledgements
are encoded when the transport is ready for them: all batches that a commit group finished, and what
finished while an earlier message was being written, share one message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

from codeq import errors
from codeq.config import Config
from codeq.engine import _wire
from codeq.engine.shard import Shard
from codeq.model import BLANKS, WORKER_ID_BYTES_MAX
from codeq.server.auth import (
    KEY_WAITS_MAX,
    Auth,
    AuthError,
    KeysAwaited,
    Principal,
)
from codeq.server.limits import CLAIM, CREATE_TASK, Limits, Operation, RateLimited
from codeq.server.readys import Assignment, ReadyRefused, Readys

#: Assignments go before acknowledgements of results, which nobody waits for, so that more of these
#: share a message; but not for longer than it takes to write so much.
ASSIGNED_BYTES_MAX = 8192

SCOPES = {
    _wire.READY: "codeq:claim",
    _wire.RESULT: "codeq:result",
    _wire.RESULT_BATCH: "codeq:result",
    _wire.NACK: "codeq:nack",
    _wire.HEARTBEAT: "codeq:heartbeat",
    _wire.ABANDON: "codeq:abandon",
}


class Status(NamedTuple):
    """How a stream ends: a gRPC code name and its text."""

    code: str
    text: str


STOPPING = Status("UNAVAILABLE", "server is stopping")


class HelloRefused(Exception):
    """The Hello does not open the stream; ``status`` says how it ends."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.status = Status(code, text)


class Timer(Protocol):
    def cancel(self) -> None: ...


class InFlight:
    """Bytes in hand over all streams and requests, by tenant: what clients sent until it is
    answered, and answers until their clients have taken them.

    Once ``bytes_max`` is spent, only tenants below their equal share may bring in more. Work that
    workers do, and reads, may use as much again: what they free is more than they take.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._total = 0
        self._used: dict[str, int] = {}
        # By ``spare`` and tenant, all in the order of their turns
        self._waiting: dict[bool, dict[str, dict[Callable[[], None], None]]]
        self._waiting = {False: {}, True: {}}

    @property
    def total(self) -> int:
        """Bytes in hand now."""
        return self._total

    def room(self, tenant: str, *, spare: bool = False, apart: int = 0) -> bool:
        """Whether the tenant may bring in more; ``spare``: more of what workers and readers do;
        ``apart``: bytes it has in hand that do not count, being those of the same request."""
        bytes_max = self._bytes_max * 2 if spare else self._bytes_max
        if self._total - apart < bytes_max:
            return True
        tenants = len(self._used) + (tenant not in self._used)
        return self._used.get(tenant, 0) - apart < bytes_max // tenants

    def wait(self, tenant: str, wake: Callable[[], None], *, spare: bool = False) -> None:
        """Calls ``wake`` once when there may be room for the tenant again."""
        self._waiting[spare].setdefault(tenant, {})[wake] = None

    def forget(self, tenant: str, wake: Callable[[], None]) -> None:
        """``wake`` waits no more, and what it may have been woken for goes to the next."""
        for waiting in self._waiting.values():
            wakes = waiting.get(tenant)
            if wakes is not None:
                wakes.pop(wake, None)
                if not wakes:
                    del waiting[tenant]
        self.wake_next(tenant)

    def take(self, tenant: str, size: int) -> None:
        self._total += size
        self._used[tenant] = self._used.get(tenant, 0) + size

    def release(self, tenant: str, size: int) -> None:
        self._total -= size
        left = self._used.pop(tenant, 0) - size
        if left:
            self._used[tenant] = left
        self.wake_next(tenant)

    def wake_next(self, tenant: str) -> None:
        """Wakes one that waits, if there is room for it: of the next tenant in turn, or of
        ``tenant`` itself while that is below its share.

        One at a time: were all woken, thousands would look again for the room of one. Who finds
        room must call this again, since it may have nothing to bring in.
        """
        for spare, waiting in self._waiting.items():
            if waiting:
                first = next(iter(waiting))
                turn = first if self.room(first, spare=spare) else tenant
                if turn in waiting and self.room(turn, spare=spare):
                    _wake_one(waiting, turn)


def _wake_one(waiting: dict[str, dict[Callable[[], None], None]], tenant: str) -> None:
    """Wakes the first of a tenant, which goes to the back of the tenants."""
    wakes = waiting.pop(tenant)
    wake = next(iter(wakes))
    del wakes[wake]
    if wakes:
        waiting[tenant] = wakes
    wake()


class Edge:
    """What the streams of one listener share.

    ``call_later(seconds, callback)`` returns a timer with ``cancel``.
    """

    def __init__(
        self,
        shard: Shard,
        auth: Auth,
        config: Config,
        call_later: Callable[[float, Callable[[], None]], Timer],
        in_flight: InFlight,
        limits: Limits,
    ) -> None:
        self.shard = shard
        self.auth = auth
        self.config = config
        self.call_later = call_later
        self.in_flight = in_flight
        self.limits = limits
        self.sessions: set[Session] = set()
        self._stopping = False

    def open(
        self,
        session_class: type[Session],
        wake_reader: Callable[[], None],
        wake_writer: Callable[[], None],
    ) -> Session:
        """A session for a new stream."""
        session = session_class(self, wake_reader, wake_writer)
        self.sessions.add(session)
        if self._stopping:
            session.end(*STOPPING)
        return session

    def stop(self) -> None:
        """Ends every stream with UNAVAILABLE, once the acknowledgements it is owed are written."""
        self._stopping = True
        for session in list(self.sessions):
            session.end(*STOPPING)

    def close(self) -> None:
        """Gives back what no transport has accepted; nothing is written any more."""
        for session in list(self.sessions):
            session.close()


class Outgoing(NamedTuple):
    """One message to write, and what is settled when the transport has accepted it."""

    message: bytes
    events: int = 0
    size: int = 0
    assignment: Assignment | None = None


class Session:
    """What both kinds of stream have in common: Hello, bounds, the way to the end.

    ``wake_reader`` and ``wake_writer`` are called when ``may_read`` or ``take`` may answer
    otherwise than before. ``status`` is None until the stream is to end.
    """

    _operation: Operation  # what a stream of this kind pays for

    def __init__(
        self, edge: Edge, wake_reader: Callable[[], None], wake_writer: Callable[[], None]
    ) -> None:
        streams = edge.config.streams
        self.status: Status | None = None
        self._edge = edge
        self._shard = edge.shard
        self._in_flight = edge.in_flight
        self._wake_reader = wake_reader
        self._wake_writer = wake_writer
        self._principal: Principal | None = None
        self.tenant = ""
        self._events_max = streams.inflight_max
        self._bytes_max = streams.inflight_bytes
        self._message_bytes_max = streams.send_bytes
        self._events = 0
        self._bytes = 0
        self._reader_waits = False
        self._key_waits = 0
        self._keys_awaited = False
        self._out: deque[Outgoing] = deque()
        self._current: Outgoing | None = None
        self._closed = False
        self._failed = False
        self._timer: Timer | None = None
        self._start_timer(streams.hello_timeout_seconds, self._hello_overdue)

    # --- what the transport calls

    def may_read(self) -> bool:
        """Whether the next message may be read; if not, ``wake_reader`` is called later."""
        full = self._events >= self._events_max or self._bytes >= self._bytes_max
        may = not full and not self._keys_awaited and self._has_room()
        self._reader_waits = not may
        self._in_flight.wake_next(self.tenant)  # there may be room for more than this stream
        return may

    def receive(self, message: bytes) -> None:
        """Takes one message from the client; never blocks."""
        if self.status is not None:
            return
        size = len(message)
        self._hold(size)
        try:
            kind, event = self._decode(message)
        except _wire.WireError as fault:
            self._release(1, size)
            self.end("INVALID_ARGUMENT", str(fault))
            return
        if self._principal is None:
            self._open(kind, event, size)
        else:
            self._handle(kind, event, size)

    def half_close(self) -> None:
        """The client will send nothing more."""
        self.end("OK", "")

    def take(self) -> bytes | None:
        """The next message to write, None when there is none now; ``sent`` must follow each."""
        if not self._out:
            self._refill()
            if not self._out:
                return None
        self._current = self._out.popleft()
        return self._current.message

    def sent(self) -> None:
        """The transport has accepted the whole message of the last ``take``."""
        current, self._current = self._current, None
        if current is None:  # closed in the meantime
            return
        if current.events:
            self._release(current.events, current.size)
        if current.assignment is not None:
            self._in_flight.release(self.tenant, len(current.message))
            self._delivered(current.assignment, len(current.message))

    @property
    def over(self) -> bool:
        """The stream is to end, and all that the client is owed is written."""
        if self.status is None or self._current is not None:
            return False
        return self._closed or self._failed or self._events == 0

    def end(self, code: str, text: str) -> None:
        """Reads no more; work in hand is finished and its acknowledgements are written first."""
        if self.status is not None:
            return
        self.status = Status(code, text)
        self._stop_timer()
        self._drop_waiting()
        for wake in (self._wake_reader, self._wake_writer):
            self._in_flight.forget(self.tenant, wake)
            wake()

    def fail(self) -> None:
        """A fault of the server: the stream ends at once, without what is in hand."""
        self.end("INTERNAL", "internal error")
        self._failed = True
        self._wake_writer()

    def close(self) -> None:
        """The transport is gone: what it has not accepted was not delivered. May be repeated."""
        self.end("CANCELLED", "stream closed")
        if self._closed:
            return
        self._closed = True
        current, self._current = self._current, None
        if current is not None and current.assignment is not None:
            current.assignment.delivery.give_back()
            self._in_flight.release(self.tenant, len(current.message))
        if self._bytes:
            self._in_flight.release(self.tenant, self._bytes)
        self._out.clear()
        self._edge.sessions.discard(self)

    # --- Hello

    def _open(self, kind: int, event: object, size: int) -> None:
        try:
            if kind != _wire.HELLO:
                raise HelloRefused("FAILED_PRECONDITION", "first event must be Hello")
            principal, ack = self._welcome(event)
            self._admit(principal)
        except KeysAwaited as awaited:
            self._await_keys(awaited, partial(self._open, kind, event, size), size)
            return
        except AuthError as refused:
            self._release(1, size)
            self.end(*auth_status(refused))
            return
        except HelloRefused as refused:
            self._release(1, size)
            self.end(*refused.status)
            return
        self._stop_timer()
        self._principal = principal
        self._in_flight.release(self.tenant, size)
        self.tenant = principal.tenant
        self._in_flight.take(self.tenant, size)
        self._watch_expiry()
        self._reply(ack, size)

    def _await_keys(self, awaited: KeysAwaited, ask_again: Callable[[], None], size: int) -> None:
        """Who speaks will be known when keys have come; until then nothing more is read."""
        self._release(1, size)
        self._key_waits += 1
        if self._key_waits > KEY_WAITS_MAX:
            self.end("UNAVAILABLE", errors.KEYS_UNAVAILABLE.message)
            return

        def come() -> None:
            self._keys_awaited = False
            if self.status is None:
                self._hold(size)
                ask_again()
                self._wake_reader()

        self._keys_awaited = True
        awaited.then(come)

    def _admit(self, principal: Principal) -> None:
        """A stream pays for one request, and nothing for its events."""
        try:
            self._edge.limits.admit(self._operation, principal)
        except RateLimited as limited:
            raise HelloRefused("RESOURCE_EXHAUSTED", limited.message) from None

    def _hello_overdue(self) -> None:
        self.end("DEADLINE_EXCEEDED", "no Hello within the time allowed")

    def _watch_expiry(self) -> None:
        """Ends the stream with its token, if so set; far ends are looked at again daily."""
        expires_ms = None if self._principal is None else self._principal.expires_ms
        if expires_ms is None or not self._edge.config.streams.end_at_token_expiry:
            return
        left_ms = expires_ms - self._shard.clock.now_ms()
        if left_ms <= 0:
            self.end("UNAUTHENTICATED", "auth failed: token expired")
        else:
            self._start_timer(min(left_ms / 1000, 86400.0), self._watch_expiry)

    def _start_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._timer = self._edge.call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- events in hand

    def _hold(self, size: int) -> None:
        """One more event is in hand."""
        self._events += 1
        self._bytes += size
        self._in_flight.take(self.tenant, size)

    def _release(self, events: int, size: int) -> None:
        self._events -= events
        self._bytes -= size
        self._in_flight.release(self.tenant, size)
        if self._reader_waits:
            self._reader_waits = False
            self._wake_reader()

    def _reply(self, message: bytes, size: int) -> None:
        """Queues the whole answer to one event of ``size`` bytes."""
        if not self._closed:
            self._out.append(Outgoing(message, 1, size))
            self._wake_writer()

    def _queue(self, messages: list[bytes], events: int, size: int) -> None:
        """Queues the answer to several events; they are in hand until its last message is out."""
        last = messages.pop()
        self._out.extend(Outgoing(message) for message in messages)
        self._out.append(Outgoing(last, events, size))

    def _shared_room(self, *, spare: bool = False) -> bool:
        if self._in_flight.room(self.tenant, spare=spare):
            return True
        self._in_flight.wait(self.tenant, self._wake_reader, spare=spare)
        return False

    # --- what the two kinds do in their own way

    def _decode(self, message: bytes) -> tuple[int, object]:
        raise NotImplementedError

    def _welcome(self, event: object) -> tuple[Principal, bytes]:
        """Who speaks, and the HelloAck; raises AuthError or HelloRefused."""
        raise NotImplementedError

    def _handle(self, kind: int, event: object, size: int) -> None:
        raise NotImplementedError

    def _has_room(self) -> bool:
        """Whether anything but the stream's own bounds keeps it from reading."""
        raise NotImplementedError

    def _refill(self) -> None:
        """Puts the next messages into ``_out``, if there are any."""
        raise NotImplementedError

    def _drop_waiting(self) -> None:
        """The stream ends: nothing more is claimed, and what is not being written goes back."""

    def _delivered(self, assignment: Assignment, size: int) -> None:
        """The transport has accepted an assignment of ``size`` bytes."""


def auth_status(refused: AuthError) -> Status:
    """How a stream ends whose token was refused."""
    if refused.slug == "unauthenticated":
        return Status("UNAUTHENTICATED", f"auth failed: {refused.message}")
    return Status(errors.SLUGS[refused.slug][1], refused.message)


class ProducerSession(Session):
    """The stream of one producer: creates in, one acknowledgement for each out."""

    _operation = CREATE_TASK

    def __init__(
        self, edge: Edge, wake_reader: Callable[[], None], wake_writer: Callable[[], None]
    ) -> None:
        super().__init__(edge, wake_reader, wake_writer)
        self._finished: list[_wire.Creates] = []
        self._finished_bytes = 0
        self._long = 0  # batches in hand that take several commits

    def _decode(self, message: bytes) -> tuple[int, object]:
        return _wire.decode_producer_event(message)

    def _welcome(self, event: object) -> tuple[Principal, bytes]:
        token = cast(str, event)
        if not token.strip(BLANKS):
            raise HelloRefused("UNAUTHENTICATED", "missing token")
        principal = self._edge.auth.producer(token)
        return principal, _wire.encode_producer_hello_ack(principal.tenant, principal.subject)

    def _handle(self, kind: int, event: object, size: int) -> None:
        if isinstance(event, _wire.Creates):
            if len(event):
                self._long += self._is_long(event)
                self._shard.create(event, self.tenant, partial(self._created, event, size))
            else:
                self._release(1, size)
        elif kind == _wire.HELLO:
            self._error("FailedPrecondition", "already-authenticated", size)
        else:
            self._error("InvalidArgument", "unknown-event", size)

    def _error(self, code: str, text: str, size: int) -> None:
        self._reply(_wire.encode_producer_error(code, text), size)

    def _is_long(self, creates: _wire.Creates) -> bool:
        return len(creates) > self._edge.config.limits.create_batch

    def _created(self, creates: _wire.Creates, size: int, _views: object) -> None:
        self._long -= self._is_long(creates)
        if not self._closed:
            self._finished.append(creates)
            self._finished_bytes += size
            self._wake_writer()

    def _refill(self) -> None:
        finished = self._finished
        if finished:
            messages = _wire.encode_create_acks(finished, self._message_bytes_max)
            self._queue(messages, len(finished), self._finished_bytes)
            self._finished = []
            self._finished_bytes = 0

    def _has_room(self) -> bool:
        # What follows a batch of several commits is created after it. While creates are refused or
        # the group is full, one event at a time: the next one asks whether it still is so.
        shard = self._shard
        if self._long or (self._events and (shard.group_full or shard.refuses_creates is not None)):
            return False
        return self._shared_room()


class WorkerSession(Session):
    """The stream of one worker: Readys and results in, assignments and acknowledgements out."""

    _operation = CLAIM

    def __init__(
        self, edge: Edge, wake_reader: Callable[[], None], wake_writer: Callable[[], None]
    ) -> None:
        super().__init__(edge, wake_reader, wake_writer)
        self._scopes: frozenset[str] = frozenset()
        self._subject = ""
        self._named = ""  # the worker id of Hello, empty when it named none
        self._readys: Readys | None = None
        self._finished: list[_wire.Finishes] = []
        self._finished_bytes = 0
        self._assigned_bytes = 0  # written since the last acknowledgement of results

    def _decode(self, message: bytes) -> tuple[int, object]:
        return _wire.decode_worker_event(message)

    def _welcome(self, event: object) -> tuple[Principal, bytes]:
        token, worker_id = cast(tuple[str, str], event)
        if not token.strip(BLANKS):
            raise AuthError("unauthenticated", "missing token")
        principal = self._edge.auth.worker(token)
        self._named = worker_id.strip(BLANKS)
        if len(self._named.encode()) > WORKER_ID_BYTES_MAX:
            raise HelloRefused("INVALID_ARGUMENT", errors.WORKER_ID_INVALID.message)
        self._subject = principal.subject
        self._scopes = principal.scopes
        worker = self._named or principal.subject
        self._readys = Readys(self._shard, self._edge.config, principal, worker, self._wake_writer)
        return principal, _wire.encode_worker_hello_ack(worker, principal.tenant)

    def _has_room(self) -> bool:
        # One event at a time goes on when others have spent the room, or the group is full.
        if self._events and self._shard.group_full:
            return False
        return self._shared_room(spare=self._events == 0)

    # --- events

    def _handle(self, kind: int, event: object, size: int) -> None:
        scope = SCOPES.get(kind)
        if scope is None:
            self._stray(kind, size)
        elif scope not in self._scopes:
            self._error("PermissionDenied", "missing scope", size)
        elif isinstance(event, _wire.Finishes):
            self._finish(event, size)
        elif kind == _wire.READY:
            self._ready(cast(tuple[tuple[bytes, ...], int, int], event), size)
        elif kind == _wire.HEARTBEAT:
            self._heartbeat(cast(tuple[str, int], event), size)
        elif kind == _wire.NACK:
            self._nack(cast(tuple[str, int, str], event), size)
        else:
            self._abandon(cast(str, event), size)

    def _stray(self, kind: int, size: int) -> None:
        if kind == _wire.HELLO:
            self._error("FailedPrecondition", "already-authenticated", size)
        else:
            self._error("InvalidArgument", "unknown-event", size)

    def _error(self, code: str, text: str, size: int) -> None:
        self._reply(_wire.encode_worker_error(code, text), size)

    def _ready(self, event: tuple[tuple[bytes, ...], int, int], size: int) -> None:
        names, lease_seconds, count = event
        readys = cast(Readys, self._readys)
        try:
            readys.add(names, self._lease_ms(lease_seconds), count)
        except ReadyRefused as refused:
            self._error(refused.code, refused.text, size)
            return
        self._release(1, size)
        if readys.too_many:
            self.end("RESOURCE_EXHAUSTED", "too many waiting Readys")

    def _finish(self, finishes: _wire.Finishes, size: int) -> None:
        if not len(finishes):
            self._release(1, size)
            return
        finishes.check(self._edge.config.limits.result_bytes, lenient_error=True)
        done = partial(self._ended, finishes, size)
        self._shard.finish(finishes, self.tenant, self._named, self._subject, done)

    def _ended(self, finishes: _wire.Finishes, size: int) -> None:
        if not self._closed:
            self._finished.append(finishes)
            self._finished_bytes += size
            self._wake_writer()

    def _nack(self, event: tuple[str, int, str], size: int) -> None:
        task_id, delay_seconds, reason = event

        def done(number: int, applied_seconds: int, dead: bool) -> None:
            self._reply(_wire.encode_nack_ack(task_id, number, applied_seconds, dead), size)

        delay = delay_seconds if delay_seconds > 0 else None
        self._shard.nack(task_id, self.tenant, self._named, self._subject, delay, reason, done)

    def _heartbeat(self, event: tuple[str, int], size: int) -> None:
        task_id, extend_seconds = event

        def done(number: int) -> None:
            self._reply(_wire.encode_heartbeat_ack(task_id, number), size)

        lease_ms = self._lease_ms(extend_seconds)
        self._shard.heartbeat(task_id, self.tenant, self._named, self._subject, lease_ms, done)

    def _abandon(self, task_id: str, size: int) -> None:
        def done(number: int) -> None:
            self._reply(_wire.encode_abandon_ack(task_id, number), size)

        self._shard.abandon(task_id, self.tenant, self._named, self._subject, done)

    def _lease_ms(self, seconds: int) -> int:
        config = self._edge.config
        if seconds <= 0:
            seconds = config.default_lease_seconds
        return min(seconds, config.lease_max_seconds) * 1000

    # --- answers

    def _refill(self) -> None:
        if self._finished and self._assigned_bytes >= ASSIGNED_BYTES_MAX:
            self._acknowledge()
            return
        assignment = self._next_assignment()
        if assignment is not None:
            message = assignment.encode()
            self._assigned_bytes += len(message)
            self._in_flight.take(self.tenant, len(message))
            self._out.append(Outgoing(message, assignment=assignment))
        elif self._finished:
            self._acknowledge()
        self._in_flight.wake_next(self.tenant)

    def _next_assignment(self) -> Assignment | None:
        """None also while clients that do not read hold too many bytes."""
        if self._readys is None:
            return None
        if self._in_flight.room(self.tenant, spare=True):
            return self._readys.take()
        if self._readys.claimed:
            self._in_flight.wait(self.tenant, self._wake_writer, spare=True)
        return None

    def _acknowledge(self) -> None:
        finished = self._finished
        messages = _wire.encode_result_acks(finished, self._message_bytes_max)
        self._queue(messages, len(finished), self._finished_bytes)
        self._finished = []
        self._finished_bytes = 0
        self._assigned_bytes = 0

    def _delivered(self, assignment: Assignment, size: int) -> None:
        cast(Readys, self._readys).written(assignment, size)

    def _drop_waiting(self) -> None:
        if self._readys is not None:
            self._readys.drop()
