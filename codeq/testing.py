"""A server for the tests of programs that use codeq: real, in this process, with a clock to move.

::

    async with codeq.testing.server() as server:
        async with codeq.Producer(server.producer, token=server.producer_token) as producer:
            await producer.produce("mail", {"to": "ann"}, delay_seconds=60)
        await server.clock.advance(60)  # now it is ready

``sync_server`` is the same for tests without an event loop, beside codeq.sync.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from codeq.client.background import Background, background
from codeq.config import DEV_PRODUCER, DEV_WORKER, Config, dev_config
from codeq.engine import clock as clocks
from codeq.errors import CodeqError
from codeq.server.app import LoopRunner, Node

__all__ = ["Clock", "Server", "SyncClock", "SyncServer", "server", "sync_server"]

ANY_PORT = "127.0.0.1:0"
ADDRESSES = {"http": "httpAddr", "producer": "producerStreamAddr", "worker": "workerStreamAddr"}
DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(ADDRESSES.values(), ANY_PORT),
    "limits.diskReserveBytes": 0,
    "persistenceConfig.fsyncOnCommit": False,  # no test loses power
    "webhooks.allowPrivateNetworks": True,  # the receiver of a test is here
}
#: Between so many timers the rest of the loop has its turn.
TIMERS_AT_ONCE = 1000


class _Runner(LoopRunner):
    """Timers go by the moves of the clock alone; what is under way is counted."""

    def __init__(self, clock: clocks.Clock) -> None:
        super().__init__(clock)
        self.timers = clocks.Timers()
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def run(self, work: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        super().run(work, self._counted(done))

    def read(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        super().read(work, self._counted(done))

    def aside(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        super().aside(work, self._counted(done))

    def soon(self, call: Callable[[], None]) -> None:
        super().soon(self._counted(call))

    def at(self, when_ms: int, call: Callable[[], None]) -> Callable[[], None]:
        cancel = self.timers.add(when_ms, call)
        if when_ms <= self._clock.now_ms():
            self.soon(self._overdue)
        return cancel

    async def idle(self) -> None:
        """Returns when nothing is under way."""
        if self._under_way:
            await self._idle.wait()

    def _overdue(self) -> None:
        while found := self.timers.due(self._clock.now_ms()):
            found[1]()

    def _counted(self, done: Callable[..., None]) -> Callable[..., None]:
        self._under_way += 1
        self._idle.clear()

        def call(*answer: Any) -> None:
            try:
                done(*answer)
            finally:
                self._under_way -= 1
                if not self._under_way:
                    self._idle.set()

        return call


class Clock:
    """The time of a server. It begins with that of the machine and stands still until it is moved:
    no lease ends and no delay is over by itself."""

    def __init__(self) -> None:
        seed = int.from_bytes(os.urandom(6), "little")
        self._clock = clocks.FakeClock(time.time_ns() // 1_000_000, seed)
        self._runner: _Runner | None = None

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return self._clock.now_ms()

    async def advance(self, seconds: float) -> None:
        """Moves the time on. Whatever comes due on the way is done at its time and in order: leases
        end, delays are over, retries of webhooks begin, ended tasks are removed. Returns when all
        of that is decided and kept. The server looks around in each of its seconds, so a way of
        days takes seconds of the test.

        Clients are not moved: a worker sends no heartbeats for a time that did not pass for it.
        """
        if seconds < 0:
            raise ValueError("the clock only goes forwards")
        clock, runner = self._clock, self._runner
        if runner is None:
            raise CodeqError("unavailable", "the server does not run")
        end_ms = clock.now_ms() + round(seconds * 1000)
        await runner.idle()
        steps = 0
        while found := runner.timers.due(end_ms):
            when_ms, call = found
            clock.advance(max(0, when_ms - clock.now_ms()))
            call()
            await runner.idle()
            steps += 1
            if steps % TIMERS_AT_ONCE == 0:
                await asyncio.sleep(0)
        clock.advance(end_ms - clock.now_ms())

    def _run(self, clock: clocks.Clock) -> _Runner:
        self._runner = _Runner(clock)
        return self._runner


class Server:
    """A running server. ``http``, ``producer`` and ``worker`` are HOST:PORT of its listeners,
    ``url`` is that of REST; ``producer_token`` (also an admin's) and ``worker_token`` are of the
    tenant ``dev``."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.clock = Clock()
        self.http = self.producer = self.worker = ANY_PORT
        self.producer_token = str(DEV_PRODUCER["token"])
        self.worker_token = str(DEV_WORKER["token"])
        self._settings = {**DEFAULTS, "persistenceConfig.path": str(folder), **settings}
        self._node: Node | None = None
        self._faults: list[str] = []

    @property
    def url(self) -> str:
        """Of REST, for a Client."""
        return f"http://{self.http}"

    async def restart(self) -> None:
        """Stops the server in order and starts it again with its data, at the same addresses and
        the same time."""
        await self.stop()
        await self.start()

    async def start(self) -> None:
        """Opens the store and the listeners."""
        self._node = Node(self._config(), self._faults.append, self.clock._clock, self.clock._run)
        await self._node.start()
        at = self._node.addresses
        self.http, self.producer, self.worker = at["http"], at["producer"], at["worker"]

    async def stop(self) -> None:
        """Ends the server. Raises CodeqError ``internal`` when its store failed."""
        node, self._node, self.clock._runner = self._node, None, None
        if node is not None:
            await node.stop()
        if self._faults:
            raise CodeqError("internal", self._faults[0])

    def _config(self) -> Config:
        at = {
            key: getattr(self, name)
            for name, key in ADDRESSES.items()
            if getattr(self, name) not in (ANY_PORT, "off")
        }
        return dev_config(flags={**self._settings, **at})


@asynccontextmanager
async def server(
    settings: Mapping[str, Any] | None = None, data: Path | None = None
) -> AsyncIterator[Server]:
    """A server in the running event loop, on free ports of 127.0.0.1, as ``codeq serve --dev``.

    ``settings`` are those of the settings file by dotted key, e.g. ``{"backoffBaseSeconds": 1}``.
    They win over the defaults of such a server: nothing is synced, and webhooks may go to this
    machine. The tasks are in a folder that is removed in the end, or stay in ``data``. Raises
    ConfigError for a setting that is not one.
    """
    with TemporaryDirectory(prefix="codeq-") as folder:
        running = Server(data or Path(folder), settings or {})
        await running.start()
        try:
            yield running
        finally:
            await running.stop()


class SyncClock:
    """The time of a server for tests without an event loop."""

    def __init__(self, clock: Clock, there: Background) -> None:
        self._clock = clock
        self._background = there

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return self._clock.now_ms()

    def advance(self, seconds: float) -> None:
        """Moves the time on, as ``Clock.advance`` does."""
        self._background.call(lambda: self._clock.advance(seconds))


class SyncServer:
    """A running server for tests without an event loop: a Server whose methods block."""

    def __init__(self, inner: Server, there: Background) -> None:
        self._inner = inner
        self._background = there
        self.clock = SyncClock(inner.clock, there)
        self.http, self.producer, self.worker = inner.http, inner.producer, inner.worker
        self.producer_token, self.worker_token = inner.producer_token, inner.worker_token
        self.url = inner.url

    def restart(self) -> None:
        """Stops the server in order and starts it again with its data, at the same addresses and
        the same time."""
        self._background.call(self._inner.restart)


@contextmanager
def sync_server(
    settings: Mapping[str, Any] | None = None, data: Path | None = None
) -> Iterator[SyncServer]:
    """As ``server``, on the event loop of codeq.sync: for tests without one."""
    there = background()
    opened = server(settings, data)
    running = there.call(opened.__aenter__)
    try:
        yield SyncServer(running, there)
    finally:
        there.call(lambda: opened.__aexit__(None, None, None))
