"""The transport under streams.py: one gRPC listener for producers or for workers.

Messages pass as raw bytes. Each stream has one reader and one writer task on the server's loop. The
writer is the task that gRPC cancels when the client goes away.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import grpc
import grpc.aio

from codeq.config import Config, ConfigError, parse_address
from codeq.engine.shard import Shard
from codeq.server import tls
from codeq.server.auth import Auth
from codeq.server.limits import Limits
from codeq.server.streams import Edge, InFlight, ProducerSession, Session, WorkerSession
from codeq.server.tls import Identity

log = logging.getLogger("codeq.streams")

SERVICES: dict[str, tuple[str, type[Session]]] = {
    "producer": ("producerpb.ProducerStream", ProducerSession),
    "worker": ("workerpb.WorkerStream", WorkerSession),
}
PING_IDLE_MS = 30_000
PING_TIMEOUT_MS = 10_000
#: How long an ended call may take to tell its reader, once the server has stopped.
READERS_SECONDS = 1.0


class Credentials:
    """TLS of one listener. The certificate is asked for at each handshake, by a thread of the
    library, and so can be exchanged."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._current = self._configuration()

    def for_port(self) -> grpc.ServerCredentials:
        """What a port is opened with."""
        return grpc.dynamic_ssl_server_credentials(
            self._current, lambda: self._current, bool(self._identity.client_ca)
        )

    def differ(self, identity: Identity) -> bool:
        """Whether this is not the one in use."""
        return identity != self._identity

    def exchange(self, identity: Identity) -> None:
        """Uses this one from the next handshake on."""
        self._identity = identity
        self._current = self._configuration()

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        certificate, key, client_ca = self._identity
        return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca or None)


class Listener:
    """A running listener. ``address`` is "host:port" with the real port."""

    def __init__(
        self, kind: str, edge: Edge, server: grpc.aio.Server, credentials: Credentials | None
    ) -> None:
        self.address = ""
        self.readers: set[asyncio.Task[None]] = set()
        self._kind = kind
        self._edge = edge
        self._server = server
        self._credentials = credentials

    def streams_of(self, tenant: str | None) -> int:
        """Open streams, of one tenant or (None) of all."""
        sessions = self._edge.sessions
        if tenant is None:
            return len(sessions)
        return sum(session.tenant == tenant for session in sessions)

    async def exchange(self, identity: Identity) -> bool:
        """Shows another certificate to new connections; False when it is the one in use. Raises
        ConfigError, and goes on with the one in use, when it cannot be used."""
        assert self._credentials is not None
        if not self._credentials.differ(identity):
            return False
        await try_out(identity, self._kind)
        self._credentials.exchange(identity)
        return True

    async def stop(self, grace_seconds: float) -> None:
        """Ends all streams with UNAVAILABLE, after the acknowledgements they are owed; what is left
        after ``grace_seconds`` is cut off."""
        self._edge.stop()
        await self._server.stop(grace_seconds)
        self._edge.close()
        if self.readers:
            await asyncio.wait(self.readers, timeout=READERS_SECONDS)


