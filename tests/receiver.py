"""What webhooks and callbacks are sent to in tests: a real HTTP server, and a node that sends."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from codeq.config import Config, load
from codeq.engine._wire import Creates, Finishes
from codeq.engine.clock import FakeClock
from codeq.engine.shard import ClaimRequest, Delivery, Shard
from codeq.server.app import LoopRunner, shard_settings
from codeq.server.auth import Auth
from codeq.server.callbacks import Callbacks, Lookup
from codeq.server.limits import Limits
from codeq.server.metrics import Metrics
from codeq.server.rest import RestApp
from codeq.server.streams import InFlight
from codeq.server.subscriptions import Notifier
from codeq.server.webhooks import Webhooks

from .conftest import Tokens
from .manual_runner import ManualRunner

SECONDS = 20


class Got:
    """One request as it came."""

    def __init__(self, line: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, _ = line.split(" ")
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Receiver:
    """Answers each POST with ``status`` and ``headers``; with None it never answers."""

    def __init__(self) -> None:
        self.status: int | None = 200
        self.headers: dict[str, str] = {}
        self.got: asyncio.Queue[Got] = asyncio.Queue()
        self.all: list[Got] = []
        self.open = 0
        self.open_max = 0
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    def url(self, path: str = "/hook", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def next(self) -> Got:
        """The next request; fails the test when none comes."""
        return await asyncio.wait_for(self.got.get(), SECONDS)

    async def take(self, count: int) -> list[Got]:
        return [await self.next() for _ in range(count)]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *rest = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (one.split(": ", 1) for one in rest)}
        got = Got(line, headers, await reader.readexactly(int(headers.get("content-length", 0))))
        self.all.append(got)
        self.open += 1
        self.open_max = max(self.open, self.open_max)
        self.got.put_nowait(got)
        try:
            if self.status is None:
                await reader.read()  # until the client has had enough
                return False
            more = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
            writer.write(f"HTTP/1.1 {self.status} X\r\ncontent-length: 0\r\n{more}\r\n".encode())
            await writer.drain()
            return True
        finally:
            self.open -= 1

    async def close(self) -> None:
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.close()


class SteppedRunner(LoopRunner):
    """Real helper threads, and timers that follow a fake clock."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self._stepped = ManualRunner(clock)

    def at(self, when_ms: int, call: Callable[[], None]) -> Callable[[], None]:
        return self._stepped.at(when_ms, call)

    def advance(self, ms: int) -> None:
        self._stepped.advance(ms)

    @property
    def timers(self) -> list[int]:
        """When the timers are due that nobody cancelled."""
        return self._stepped.timers.times_ms()


