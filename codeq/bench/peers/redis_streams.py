"""A task queue on Redis streams as people write it: XADD, a consumer group, the result kept in a
hash, the entry acknowledged and removed; pipelined in batches of its own best size. It has no
priorities, no leases with an end and no attempts.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import redis.asyncio as redis

from codeq.bench.client import Client
from codeq.bench.plan import WINDOW, Role, Surface
from codeq.bench.target import Counters, processes_cpu_seconds, processes_written_bytes
from codeq.errors import CodeqError

NAME = "redis-streams"
BATCH, CALLS = 1000, 4
GROUP = "workers"
START_SECONDS = 30
WAIT_MS = 1000


def surface() -> Surface:
    """The best batching that was found for it."""
    make = Role("redis-produce", BATCH, CALLS, window=WINDOW * BATCH * CALLS)
    return Surface(NAME, make, Role("redis-work", BATCH, CALLS))


def results_of(command: str) -> str:
    return f"{command}:results"


class Server:
    """A server of its own behind a socket in a folder."""

    def __init__(self, socket: Path, pid: int) -> None:
        self.socket = socket
        self.pid = pid

    def address_of(self, _: Role) -> tuple[str, str]:
        return str(self.socket), ""

    async def syncs(self) -> int:
        return 0  # it does not say

    async def counters(self, command: str) -> Counters:
        client = connect(str(self.socket))
        completed = await client.hlen(results_of(command))
        waiting = await client.xlen(command)
        await client.aclose()
        return Counters(completed + waiting, completed, completed)

    def cpu_seconds(self) -> float | None:
        return processes_cpu_seconds(self.pid)

    def written_bytes(self) -> int | None:
        return processes_written_bytes(self.pid)


def connect(socket: str) -> Any:
    return redis.Redis(unix_socket_path=socket)


@contextlib.asynccontextmanager
async def serve(folder: Path, *, sync: bool) -> AsyncIterator[Server]:
    """A fresh server; ``sync``: appendfsync always instead of everysec."""
    program = shutil.which("redis-server")
    if program is None:
        raise CodeqError("validation-error", f"--peer {NAME} needs redis-server on the PATH")
    socket = folder / "redis.sock"
    words = {"port": "0", "unixsocket": str(socket), "dir": str(folder), "save": "",
             "appendonly": "yes", "appendfsync": "always" if sync else "everysec"}  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *(program, *(word for name, value in words.items() for word in (f"--{name}", value))),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        client = connect(str(socket))
        async with asyncio.timeout(START_SECONDS):
            while True:
                try:
                    await client.ping()
                    break
                except (OSError, redis.RedisError):
                    await asyncio.sleep(0.02)
        await client.aclose()
        yield Server(socket, process.pid)
    finally:
        process.kill()
        await process.wait()


class Creates:
    """One pipeline a batch."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def play(self, ready: Callable[[], None]) -> None:
        role = self._client.role
        connections = [connect(role.address) for _ in range(role.calls)]
        ready()
        await asyncio.gather(*(self._loop(connection) for connection in connections))
        for connection in connections:
            await connection.aclose()

    async def _loop(self, connection: Any) -> None:
        client, role = self._client, self._client.role
        async for due_ns in client.calls():
            pipeline = connection.pipeline(transaction=False)
            for _ in range(role.batch):
                pipeline.xadd(role.command, {"p": msgspec.json.encode(client.payload(due_ns))})
            await pipeline.execute()
            client.acknowledged(due_ns, role.batch, 0)


class Claims:
    """Reads a batch for its consumer, handles it; results, acknowledgements and removals go in one
    pipeline."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._delivered = self._acknowledged = 0

    async def play(self, ready: Callable[[], None]) -> None:
        role = self._client.role
        connections = [connect(role.address) for _ in range(role.calls)]
        with contextlib.suppress(redis.ResponseError):  # it is there already
            await connections[0].xgroup_create(role.command, GROUP, id="0", mkstream=True)
        working = [
            asyncio.ensure_future(self._loop(connection, f"worker-{number}"))
            for number, connection in enumerate(connections)
        ]
        ready()
        await self._client.drained()
        for task in working:
            task.cancel()
        await asyncio.wait(working)
        for connection in connections:
            await connection.aclose()

    async def _loop(self, connection: Any, worker: str) -> None:
        client, role = self._client, self._client.role
        for _ in range(sys.maxsize):
            found = await connection.xreadgroup(
                GROUP, worker, {role.command: ">"}, count=role.batch, block=WAIT_MS
            )
            for _, entries in found or ():
                self._delivered += len(entries)
                await self._finish(connection, entries)
                self._acknowledged += len(entries)
                client.worked(self._delivered, self._delivered, self._acknowledged)

    async def _finish(self, connection: Any, entries: list[Any]) -> None:
        client, command = self._client, self._client.role.command
        results = {
            number: msgspec.json.encode(client.handle(msgspec.json.decode(fields[b"p"])))
            for number, fields in entries
        }
        pipeline = connection.pipeline(transaction=False)
        pipeline.hset(results_of(command), mapping=results)
        pipeline.xack(command, GROUP, *results)
        pipeline.xdel(command, *results)
        await pipeline.execute()
