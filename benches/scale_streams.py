"""A real server with thousands of idle worker streams, each with several waiting Readys.

Used by benches/scale.py.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import uvloop

from benches.scale_node import Figure, resident_bytes, say
from tests.conftest import PREFIX, Server, dev_arguments, waiting_claims
from tests.protos import workerpb

STREAMS_PER_CONNECTION = 100
OPENING_MAX = 100  # streams being opened at a time
PROBES = 20


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def idle_streams(folder: Path, streams: int, readys: int, seconds: float) -> list[Figure]:
    """Opens ``streams`` with ``readys`` waiting Readys each, and leaves them alone for a while."""
    settings = {"LIMITS_DISK_RESERVE_BYTES": "0", "LIMITS_CONNECTIONS": str(streams + 100)}
    server = Server(folder, dev_arguments(folder), settings)
    try:
        return uvloop.run(_idle_streams(server, streams, readys, seconds))
    finally:
        server.close()


async def _idle_streams(server: Server, streams: int, readys: int, seconds: float) -> list[Figure]:
    async with AsyncExitStack() as stack:
        before, began = resident_bytes(server.pid), time.perf_counter()
        lines = await _open_all(stack, server, streams, readys)
        while waiting_claims(server) < streams * readys:
            await asyncio.sleep(0)
        opened_s = time.perf_counter() - began
        memory = resident_bytes(server.pid) - before
        say(f"{streams:,} streams with {readys} Readys each wait")
        quiet = asyncio.create_task(lines[0].read())  # nothing comes
        used = cpu_s(server.pid)
        await asyncio.wait([quiet], timeout=seconds)
        used = cpu_s(server.pid) - used
        assert not quiet.done()
        delays = [await _probe(server, lines, number) for number in range(1, PROBES)]
        for line in lines:
            line.cancel()
    return [
        Figure("streams opened, each with its Readys", streams / opened_s, "/s"),
        Figure("memory of the server per stream with its Readys", memory / streams, "B"),
        Figure("CPU of the idle server", used / seconds * 100, "%"),
        Figure("one task to one of them, POST to delivery", sorted(delays)[len(delays) // 2], "ms"),
    ]


async def _open_all(stack: AsyncExitStack, server: Server, streams: int, readys: int) -> list[Any]:
    gate = asyncio.Semaphore(OPENING_MAX)
    channels = []
    for _ in range(0, streams, STREAMS_PER_CONNECTION):
        options = [("grpc.use_local_subchannel_pool", 1)]  # else all share one connection
        channel = grpc.aio.insecure_channel(server.worker, options=options)
        channels.append(await stack.enter_async_context(channel))

    async def one(number: int) -> Any:
        async with gate:
            return await _open(channels[number // STREAMS_PER_CONNECTION], number, readys)

    return list(await asyncio.gather(*map(one, range(streams))))


async def _open(channel: grpc.aio.Channel, number: int, readys: int) -> Any:
    call: Any = channel.stream_stream(
        "/workerpb.WorkerStream/Stream",
        request_serializer=workerpb.WorkerEvent.SerializeToString,
        response_deserializer=workerpb.ServerEvent.FromString,
    )()
    await call.write(workerpb.WorkerEvent(hello={"token": "dev-worker"}))
    assert (await call.read()).HasField("hello_ack")
    for slot in range(readys):
        await call.write(workerpb.WorkerEvent(ready={"commands": [f"idle-{number}-{slot}"]}))
    return call


async def _probe(server: Server, lines: list[Any], number: int) -> float:
    """Milliseconds from a create to its delivery to the one stream that waits for it."""
    at = number * (len(lines) - 1) // PROBES + 1 if len(lines) > 1 else 0
    async with httpx.AsyncClient(headers={"authorization": "Bearer dev-producer"}) as client:
        url = f"http://{server.http}{PREFIX}/tasks"
        began = time.perf_counter()
        await client.post(url, json={"command": f"idle-{at}-0", "payload": number})
        task = (await lines[at].read()).task.task
        took_ms = (time.perf_counter() - began) * 1e3
    assert task.command == f"idle-{at}-0"
    await lines[at].write(workerpb.WorkerEvent(ready={"commands": [task.command]}))
    return took_ms