class Sender:
    """A shard with everything that sends, under a fake clock, inside the test's loop."""

    def __init__(
        self,
        config: Config,
        clock: FakeClock,
        *,
        lookup: Lookup | None = None,
        tokens: Tokens | None = None,
        **window: int,
    ) -> None:
        self.clock = clock
        self.runner = SteppedRunner(clock)
        self.faults: list[str] = []
        self.shard = Shard.open(shard_settings(config), clock, self.runner, self.faults.append)
        limits = Limits(config.rate_limit, clock)
        self.metrics = Metrics(self.shard, limits)
        known = tokens or Tokens()
        in_flight = InFlight(config.limits.inflight_bytes)
        self.app = RestApp(self.shard, Auth(known, known), config, self.metrics, in_flight, limits)
        self.callbacks = Callbacks(
            self.shard,
            config,
            count=self.metrics.count_callback,
            limits=limits,
            lookup=lookup,
        )
        self.notifier = Notifier(self.shard, self.callbacks)
        self.webhooks = Webhooks(self.shard, self.callbacks, config, **window)
        self.app.overviews.webhooks = self.webhooks
        self.webhooks.start()

    async def close(self) -> None:
        await self.webhooks.stop()
        await self.callbacks.stop()
        await self.drained()
        self.runner.stop()
        self.shard.close()
        assert not self.faults

    async def drained(self) -> None:
        """Until everything decided so far is on disk."""
        await self.call(self.shard.drain)

    async def call(self, operation: Callable[..., Any]) -> Any:
        """The value that an operation hands to its callback."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        operation(lambda *values: answer.set_result(values[0] if values else None))
        return await asyncio.wait_for(answer, SECONDS)

    async def create(
        self, *urls: str, command: str = "job", tenant: str = "t", **fields: Any
    ) -> list[str]:
        creates = Creates()
        for url in urls:
            creates.add(command.encode(), b"{}", webhook=url.encode(), **fields)
        await self.call(lambda done: self.shard.create(creates, tenant, done))
        assert not any(creates.codes), creates.codes
        return [creates.task_id(index) for index in range(len(creates))]

    async def claim(self, count: int = 1, command: str = "job", tenant: str = "t") -> list[Any]:
        delivery: Delivery | None = await self.call(
            lambda done: self.shard.claim(
                ClaimRequest(
                    tenant, (command.encode(),), True, "w", "s", count, 60_000, 1 << 30, False, done
                )
            )
        )
        assert delivery is not None
        views = delivery.views()
        delivery.accepted()
        return views

    async def finish(self, *ids: str, tenant: str = "t", **fields: Any) -> None:
        finishes = Finishes()
        status = fields.pop("status", b"COMPLETED")
        for task_id in ids:
            finishes.add(task_id.encode(), status, **fields)
        finishes.check(1 << 22, lenient_error=True)
        await self.call(lambda done: self.shard.finish(finishes, tenant, "w", "s", done))
        assert not any(finishes.codes), finishes.codes

    async def end(self, *urls: str, tenant: str = "t", **fields: Any) -> list[str]:
        """Tasks with these webhooks that have come to their end."""
        ids = await self.create(*urls, tenant=tenant)
        await self.claim(len(urls), tenant=tenant)
        await self.finish(*ids, tenant=tenant, **fields)
        return ids

    async def until(self, holds: Callable[[], bool]) -> None:
        """Until something holds that only the loop and the helper threads can bring about."""
        loop = asyncio.get_running_loop()
        end = loop.time() + SECONDS
        while not holds():
            assert loop.time() < end, "it did not come about"
            await self.drained()

    def metric(self, name: str, **labels: str) -> float:
        """A value of the scrape; 0 when it is not there."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in self.metrics.scrape().decode().splitlines():
            if line.startswith(name) and all(one in line for one in wanted):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


def settings(folder: Path, **flags: Any) -> Config:
    """Settings of a sender that may reach this machine; dots of keys are written ``__``."""
    defaults = {
        "limits.diskReserveBytes": 0,
        "persistenceConfig.path": str(folder / "data"),
        "webhooks.allowPrivateNetworks": True,
    }
    return load(flags={**defaults, **{key.replace("__", "."): v for key, v in flags.items()}})


@asynccontextmanager
async def sender(
    folder: Path,
    clock: FakeClock | None = None,
    *,
    lookup: Lookup | None = None,
    tokens: Tokens | None = None,
    window: dict[str, int] | None = None,
    **flags: Any,
) -> AsyncIterator[Sender]:
    config = settings(folder, **flags)
    made = Sender(
        config,
        clock or FakeClock(),
        lookup=lookup,
        tokens=tokens,
        **(window or {}),
    )
    try:
        yield made
    finally:
        await made.close()


def names(**addresses: list[str]) -> Lookup:
    """A name service that knows these names (``_`` for a dot); ``asked`` counts."""

    def lookup(host: str, port: int) -> list[tuple[Any, ...]]:
        found = addresses[host.replace(".", "_")]
        return [
            (
                socket.AF_INET6 if ":" in address else socket.AF_INET,
                socket.SOCK_STREAM,
                socket.IPPROTO_TCP,
                "",
                (address, port, 0, 0) if ":" in address else (address, port),
            )
            for address in found
        ]

    return lookup
