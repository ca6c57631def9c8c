"""Both streams over gRPC against a real server."""

from __future__ import annotations

import asyncio
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from codeq.config import Config, load
from codeq.engine.clock import Clock
from codeq.engine.shard import Shard
from codeq.server import grpc_server
from codeq.server.app import LoopRunner, shard_settings
from codeq.server.auth import Auth
from tests.conftest import IDLE_CPU_MS_MAX, IDLE_SECONDS, ROOT, Server, Tokens, cpu_ms
from tests.protos import producerpb, workerpb

PRODUCER = "/producerpb.ProducerStream/Stream"
WORKER = "/workerpb.WorkerStream/Stream"
PATIENCE_SECONDS = 30


class Line:
    """One call, bytes or messages up, messages down."""

    def __init__(self, channel: grpc.Channel, method: str = PRODUCER) -> None:
        self._proto = producerpb if "producer" in method else workerpb
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call = channel.stream_stream(method)(iter(self._out.get, None))

    def send(self, event: Any = None, **fields: Any) -> None:
        if event is None:
            kind = getattr(self._proto, "ProducerEvent", None) or self._proto.WorkerEvent
            event = kind(**fields).SerializeToString()
        self._out.put(event)

    def read(self) -> Any:
        return self._proto.ServerEvent.FromString(next(self.call))

    def half_close(self) -> None:
        self._out.put(None)

    def status(self) -> tuple[str, str]:
        """(code name, text), after reading what is left to the end."""
        with pytest.raises((grpc.RpcError, StopIteration)):
            while True:
                next(self.call)
        return self.call.code().name, self.call.details()

    def cancel(self) -> None:
        self._out.put(None)
        self.call.cancel()


