"""Worker against a server that the test plays by hand."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from codeq import CodeqError, Fail, Nack, Task, Worker

from .fake_streams import UNAVAILABLE, FakeStreams, Peer, ended, play, spawn, task_id


def wire_task(
    number: int, payload: Any = None, lease_seconds: int = 60, **more: Any
) -> dict[str, Any]:
    now = datetime.now(UTC)
    until = now + timedelta(seconds=lease_seconds)
    return {
        "id": task_id(number), "command": "job", "payload": json.dumps(payload).encode(),
        "status": "IN_PROGRESS", "attempts": 1, "max_attempts": 5, "updated_at": now,
        "lease_until": until.strftime("%Y-%m-%dT%H:%M:%SZ"), **more,
    }  # fmt: skip


def batch(*numbers: int, **more: Any) -> dict[str, Any]:
    return {"task_batch": {"tasks": [wire_task(number, number, **more) for number in numbers]}}


async def result_acks(peer: Peer, event: Any) -> None:
    results = [event.result] if event.HasField("result") else event.result_batch.results
    acks = [{"task_id": result.task_id, "ok": True} for result in results]
    await peer.say(result_ack_batch={"acks": acks})


def results_of(event: Any) -> dict[str, tuple[str, bytes, str]]:
    results = [event.result] if event.HasField("result") else event.result_batch.results
    return {r.task_id: (r.status, r.result_json, r.error) for r in results}


def a_worker(fake: FakeStreams, **options: Any) -> Worker:
    return Worker(fake.address, token="t", **{"commands": ["job"], "batch": 10, **options})


def test_results_of_a_batch_go_together_and_the_ready_right_behind() -> None:
    seen = []

    def handle(task: Task) -> Any:
        seen.append((task.id, task.command, task.json(), task.attempts, task.max_attempts))
        return {"square": task.json(int) ** 2}

    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake, lease_seconds=30)
        running = spawn(worker.run(handle))
        peer = await fake.worker()
        ready = (await peer.heard()).ready
        assert (list(ready.commands), ready.lease_seconds, ready.count) == (["job"], 30, 10)
        await peer.say(**batch(1, 2, 3))
        event = await peer.heard()
        assert results_of(event) == {
            task_id(n): ("COMPLETED", b'{"square":%d}' % n**2, "") for n in (1, 2, 3)
        }
        assert (await peer.heard()).HasField("ready")
        await result_acks(peer, event)
        await peer.say(task={"task": wire_task(4, 4)})
        event = await peer.heard()
        assert event.result.task_id == task_id(4)
        await result_acks(peer, event)
        worker.stop()
        await ended(running, peer)
        assert seen[0] == (task_id(1), "job", 1, 1, 5)
        assert (worker.counts.delivered, worker.counts.finished) == (4, 4)
        assert worker.counts.acknowledged == 4

    play(scenario)


def test_a_handler_completes_fails_or_gives_back() -> None:
    class Answer(msgspec.Struct):
        n: int

    async def handle(task: Task) -> Any:
        n = task.json()
        if n == 1:
            return None
        if n == 2:
            raise Fail("no such address")
        if n == 3:
            raise Nack(2.5, "busy")
        if n == 4:
            raise KeyError("oops")
        if n == 5:
            return object()  # no JSON
        return Answer(n)

    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake)
        running = spawn(worker.run(handle))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1, 2, 3, 4, 5, 6))
        results: dict[str, Any] = {}
        nacks: dict[str, Any] = {}
        while len(results) + len(nacks) < 6:
            event = await peer.heard()
            if event.HasField("nack"):
                nacks[event.nack.task_id] = (event.nack.delay_seconds, event.nack.reason)
                await peer.say(nack_ack={"task_id": event.nack.task_id, "ok": True})
            else:
                results |= results_of(event)
                await result_acks(peer, event)
        assert results[task_id(1)] in (("COMPLETED", b"", ""), ("COMPLETED", b"null", ""))
        assert results[task_id(2)] == ("FAILED", b"", "no such address")
        assert results[task_id(6)] == ("COMPLETED", b'{"n":6}', "")
        assert nacks[task_id(3)] == (3, "busy")
        assert nacks[task_id(4)] == (0, "KeyError: 'oops'")
        assert nacks[task_id(5)][1].startswith("TypeError")
        worker.stop()
        await ended(running, peer)

    play(scenario)


def test_what_a_handler_returns_may_have_to_be_awaited() -> None:
    """A plain handler may hand the work to an executor and return its future."""

    def handle(task: Task) -> Any:
        return asyncio.get_running_loop().run_in_executor(None, task.json)

    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake)
        running = spawn(worker.run(handle))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1))
        event = await peer.heard()
        assert results_of(event) == {task_id(1): ("COMPLETED", b"1", "")}
        await result_acks(peer, event)
        worker.stop()
        await ended(running, peer)

    play(scenario)


def test_a_batch_handler_answers_for_all() -> None:
    async def handle(tasks: list[Task]) -> list[Any]:
        return [Fail("odd") if task.json() % 2 else {"n": task.json()} for task in tasks]

    def too_few(tasks: list[Task]) -> list[Any]:
        return [1]

    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake)
        running = spawn(worker.run_batches(handle))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1, 2))
        event = await peer.heard()
        assert results_of(event) == {
            task_id(1): ("FAILED", b"", "odd"),
            task_id(2): ("COMPLETED", b'{"n":2}', ""),
        }
        await result_acks(peer, event)
        worker.stop()
        await ended(running, peer)

        worker = a_worker(fake)
        running = spawn(worker.run_batches(too_few))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1, 2))
        reasons = [(await peer.heard()).nack.reason for _ in range(2)]
        assert reasons == ["ValueError: 1 results for 2 tasks"] * 2
        running.cancel()

    play(scenario)


def test_concurrency_is_the_number_of_readys_and_handlers() -> None:
    async def scenario(fake: FakeStreams) -> None:
        release = asyncio.Event()
        running_now = 0

        async def handle(task: Task) -> None:
            nonlocal running_now
            running_now += 1
            await release.wait()

        worker = a_worker(fake, concurrency=3, batch=1)
        running = spawn(worker.run(handle))
        peer = await fake.worker()
        for _ in range(3):
            assert (await peer.heard()).ready.count == 1
        for n in range(3):
            await peer.say(task={"task": wire_task(n)})
        while running_now < 3:
            await asyncio.sleep(0)
        release.set()
        seen = 0
        while seen < 3:
            event = await peer.heard()
            if not event.HasField("ready"):
                seen += len(results_of(event))
                await result_acks(peer, event)
        worker.stop()
        await ended(running, peer)

    play(scenario)


def test_T65_a_long_handler_is_kept_alive_by_heartbeats() -> None:
    async def scenario(fake: FakeStreams) -> None:
        release = asyncio.Event()

        async def handle(task: Task) -> str:
            await release.wait()
            return "done"

        # The server grants less than was asked for: its word counts.
        worker = a_worker(fake, lease_seconds=3600)
        running = spawn(worker.run(handle))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1, 2, lease_seconds=2))
        for _ in range(2):
            beats = {(await peer.heard()).heartbeat.task_id for _ in range(2)}
            assert beats == {task_id(1), task_id(2)}
            for beat in beats:
                await peer.say(heartbeat_ack={"task_id": beat, "ok": True})
        release.set()
        event = await peer.heard()
        while event.HasField("heartbeat"):
            event = await peer.heard()
        assert results_of(event)[task_id(1)] == ("COMPLETED", b'"done"', "")
        running.cancel()

    play(scenario)


def test_T65_a_refused_heartbeat_cancels_the_handler_and_only_that() -> None:
    async def scenario(fake: FakeStreams) -> None:
        cancelled = []

        async def handle(task: Task) -> int:
            if task.json() == 1:
                try:
                    await asyncio.get_running_loop().create_future()
                except asyncio.CancelledError:
                    cancelled.append(task.id)
                    raise
            return task.json()

        worker = a_worker(fake, lease_seconds=2)
        running = spawn(worker.run(handle))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1, 2, 3, lease_seconds=2))
        for _ in range(3):
            await peer.heard()
        for number in (3, 1):
            lost = {"task_id": task_id(number), "ok": False, "error_message": "not-owner"}
            await peer.say(heartbeat_ack=lost)
        event = await peer.heard()
        while event.HasField("heartbeat"):
            event = await peer.heard()
        assert results_of(event) == {task_id(2): ("COMPLETED", b"2", "")}
        assert cancelled == [task_id(1)]
        assert (await peer.heard()).HasField("ready")
        await result_acks(peer, event)
        worker.stop()
        await ended(running, peer)

    play(scenario)


def test_T65_results_without_acknowledgement_are_sent_again() -> None:
    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake, worker_id="w-7", concurrency=2)
        release = asyncio.Event()

        async def handle(task: Task) -> int:
            if task.json() == 3:
                await release.wait()
            return task.json()

        running = spawn(worker.run(handle))
        peer = await fake.peer()
        assert (await peer.heard()).hello.worker_id == "w-7"
        await peer.say(hello_ack={"worker_id": "w-7"})
        await peer.heard()
        await peer.heard()
        await peer.say(**batch(1, 2))
        await peer.say(**batch(3))
        event = await peer.heard()
        assert len(results_of(event)) == 2
        await peer.say(result_ack={"task_id": task_id(1), "ok": True})
        peer.end(UNAVAILABLE)
        peer = await fake.peer()
        assert (await peer.heard()).hello.worker_id == "w-7"  # it still owns its leases
        await peer.say(hello_ack={"worker_id": "w-7"})
        event = await peer.heard()
        assert results_of(event).keys() == {task_id(2)}
        await result_acks(peer, event)
        assert (await peer.heard()).HasField("ready")  # one: the other handler is still busy
        release.set()
        event = await peer.heard()
        assert results_of(event).keys() == {task_id(3)}
        await result_acks(peer, event)
        assert (await peer.heard()).HasField("ready")
        worker.stop()
        await ended(running, peer)
        assert worker.counts.acknowledged == 3

    play(scenario)


def test_T65_refused_results_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    refused = []

    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake, on_refused=lambda task, error: refused.append((task, error)))
        running = spawn(worker.run(lambda task: 1))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1))
        await peer.heard()
        await peer.say(
            result_ack={"task_id": task_id(1), "ok": False, "error_message": "not-owner"}
        )
        worker.stop()
        await ended(running, peer)

    play(scenario)
    ((task, error),) = refused
    assert (task, error.slug) == (task_id(1), "not-owner")
    assert "did not accept" in caplog.text


def test_stopping_finishes_what_is_in_hand() -> None:
    async def scenario(fake: FakeStreams) -> None:
        release = asyncio.Event()

        async def handle(task: Task) -> int:
            await release.wait()
            return task.json()

        worker = a_worker(fake, concurrency=2)
        running = spawn(worker.run(handle))
        peer = await fake.worker()
        await peer.heard()
        await peer.heard()
        await peer.say(**batch(1, 2))
        while not worker.counts.delivered:
            await asyncio.sleep(0)
        worker.stop()
        await peer.say(**batch(9))  # crossed with the stop: goes back untried
        assert (await peer.heard()).abandon.task_id == task_id(9)
        await peer.say(abandon_ack={"task_id": task_id(9), "ok": True})
        release.set()
        event = await peer.heard()
        while len(results_of(event)) < 2:
            await result_acks(peer, event)
            event = await peer.heard()
            break
        await result_acks(peer, event)
        assert await peer.heard() is None  # half-closed, without another Ready
        peer.end()
        await running
        assert worker.counts.finished == 2

    play(scenario)


def test_stopping_can_abandon_instead() -> None:
    async def scenario(fake: FakeStreams) -> None:
        async def handle(task: Task) -> None:
            await asyncio.get_running_loop().create_future()

        worker = a_worker(fake)
        running = spawn(worker.run(handle))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1, 2, 3))
        while not worker.counts.delivered:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        worker.stop(abandon=True)
        abandoned = [(await peer.heard()).abandon.task_id for _ in range(3)]
        assert abandoned == [task_id(n) for n in (1, 2, 3)]
        for number in (1, 2, 3):
            await peer.say(abandon_ack={"task_id": task_id(number), "ok": True})
        assert await peer.heard() is None
        peer.end()
        await running

    play(scenario)


def test_tasks_that_cross_the_half_close_are_abandoned_on_a_new_stream() -> None:
    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake)
        running = spawn(worker.run(lambda task: 1))
        peer = await fake.worker()
        await peer.heard()
        worker.stop()
        assert await peer.heard() is None
        await peer.say(**batch(1))
        peer.end()
        peer = await fake.worker()
        assert (await peer.heard()).abandon.task_id == task_id(1)
        await peer.say(abandon_ack={"task_id": task_id(1), "ok": True})
        assert await peer.heard() is None
        peer.end()
        await running

    play(scenario)


def test_stopping_gives_up_on_a_silent_server(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake, stop_timeout_seconds=0.1)
        running = spawn(worker.run(lambda task: 1))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1))
        await peer.heard()
        worker.stop()
        await running

    play(scenario)
    assert "1 results not acknowledged" in caplog.text


def test_a_stop_before_the_start_ends_at_once() -> None:
    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake)
        worker.stop()
        await worker.run(lambda task: 1)

    play(scenario)


@pytest.mark.parametrize(
    ("code", "text", "slug"),
    [
        ("PermissionDenied", "event type not allowed", "permission-denied"),
        ("InvalidArgument", "more than 100 commands", "validation-error"),
    ],
)
def test_T65_commands_that_are_not_taken_end_the_worker(code: str, text: str, slug: str) -> None:
    async def scenario(fake: FakeStreams) -> None:
        running = spawn(a_worker(fake).run(lambda task: 1))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(error={"code": code, "message": text})
        assert await peer.heard() is None
        peer.end()
        with pytest.raises(CodeqError, match=text) as caught:
            await running
        assert caught.value.slug == slug

    play(scenario)


def test_a_cancelled_run_leaves_nothing_behind() -> None:
    async def scenario(fake: FakeStreams) -> None:
        ended = asyncio.Event()

        async def handle(task: Task) -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                ended.set()

        worker = a_worker(fake)
        running = spawn(worker.run(handle))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1))
        while not worker.counts.delivered:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert ended.is_set()

    play(scenario)
