"""codeq.testing: a whole server in the test's process, whose time the test moves."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

import codeq.sync
import codeq.testing
from codeq import CodeqError, Nack, NewTask, Producer, Task, Worker
from codeq.config import ConfigError

PREFIX = "/v1/codeq"
Scenario = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Runs a scenario on each kind of event loop."""
    runners: dict[str, Any] = {"asyncio": asyncio.run, "uvloop": uvloop.run}

    def run(scenario: Scenario) -> None:
        async def limited() -> None:
            async with asyncio.timeout(60):
                await scenario()

        runners[request.param](limited())

    return run


def a_producer(server: codeq.testing.Server) -> Producer:
    return Producer(server.producer, token=server.producer_token)


def a_worker(server: codeq.testing.Server, **options: Any) -> Worker:
    return Worker(server.worker, token=server.worker_token, **options)


def rest(server: codeq.testing.Server) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {server.producer_token}"}
    return httpx.AsyncClient(base_url=server.url + PREFIX, headers=headers)


def test_all_three_listeners_serve(play: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with codeq.testing.server() as server, rest(server) as client:
            worker = a_worker(server)

            @worker.task("double")
            async def double(task: Task) -> int:
                worker.stop()
                return int(task.json(int)) * 2

            async with a_producer(server) as producer:
                task_id = await producer.produce("double", 21)
            await worker.run()
            answer = await client.get(f"/tasks/{task_id}/result")
            assert answer.json()["result"]["result"] == 42

    play(scenario)


def test_T65_delays_leases_and_retries_come_due_when_the_clock_is_moved(
    play: Callable[[Scenario], None],
) -> None:
    async def scenario() -> None:
        settings = {"backoffPolicy": "fixed", "backoffBaseSeconds": 30}
        async with codeq.testing.server(settings) as server, rest(server) as client:

            async def depths() -> list[int]:
                found = (await client.get("/admin/queues/job")).json()
                return [found[name] for name in ("ready", "delayed", "inProgress")]

            async with a_producer(server) as producer:
                await producer.produce("job", 1, delay_seconds=3600)
            began_ms = server.clock.now_ms()
            assert await depths() == [0, 1, 0]
            await server.clock.advance(3599.999)
            assert await depths() == [0, 1, 0]
            await server.clock.advance(0.001)
            assert await depths() == [1, 0, 0]
            assert server.clock.now_ms() == began_ms + 3_600_000

            tries: asyncio.Queue[int] = asyncio.Queue()

            async def handle(task: Task) -> None:
                await tries.put(task.attempts)
                if task.attempts == 1:
                    raise Nack(0, "busy")
                if task.attempts == 2:
                    await asyncio.get_running_loop().create_future()

            worker = a_worker(server, commands=["job"], lease_seconds=60, concurrency=2)
            running = asyncio.create_task(worker.run(handle))
            assert await tries.get() == 1
            while worker.counts.acknowledged < 1:
                await asyncio.sleep(0)
            assert await depths() == [0, 1, 0]
            await server.clock.advance(30)
            assert await tries.get() == 2
            await server.clock.advance(59)
            assert await depths() == [0, 0, 1]
            await server.clock.advance(31)  # the lease is over, and 30 s later it comes again
            assert await tries.get() == 3
            while worker.counts.acknowledged < 2:
                await asyncio.sleep(0)
            worker.stop(abandon=True)
            await running

    play(scenario)


def test_ended_tasks_go_after_their_time(play: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        settings = {"retentionSeconds": 600, "idempotencyWindowSeconds": 600}
        async with codeq.testing.server(settings) as server, rest(server) as client:
            async with a_producer(server) as producer:
                [task_id] = await producer.produce_batch([NewTask("job", 1)])
            assert (await client.post(f"/tasks/{task_id}/cancel")).status_code == 200
            await server.clock.advance(590)
            assert (await client.get(f"/tasks/{task_id}")).status_code == 200
            await server.clock.advance(3 * 3600)
            assert (await client.get(f"/tasks/{task_id}")).status_code == 404

    play(scenario)


def test_T65_a_restart_keeps_tasks_time_and_addresses(play: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with codeq.testing.server({"leaseGraceSeconds": 0}) as server:
            worker = a_worker(server, commands=["job"])
            seen: list[int] = []
            running = asyncio.create_task(worker.run(lambda task: seen.append(task.json())))
            async with a_producer(server) as producer:
                await producer.produce("job", 1)
                now_ms = server.clock.now_ms()
                await server.clock.advance(5)
                before = (server.http, server.producer, server.worker)
                await server.restart()
                assert (server.http, server.producer, server.worker) == before
                assert server.clock.now_ms() == now_ms + 5000
                await producer.produce("job", 2)
            while seen != [1, 2]:
                await asyncio.sleep(0)
            worker.stop()
            await running

    play(scenario)


def test_two_servers_at_once_and_a_folder_that_stays(
    play: Callable[[Scenario], None], tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with codeq.testing.server(data=tmp_path) as one, codeq.testing.server() as other:
            await one.clock.advance(100)
            assert one.clock.now_ms() > other.clock.now_ms() + 90_000
            async with a_producer(one) as producer:
                task_id = await producer.produce("job", 1)
            async with rest(one) as here, rest(other) as there:
                assert (await here.get(f"/tasks/{task_id}")).status_code == 200
                assert (await there.get(f"/tasks/{task_id}")).status_code == 404
        async with codeq.testing.server(data=tmp_path) as again, rest(again) as client:
            assert (await client.get(f"/tasks/{task_id}")).status_code == 200

    play(scenario)


def test_what_goes_wrong_is_told(play: Callable[[Scenario], None], tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match="noSuchSetting"):
            async with codeq.testing.server({"noSuchSetting": 1}):
                pass
        async with codeq.testing.server({"workerStreamAddr": ""}) as server:
            assert server.worker == "off"
            with pytest.raises(ValueError, match="only goes forwards"):
                await server.clock.advance(-1)
        with pytest.raises(CodeqError, match="the server does not run"):
            await server.clock.advance(1)
        with pytest.raises(CodeqError, match="write to the store failed"):
            async with codeq.testing.server() as server:
                assert server._node is not None and server._node._shard is not None
                server._node._shard.journal.fail("write to the store failed")

    play(scenario)


def test_the_logs_of_the_test_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, threading.active_count())

    async def scenario() -> None:
        async with codeq.testing.server():
            logging.getLogger("mine").warning("still heard")

    asyncio.run(scenario())
    assert (list(root.handlers), root.level) == before[:2]
    assert "still heard" in caplog.text


def test_without_an_event_loop() -> None:
    with codeq.testing.sync_server() as server:
        worker = codeq.sync.Worker(server.worker, token=server.worker_token)

        @worker.task("greet")
        def greet(task: Task) -> str:
            worker.stop()
            return f"Hello, {task.json(str)}!"

        with codeq.sync.Producer(server.producer, token=server.producer_token) as producer:
            task_id = producer.produce("greet", "Ada", delay_seconds=3600)
            now_ms = server.clock.now_ms()
            server.clock.advance(3600)
            assert server.clock.now_ms() == now_ms + 3_600_000
            server.restart()
            worker.run()
        headers = {"authorization": f"Bearer {server.producer_token}"}
        found = httpx.get(f"{server.url}{PREFIX}/tasks/{task_id}/result", headers=headers)
        assert found.json()["result"]["result"] == "Hello, Ada!"


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    async def scenario() -> None:
        async with codeq.testing.server():
            assert len(os.listdir(tmp_path)) == 1
        assert os.listdir(tmp_path) == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
