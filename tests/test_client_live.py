"""Producer and Worker against a real server."""

from __future__ import annotations

import asyncio
import dataclasses
import runpy
import signal
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import msgspec
import pytest

import codeq
from codeq import CodeqError, Fail, Nack, NewTask, Producer, Task, Worker

from .conftest import ANY_PORT, ROOT, Server


class Size(msgspec.Struct):
    width: int


@dataclasses.dataclass
class Mail:
    to: str


def play(scenario: Coroutine[Any, Any, None]) -> None:
    async def run() -> None:
        async with asyncio.timeout(90):
            await scenario

    asyncio.run(run())


def a_worker(server: Server, command: str, **options: Any) -> Worker:
    return Worker(server.worker, token="dev-worker", commands=[command], **options)


def a_producer(server: Server, **options: Any) -> Producer:
    return Producer(server.producer, token="dev-producer", **options)


def stays_at_its_ports(server: Server) -> None:
    """A later start of this server uses the addresses it has now."""
    for flag, address in (("--http", server.http), ("--producer-stream", server.producer),
                          ("--worker-stream", server.worker)):  # fmt: skip
        place = server.arguments.index(flag) + 1
        assert server.arguments[place] == ANY_PORT
        server.arguments[place] = address


def test_a_life_from_produce_to_result(
    server: Server, producer: httpx.Client, command: str
) -> None:
    async def handle(task: Task) -> dict[str, int]:
        return {"double": task.json()["n"] * 2}

    async def scenario() -> None:
        worker = a_worker(server, command, batch=100)
        running = asyncio.create_task(worker.run(handle))
        async with a_producer(server) as creating:
            single = await creating.produce(command, {"n": 0})
            batch = await creating.produce_batch([(command, {"n": n}) for n in range(1, 2501)])
            many = await asyncio.gather(*(creating.produce(command, {"n": n}) for n in range(500)))
        assert not any(isinstance(result, CodeqError) for result in batch)
        while worker.counts.acknowledged < 3001:
            await asyncio.sleep(0)
        worker.stop()
        await running
        assert worker.counts.delivered == worker.counts.finished == 3001
        ids = [single, *map(str, batch), *many]
        assert len(set(ids)) == 3001 and ids[:2501] == sorted(ids[:2501])
        for place in (0, 1, 1000, 2500, 3000):
            record = producer.get(f"/tasks/{ids[place]}/result").json()["result"]
            assert record["result"] == {"double": 2 * (place if place < 2501 else place - 2501)}

    play(scenario())


def test_every_kind_of_payload_and_result_comes_through(
    server: Server, producer: httpx.Client, command: str
) -> None:
    payloads = [{"a": [1, None]}, Size(3), Mail("ann"), b"\x00\xff", bytearray(b"b"),
                memoryview(b"m"), None]  # fmt: skip
    results = [Size(4), Mail("bob"), msgspec.Raw(b'{"raw": 1}'), [1.5, "x"], True, "", None]
    seen: list[bytes] = []

    async def scenario() -> None:
        worker = a_worker(server, command)
        answers = iter(results)

        @worker.task(command)
        async def handle(task: Task) -> Any:
            seen.append(task.payload)
            return next(answers)

        running = asyncio.create_task(worker.run())
        async with a_producer(server) as creating:
            ids = await creating.produce_batch([(command, payload) for payload in payloads])
        while worker.counts.acknowledged < len(payloads):
            await asyncio.sleep(0)
        worker.stop()
        await running
        kept = [producer.get(f"/tasks/{one}/result").json()["result"].get("result") for one in ids]
        assert kept == [{"width": 4}, {"to": "bob"}, {"raw": 1}, [1.5, "x"], True, "", None]

    play(scenario())
    assert seen == [b'{"a":[1,null]}', b'{"width":3}', b'{"to":"ann"}', b"\x00\xff", b"b", b"m",
                    b"null"]  # fmt: skip


def test_failed_and_given_back(server: Server, producer: httpx.Client, command: str) -> None:
    async def handle(task: Task) -> str:
        if task.json() == "fail":
            raise Fail("no way")
        if task.json() == "later" and task.attempts == 1:
            raise Nack(1, "busy")
        if task.json() == "never":
            raise ValueError("broken")
        return "done"

    async def scenario() -> None:
        worker = a_worker(server, command, concurrency=2)
        running = asyncio.create_task(worker.run(handle))
        async with a_producer(server) as creating:
            failing = await creating.produce(command, "fail")
            later = await creating.produce(command, "later")
            never = await creating.produce(command, "never", max_attempts=1)
        while worker.counts.acknowledged < 4:
            await asyncio.sleep(0)
        worker.stop()
        await running
        answer = producer.get(f"/tasks/{failing}/result").json()
        assert answer["result"]["error"] == "no way" and answer["task"]["attempts"] == 1
        answer = producer.get(f"/tasks/{later}/result").json()
        assert answer["result"]["result"] == "done" and answer["task"]["attempts"] == 2
        dead = producer.get(f"/tasks/{never}").json()
        assert (dead["status"], dead["error"]) == ("FAILED", "ValueError: broken")

    play(scenario())


