"""The HTTP server under rest.py: its socket, TLS, the exchange of certificates, its end.

The only file that knows which HTTP server this is. A certificate is exchanged by a second server on
the same address: the kernel is told to give every new connection to it, the first one asks its
clients to come again (``connection: close``) and ends when they have had the time to.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.server.embed import Server

from codeq.config import Config, ConfigError
from codeq.server import tls
from codeq.server.request import STALL_SECONDS
from codeq.server.rest import RestApp
from codeq.server.tls import Identity

log = logging.getLogger("codeq.http")

#: How long a request that was cut off may take to be told
CUT_SECONDS = 1
START_SECONDS = 10
TRIAL_SECONDS = 20
#: How long a connection made before the exchange of a certificate has for its first request
MOVE_SECONDS = 2
NEXT_HEADERS_MS = 75_000
#: Read buffer of one connection; what a client that sends endless headers can hold.
BUFFER_BYTES = 65_536
#: A connection that no byte has passed for so long is ended: longer than any request may wait, and
#: than an idle connection is kept. HTTP/2 has its pings.
SILENT_SECONDS = 120
SWEEP_SECONDS = 30
H2_STREAMS_MAX = 256
H2_PING_MS = 30_000
H2_PING_TIMEOUT_S = 10
BACKLOG_MAX = 4096
#: The library would add handlers that write to standard output, close those that are there and
#: warn of its embedded form: its errors go where all logs go.
LOG_CONFIG = {
    "incremental": True,
    "handlers": {},
    "loggers": {"_granian": {"propagate": True}},
}
#: Where a listener on all interfaces can be reached from here
DIALLED = {"0.0.0.0": "127.0.0.1", "::": "::1"}
#: Socket option of Linux that Python has no name for
SO_ATTACH_REUSEPORT_CBPF = 51
BPF_RETURN = 0x06
#: Where the ages of the last bytes sent and received (ms) stand in struct tcp_info of Linux
TCP_INFO_BYTES, SENT_AT, RECEIVED_AT = 104, 44, 52


def reserve(host: str, port: int, use: str) -> socket.socket:
    """A socket bound to a port that was free (0: any), which does not listen yet.

    A port in use is found here: the socket itself would share it. Raises OSError with one clear
    line.
    """
    try:
        family, *_, at = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(at)
            probe.listen(1)
            bound = probe.getsockname()
        return _bound(family, bound)
    except OSError as fault:
        raise OSError(f"cannot listen on {host}:{port} for {use}: {fault.strerror}") from None


def _bound_like(other: socket.socket) -> socket.socket:
    """One more socket on the address of another, which shares it."""
    return _bound(other.family, other.getsockname())


def _bound(family: int, at: Any) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(at)
    except BaseException:
        one.close()
        raise
    return one


def end_silent(port: int, seconds: float) -> int:
    """Ends the connections to a port of this process that no byte has passed for so long; returns
    how many. The library itself has no deadline for a client that says nothing after its TLS
    handshake, nor for one that does not take its answer."""
    ended = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as held:  # whatever its owner does
                ended += _end_if_silent(held, port, seconds * 1000)
    return ended


def _end_if_silent(held: socket.socket, port: int, ms: float) -> bool:
    if held.family not in (socket.AF_INET, socket.AF_INET6) or held.getsockname()[1] != port:
        return False
    held.getpeername()  # raises for the socket that listens
    info = held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    ages_ms = (struct.unpack_from("I", info, at)[0] for at in (SENT_AT, RECEIVED_AT))
    if min(ages_ms) < ms:
        return False
    held.shutdown(socket.SHUT_RDWR)
    return True


class EmbeddedServer(Server):
    """The library's server on a socket of ours and with certificates that are no files."""

    def __init__(
        self, app: Any, listening: socket.socket, backlog: int, files: list[int], **settings: Any
    ) -> None:
        self._listening = listening
        self._listen_backlog = backlog
        self._files = files
        ip, port = listening.getsockname()[:2]
        super().__init__(
            app,
            address=ip,
            port=port,
            interface=Interfaces.ASGINL,
            websockets=False,
            log_access=False,
            log_level=LogLevels.error,
            log_dictconfig=LOG_CONFIG,
            backlog=backlog,
            **settings,
        )

    def build_ssl_context(self, *_: Any) -> None:
        """The certificates were looked at before; the files are open ones without a name."""
        lowest = str(SSLProtocols.tls12)
        if not self._files:
            self.ssl_ctx: Any = (False, None, None, None, lowest, None, [], False)
            return
        certificate, key, *ca = map(tls.path_of, self._files)
        client_ca = ca[0] if ca else None
        self.ssl_ctx = (True, certificate, key, None, lowest, client_ca, [], bool(ca))

    def _init_shared_socket(self) -> None:
        self._ssp = None
        held = os.dup(self._listening.fileno())  # the library closes what it gets
        holder: Any = SocketHolder  # its stub lacks the arguments
        self._shd: Any = holder(held, False, self._listen_backlog)


