"""The Go client of the server that codeq re-makes must keep working, unchanged."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.conftest import Server
from tests.go_client import GoProducer, GoWorker, StreamEnded
from tests.protos import workerpb
from tests.test_streams import wait_for_metric


@contextmanager
def go_producer(server: Server) -> Iterator[GoProducer]:
    producer = GoProducer(server.producer, "dev-producer")
    try:
        yield producer
    finally:
        producer.close()
    assert producer.faults == []


@contextmanager
def go_worker(server: Server, handler: Any, **settings: Any) -> Iterator[GoWorker]:
    worker = GoWorker(server.worker, "dev-worker", handler, **settings)
    try:
        yield worker
    finally:
        worker.stop()
    assert worker.faults == []


def completed(task: Any) -> Any:
    """Completed(nil): no body at all."""
    return workerpb.Result(task_id=task.id, status="COMPLETED")


def status_of(rest: httpx.Client, task_id: str) -> tuple[str, int, str]:
    task = rest.get(f"/tasks/{task_id}").json()
    return task["status"], task["attempts"], task["lastKnownLocation"]


def test_produce_from_many_threads_at_once(server: Server, command: str) -> None:
    with go_producer(server) as producer, ThreadPoolExecutor(32) as threads:
        assert producer.tenant == "dev"
        acks = list(threads.map(lambda n: producer.produce(command, b"%d" % n), range(500)))
    assert all(ack.ok for ack in acks)
    assert len({ack.task_id for ack in acks}) == 500


def test_produce_batch_and_singles_share_a_stream(server: Server, command: str) -> None:
    with go_producer(server) as producer, ThreadPoolExecutor(8) as threads:
        batches = threads.map(
            lambda n: producer.produce_batch([{"command": command}] * n), (1, 200, 3, 1000, 50)
        )
        singles = threads.map(lambda n: producer.produce(command, b"%d" % n), range(50))
        acks = [ack for batch in batches for ack in batch] + list(singles)
    assert len({ack.task_id for ack in acks if ack.ok}) == 1304


def test_a_refused_create_is_an_answer(server: Server) -> None:
    with go_producer(server) as producer:
        ack = producer.produce(" ", b"{}")
        assert (ack.ok, ack.error_message) == (False, "command is required")
        assert producer.produce("after", b"{}").ok


def test_close_with_open_produces_fails_them_and_harms_nobody(
    server: Server, producer: httpx.Client, command: str
) -> None:
    client = GoProducer(server.producer, "dev-producer")
    outcomes: Counter[str] = Counter(ok=0, refused=0, ended=0)

    def produce() -> None:
        try:
            while True:
                outcomes["ok" if client.produce(command, b"{}").ok else "refused"] += 1
                running.set()
        except StreamEnded:
            outcomes["ended"] += 1

    running = threading.Event()
    threads = [threading.Thread(target=produce) for _ in range(16)]
    for thread in threads:
        thread.start()
    assert running.wait(30)
    client.close()
    for thread in threads:
        thread.join(30)
    assert client.faults == []
    assert outcomes["ended"] == 16
    assert outcomes["refused"] == 0
    ready = producer.get(f"/admin/queues/{command}").json()["ready"]
    assert outcomes["ok"] <= ready <= outcomes["ok"] + 16


def test_slots_take_one_task_each_and_complete_without_a_body(
    server: Server, producer: httpx.Client, command: str
) -> None:
    seen: Counter[str] = Counter()

    def handler(task: Any) -> Any:
        assert (task.status, task.attempts, task.tenant_id) == ("IN_PROGRESS", 1, "dev")
        seen[task.id] += 1
        return completed(task)

    with (
        go_worker(server, handler, commands=(command,), concurrency=8, worker_id="go") as worker,
        go_producer(server) as client,
    ):
        assert worker.worker_id == "go"
        acks = client.produce_batch([{"command": command, "payload": b"{}"}] * 300)
        worker.wait_for_acks(300)
        assert worker.messages == 300
    assert set(seen.values()) == {1}
    assert set(seen) == {ack.task_id for ack in acks}
    assert worker.refused == []
    for task_id in (acks[0].task_id, acks[-1].task_id):
        assert status_of(producer, task_id) == ("COMPLETED", 1, "NONE")


def test_batches_of_mixed_answers(server: Server, producer: httpx.Client, command: str) -> None:
    def handler(task: Any) -> Any:
        what = task.payload.decode()
        if what == "abandon" and task.id not in abandoned:
            abandoned.add(task.id)
            return workerpb.Abandon(task_id=task.id)
        if what == "nack" and task.attempts == 1:
            return workerpb.Nack(task_id=task.id, delay_seconds=1, reason="later")
        if what == "fail":
            return workerpb.Result(task_id=task.id, status="FAILED", error="no")
        return completed(task)

    abandoned: set[str] = set()
    made = ["complete", "abandon", "nack", "fail"] * 25
    with (
        go_worker(server, handler, commands=(command,), concurrency=3, batch_size=16) as worker,
        go_producer(server) as client,
    ):
        assert worker.worker_id == "dev-worker"
        acks = client.produce_batch([{"command": command, "payload": m.encode()} for m in made])
        worker.wait_for_acks(150)
    assert worker.refused == []
    attempts = {"complete": 1, "abandon": 1, "nack": 2, "fail": 1}
    for what, ack in zip(made, acks, strict=True):
        status = "FAILED" if what == "fail" else "COMPLETED"
        assert status_of(producer, ack.task_id) == (status, attempts[what], "NONE"), what


def test_T19_32_tasks_of_200_kb_fit_the_go_clients_limit(
    server: Server, producer: httpx.Client, command: str
) -> None:
    sizes: list[int] = []

    def handler(task: Any) -> Any:
        sizes.append(len(task.payload))
        return completed(task)

    with go_producer(server) as client, ThreadPoolExecutor(8) as threads:
        payload = b'"' + b"x" * 200_000 + b'"'
        acks = list(threads.map(lambda _: client.produce(command, payload), range(32)))
        with go_worker(server, handler, commands=(command,), batch_size=32) as worker:
            worker.wait_for_acks(32)
            assert 2 <= worker.messages <= 4
    assert sizes == [200_002] * 32
    assert status_of(producer, acks[-1].task_id) == ("COMPLETED", 1, "NONE")
    stats = producer.get(f"/admin/queues/{command}").json()
    assert (stats["ready"], stats["inProgress"]) == (0, 0)


@pytest.mark.parametrize("batch_size", [0, 8])
def test_a_worker_that_waits_gets_a_task_that_comes_later(
    server: Server, command: str, batch_size: int
) -> None:
    came = threading.Event()

    def handler(task: Any) -> Any:
        came.set()
        return completed(task)

    with go_worker(
        server, handler, commands=(command,), concurrency=4, batch_size=batch_size
    ) as worker:
        assert not came.wait(0.3)
        with go_producer(server) as client:
            assert client.produce(command, b"{}").ok
        assert came.wait(30)
        worker.wait_for_acks(1)
        assert worker.messages == 1


def test_a_stopped_worker_leaves_no_ready_behind(
    server: Server, producer: httpx.Client, command: str
) -> None:
    with go_worker(server, completed, commands=(command,), concurrency=4):
        pass
    wait_for_metric(server, 'codeq_streams{kind="worker"}', 0)
    with go_producer(server) as client:
        ids = [client.produce(command, b"{}").task_id for _ in range(4)]
    with go_worker(server, completed, commands=(command,)) as worker:
        worker.wait_for_acks(4)
    assert [status_of(producer, task_id) for task_id in ids] == [("COMPLETED", 1, "NONE")] * 4


@pytest.mark.parametrize(
    ("token", "status"), [("wrong", "UNAUTHENTICATED"), ("", "UNAUTHENTICATED")]
)
def test_a_refused_token_ends_the_stream_with_a_status(
    server: Server, token: str, status: str
) -> None:
    with pytest.raises(StreamEnded, match=status):
        GoProducer(server.producer, token)
    with pytest.raises(StreamEnded, match=status):
        GoWorker(server.worker, token, completed)


def test_a_server_that_stops_fails_what_is_open(start_server: Any) -> None:
    server = start_server()
    producer = GoProducer(server.producer, "dev-producer")
    worker = GoWorker(server.worker, "dev-worker", completed, commands=("never",), concurrency=2)
    assert producer.produce("job", b"{}").ok
    assert server.terminate() == 0
    producer.join()
    worker.join()
    assert producer.ended == worker.ended == "StatusCode.UNAVAILABLE"
    assert producer.faults == worker.faults == []
    with pytest.raises(StreamEnded):
        producer.produce("job", b"{}")
