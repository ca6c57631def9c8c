"""A server of the two streams that a test plays by hand, in the generated protobuf classes.

It keeps nothing: the test reads what the client said and answers it, or breaks the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from .protos import producerpb, workerpb

WAIT_SECONDS = 20.0


class Peer:
    """One stream, seen from the server."""

    def __init__(self, context: Any, event: Any, server_event: Any) -> None:
        self._context = context
        self._event = event
        self._server_event = server_event
        self._over = asyncio.Event()

    async def heard(self) -> Any:
        """The next event of the client, or None when it has half-closed or gone."""
        async with asyncio.timeout(WAIT_SECONDS):
            message = await self._context.read()
        return None if message is grpc.aio.EOF else self._event.FromString(message)

    async def say(self, **members: Any) -> None:
        await self._context.write(self._server_event(**members).SerializeToString())

    def end(self, code: grpc.StatusCode = grpc.StatusCode.OK, text: str = "") -> None:
        if code is not grpc.StatusCode.OK:
            self._context.set_code(code)
            self._context.set_details(text)
        self._over.set()

    async def over(self) -> None:
        await self._over.wait()


class FakeStreams:
    """``address`` of the server; ``peer()`` is the next stream that a client opened."""

    def __init__(self) -> None:
        self.address = ""
        self._peers: asyncio.Queue[Peer] = asyncio.Queue()

    async def peer(self) -> Peer:
        async with asyncio.timeout(WAIT_SECONDS):
            return await self._peers.get()

    async def producer(self) -> Peer:
        """The next stream, greeted as a producer's."""
        peer = await self.peer()
        assert (await peer.heard()).HasField("hello")
        await peer.say(hello_ack={"tenant_id": "t", "subject": "s"})
        return peer

    async def worker(self) -> Peer:
        """The next stream, greeted as a worker's."""
        peer = await self.peer()
        assert (await peer.heard()).HasField("hello")
        await peer.say(hello_ack={"worker_id": "w", "tenant_id": "t"})
        return peer

    def handler(self, event: Any, server_event: Any) -> Any:
        async def stream(_: object, context: Any) -> None:
            peer = Peer(context, event, server_event)
            await self._peers.put(peer)
            await peer.over()

        return grpc.stream_stream_rpc_method_handler(stream)


@asynccontextmanager
async def fake_streams() -> AsyncIterator[FakeStreams]:
    fake = FakeStreams()
    server = grpc.aio.server()
    for service, module, event in (
        ("producerpb.ProducerStream", producerpb, "ProducerEvent"),
        ("workerpb.WorkerStream", workerpb, "WorkerEvent"),
    ):
        handler = fake.handler(getattr(module, event), module.ServerEvent)
        methods = {"Stream": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(0)


# --- for the tests that play it

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
spawn = asyncio.create_task


def play(scenario: Callable[[FakeStreams], Awaitable[None]]) -> None:
    """Runs a scenario with a fake server; no wait is for ever, and no batch is sent in parts
    because the machine was busy with other things."""

    async def run() -> None:
        async with asyncio.timeout(60), fake_streams() as fake:
            await scenario(fake)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codeq.client.worker.SLICE_SECONDS", 60.0)
        asyncio.run(run())


def task_id(number: int) -> str:
    return f"0197c9c2-8f00-7000-8000-{number:012d}"


async def ended(ending: Awaitable[Any], peer: Peer) -> None:
    """Waits for a close or a stopped run; the server ends the stream after the half-close."""
    waiting = asyncio.ensure_future(ending)
    while await peer.heard() is not None:
        pass
    peer.end()
    await waiting