@contextmanager
def channel(address: str) -> Iterator[grpc.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as opened:
        yield opened


@pytest.fixture
def producers(server: Server) -> Iterator[grpc.Channel]:
    with channel(server.producer) as opened:
        yield opened


@pytest.fixture
def workers(server: Server) -> Iterator[grpc.Channel]:
    with channel(server.worker) as opened:
        yield opened


def open_producer(opened: grpc.Channel) -> Line:
    line = Line(opened, PRODUCER)
    line.send(hello={"token": "dev-producer"})
    assert line.read().hello_ack == producerpb.HelloAck(tenant_id="dev", subject="dev-producer")
    return line


def open_worker(opened: grpc.Channel, worker_id: str = "") -> Line:
    line = Line(opened, WORKER)
    line.send(hello={"token": "dev-worker", "worker_id": worker_id})
    assert line.read().hello_ack.tenant_id == "dev"
    return line


def create(line: Line, command: str, count: int, **fields: Any) -> list[str]:
    """Ids of so many new tasks."""
    tasks = [producerpb.CreateTask(seq=n, command=command, **fields) for n in range(count)]
    line.send(create_batch={"tasks": tasks})
    ids: list[str] = []
    while len(ids) < count:
        event = line.read()
        acks = event.create_ack_batch.acks or [event.create_ack]
        assert all(ack.ok for ack in acks)
        ids += [ack.task_id for ack in acks]
    return ids


def metric(server: Server, name: str) -> float:
    text = httpx.get(f"http://{server.http}/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, f"no {name} in\n{text}"
    return float(found.group(1))


def wait_for_metric(server: Server, name: str, value: float) -> None:
    for _ in range(2000):
        if metric(server, name) == value:
            return
    pytest.fail(f"{name} is {metric(server, name)}, not {value}")


# --- opening and ending


@pytest.mark.parametrize(
    ("hello", "status"),
    [
        ({"create": {"seq": 1}}, ("FAILED_PRECONDITION", "first event must be Hello")),
        ({"hello": {"token": " "}}, ("UNAUTHENTICATED", "missing token")),
        ({"hello": {"token": "no"}}, ("UNAUTHENTICATED", "auth failed: invalid token")),
        ({"hello": {"token": "dev-worker"}}, ("UNAUTHENTICATED", "auth failed: invalid token")),
    ],
)
def test_status_of_a_refused_hello(
    producers: grpc.Channel, hello: dict[str, Any], status: tuple[str, str]
) -> None:
    line = Line(producers)
    line.send(**hello)
    assert line.status() == status


def test_no_hello_in_time(start_server: Any) -> None:
    server = start_server(STREAMS_HELLO_TIMEOUT_SECONDS="1")
    with channel(server.producer) as opened:
        assert Line(opened).status()[0] == "DEADLINE_EXCEEDED"


def test_unknown_methods_are_unimplemented(producers: grpc.Channel, workers: grpc.Channel) -> None:
    for opened in (producers, workers):
        for method in ("/producerpb.ProducerStream/Other", "/other.Service/Stream"):
            assert Line(opened, method).status()[0] == "UNIMPLEMENTED"
    assert Line(producers, WORKER).status()[0] == "UNIMPLEMENTED"


def test_half_close_flushes_acknowledgements_and_ends_ok(
    producers: grpc.Channel, workers: grpc.Channel, command: str
) -> None:
    line = open_producer(producers)
    for seq in range(200):
        line.send(create={"seq": seq, "command": command})
    line.half_close()
    seqs: list[int] = []
    while len(seqs) < 200:
        event = line.read()
        seqs += [ack.seq for ack in event.create_ack_batch.acks or [event.create_ack]]
    assert sorted(seqs) == list(range(200))
    assert line.status() == ("OK", "")
    waiting = open_worker(workers)
    waiting.send(ready={"commands": [command + "-other"]})
    waiting.half_close()
    assert waiting.status() == ("OK", "")


def test_a_second_hello_and_an_unknown_event_are_errors_and_the_stream_goes_on(
    producers: grpc.Channel, workers: grpc.Channel, command: str
) -> None:
    for line in (open_producer(producers), open_worker(workers)):
        line.send(hello={"token": "dev-worker"})
        error = line.read().error
        assert (error.code, error.message) == ("FailedPrecondition", "already-authenticated")
        line.send(b"")
        error = line.read().error
        assert (error.code, error.message) == ("InvalidArgument", "unknown-event")
        line.half_close()
        assert line.status() == ("OK", "")


def test_T47_a_bad_event_ends_at_most_its_stream(
    server: Server, producers: grpc.Channel, command: str
) -> None:
    good = open_producer(producers)
    for message in (b"\xff\xff\xff", b"\x12\x02\x12\xff", b"\x12\x03\x12\x01\xff"):
        bad = open_producer(producers)
        bad.send(message)
        code, text = bad.status()
        assert code == "INVALID_ARGUMENT"
        assert text == "malformed message"
    assert len(create(good, command, 1)) == 1
    good.cancel()
    wait_for_metric(server, 'codeq_streams{kind="producer"}', 0)


def test_T47_a_message_over_the_limit_ends_its_stream(start_server: Any) -> None:
    server = start_server(STREAMS_RECEIVE_BYTES="200000")
    with channel(server.producer) as opened:
        other, line = open_producer(opened), open_producer(opened)
        line.send(create={"seq": 1, "command": "job", "payload": bytes(300_000)})
        assert line.status()[0] == "RESOURCE_EXHAUSTED"
        assert len(create(other, "job", 1)) == 1


def test_cancelled_streams_leave_nothing_behind(server: Server, workers: grpc.Channel) -> None:
    lines = [open_worker(workers) for _ in range(100)]
    for line in lines:
        line.send(ready={"commands": ["never"]})
    wait_for_metric(server, "codeq_waiting_claims", 100)
    for line in lines:
        line.cancel()
    wait_for_metric(server, "codeq_waiting_claims", 0)
    wait_for_metric(server, 'codeq_streams{kind="worker"}', 0)


def test_a_killed_client_leaves_nothing_behind(server: Server) -> None:
    script = (
        "import queue, sys, grpc\n"
        "from tests.test_streams import open_worker\n"
        "line = open_worker(grpc.insecure_channel(sys.argv[1]))\n"
        "line.send(ready={'commands': ['never']})\n"
        "print('ready', flush=True)\n"
        "queue.SimpleQueue().get()\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", script, server.worker], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        wait_for_metric(server, "codeq_waiting_claims", 1)
        client.kill()
    wait_for_metric(server, "codeq_waiting_claims", 0)
    wait_for_metric(server, 'codeq_streams{kind="worker"}', 0)


# --- bounds


def test_T47_work_in_hand_is_bounded_and_nothing_is_dropped(start_server: Any) -> None:
    server = start_server(STREAMS_INFLIGHT_MAX="3", STREAMS_INFLIGHT_BYTES="1000")
    with channel(server.producer) as opened:
        line = open_producer(opened)
        for seq in range(1000):
            line.send(create={"seq": seq, "command": "job", "payload": bytes(seq % 500)})
        seen = 0
        while seen < 1000:
            event = line.read()
            acks = event.create_ack_batch.acks or [event.create_ack]
            assert len(acks) <= 3
            assert [ack.seq for ack in acks] == list(range(seen, seen + len(acks)))
            seen += len(acks)


def test_T47_too_many_readys_end_their_stream(start_server: Any) -> None:
    server = start_server(STREAMS_READYS_MAX="5")
    with channel(server.worker) as opened:
        line = open_worker(opened)
        for _ in range(6):
            line.send(ready={"commands": ["job"]})
        assert line.status() == ("RESOURCE_EXHAUSTED", "too many waiting Readys")
        wait_for_metric(server, "codeq_waiting_claims", 0)


def test_T46_a_huge_count_is_cut(
    producers: grpc.Channel, workers: grpc.Channel, command: str
) -> None:
    create(open_producer(producers), command, 1200)
    line = open_worker(workers)
    line.send(ready={"commands": [command], "count": 2**31 - 1})
    assert len(line.read().task_batch.tasks) == 1000
    line.send(ready={"commands": [command], "count": 2**31 - 1})
    assert len(line.read().task_batch.tasks) == 200
    line.cancel()


def test_T47_a_slow_reader_stalls_only_itself_and_holds_few_tasks(
    producers: grpc.Channel, workers: grpc.Channel, producer: httpx.Client, command: str
) -> None:
    line = open_producer(producers)
    for _ in range(20):
        create(line, command, 1, payload=b'"' + bytes(b"x" * 1_000_000) + b'"')
    slow, quick = open_worker(workers, "slow"), open_worker(workers, "quick")
    for _ in range(20):
        slow.send(ready={"commands": [command], "lease_seconds": 3600})
    got = 0
    while got < 12:
        quick.send(ready={"commands": [command]})
        task = quick.read().task.task
        quick.send(result={"task_id": task.id, "status": "COMPLETED"})
        assert quick.read().result_ack.ok
        got += 1
    stats = producer.get(f"/admin/queues/{command}").json()
    assert stats["inProgress"] <= 8
    slow.cancel()
    while got + stats["inProgress"] < 20 or stats["ready"]:
        quick.send(ready={"commands": [command], "lease_seconds": 60})
        task = quick.read().task.task
        assert task.attempts == 1
        quick.send(result={"task_id": task.id, "status": "COMPLETED"})
        assert quick.read().result_ack.ok
        got += 1
        stats = producer.get(f"/admin/queues/{command}").json()
    quick.cancel()


def test_T7_an_assignment_nobody_reads_goes_back_when_its_stream_is_cancelled(
    producers: grpc.Channel, workers: grpc.Channel, producer: httpx.Client, command: str
) -> None:
    line = open_producer(producers)
    ids = [create(line, command, 1, payload=bytes(4_000_000), max_attempts=1)[0] for _ in range(4)]
    lost = open_worker(workers, "lost")
    for _ in range(4):
        lost.send(ready={"commands": [command], "lease_seconds": 3600})
    while producer.get(f"/admin/queues/{command}").json()["inProgress"] == 0:
        pass
    lost.cancel()
    quick = open_worker(workers, "quick")
    seen = set()
    while producer.get(f"/admin/queues/{command}").json()["ready"]:
        quick.send(ready={"commands": [command]})
        task = quick.read().task.task
        assert task.attempts == 1
        seen.add(task.id)
    # What the transport of the lost stream had taken keeps its lease, the rest came at once.
    assert len(seen) >= 2
    assert seen <= set(ids)
    quick.cancel()


# --- waiting costs nothing


def test_T49_a_thousand_idle_waits_cost_no_cpu(start_server: Any) -> None:
    """Hardly more than none do: what it takes to wake up now and then is the machine's."""
    server = start_server()

    def spent_ms() -> float:
        before_ms = cpu_ms(server.pid)
        threading.Event().wait(IDLE_SECONDS)
        return cpu_ms(server.pid) - before_ms

    without_ms = spent_ms()
    with channel(server.worker) as opened:
        lines = [open_worker(opened) for _ in range(100)]
        for number, line in enumerate(lines):
            for slot in range(10):
                line.send(ready={"commands": [f"idle-{number}-{slot}"]})
        wait_for_metric(server, "codeq_waiting_claims", 1000)
        most_ms = 2 * without_ms + IDLE_CPU_MS_MAX
        assert any(spent_ms() < most_ms for _ in range(3)), "a stolen core is seldom"
        for line in lines:
            line.cancel()


# --- the listener itself


async def listeners(folder: Path, use: Any) -> None:
    """Runs ``use(start)`` with a real shard; ``start(kind, address)`` opens a listener on it."""
    data = str(folder / "data")
    config: Config = load(flags={"persistenceConfig.path": data, "limits.diskReserveBytes": 0})
    clock = Clock()
    runner = LoopRunner(clock)
    shard = Shard.open(shard_settings(config), clock, runner, pytest.fail)
    tokens = Tokens()
    opened: list[grpc_server.Listener] = []

    async def start(kind: str, address: str) -> grpc_server.Listener:
        auth = Auth(tokens, tokens)
        opened.append(await grpc_server.start(shard, auth, config, kind, address))
        return opened[-1]

    try:
        await use(start)
    finally:
        for listener in opened:
            await listener.stop(1)
        runner.stop()
        shard.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", ""])
def test_port_0_is_resolved_and_a_port_in_use_is_refused_in_one_line(
    tmp_path: Path, host: str
) -> None:
    async def use(start: Any) -> None:
        first = await start("producer", f"{host}:0")
        name, _, port = first.address.rpartition(":")
        assert int(port) > 0
        assert name == (host or "0.0.0.0")
        with pytest.raises(OSError) as refused:
            await start("worker", f"{host}:{port}")
        said = f"cannot listen on {name}:{port} for worker streams: Address already in use"
        assert str(refused.value) == said

    asyncio.run(listeners(tmp_path, use))


def test_an_address_of_another_machine_is_refused_in_one_line(tmp_path: Path) -> None:
    async def use(start: Any) -> None:
        for address in ("192.0.2.1:7777", "192.0.2.1:0", "no-such-host.invalid:7777"):
            with pytest.raises(OSError, match=r"^cannot listen on .* for producer streams: "):
                await start("producer", address)

    asyncio.run(listeners(tmp_path, use))


def test_stop_flushes_acknowledgements_and_ends_all_streams_unavailable(tmp_path: Path) -> None:
    async def use(start: Any) -> None:
        producer = await start("producer", "127.0.0.1:0")
        worker = await start("worker", "127.0.0.1:0")
        async with (
            grpc.aio.insecure_channel(producer.address) as up,
            grpc.aio.insecure_channel(worker.address) as down,
        ):
            calls = [up.stream_stream(PRODUCER)(), down.stream_stream(WORKER)()]
            await calls[0].write(
                producerpb.ProducerEvent(hello={"token": "acme/p"}).SerializeToString()
            )
            await calls[1].write(
                workerpb.WorkerEvent(hello={"token": "acme/w"}).SerializeToString()
            )
            for call in calls:
                assert isinstance(await call.read(), bytes)
            assert (producer.streams_of(None), worker.streams_of("acme")) == (1, 1)
            await calls[1].write(workerpb.WorkerEvent(ready={}).SerializeToString())
            create_event = producerpb.ProducerEvent(create={"seq": 7, "command": "job"})
            await calls[0].write(create_event.SerializeToString())
            assert isinstance(await calls[1].read(), bytes)
            await asyncio.gather(producer.stop(5), worker.stop(5))
            event = producerpb.ServerEvent.FromString(await calls[0].read())
            assert event.create_ack.seq == 7
            for call in calls:
                assert await call.code() is grpc.StatusCode.UNAVAILABLE
                assert await call.details() == "server is stopping"
            assert (producer.streams_of(None), worker.streams_of(None)) == (0, 0)

    asyncio.run(listeners(tmp_path, use))
