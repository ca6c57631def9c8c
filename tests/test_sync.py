"""The synchronous client against a real server: threads, signals, exits, forks."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import httpx
import msgspec
import pytest

import codeq
from codeq import CodeqError, Fail, Nack, NewTask, Task
from codeq.client.background import background
from codeq.sync import Client, Producer, Worker

from .conftest import ROOT, Server

SECONDS = 60


class Size(msgspec.Struct):
    width: int


def a_producer(server: Server, **options: Any) -> Producer:
    return Producer(server.producer, token="dev-producer", **options)


def a_worker(server: Server, **options: Any) -> Worker:
    return Worker(server.worker, token="dev-worker", **options)


@contextmanager
def in_a_thread(call: Callable[[], None]) -> Iterator[None]:
    """Runs it meanwhile; in the end it must end without an error."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call)
        yield
        running.result(SECONDS)


def result_of(producer: httpx.Client, task_id: str) -> Any:
    answer = producer.get(f"/tasks/{task_id}/result?waitSeconds=60")
    assert answer.status_code == 200, answer.text
    return answer.json()["result"]


def test_a_life_without_an_event_loop(server: Server, producer: httpx.Client, command: str) -> None:
    worker = a_worker(server, concurrency=3)
    threads: set[str] = set()

    @worker.task(command, type=Size)
    def resize(task: Task, size: Size) -> Size:
        threads.add(threading.current_thread().name)
        if size.width == 3:
            raise Fail("too small")
        if size.width == 4 and task.attempts == 1:
            raise Nack(0, "later")
        return Size(size.width * 2)

    @worker.batch(command + "-batch")
    def double(tasks: list[Task]) -> list[int]:
        return [2 * task.json(int) for task in tasks]

    with in_a_thread(worker.run):
        with a_producer(server) as creating:
            one = creating.produce(command, Size(1), priority=3)
            ids = creating.produce_batch((command, Size(n)) for n in (2, 3, 4))
            other = creating.produce(command + "-batch", 21)
        assert result_of(producer, one)["result"] == {"width": 2}
        ends = [result_of(producer, str(task_id)) for task_id in ids]
        assert [end.get("result") for end in ends] == [{"width": 4}, None, {"width": 8}]
        assert ends[1]["error"] == "too small"
        assert result_of(producer, other)["result"] == 42
        worker.stop()
    assert worker.counts.acknowledged == 6
    assert threads <= {f"codeq-handler-{n}" for n in range(3)}


def test_T65_handlers_in_threads_keep_their_leases(
    server: Server, producer: httpx.Client, command: str
) -> None:
    """As many at a time as the concurrency says, each longer than its lease."""
    everybody = threading.Barrier(3)
    release = threading.Event()

    def handle(task: Task) -> int:
        everybody.wait(SECONDS)
        assert release.wait(SECONDS)
        return task.attempts

    worker = a_worker(server, commands=[command], concurrency=2, lease_seconds=3)
    with in_a_thread(lambda: worker.run(handle)):
        with a_producer(server) as creating:
            ids = creating.produce_batch([(command, 1), (command, 2)])
        everybody.wait(SECONDS)
        until = producer.get(f"/tasks/{ids[0]}").json()["leaseUntil"]
        while producer.get(f"/tasks/{ids[0]}").json()["leaseUntil"][:19] < plus(until, 7):
            assert producer.get(f"/admin/queues/{command}").json()["inProgress"] == 2
        release.set()
        assert [result_of(producer, str(task_id))["result"] for task_id in ids] == [1, 1]
        worker.stop()
    assert (worker.counts.acknowledged, worker.counts.refused) == (2, 0)


def plus(time: str, seconds: int) -> str:
    return (datetime.fromisoformat(time) + timedelta(seconds=seconds)).isoformat()[:19]


def test_T65_refusals_reach_a_plain_function(server: Server, command: str) -> None:
    refused: list[tuple[str, str, str]] = []

    def on_refused(task_id: str, error: CodeqError) -> None:
        refused.append((task_id, error.slug, threading.current_thread().name))
        raise ValueError("a bug of the caller's")

    worker = a_worker(server, commands=[command], on_refused=on_refused)

    def handle(task: Task) -> int:
        with httpx.Client(headers={"authorization": "Bearer dev-worker"}) as rest:
            base = f"http://{server.http}/v1/codeq/tasks/{task.id}"
            done = rest.post(f"{base}/abandon", json={"workerId": worker.worker_id})
            assert done.status_code == 200, done.text
        worker.stop()
        return 1

    with a_producer(server) as creating:
        task_id = creating.produce(command, 1)
    worker.run(handle)
    assert refused == [(task_id, "not-in-progress", "codeq-refused-0")]
    assert worker.counts.refused == 1


