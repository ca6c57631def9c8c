"""One process from a Config: builds, starts and stops everything in order.

The only file that knows which event loop this is.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import uvloop

from codeq.config import Config, ConfigError, parse_address, unavailable_settings
from codeq.engine.clock import Clock
from codeq.engine.shard import Shard, ShardSettings
from codeq.errors import CodeqError
from codeq.server import grpc_server, http_server, logs
from codeq.server.auth import Auth
from codeq.server.callbacks import Callbacks
from codeq.server.http_server import HttpListener, reserve
from codeq.server.limits import Limits
from codeq.server.metrics import Metrics
from codeq.server.providers import build_auth
from codeq.server.rest import RestApp
from codeq.server.streams import InFlight
from codeq.server.subscriptions import Notifier
from codeq.server.tls import Certificates, Identity
from codeq.server.watchdog import Watchdog
from codeq.server.webhooks import Webhooks

if TYPE_CHECKING:
    from codeq.server.tracing import Tracer

log = logging.getLogger("codeq.app")

EXIT_START_FAILED = 1
EXIT_BAD_SETTING = 2
EXIT_STORE_FAULT = 3

REST_STOP_SECONDS = 10
STREAMS_STOP_SECONDS = 5
STORE_STOP_SECONDS = 5
GC_ALLOCATIONS = 50_000
GC_GENERATIONS = 20
#: So long may Python code beside the loop hold Python's lock while the loop wants it, and the other
#: way round. The less often it changes hands, the more is done.
SWITCH_SECONDS = 0.002

#: How to find out whether the library under a listener can use a certificate
TRIALS = {
    "http": http_server.try_out,
    "producer": grpc_server.try_out,
    "worker": grpc_server.try_out,
}


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

    def begin(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        """As ``do``, and returns when the thread has begun, which must have nothing else to do.

        A thread that needs Python's lock waits for a busy loop to let go of it; here the loop hands
        it over.
        """
        begun = threading.Lock()
        begun.acquire()

        def at_work() -> object:
            begun.release()
            return work()

        self.do(at_work, done)
        begun.acquire()

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
        """Begins ``work`` on the sync thread; then ``done(error)`` is called on the loop."""
        self._sync.begin(work, done)  # type: ignore[arg-type]

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
        subscription_cleanup_seconds=config.subscription_cleanup_interval_seconds,
    )


class Node:
    """Everything one process runs. Make, ``start`` and ``stop`` it inside one loop.

    ``fault`` is told when the store cannot be written, and has to end everything. A test has a
    clock of its own, and a runner that goes by it.
    """

    def __init__(
        self,
        config: Config,
        fault: Callable[[str], None],
        clock: Clock | None = None,
        runner: Callable[[Clock], LoopRunner] = LoopRunner,
    ) -> None:
        self._config = config
        self._fault = fault
        self._clock = clock or Clock()
        self._runner = runner
        self._stops: list[Callable[[], object]] = []
        self._streams: dict[str, grpc_server.Listener] = {}
        self._http: HttpListener | None = None
        self._rest: RestApp | None = None
        self._shard: Shard | None = None
        self._metrics: Metrics | None = None
        self._certificates = Certificates(config.tls)
        self._reading: asyncio.Task[None] | None = None
        self._tracer: Tracer | None = None
        self._callbacks: Callbacks | None = None
        self._webhooks: Webhooks | None = None

    async def start(self) -> str:
        """Opens the store, then the listeners; returns the ready line. On failure nothing is left
        running."""
        config = self._config
        try:
            self._tracer = _tracer(config)
            identities = await _identities(self._certificates)
            clock = self._clock
            auth = build_auth(config, clock)
            reserved = self._reserve_all()
            limits = Limits(config.rate_limit, clock)
            in_flight = InFlight(config.limits.inflight_bytes)
            shard = self._open_shard()
            self._metrics = Metrics(shard, limits)
            shard.journal.observe = self._metrics.observe_commit
            self._rest = RestApp(
                shard, auth, config, self._metrics, in_flight, limits, self._tracer
            )
            self._http = HttpListener(self._rest, config, reserved, identities["http"])
            await self._http.start()
            self._certificates.on_change["http"] = self._http.exchange
            for kind in ("producer", "worker"):
                await self._open_streams(kind, shard, auth, in_flight, limits, identities[kind])
            self._start_callbacks(shard, self._metrics, limits)
        except BaseException:
            await self.stop()
            raise
        watchdog = Watchdog(self._metrics.loop_blocked.observe, lambda: shard.journal.groups)
        watchdog.start()
        self._stops.append(watchdog.stop)
        if any(identities.values()):
            self._read_certificates_on(signal.SIGHUP)
        at = self.addresses
        return (
            f"ready http={at['http']} producer={at['producer']} worker={at['worker']}"
            f" pid={os.getpid()}"
        )

    @property
    def addresses(self) -> dict[str, str]:
        """HOST:PORT of the listeners http, producer and worker, "off" for those that are not."""
        listeners = {"http": self._http, "producer": None, "worker": None, **self._streams}
        return {kind: "off" if one is None else one.address for kind, one in listeners.items()}

    def _read_certificates_on(self, number: signal.Signals) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(number, self._certificates.ask)
        self._reading = loop.create_task(self._certificates.run())
        self._stops.append(partial(loop.remove_signal_handler, number))

    def _reserve_all(self) -> socket.socket:
        """The address of REST, after a look at those of the streams: a port in use is to be found
        before the store is touched."""
        for kind in ("producer", "worker"):
            if address := self._stream_address(kind):
                host, port = parse_address(f"{kind}StreamAddr", address)
                reserve(host, port, f"{kind} streams").close()
        reserved = reserve(*self._config.http_address, "REST")
        self._stops.append(reserved.close)
        return reserved

    def _stream_address(self, kind: str) -> str:
        address: str = getattr(self._config, f"{kind}_stream_addr")
        return address

    async def stop(self) -> None:
        """Answers what is in hand, each part up to its deadline, then closes the store."""
        if self._reading is not None:
            self._reading.cancel()  # no exchange begins now
        if self._rest is not None:
            self._rest.stop()
        if self._shard is not None:
            self._shard.backups.stop()
        endings = [listener.stop(STREAMS_STOP_SECONDS) for listener in self._streams.values()]
        if self._http is not None:
            endings.append(self._http.stop(REST_STOP_SECONDS))
        await asyncio.gather(*endings)
        await self._stop_callbacks()
        if self._shard is not None and self._shard.ready:
            await self._drain(self._shard)
        for stop in reversed(self._stops):
            stop()
        self._stops.clear()
        if self._tracer is not None:
            self._tracer.close()

    def _open_shard(self) -> Shard:
        clock = self._clock
        runner = self._runner(clock)
        open_shard = Shard.open if self._tracer is None else self._tracer.open_shard
        try:
            self._shard = open_shard(shard_settings(self._config), clock, runner, self._fault)
        except BaseException:
            runner.stop()
            raise
        self._stops += [self._shard.close, runner.stop]  # undone backwards: the threads end first
        return self._shard

    async def _open_streams(
        self,
        kind: str,
        shard: Shard,
        auth: Auth,
        in_flight: InFlight,
        limits: Limits,
        identity: Identity | None,
    ) -> None:
        address = self._stream_address(kind)
        if not address:
            return
        listener = await grpc_server.start(
            *(shard, auth, self._config, kind, address),
            in_flight=in_flight,
            limits=limits,
            identity=identity,
        )
        self._streams[kind] = listener
        self._certificates.on_change[kind] = listener.exchange
        if self._metrics is not None:
            self._metrics.streams[kind] = listener.streams_of

    def _start_callbacks(self, shard: Shard, metrics: Metrics, limits: Limits) -> None:
        callbacks = self._callbacks = Callbacks(
            *(shard, self._config),
            count=metrics.count_callback,
            limits=limits,
            tracer=self._tracer,
        )
        self._stops.append(Notifier(shard, callbacks).stop)
        self._webhooks = Webhooks(shard, callbacks, self._config)
        if self._rest is not None:
            self._rest.overviews.webhooks = self._webhooks
        self._webhooks.start()

    async def _stop_callbacks(self) -> None:
        """What is on its way is cut off; its entry stays for the next start."""
        if self._webhooks is not None:
            await self._webhooks.stop()
        if self._callbacks is not None:
            await self._callbacks.stop()

    async def _drain(self, shard: Shard) -> None:
        drained = asyncio.get_running_loop().create_future()
        shard.drain(lambda: None if drained.done() else drained.set_result(None))
        done, _ = await asyncio.wait([drained], timeout=STORE_STOP_SECONDS)
        if not done:
            self._fault(f"the store did not finish its last commit within {STORE_STOP_SECONDS} s")


def _tracer(config: Config) -> Tracer | None:
    """What makes spans, if any are wanted. Raises ConfigError when it is not installed."""
    if not config.tracing_enabled:
        return None
    try:
        from codeq.server import tracing
    except ImportError:
        text = "needs OpenTelemetry, which is not installed (pip install 'codeq[otel]')"
        raise ConfigError("tracingEnabled", text) from None
    return tracing.from_config(config)


def check(config: Config) -> list[str]:
    """Looks at what a start would look at, and opens nothing; returns what it would warn of.
    Raises ConfigError for what would stop it."""
    warnings = _warnings(config)
    build_auth(config, Clock())
    if (tracer := _tracer(config)) is not None:
        tracer.close()
    asyncio.run(_identities(Certificates(config.tls)))
    return warnings


def _warnings(config: Config) -> list[str]:
    """What a start warns of. Raises ConfigError for what this release does not have."""
    stops, warns = unavailable_settings(config)
    if stops:
        raise ConfigError(*stops[0].split(": ", 1))
    if not config.persistence_config.fsync_on_commit:
        warns.append("fsyncOnCommit is off: a loss of power may take the last moments with it")
    if not config.webhook_hmac_secret.strip():
        warns.append("webhookHmacSecret is empty: webhooks are sent without a signature")
    return [*config.warnings, *warns]


async def _identities(certificates: Certificates) -> dict[str, Identity | None]:
    """The identity of each listener, known to be of use; raises ConfigError."""
    identities = certificates.read()
    for name, identity in identities.items():
        if identity is not None:
            await TRIALS[name](identity, name)
    return identities


def serve(config: Config) -> int:
    """Runs the server until SIGTERM or SIGINT; returns the exit code of the process.

    Prints one ``ready`` line on standard output when it serves. What keeps it from serving is one
    line on standard error.
    """
    logs.configure(config.log_level, config.log_format)
    try:
        return uvloop.run(_run(config, _warnings(config)))
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
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        # Without TLS; a node with it has a handler of its own
        hangup = stopping.set if os.isatty(0) else _nothing_to_read
        loop.add_signal_handler(signal.SIGHUP, hangup)
    sys.setswitchinterval(SWITCH_SECONDS)
    node = Node(config, _store_fault)
    ready = await node.start()
    _calm_garbage_collector()
    for warning in warnings:
        log.warning("%s", warning)
    print(ready, flush=True)
    log.info("%s", ready)
    await stopping.wait()
    log.info("stopping")
    await node.stop()
    log.info("stopped")
    return 0


def _nothing_to_read() -> None:
    log.info("SIGHUP: without TLS there is nothing to read again")


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