class Serving:
    """One server of the library at work, with the socket and the certificates it has."""

    def __init__(
        self, app: Any, connections: int, listening: socket.socket, identity: Identity | None
    ) -> None:
        self.listening = listening
        self.identity = identity
        self._files = [tls.in_memory(part) for part in identity or () if part]
        backlog = min(connections, BACKLOG_MAX)
        self._server = EmbeddedServer(
            app,
            listening,
            backlog,
            self._files,
            # In clear text HTTP/2 would be guessed from the first bytes, and a connection that
            # sends none would never be timed out.
            http=HTTPModes.http1 if identity is None else HTTPModes.auto,
            backpressure=connections,
            http1_settings=HTTP1Settings(
                header_read_timeout=NEXT_HEADERS_MS, max_buffer_size=BUFFER_BYTES
            ),
            http2_settings=HTTP2Settings(
                max_concurrent_streams=H2_STREAMS_MAX,
                max_headers_size=BUFFER_BYTES,
                keep_alive_interval=H2_PING_MS,
                keep_alive_timeout=H2_PING_TIMEOUT_S,
            ),
        )
        # Inherited by what is accepted: the kernel drops a client that takes nothing for so long.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_SECONDS * 1000)
        listening.setblocking(False)
        listening.listen(backlog)
        self.task = asyncio.create_task(self._server.serve())

    async def started(self) -> None:
        """Returns when connections are answered; raises OSError when they are not in time."""
        ip, port = self.listening.getsockname()[:2]
        dial = (DIALLED.get(ip, ip), port)
        async with asyncio.timeout(START_SECONDS):
            while not await self._answers(*dial):
                if self.task.done():
                    self.task.result()
                    raise OSError(f"cannot listen on {ip}:{port} for REST")
                await asyncio.sleep(0.005)
        self._forget_files()

    async def _answers(self, ip: str, port: int) -> bool:
        try:
            if self.identity is None:
                _, writer = await asyncio.open_connection(ip, port)
                writer.close()
                return True
            return await tls.shown_by(ip, port, ["http/1.1"]) == self.identity.leaf
        except OSError:
            return False

    def steer(self, place: int) -> None:
        """Has the kernel give every new connection to the socket with this place among those that
        listen on the address, in order of their beginning."""
        program = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RETURN, 0, 0, place))
        option = struct.pack("HL", 1, ctypes.addressof(program))
        try:
            self.listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, option)
        except OSError as error:
            log.warning("new connections cannot be steered to the new certificate: %s", error)

    def leave(self) -> None:
        """Takes no more connections, and closes those at hand when they are answered."""
        self.listening.close()
        self._server.stop()  # type: ignore[no-untyped-call]

    async def end(self, grace_seconds: float) -> bool:
        """Leaves; whether all was answered in time."""
        self.leave()
        return await self.ended(grace_seconds)

    async def ended(self, seconds: float) -> bool:
        """Whether the end comes within so many seconds."""
        done, _ = await asyncio.wait([self.task], timeout=seconds)
        self._forget_files()
        return bool(done)

    def _forget_files(self) -> None:
        for file in self._files:
            os.close(file)
        self._files.clear()