def test_what_a_handler_may_not_raise_is_a_failed_try(
    server: Server, producer: httpx.Client, command: str
) -> None:
    def handle(task: Task) -> Any:
        if task.json() == "exit":
            sys.exit("not the whole worker")
        return next(iter(()))

    worker = a_worker(server, commands=[command])
    with in_a_thread(lambda: worker.run(handle)):
        with a_producer(server) as creating:
            ids = [creating.produce(command, what, max_attempts=1) for what in ("exit", "next")]
        errors = [result_of(producer, task_id)["error"] for task_id in ids]
        worker.stop()
    assert errors == [
        "RuntimeError: raised SystemExit('not the whole worker')",
        "RuntimeError: raised StopIteration()",
    ]


@pytest.mark.parametrize("times", [1, 2])
def test_signals_finish_and_a_second_one_gives_back(
    server: Server, producer: httpx.Client, command: str, times: int
) -> None:
    """In the main thread, which waits; a handler that is given up runs on and hinders nothing."""
    release = threading.Event()
    worker = a_worker(server, commands=[command])

    def handle(task: Task) -> int:
        for number in (signal.SIGINT, signal.SIGTERM)[:times]:
            os.kill(os.getpid(), number)
        if times == 2:
            release.wait(SECONDS)
        return 1

    with a_producer(server) as creating:
        task_id = creating.produce(command, 1)
    before = signal.getsignal(signal.SIGINT)
    worker.run(handle)
    assert signal.getsignal(signal.SIGINT) is before
    release.set()
    status = producer.get(f"/tasks/{task_id}").json()["status"]
    assert status == ("COMPLETED" if times == 1 else "PENDING")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Also where the suite was started in the background, whose shell has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_a_call_and_closes(server: Server, command: str) -> None:
    creating = a_producer(server, inflight_bytes_max=1)

    def token() -> str:
        signal.raise_signal(signal.SIGINT)
        threading.Event().wait(SECONDS)
        return "never"

    waiting = Producer(server.producer, token=token)
    with pytest.raises(KeyboardInterrupt):
        waiting.start()
    waiting.close()
    with pytest.raises(CodeqError, match="not started"):
        creating.produce(command, 1)
    with pytest.raises(ZeroDivisionError), creating:
        raise ZeroDivisionError
    with pytest.raises(CodeqError, match="the producer is closed"):
        creating.produce(command, 1)


def test_it_cannot_be_called_where_it_would_wait_for_itself(server: Server) -> None:
    async def on_the_loop() -> None:
        a_producer(server).start()

    with pytest.raises(RuntimeError, match="was called on its own event loop"):
        background().call(on_the_loop)
    with pytest.raises(ValueError, match=r"handlers of codeq\.sync are plain"):

        @a_worker(server).task("x")
        async def handle(task: Task) -> None: ...


def test_rest_without_an_event_loop(server: Server, command: str) -> None:
    asked = threading.get_ident()

    def token() -> str:
        assert threading.get_ident() != asked
        return "dev-producer"

    with Client(f"http://{server.http}", token=token, worker_token="dev-worker") as client:
        task = client.create(command, {"n": 1})
        more = client.create_many(NewTask(command, n) for n in range(2))
        listed = [one.id for one in client.tasks(command=command)]
        assert listed == [task.id, *(one.id for one in more if not isinstance(one, CodeqError))]
        with pytest.raises(TimeoutError):
            client.wait_for_result(task.id, timeout_seconds=0.01)
        with pytest.raises(CodeqError, match="not found"):
            client.get("01900000-0000-7000-8000-000000000000")
        claimed = client.claim([command])
        assert claimed is not None
        client.complete(claimed.id, 7)
        found = client.wait_for_result(task.id).result.result
        assert found is not None and json.loads(bytes(found)) == 7
        assert client.queue(command).ready == 2


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_what_is_open_is_closed_when_the_program_ends(server: Server, command: str) -> None:
    code = """
import sys
from codeq.sync import Producer
producer = Producer(sys.argv[1], token="dev-producer")
producer.start()
print(len(producer.produce(sys.argv[2], 1)))
"""
    done = run(code, server.producer, command)
    assert (done.returncode, done.stdout, done.stderr) == (0, "36\n", "")


def test_after_a_fork_old_objects_refuse_and_new_ones_work(server: Server, command: str) -> None:
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")  # of forking with threads, which is what this is about
from codeq import CodeqError
from codeq.sync import Producer
before = Producer(sys.argv[1], token="dev-producer")
if pid := os.fork():
    _, status = os.waitpid(pid, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
try:
    before.start()
except CodeqError as error:
    print(error)
with Producer(sys.argv[1], token="dev-producer") as after:
    print(len(after.produce(sys.argv[2], 1)), flush=True)
"""
    done = run(code, server.producer, command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "unavailable: made before a fork: make a new one in this process",
        "36",
    ]


def test_signatures_and_docstrings_are_those_of_the_asyncio_classes() -> None:
    for sync, name in ((Client, "Client"), (Producer, "Producer"), (Worker, "Worker")):
        there = getattr(codeq, name)
        assert inspect.signature(sync) == inspect.signature(there)
        public = [word for word in vars(there) if not word.startswith("_")]
        assert public, name
        for word in public:
            assert getattr(sync, word).__doc__, word
    produce = inspect.signature(Producer.produce)
    assert produce == inspect.signature(codeq.Producer.produce)
    assert NewTask("a").idempotency_key == ""
