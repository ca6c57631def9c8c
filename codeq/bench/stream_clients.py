"""The stream roles of the load bench, over the public Producer and Worker."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from codeq.bench.client import PUBLISH_SECONDS, Client
from codeq.client import Producer, Task, Worker
from codeq.errors import CodeqError


class StreamCreates:
    """Makes tasks."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def play(self, ready: Callable[[], None]) -> None:
        client, role = self._client, self._client.role
        async with contextlib.AsyncExitStack() as stack:
            producers = [
                await stack.enter_async_context(
                    Producer(
                        role.address, token=role.token, merge=role.merge, make_keys=role.make_keys
                    )
                )
                for _ in range(role.streams)
            ]
            ready()
            if role.per_second:
                turns = iter(range(sys.maxsize))
                await client.schedule(
                    lambda due_ns: self._call(producers[next(turns) % role.streams], due_ns)
                )
            else:
                loops = (self._loop(producers[n % role.streams]) for n in range(role.calls))
                await asyncio.gather(*loops)

    async def _loop(self, producer: Producer) -> None:
        async for due_ns in self._client.calls():
            await self._call(producer, due_ns)

    async def _call(self, producer: Producer, due_ns: int) -> None:
        client, role = self._client, self._client.role
        if role.batch == 1:
            try:
                await producer.produce(client.command(), client.payload(due_ns))
            except CodeqError:
                client.acknowledged(due_ns, 0, 1)
            else:
                client.acknowledged(due_ns, 1, 0)
            return
        if role.queues == 1:
            tasks = [(role.command, client.payload(due_ns)) for _ in range(role.batch)]
        else:
            tasks = [(client.command(), client.payload(due_ns)) for _ in range(role.batch)]
        results = await producer.produce_batch(tasks)
        refused = len(results) - list(map(type, results)).count(str)
        client.acknowledged(due_ns, len(results) - refused, refused)


class StreamClaims:
    """Works on tasks."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def play(self, ready: Callable[[], None]) -> None:
        client, role = self._client, self._client.role
        workers = [
            Worker(
                role.address,
                token=role.token,
                commands=[role.command] if role.queues == 1 else [],
                concurrency=role.calls // role.streams,
                batch=role.batch,
                merge=role.merge,
            )
            for _ in range(role.streams)
        ]
        running = asyncio.gather(*(worker.run(self._handle) for worker in workers))
        publishing = asyncio.ensure_future(self._publish(workers))
        ready()
        try:
            await client.drained()
            for worker in workers:
                worker.stop()
            await running
        finally:
            publishing.cancel()
            self._count(workers)

    def _handle(self, task: Task) -> dict[str, Any]:
        return self._client.handle(task.json())

    async def _publish(self, workers: list[Worker]) -> None:
        while True:
            self._count(workers)
            await asyncio.sleep(PUBLISH_SECONDS)

    def _count(self, workers: list[Worker]) -> None:
        counts = [worker.counts for worker in workers]
        self._client.worked(
            sum(c.delivered for c in counts),
            sum(c.finished for c in counts),
            sum(c.acknowledged for c in counts),
        )
        self._client.refused = sum(c.refused for c in counts)