def test_refusals_come_back_as_errors(server: Server, command: str) -> None:
    async def scenario() -> None:
        async with a_producer(server) as creating:
            with pytest.raises(CodeqError, match="command is required") as caught:
                await creating.produce("  ", 1)
            assert caught.value.slug == "validation-error"
            await creating.produce(command, 1, idempotency_key=command)
            with pytest.raises(CodeqError) as caught:
                await creating.produce(command, 2, idempotency_key=command)
            assert caught.value.slug == "conflict"
            results = await creating.produce_batch(
                [NewTask(command, 1, delay_seconds=-1), (command, 1)]
            )
            assert isinstance(results[0], CodeqError) and isinstance(results[1], str)
        with pytest.raises(CodeqError) as caught:
            await Producer(server.producer, token="wrong").start()
        assert caught.value.slug == "unauthenticated"
        with pytest.raises(CodeqError) as caught:
            await Producer(server.worker, token="dev-producer").start()
        assert caught.value.slug in ("not-found", "unauthenticated")

    play(scenario())


def test_T65_a_long_handler_keeps_its_lease(server: Server, command: str) -> None:
    async def scenario() -> None:
        release = asyncio.Event()

        async def handle(task: Task) -> int:
            await release.wait()
            return task.attempts

        slow = a_worker(server, command, lease_seconds=3)
        slow_running = asyncio.create_task(slow.run(handle))
        async with a_producer(server) as creating:
            await creating.produce(command, 1)
        while not slow.counts.delivered:
            await asyncio.sleep(0)
        other = a_worker(server, command)
        other_running = asyncio.create_task(other.run(handle))
        loop = asyncio.get_running_loop()
        loop.call_later(7, release.set)  # more than twice the lease
        await release.wait()
        slow.stop()
        await slow_running
        other.stop()
        await other_running
        assert (slow.counts.acknowledged, slow.counts.refused) == (1, 0)
        assert other.counts.delivered == 0

    play(scenario())


def test_T65_producer_and_worker_survive_kill_9_of_the_server(
    start_server: Callable[..., Server], command: str
) -> None:
    """Every create makes one task and every task ends once, through three kills."""
    server = start_server(LEASE_GRACE_SECONDS="1", BACKOFF_BASE_SECONDS="1")
    stays_at_its_ports(server)
    handled: Counter[int] = Counter()

    async def handle(task: Task) -> int:
        handled[task.json()] += 1
        await asyncio.sleep(0)
        return task.json()

    async def scenario() -> None:
        worker = a_worker(server, command, batch=50, concurrency=2, lease_seconds=3)
        running = asyncio.create_task(worker.run(handle))
        ids: list[str] = []
        async with a_producer(server) as creating:
            for round_ in range(4):
                tasks = [(command, n) for n in range(round_ * 1000, round_ * 1000 + 1000)]
                calling = asyncio.create_task(creating.produce_batch(tasks))
                if round_:
                    before = worker.counts.delivered
                    while worker.counts.delivered < before + 100:
                        await asyncio.sleep(0)
                    server.kill()
                    server.start()
                results = await calling
                ids += [result for result in results if isinstance(result, str)]
        assert len(set(ids)) == 4000
        while len(handled) < 4000:
            await asyncio.sleep(0)
        with httpx.Client(headers={"authorization": "Bearer dev-producer"}) as rest:
            base = f"http://{server.http}/v1/codeq"
            empty = {"command": command, "ready": 0, "delayed": 0, "inProgress": 0, "dlq": 0}
            # A lease that ended with the server makes its task come again after a while.
            while rest.get(f"{base}/admin/queues/{command}").json() != empty:
                await asyncio.sleep(0)
            worker.stop()
            await running
            for number, task_id in enumerate(ids):
                record = rest.get(f"{base}/tasks/{task_id}/result").json()["result"]
                assert (record["status"], record["result"]) == ("COMPLETED", number)

    play(scenario())


def test_the_examples_run(
    server: Server,
    producer: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As they stand, but at the addresses of this server; the worker ends by SIGTERM."""
    stats = "/admin/queues/greet"

    class Observed(Worker):
        def __init__(self, _: str, **options: Any) -> None:
            super().__init__(server.worker, **options)

        def _results_acknowledged(self, refused: list[tuple[str, str]]) -> None:
            super()._results_acknowledged(refused)
            if self.counts.acknowledged == 101:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(codeq, "Producer", lambda _, **more: Producer(server.producer, **more))
    monkeypatch.setattr(codeq, "Worker", Observed)
    runpy.run_path(str(ROOT / "examples" / "producer.py"))
    assert producer.get(stats).json()["ready"] == 101
    runpy.run_path(str(ROOT / "examples" / "worker.py"))
    assert producer.get(stats).json()["ready"] == 0
    said = capsys.readouterr().out
    assert "created " in said and "finished 101 tasks" in said
