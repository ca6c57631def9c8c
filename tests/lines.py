"""Streams without a transport: the sessions of the stream edge in a test's hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from codeq.config import Config, RateLimit, Streams
from codeq.server.auth import WORKER_SCOPES, AuthError
from codeq.server.limits import Limits
from codeq.server.streams import Edge, InFlight, ProducerSession, Session, WorkerSession
from tests.protos import producerpb, workerpb


class FakePrincipal:
    def __init__(self, **fields: Any) -> None:
        self.tenant = "acme"
        self.subject = "sub"
        self.scopes = WORKER_SCOPES
        self.event_types: tuple[bytes, ...] = ()
        self.any_command = True
        self.expires_ms: int | None = None
        self.__dict__.update(fields)

    def may_claim(self, command: bytes) -> bool:
        return self.any_command or command in self.event_types


class FakeAuth:
    """Knows the tokens it is told of."""

    def __init__(self) -> None:
        self.tokens: dict[str, FakePrincipal | AuthError] = {"token": FakePrincipal()}

    def producer(self, token: str) -> FakePrincipal:
        found = self.tokens.get(token, AuthError("unauthenticated", "invalid token"))
        if isinstance(found, AuthError):
            raise found
        return found

    worker = producer


class FakeTimer:
    def __init__(self, seconds: float, callback: Callable[[], None]) -> None:
        self.seconds = seconds
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class House:
    """An edge on any shard: tokens from a list, timers that a test rings, streams on Lines."""

    def __init__(
        self,
        shard: Any,
        *,
        bytes_in_all: int = 1 << 30,
        rate_limit: RateLimit | None = None,
        **streams: Any,
    ) -> None:
        self.shard = shard
        self.auth = FakeAuth()
        self.timers: list[FakeTimer] = []
        self.config = Config(streams=Streams(**streams))
        self.in_flight = InFlight(bytes_in_all)
        self.limits = Limits(rate_limit or RateLimit(), shard.clock)
        self.edge = Edge(
            self.shard,
            self.auth,  # type: ignore[arg-type]
            self.config,
            self._call_later,
            self.in_flight,
            self.limits,
        )

    def _call_later(self, seconds: float, callback: Callable[[], None]) -> FakeTimer:
        self.timers.append(FakeTimer(seconds, callback))
        return self.timers[-1]

    def producer(self, token: str | None = "token") -> Line:
        line = Line(self.edge, ProducerSession, producerpb)
        if token is not None:
            line.send(hello=producerpb.Hello(token=token))
            line.read_hello_ack()
        return line

    def worker(self, token: str | None = "token", worker_id: str = "w1") -> Line:
        line = Line(self.edge, WorkerSession, workerpb)
        if token is not None:
            line.send(hello=workerpb.Hello(token=token, worker_id=worker_id))
            line.read_hello_ack()
        return line


class Line:
    """A transport in a test's hand."""

    def __init__(self, edge: Edge, session_class: type[Session], proto: Any) -> None:
        self.reader_woken = 0
        self.writer_woken = 0
        self.proto = proto
        self.session = edge.open(session_class, self._wake_reader, self._wake_writer)

    def _wake_reader(self) -> None:
        self.reader_woken += 1

    def _wake_writer(self) -> None:
        self.writer_woken += 1

    def send(self, **event: Any) -> None:
        kind = self.proto.ProducerEvent if self.proto is producerpb else self.proto.WorkerEvent
        assert self.session.may_read()
        self.session.receive(kind(**event).SerializeToString())

    def read(self) -> Any:
        """The next message, as if the transport had accepted it at once; None if there is none."""
        message = self.session.take()
        if message is None:
            return None
        self.session.sent()
        return self.proto.ServerEvent.FromString(message)

    def read_all(self) -> list[Any]:
        found = []
        while (event := self.read()) is not None:
            found.append(event)
        return found

    def read_hello_ack(self) -> None:
        assert self.read().WhichOneof("event") == "hello_ack"

    def ready(self, *commands: str, count: int = 1, lease_seconds: int = 0) -> None:
        ready = workerpb.Ready(commands=commands, count=count, lease_seconds=lease_seconds)
        self.send(ready=ready)

    def create(self, seq: int, command: str = "job", payload: bytes = b"{}") -> None:
        self.send(create=producerpb.CreateTask(seq=seq, command=command, payload=payload))


def refused(event: Any) -> tuple[str, str]:
    assert event.WhichOneof("event") == "error"
    return event.error.code, event.error.message
