"""One process from a Config: builds, starts and stops everything in order.

The only file that knows the HTTP server and the event loop.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from codeq.config import Config, ConfigError, parse_address, unavailable_settings
from codeq.engine.clock import Clock
from codeq.engine.shard import Shard, ShardSettings
from codeq.errors import CodeqError
from codeq.server import grpc_server, logs
from codeq.server.auth import Auth
from codeq.server.limits import Limits
from codeq.server.metrics import Metrics
from codeq.server.providers import build_auth
from codeq.server.request import STALL_SECONDS
from codeq.server.rest import RestApp
from codeq.server.streams import InFlight
from codeq.server.watchdog import Watchdog

log = logging.getLogger("codeq.app")

EXIT_START_FAILED = 1
EXIT_BAD_SETTING = 2
EXIT_STORE_FAULT = 3

REST_STOP_SECONDS = 10
#: How long a request that was cut off may take to be told
CUT_SECONDS = 1
STREAMS_STOP_SECONDS = 5
STORE_STOP_SECONDS = 5
HTTP_START_SECONDS = 10
NEXT_HEADERS_MS = 75_000
#: Read buffer of one connection; what a client that sends endless headers can hold.
HTTP_BUFFER_BYTES = 65_536
BACKLOG_MAX = 4096
GC_ALLOCATIONS = 50_000
GC_GENERATIONS = 20
#: Where a listener on all interfaces can be reached from here
DIALLED = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Helper:
    """A thread that does one piece of work after the other and reports on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._work: SimpleQueue[tuple[Callable[[], object], Callable[[object], None]] | None]
        self._work = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        """Runs ``work`` in the thread, then ``done(its value or exception)`` on the loop."""
        self._work.put((work, done))

    def stop(self) -> None:
        """Ends the thread after what is queued."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            work, done = task
            try:
                outcome = work()
            except BaseException as error:
                outcome = error
            self._loop.call_soon_threadsafe(done, outcome)


class Timer:
    """One call at a time of the clock, never before it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Clock, when_ms: int, call: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._when_ms = when_ms
        self._call = call
        self._arm()

    def cancel(self) -> None:
        """Forgets the call."""
        self._handle.cancel()

    def _arm(self) -> None:
        # A day at most, so that the wall clock is followed.
        delay_ms = min(self._when_ms - self._clock.now_ms(), 86_400_000)
        self._handle = self._loop.call_later(max(delay_ms, 0) / 1000, self._due)

    def _due(self) -> None:
        if self._clock.now_ms() < self._when_ms:
            self._arm()
        else:
            self._call()