class HttpListener:
    """The REST listener on a socket that was reserved for it."""

    def __init__(
        self, app: RestApp, config: Config, reserved: socket.socket, identity: Identity | None
    ) -> None:
        self._app = app
        self._config = config
        self._reserved = reserved
        self._identity = identity
        ip, port = reserved.getsockname()[:2]
        self.address = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
        self._servings: list[Serving] = []  # the one in use is the last
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when connections are answered. The identity must have been tried out."""
        await self._serve(self._app, self._reserved, self._identity).started()
        self._sweeping = asyncio.create_task(self._sweep(self._reserved.getsockname()[1]))

    async def _sweep(self, port: int) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            if ended := await asyncio.to_thread(end_silent, port, SILENT_SECONDS):
                log.info("%d silent connections were ended", ended)

    async def exchange(self, identity: Identity) -> bool:
        """Shows another certificate to new connections from now on; False when it is the one in
        use. Returns when the connections made before have had the time to come again.

        Raises ConfigError, and goes on with the one in use, when it cannot be used.
        """
        before = self._servings[-1]
        if identity == before.identity:
            return False
        await try_out(identity, "http")
        app = self._app.twin()
        after = self._serve(app, _bound_like(before.listening), identity)
        after.steer(1)
        try:
            await after.started()
        except OSError as error:
            after.steer(0)
            self._servings.remove(after)
            await after.end(CUT_SECONDS)
            raise ConfigError("tls.http.certFile", f"cannot be served: {error}") from None
        self._app.leaving = True
        self._app = app
        log.info("new connections to %s get the new certificate", self.address)
        await asyncio.sleep(MOVE_SECONDS)
        before.leave()
        before.task.add_done_callback(lambda _: self._servings.remove(before))
        return True

    def _serve(self, app: RestApp, listening: socket.socket, identity: Identity | None) -> Serving:
        serving = Serving(app, self._config.limits.connections, listening, identity)
        self._servings.append(serving)
        return serving

    async def stop(self, grace_seconds: float) -> None:
        """Takes no more connections; what is not answered in time is cut off."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._reserved.close()
        ends = [serving.end(grace_seconds) for serving in list(self._servings)]
        if all(await asyncio.gather(*ends)):
            return
        log.warning("REST requests were cut off after %d s", grace_seconds)
        self._app.cut()
        for serving in list(self._servings):
            if not await serving.ended(CUT_SECONDS):
                serving.task.cancel()


async def try_out(identity: Identity, name: str) -> None:
    """Raises ConfigError when the HTTP server cannot use the certificate, in a process that is
    there for it: the library would take this one down."""
    files = [tls.in_memory(part) for part in identity if part]
    command = [sys.executable, "-m", "codeq.server.http_server", *map(str, files)]
    try:
        # Not the loop's own subprocesses: these fork, of which the gRPC library has much to say.
        code, said = await asyncio.to_thread(_run, command, files)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"tls.{name}.certFile", "the HTTP server hangs with it") from None
    finally:
        for file in files:
            os.close(file)
    if code:
        lines = said.strip().splitlines() or [""]
        text = next((line for line in lines if "Err" in line), lines[-1])
        raise ConfigError(f"tls.{name}.certFile", f"the HTTP server cannot use it: {text}")


def _run(command: list[str], files: list[int]) -> tuple[int, str]:
    """(exit code, what it said on standard error) of a process that inherits these files."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=files,
        timeout=TRIAL_SECONDS,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, done.stderr


async def _trial(parts: list[bytes]) -> None:
    """Serves the certificate on a port of its own and looks at it from outside."""
    identity = Identity(parts[0], parts[1], parts[2] if len(parts) > 2 else b"")
    serving = Serving(None, 128, reserve("127.0.0.1", 0, "a trial"), identity)
    await serving.started()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_trial([Path(tls.path_of(int(file))).read_bytes() for file in sys.argv[1:]]))
