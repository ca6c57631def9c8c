"""The client processes of the load bench: each plays one role until its standard input ends.

Run as ``python -m codeq.bench.clients``, told its role on the first line of standard input. What it
counts stands in a file that all processes share, so that producers can wait for workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from codeq.client import NewTask, Producer, Task, Worker
from codeq.errors import CodeqError

PUBLISH_SECONDS = 0.02
FILL = "x" * 145
CREATED, DELIVERED, FINISHED, ACKNOWLEDGED = COLUMNS = range(4)


class Role(msgspec.Struct):
    """What a client process is told. ``flights``: calls, connections or Readys in flight, spread
    over ``streams``."""

    kind: str  # produce, work, rest
    address: str
    token: str
    command: str
    tally: str
    slot: int
    batch: int = 1
    flights: int = 1
    streams: int = 1
    merge: bool = True
    window: int = 0  # lives that may be open at a time
    per_second: float = 0.0  # paced, or 0 = as fast as it goes


class Tally:
    """Four counters (created, delivered, finished, acknowledged) for each process."""

    def __init__(self, path: Path, slots: int) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * len(COLUMNS) * slots))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._cells = memoryview(self._map).cast("Q")

    def put(self, slot: int, column: int, value: int) -> None:
        self._cells[slot * len(COLUMNS) + column] = value

    def total(self, column: int) -> int:
        return sum(self._cells[column :: len(COLUMNS)])


def payload_of(role: Role, number: int) -> dict[str, Any]:
    """About 200 bytes of JSON, built anew for each task, as a program would."""
    sent = time.monotonic_ns() if role.per_second else 0
    return {"sent": sent, "n": number, "to": "a@b.example", "text": FILL}


def result_of(payload: dict[str, Any]) -> dict[str, Any]:
    """About 40 bytes of JSON."""
    return {"n": payload["n"], "done": "with pleasure"}


class Client:
    """One role at work."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.tally = Tally(Path(role.tally), 0)
        self.created = 0
        self.refused = 0
        self.ending = False  # what fails from now on was cut off, not refused
        self.deliveries: list[tuple[int, int]] = []  # (when, after how long), ns

    def payload(self) -> dict[str, Any]:
        return payload_of(self.role, self.created)

    def handle(self, task: Task) -> dict[str, Any]:
        payload = task.json()
        if self.role.per_second:
            now = time.monotonic_ns()
            self.deliveries.append((now, now - payload["sent"]))
        return result_of(payload)

    async def room(self) -> None:
        """Waits while too many lives are open."""
        while self.created - self.tally.total(ACKNOWLEDGED) > self.role.window:
            await asyncio.sleep(0.001)

    def publish(self) -> None:
        self.tally.put(self.role.slot, CREATED, self.created)

    # --- roles

    async def produce(self) -> None:
        role = self.role
        async with contextlib.AsyncExitStack() as stack:
            producers = [
                await stack.enter_async_context(
                    Producer(role.address, token=role.token, merge=role.merge)
                )
                for _ in range(role.streams)
            ]
            ready()
            play = self._singles if role.batch == 1 else self._batches
            if role.per_second:
                play = self._paced
            await asyncio.gather(
                *(play(producers[flight % role.streams]) for flight in range(role.flights))
            )

    async def _batches(self, producer: Producer) -> None:
        command = self.role.command
        while True:
            await self.room()
            tasks = [NewTask(command, self.payload()) for _ in range(self.role.batch)]
            results = await producer.produce_batch(tasks)
            refused = sum(isinstance(result, CodeqError) for result in results)
            self.refused += refused
            self.created += len(results) - refused
            self.publish()

    async def _singles(self, producer: Producer) -> None:
        while True:
            await self.room()
            await self._one(producer)

    async def _one(self, producer: Producer) -> None:
        try:
            await producer.produce(self.role.command, self.payload())
        except CodeqError:
            self.refused += not self.ending
        else:
            self.created += 1
            self.publish()

    async def _paced(self, producer: Producer) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        calls = set()
        for number in range(sys.maxsize):
            await asyncio.sleep(max(0.0, start + number / self.role.per_second - loop.time()))
            call = asyncio.create_task(self._one(producer))
            calls.add(call)
            call.add_done_callback(calls.discard)

    async def work(self) -> None:
        role = self.role
        workers = [
            Worker(
                role.address,
                token=role.token,
                commands=[role.command],
                concurrency=role.flights // role.streams,
                batch=role.batch,
                merge=role.merge,
            )
            for _ in range(role.streams)
        ]
        running = asyncio.gather(*(worker.run(self.handle) for worker in workers))
        ready()
        try:
            while not running.done():
                counts = [worker.counts for worker in workers]
                self.tally.put(role.slot, DELIVERED, sum(c.delivered for c in counts))
                self.tally.put(role.slot, FINISHED, sum(c.finished for c in counts))
                self.tally.put(role.slot, ACKNOWLEDGED, sum(c.acknowledged for c in counts))
                self.refused = sum(c.refused for c in counts)
                await asyncio.sleep(PUBLISH_SECONDS)
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def rest(self) -> None:
        host, _, port = self.role.address.rpartition(":")
        connections = [
            await asyncio.open_connection(host, int(port)) for _ in range(self.role.flights)
        ]
        ready()
        await asyncio.gather(*(self._posts(*connection) for connection in connections))

    async def _posts(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        role = self.role
        path = "/v1/codeq/tasks" if role.batch == 1 else "/v1/codeq/tasks/batch"
        head = f"POST {path} HTTP/1.1\r\nHost: {role.address}\r\nAuthorization: Bearer {role.token}"
        while True:
            tasks = [
                {"command": role.command, "payload": self.payload()} for _ in range(role.batch)
            ]
            body = msgspec.json.encode(tasks[0] if role.batch == 1 else tasks)
            writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = answer.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            if answer[9:12] in (b"200", b"201", b"202"):
                self.created += role.batch
                self.publish()
            else:
                self.refused += role.batch


def ready() -> None:
    print("ready", flush=True)


async def play(role: Role) -> None:
    """Plays the role until standard input ends, then prints what it saw."""
    client = Client(role)
    roles: dict[str, Callable[[], Awaitable[None]]] = {
        "produce": client.produce,
        "work": client.work,
        "rest": client.rest,
    }
    playing = asyncio.ensure_future(roles[role.kind]())
    loop = asyncio.get_running_loop()

    def end(_: object) -> None:
        client.ending = True
        playing.cancel()

    loop.run_in_executor(None, sys.stdin.buffer.read).add_done_callback(end)
    try:
        await playing
    except asyncio.CancelledError:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        report = {
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "refused": client.refused,
            "deliveries": client.deliveries,
        }
        print(msgspec.json.encode(report).decode(), flush=True)


if __name__ == "__main__":
    uvloop.run(play(msgspec.json.decode(sys.stdin.buffer.readline(), type=Role)))