class Bell:
    """Wakes the one task that waits. A ring that nobody waits for is lost."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class Stream:
    """Carries messages between one call and its session."""

    def __init__(self, edge: Edge, session_class: type[Session], context: Any) -> None:
        self._context = context
        self._may_read = Bell()
        self._may_write = Bell()
        self._session = edge.open(session_class, self._may_read.ring, self._may_write.ring)

    async def read(self) -> None:
        """Reads until the session wants no more or the call is over."""
        session = self._session
        read = self._context.read
        while session.status is None:
            if not session.may_read():
                await self._may_read.wait()
                continue
            try:
                message = await read()
            except Exception as fault:
                log.debug("stream ended while reading: %r", fault)
                return
            if message is grpc.aio.EOF:
                session.half_close()
                return
            self._receive(message)

    def _receive(self, message: bytes) -> None:
        try:
            self._session.receive(message)
        except Exception:
            log.exception("an event was not handled; its stream ends")
            self._session.fail()

    async def write(self) -> None:
        """Writes what the session has to say until it is over."""
        session = self._session
        write = self._context.write
        try:
            while not session.over:
                message = self._take()
                if message is not None:
                    await write(message)
                    session.sent()
                elif not session.over:
                    await self._may_write.wait()
        except grpc.aio.BaseError as fault:
            log.debug("stream ended while writing: %r", fault)
        finally:
            session.close()

    def _take(self) -> bytes | None:
        try:
            return self._session.take()
        except Exception:
            log.exception("an answer could not be made; its stream ends")
            self._session.fail()
            return None

    def end(self) -> None:
        """Sets the status that the call ends with."""
        status = self._session.status
        if status is not None and status.code != "OK":
            self._context.set_code(getattr(grpc.StatusCode, status.code))
            self._context.set_details(status.text)


def _options(config: Config) -> list[tuple[str, int]]:
    return [
        # Another process on the same port would otherwise take half of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.bdp_probe", 1),
        ("grpc.max_receive_message_length", config.streams.receive_bytes),
        ("grpc.max_send_message_length", config.streams.send_bytes),
        # Dead peers are found, so that their Readys go away.
        ("grpc.keepalive_time_ms", PING_IDLE_MS),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients may ping as often as they like: some measure bandwidth with it.
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _open_port(
    server: grpc.aio.Server, kind: str, address: str, credentials: Credentials | None
) -> str:
    """Binds a server that is not yet started; returns "host:port" with its real port."""
    host, port = parse_address(f"{kind}StreamAddr", address)
    name = f"[{host}]" if ":" in host else host
    complaint = f"cannot listen on {name}:{port} for {kind} streams"
    if port:
        _probe(host, port, complaint)
    try:
        if credentials is None:
            bound = server.add_insecure_port(f"{name}:{port}")
        else:
            bound = server.add_secure_port(f"{name}:{port}", credentials.for_port())
    except RuntimeError as fault:
        raise OSError(f"{complaint}: {fault}") from None
    return f"{name}:{bound}"


async def try_out(identity: Identity, name: str) -> None:
    """Raises ConfigError when the gRPC library cannot use the certificate: it says so nowhere, but
    lets every handshake fail."""
    server = grpc.aio.server()
    try:
        port = server.add_secure_port("127.0.0.1:0", Credentials(identity).for_port())
        await server.start()
        shown = await tls.shown_by("127.0.0.1", port, ["h2"])
    except (OSError, RuntimeError, ValueError):
        shown = b""
    finally:
        await server.stop(None)
    if shown != identity.leaf:
        raise ConfigError(f"tls.{name}.certFile", "the gRPC library cannot use it")


def _probe(host: str, port: int, complaint: str) -> None:
    """Binds and lets go, because the gRPC library does not tell the reason of a failure."""
    try:
        family, *_, at = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(at)
            probe.listen(1)
    except OSError as fault:
        raise OSError(f"{complaint}: {fault.strerror}") from None


async def start(
    shard: Shard,
    auth: Auth,
    config: Config,
    kind: str,
    address: str,
    *,
    in_flight: InFlight | None = None,
    limits: Limits | None = None,
    identity: Identity | None = None,
) -> Listener:
    """Opens a listener for "producer" or "worker" streams on ``address`` (port 0: a free one).

    ``in_flight`` bounds the events in hand, ``limits`` how often streams may be opened; listeners
    that share them share the bounds. ``identity`` None is clear text; it must have been tried out.
    Raises OSError with one clear line when the address cannot be used.
    """
    service, session_class = SERVICES[kind]
    credentials = None if identity is None else Credentials(identity)
    server = grpc.aio.server(
        options=_options(config), maximum_concurrent_rpcs=config.limits.connections
    )
    in_flight = in_flight or InFlight(config.limits.inflight_bytes)
    limits = limits or Limits(config.rate_limit, shard.clock)
    edge = Edge(shard, auth, config, asyncio.get_running_loop().call_later, in_flight, limits)
    listener = Listener(kind, edge, server, credentials)

    async def stream(_: object, context: Any) -> None:
        call = Stream(edge, session_class, context)
        reader = asyncio.create_task(call.read())
        listener.readers.add(reader)
        reader.add_done_callback(listener.readers.discard)
        await call.write()
        call.end()

    handler: Any = grpc.stream_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {"Stream": handler}),)
    )
    try:
        listener.address = _open_port(server, kind, address, credentials)
        await server.start()
    except BaseException:
        await server.stop(None)
        raise
    return listener
