"""The engine room of one node at scale: waiting tasks, queues, parked claims, leases that end
together.

Engine, journal and store without edges, every group synced. Used by benches/scale.py.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from codeq.engine._wire import Creates
from codeq.engine.clock import Clock, FakeClock
from codeq.engine.shard import ClaimRequest, Delivery, Shard, ShardSettings
from codeq.server.app import LoopRunner
from tests.conftest import dev_arguments, launch
from tests.node import Node

BATCH = 1000
ROUNDS = 5
TOGETHER = 100  # claims of one task in a commit group
PAYLOAD = b'{"to": "somebody@example.com", "body": "' + b"x" * 159 + b'"}'
BYTES_MAX = 4 << 20
PAGE_BYTES = 4096
TENANT, TENANT_BYTES = "t", b"t"
LEASES_SECONDS_MAX = 120


class Figure(NamedTuple):
    """One line of the table."""

    what: str
    value: float
    unit: str


def resident_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def node_in(folder: Path) -> Node:
    return Node(folder / "data", FakeClock(Clock().now_ms()), retention_seconds=1)


def batch_of(commands: Iterable[str]) -> Creates:
    creates = Creates()
    for command in commands:
        creates.add(command.encode(), PAYLOAD)
    return creates


def fill(node: Node, count: int, command: Callable[[int], str]) -> float:
    """Makes tasks, the n-th for ``command(n)``; returns how many per second."""
    began = time.perf_counter()
    for done in range(0, count, BATCH):
        numbers = range(done, min(done + BATCH, count))
        node.shard.create(batch_of(map(command, numbers)), TENANT, lambda _: None)
        node.settle()
        node.advance(1)
        if done and done % 1_000_000 == 0:
            say(f"{done:,} tasks made")
    return count / (time.perf_counter() - began)


def claims_per_s(
    node: Node, commands: tuple[str, ...] | None, count: int, batch: int, together: int = 1
) -> float:
    """Claims ``count`` tasks and gives nothing back: ``batch`` at a time, so many claims
    together."""
    began = time.perf_counter()
    for _ in range(0, count, batch * together):  # a whole number of groups
        got: list[Any] = []
        for _ in range(together):
            node.shard.claim(node.request(got.append, commands, count=batch, bytes_max=BYTES_MAX))
        node.settle()
        for delivery in got:
            delivery.encode(batch == 1)
            delivery.accepted()
    return count / (time.perf_counter() - began)


# --- waiting tasks


def waiting_tasks(folder: Path, count: int) -> list[Figure]:
    """Memory and speed with so many tasks in one queue, and the way back after a stop."""
    node = node_in(folder)
    engine = node.shard.engine
    before = resident_bytes()
    half = count // 2
    fill(node, half, lambda _: "deep")
    held_by_half = resident_bytes() - before - engine.body_bytes
    created_per_s = fill(node, count - half, lambda _: "deep")
    held = resident_bytes() - before - engine.body_bytes
    payloads = engine.body_bytes
    claimed = min(50 * BATCH, count // (2 * ROUNDS))
    batch = min(BATCH, claimed)
    deep, empty = [], []
    for _ in range(ROUNDS):
        fill(node, claimed, lambda _: "short")
        empty.append(claims_per_s(node, ("short",), claimed, batch))
        deep.append(claims_per_s(node, ("deep",), claimed, batch))
    node.close()
    return [
        Figure("creates, payloads of 200 B", created_per_s, "/s"),
        Figure("memory per further waiting task", (held - held_by_half) / (count - half), "B"),
        Figure("memory for all of them, write buffers included", held / 1e6, "MB"),
        Figure("payloads in memory beside that", payloads / 1e6, "MB"),
        Figure("claims from the deep queue", statistics.median(deep), "/s"),
        Figure("claims from a short queue", statistics.median(empty), "/s"),
        *start_again(folder),
    ]


def start_again(folder: Path) -> list[Figure]:
    """Starts the real server on the folder."""
    stderr = folder / "stderr.txt"
    began = time.perf_counter()
    process = launch(dev_arguments(folder), {"LIMITS_DISK_RESERVE_BYTES": "0"}, stderr)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline().startswith("ready "), stderr.read_text()
        ready_s = time.perf_counter() - began
        memory = resident_bytes(process.pid)
        process.terminate()
        process.wait()
    log = stderr.read_text().splitlines()
    for line in log:
        if "recover" in line:
            say(line)
    return [
        Figure("restart: start of the process to ready", ready_s, "s"),
        Figure("restart: lines of progress in the log", sum("recovering" in x for x in log), ""),
        Figure("restart: memory of the server", memory / 1e6, "MB"),
    ]


# --- queues


def many_queues(folder: Path, count: int) -> list[Figure]:
    """One task in each of so many queues, against as many tasks in one."""
    node = node_in(folder)
    fill(node, count, lambda _: "one")
    one = claims_per_s(node, None, count, 1, TOGETHER)
    before = resident_bytes()
    fill(node, count, lambda number: f"queue-{number}")
    held = resident_bytes() - before - node.shard.engine.body_bytes
    many = claims_per_s(node, None, count, 1, TOGETHER)
    before = resident_bytes()
    for number in range(count):
        assert node.claim((f"unknown-{number}",)) == []
    left = resident_bytes() - before
    queues = len(node.shard.engine.queues(None))
    node.close()
    assert queues == count + 1
    return [
        Figure("memory per queue with one task", held / count, "B"),
        Figure("wildcard claims of one task, 100 a group, one queue", one, "/s"),
        Figure("wildcard claims of one task, 100 a group, all queues", many, "/s"),
        Figure("memory left by claims of as many unknown commands", left / 1e6, "MB"),
    ]


# --- parked claims


def parked_claims(folder: Path, count: int, queues: int) -> list[Figure]:
    """So many claims that wait for tasks of ``queues`` commands."""
    node = node_in(folder)
    shard, got = node.shard, list[Delivery | None]()
    before, began = resident_bytes(), time.perf_counter()
    for number in range(count):
        shard.claim(node.request(got.append, (f"queue-{number % queues}",), wait=True))
    node.settle()
    parked_per_s = count / (time.perf_counter() - began)
    held = resident_bytes() - before
    assert shard.waiting_claims == count
    began = time.perf_counter()
    for _ in range(100):
        node.create("queue-0")
    alone_ms = (time.perf_counter() - began) / 100 * 1e3
    assert len(got) == min(100, count // queues)
    began = time.perf_counter()
    fill(node, queues, lambda number: f"queue-{number}")
    served_per_s = queues / (time.perf_counter() - began)
    node.close()
    return [
        Figure("memory per parked claim", held / count, "B"),
        Figure("claims parked", parked_per_s, "/s"),
        Figure("create of one task, with its claim and their sync", alone_ms, "ms"),
        Figure("creates that each serve a claim of another queue", served_per_s, "/s"),
    ]


# --- leases


class TimedRunner(LoopRunner):
    """Notes the longest that a piece of the shard's work held the loop."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.longest_s = 0.0
        self.longest_cpu_s = 0.0  # without the time the machine gave to others

    def run(self, work: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        super().run(work, lambda error: self._timed(partial(done, error)))

    def soon(self, call: Callable[[], None]) -> None:
        super().soon(partial(self._timed, call))

    def at(self, when_ms: int, call: Callable[[], None]) -> Callable[[], None]:
        return super().at(when_ms, partial(self._timed, call))

    def _timed(self, call: Callable[[], None]) -> None:
        began, began_cpu = time.perf_counter(), time.thread_time()
        call()
        self.longest_s = max(self.longest_s, time.perf_counter() - began)
        self.longest_cpu_s = max(self.longest_cpu_s, time.thread_time() - began_cpu)


def leases_together(folder: Path, count: int) -> list[Figure]:
    """So many leases that end in the same millisecond, on a real loop with its threads."""
    return uvloop.run(_leases_together(folder, count))


async def _leases_together(folder: Path, count: int) -> list[Figure]:
    clock = Clock()
    runner = TimedRunner(clock)
    settings = ShardSettings(
        path=folder / "data",
        disk_reserve_bytes=0,
        backoff_policy="fixed",
        backoff_base_seconds=0,
        default_lease_seconds=1,
    )
    shard = Shard.open(settings, clock, runner, say)
    end_ms = clock.now_ms() + 5_000 + count // 20
    for begin in range(0, count, BATCH):
        await _made(shard, min(BATCH, count - begin))
        await _leased(shard, min(BATCH, count - begin), end_ms - clock.now_ms())
    assert clock.now_ms() < end_ms, "the leases began to end before all were taken"
    ended = asyncio.get_running_loop().create_future()
    runner.at(end_ms, lambda: ended.set_result(None))
    runner.longest_s = runner.longest_cpu_s = 0.0
    await ended
    async with asyncio.timeout(LEASES_SECONDS_MAX):
        while shard.engine.stats(TENANT_BYTES, b"job")[0] < count:
            await asyncio.sleep(0)
    drained = asyncio.get_running_loop().create_future()
    shard.drain(lambda: drained.set_result(None))
    await drained
    back_s = (clock.now_ms() - end_ms) / 1000
    runner.stop()
    shard.close()
    return [
        Figure("leases over: the last task is back, and synced, after", back_s, "s"),
        Figure("leases over: the loop was held for at most", runner.longest_s * 1e3, "ms"),
        Figure("leases over: of that on the CPU", runner.longest_cpu_s * 1e3, "ms"),
    ]


async def _made(shard: Shard, count: int) -> None:
    made = asyncio.get_running_loop().create_future()
    shard.create(batch_of(["job"] * count), TENANT, made.set_result)
    await made


async def _leased(shard: Shard, count: int, lease_ms: int) -> None:
    got: asyncio.Future[Delivery | None] = asyncio.get_running_loop().create_future()
    shard.claim(
        ClaimRequest(
            tenant=TENANT,
            commands=(b"job",),
            in_order=True,
            worker="w",
            subject="s",
            count=count,
            lease_ms=lease_ms,
            bytes_max=1 << 30,
            wait=True,
            deliver=got.set_result,
        )
    )
    delivery = await got
    assert delivery is not None and len(delivery) == count
    delivery.accepted()