class LoopRunner:
    """What the shard needs of the world: helper threads and timers, bound to the running loop."""

    def __init__(self, clock: Clock) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._sync = Helper(self._loop, "codeq-sync")
        self._reads = Helper(self._loop, "codeq-read")
        self._aside = Helper(self._loop, "codeq-aside")

    def run(self, work: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        """Runs ``work`` on the sync thread, then ``done(error)`` on the loop."""
        self._sync.do(work, done)  # type: ignore[arg-type]

    def read(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        """Runs ``work`` on the read thread, then ``done(result or exception)`` on the loop."""
        self._reads.do(work, done)

    def aside(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        """As ``read``, on a thread for work that may take long."""
        self._aside.do(work, done)

    def soon(self, call: Callable[[], None]) -> None:
        """Calls ``call`` after the events at hand."""
        self._loop.call_soon(call)

    def at(self, when_ms: int, call: Callable[[], None]) -> Callable[[], None]:
        """Calls ``call`` at ``when_ms`` of the clock; returns the function that cancels it."""
        return Timer(self._loop, self._clock, when_ms, call).cancel

    def stop(self) -> None:
        """Ends the threads after what they have to do."""
        for helper in (self._aside, self._sync, self._reads):
            helper.stop()


class Reserved(NamedTuple):
    """An address that is free and kept for us as long as the holder is open."""

    holder: socket.socket
    ip: str
    port: int


def reserve(host: str, port: int, use: str) -> Reserved:
    """Finds a port in use, which the HTTP server would share; turns port 0 into a free one.

    Raises OSError with one clear line.
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
        holder = socket.socket(family, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(bound)
    except OSError as fault:
        raise OSError(f"cannot listen on {host}:{port} for {use}: {fault.strerror}") from None
    return Reserved(holder, str(bound[0]), int(bound[1]))


def drop_unread(address: tuple[str, int], seconds: int) -> None:
    """Has the kernel drop connections whose client takes nothing of what is sent for so long.

    The HTTP server has no setting for it and shows no socket, so its listener is looked for; what
    it accepts is as it is.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed meanwhile
            continue
        with found:
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and found.getsockname()[:2] == address:
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)


class HttpListener:
    """The HTTP server with a deadline for its end, on an address that was reserved for it."""

    def __init__(self, app: RestApp, config: Config, reserved: Reserved) -> None:
        self._app = app
        self._holder, ip, port = reserved
        self._bound = (ip, port)
        self._dial = (DIALLED.get(ip, ip), port)
        self.address = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
        connections = config.limits.connections
        self._server = Server(
            app,
            address=ip,
            port=port,
            interface=Interfaces.ASGINL,
            # In clear text HTTP/2 would be guessed from the first bytes, and a connection that
            # sends none would never be timed out.
            http=HTTPModes.http1,
            websockets=False,
            backlog=min(connections, BACKLOG_MAX),
            backpressure=connections,
            log_access=False,
            http1_settings=HTTP1Settings(
                header_read_timeout=NEXT_HEADERS_MS, max_buffer_size=HTTP_BUFFER_BYTES
            ),
        )
        logs.configure(config.log_level, config.log_format)  # the server has set its own
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when connections are accepted."""
        self._serving = asyncio.create_task(self._server.serve())
        try:
            await asyncio.wait_for(self._accepting(self._serving), HTTP_START_SECONDS)
        finally:
            self._holder.close()
        drop_unread(self._bound, STALL_SECONDS)

    async def _accepting(self, serving: asyncio.Task[None]) -> None:
        while True:
            if serving.done():
                serving.result()
                raise OSError(f"cannot listen on {self.address} for REST")
            try:
                _, writer = await asyncio.open_connection(*self._dial)
            except OSError:
                await asyncio.sleep(0.005)
                continue
            writer.close()
            return

    async def stop(self, grace_seconds: float) -> None:
        """Takes no more connections; what is not answered in time is cut off."""
        if self._serving is None:
            return
        self._server.stop()  # type: ignore[no-untyped-call]
        if await self._ended(grace_seconds):
            return
        log.warning("REST requests were cut off after %d s", grace_seconds)
        self._app.cut()
        if not await self._ended(CUT_SECONDS):
            self._serving.cancel()

    async def _ended(self, seconds: float) -> bool:
        assert self._serving is not None
        done, _ = await asyncio.wait([self._serving], timeout=seconds)
        return bool(done)


def shard_settings(config: Config) -> ShardSettings:
    """What the shard needs of the settings."""
    return ShardSettings(
        path=Path(config.persistence_config.path),
        backup_dir=Path(config.backup_dir),
        fsync_on_commit=config.persistence_config.fsync_on_commit,
        num_shards=config.persistence_config.num_shards,
        default_lease_seconds=config.default_lease_seconds,
        lease_max_seconds=config.lease_max_seconds,
        max_attempts_default=config.max_attempts_default,
        backoff_policy=config.backoff_policy,
        backoff_base_seconds=config.backoff_base_seconds,
        backoff_max_seconds=config.backoff_max_seconds,
        nack_delay_max_seconds=config.nack_delay_max_seconds,
        idempotency_window_seconds=config.idempotency_window_seconds,
        idempotency_lenient=config.compat.idempotency_replay == "lenient",
        retention_seconds=config.retention_seconds,
        dead_retention_seconds=config.dead_retention_seconds,
        lease_grace_seconds=config.lease_grace_seconds,
        live_tasks_max=config.limits.live_tasks,
        payload_memory_bytes=config.limits.payload_memory_bytes,
        journal_pending_bytes=config.limits.journal_pending_bytes,
        disk_reserve_bytes=config.limits.disk_reserve_bytes,
        payload_bytes_max=config.limits.payload_bytes,
        commit_creates_max=config.limits.create_batch,
        commit_results_max=config.limits.result_batch,
        command_labels_max=config.metrics.command_labels_max,
        webhooks_private=config.webhooks.allow_private_networks,
    )


class Node:
    """Everything one process runs. Make, ``start`` and ``stop`` it inside one loop."""

    def __init__(self, config: Config, fault: Callable[[str], None]) -> None:
        self._config = config
        self._fault = fault
        self._stops: list[Callable[[], None]] = []
        self._streams: dict[str, grpc_server.Listener] = {}
        self._http: HttpListener | None = None
        self._rest: RestApp | None = None
        self._shard: Shard | None = None
        self._metrics: Metrics | None = None

    async def start(self) -> str:
        """Opens the store, then the listeners; returns the ready line. On failure nothing is left
        running."""
        config = self._config
        try:
            clock = Clock()
            auth = build_auth(config, clock)
            reserved = self._reserve_all()
            limits = Limits(config.rate_limit, clock)
            in_flight = InFlight(config.limits.inflight_bytes)
            shard = self._open_shard(clock)
            self._metrics = Metrics(shard, limits)
            shard.journal.observe = self._metrics.observe_commit
            self._rest = RestApp(shard, auth, config, self._metrics, in_flight, limits)
            self._http = HttpListener(self._rest, config, reserved)
            await self._http.start()
            for kind in ("producer", "worker"):
                await self._open_streams(kind, shard, auth, in_flight, limits)
        except BaseException:
            await self.stop()
            raise
        watchdog = Watchdog(self._metrics.loop_blocked.observe, lambda: shard.journal.groups)
        watchdog.start()
        self._stops.append(watchdog.stop)
        addresses = {kind: self._streams[kind].address for kind in self._streams}
        return (
            f"ready http={self._http.address} producer={addresses.get('producer', 'off')}"
            f" worker={addresses.get('worker', 'off')} pid={os.getpid()}"
        )

    def _reserve_all(self) -> Reserved:
        """The address of REST, after a look at those of the streams: a port in use is to be found
        before the store is touched."""
        for kind in ("producer", "worker"):
            if address := self._stream_address(kind):
                host, port = parse_address(f"{kind}StreamAddr", address)
                reserve(host, port, f"{kind} streams").holder.close()
        reserved = reserve(*self._config.http_address, "REST")
        self._stops.append(reserved.holder.close)
        return reserved

    def _stream_address(self, kind: str) -> str:
        address: str = getattr(self._config, f"{kind}_stream_addr")
        return address

    async def stop(self) -> None:
        """Answers what is in hand, each part up to its deadline, then closes the store."""
        if self._rest is not None:
            self._rest.stop()
        if self._shard is not None:
            self._shard.backups.stop()
        endings = [listener.stop(STREAMS_STOP_SECONDS) for listener in self._streams.values()]
        if self._http is not None:
            endings.append(self._http.stop(REST_STOP_SECONDS))
        await asyncio.gather(*endings)
        if self._shard is not None and self._shard.ready:
            await self._drain(self._shard)
        for stop in reversed(self._stops):
            stop()
        self._stops.clear()

    def _open_shard(self, clock: Clock) -> Shard:
        runner = LoopRunner(clock)
        try:
            self._shard = Shard.open(shard_settings(self._config), clock, runner, self._fault)
        except BaseException:
            runner.stop()
            raise
        self._stops += [self._shard.close, runner.stop]  # undone backwards: the threads end first
        return self._shard

    async def _open_streams(
        self, kind: str, shard: Shard, auth: Auth, in_flight: InFlight, limits: Limits
    ) -> None:
        address = self._stream_address(kind)
        if not address:
            return
        listener = await grpc_server.start(
            shard, auth, self._config, kind, address, in_flight=in_flight, limits=limits
        )
        self._streams[kind] = listener
        if self._metrics is not None:
            self._metrics.streams[kind] = partial(getattr, listener, "streams")

    async def _drain(self, shard: Shard) -> None:
        drained = asyncio.get_running_loop().create_future()
        shard.drain(lambda: None if drained.done() else drained.set_result(None))
        done, _ = await asyncio.wait([drained], timeout=STORE_STOP_SECONDS)
        if not done:
            self._fault(f"the store did not finish its last commit within {STORE_STOP_SECONDS} s")


def serve(config: Config) -> int:
    """Runs the server until SIGTERM or SIGINT; returns the exit code of the process.

    Prints one ``ready`` line on standard output when it serves. What keeps it from serving is one
    line on standard error.
    """
    logs.configure(config.log_level, config.log_format)
    stops, warns = unavailable_settings(config)
    if stops:
        return _complain(stops[0], EXIT_BAD_SETTING)
    try:
        return uvloop.run(_run(config, [*config.warnings, *warns]))
    except ConfigError as error:
        return _complain(str(error), EXIT_BAD_SETTING)
    except CodeqError as error:
        return _complain(error.message, EXIT_START_FAILED)
    except OSError as error:
        return _complain(str(error), EXIT_START_FAILED)


async def _run(config: Config, warnings: list[str]) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    node = Node(config, _store_fault)
    ready = await node.start()
    _calm_garbage_collector()
    for warning in warnings:
        log.warning("%s", warning)
    if not config.persistence_config.fsync_on_commit:
        log.warning("fsyncOnCommit is off: a loss of power may take the last moments with it")
    print(ready, flush=True)
    log.info("%s", ready)
    await stopping.wait()
    log.info("stopping")
    await node.stop()
    log.info("stopped")
    return 0


def _calm_garbage_collector() -> None:
    """Looks less often for garbage in cycles: hardly any is made, and a look holds the loop."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, GC_GENERATIONS, GC_GENERATIONS)


def _store_fault(message: str) -> None:
    """The store cannot be written: nothing more may be answered, so the process ends at once. A
    restart recovers what was acknowledged."""
    _complain(message, EXIT_STORE_FAULT)
    os._exit(EXIT_STORE_FAULT)


def _complain(message: str, code: int) -> int:
    print("codeq: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code
