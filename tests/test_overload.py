"""Ten times more than the server can take: what is in hand stays bounded by the settings, tenants
share it, refusals say when to come again, and claims and results go on.

A real shard behind real listeners inside the test's loop, so that bytes in hand can be counted; the
disk is as slow as the test wants it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from codeq.config import Config, load
from codeq.engine import shard as shard_module
from codeq.engine.clock import Clock
from codeq.engine.shard import Shard
from codeq.server import grpc_server, http_server
from codeq.server.app import LoopRunner, shard_settings
from codeq.server.auth import Auth
from codeq.server.http_server import HttpListener, reserve
from codeq.server.limits import Limits
from codeq.server.metrics import Metrics
from codeq.server.request import PART_BYTES
from codeq.server.rest import RestApp
from codeq.server.streams import InFlight
from tests.conftest import ANY_PORT, PREFIX, Tokens, refusal
from tests.lines import FakePrincipal, House
from tests.node import Node
from tests.protos import producerpb, workerpb

WAIT_SECONDS = 30
KB, MB = 1 << 10, 1 << 20
#: Bytes of a message or body beside its payload, at most
AROUND_BYTES = 200


class SlowDisk(LoopRunner):
    """Syncs end when the test lets them."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._open = threading.Event()
        self._open.set()

    def run(self, work: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        def late() -> None:
            assert self._open.wait(WAIT_SECONDS)
            work()

        super().run(late, done)

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """Inside, no sync ends."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()


class Served:
    """A whole server in the loop of the test; every "tenant/subject" is a token of both roles."""

    def __init__(self, config: Config, disk: SlowDisk, shard: Shard) -> None:
        self.config = config
        self.disk = disk
        self.shard = shard
        self.auth = Auth(Tokens(), Tokens())
        self.in_flight = InFlight(config.limits.inflight_bytes)
        limits = Limits(config.rate_limit, shard.clock)
        metrics = Metrics(shard, limits)
        self.app = RestApp(shard, self.auth, config, metrics, self.in_flight, limits)
        self.http = HttpListener(self.app, config, reserve("127.0.0.1", 0, "REST"), None)
        self.streams: dict[str, grpc_server.Listener] = {}
        self.stack = AsyncExitStack()

    async def start(self) -> None:
        await self.http.start()
        for kind in ("producer", "worker"):
            self.streams[kind] = await grpc_server.start(
                *(self.shard, self.auth, self.config, kind, ANY_PORT), in_flight=self.in_flight
            )

    async def client(self, token: str) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            base_url=f"http://{self.http.address}{PREFIX}",
            headers={"authorization": f"Bearer {token}"},
            timeout=WAIT_SECONDS,
            limits=httpx.Limits(max_connections=None),
        )
        return await self.stack.enter_async_context(client)

    async def line(self, kind: str, token: str) -> Line:
        """An open stream, greeted."""
        channel = grpc.aio.insecure_channel(self.streams[kind].address)
        await self.stack.enter_async_context(channel)
        line = Line(channel, kind)
        await line.send(hello={"token": token})
        assert (await line.read()).HasField("hello_ack")
        return line

    async def raw(self, token: str, path: str, body: dict[str, Any]) -> Raw:
        """A request on a connection of its own, of whose answer nothing is read yet."""
        host, port = self.http.address.split(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KB)
        connection.setblocking(False)
        self.stack.callback(connection.close)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (host, int(port)))
        content = json.dumps(body).encode()
        head = (
            f"POST {PREFIX}{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        await loop.sock_sendall(connection, head.encode() + content)
        return Raw(connection)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Lets the server work until this holds."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not holds():
                await self.turn()

    async def turn(self) -> None:
        """One round trip through the HTTP server: whatever was under way has moved on."""
        async with httpx.AsyncClient(verify=False) as client:  # it need not read who vouches
            await client.get(f"http://{self.http.address}/healthz")


class Raw:
    """A connection whose answer is read when the test wants it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    async def read_all(self) -> bytes:
        """The answer until its announced end, or until the server cuts it off."""
        loop = asyncio.get_running_loop()
        got = b""
        async with asyncio.timeout(WAIT_SECONDS):
            while len(got) < self._size(got):
                part = await loop.sock_recv(self._connection, MB)
                if not part:
                    break
                got += part
        return got

    def close(self) -> None:
        self._connection.close()

    @staticmethod
    def _size(got: bytes) -> int:
        head, end, _ = got.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
        return len(head) + len(end) + int(length) if end else len(got) + 1


class Line:
    """A real stream, in the generated protobuf classes."""

    def __init__(self, channel: grpc.aio.Channel, kind: str) -> None:
        name = kind.capitalize()
        module: Any = producerpb if kind == "producer" else workerpb
        self._event = getattr(module, f"{name}Event")
        call: Any = channel.stream_stream(
            f"/{kind}pb.{name}Stream/Stream",
            request_serializer=self._event.SerializeToString,
            response_deserializer=module.ServerEvent.FromString,
        )
        self.call = call()

    async def send(self, **members: Any) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            await self.call.write(self._event(**members))

    async def read(self) -> Any:
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.call.read()

    async def acks(self, count: int) -> list[Any]:
        """So many acknowledgements of creates, in the order of their numbers."""
        found: list[Any] = []
        while len(found) < count:
            event = await self.read()
            found += event.create_ack_batch.acks or [event.create_ack]
        return sorted(found, key=lambda ack: int(ack.seq))


@asynccontextmanager
async def served(folder: Path, **flags: Any) -> AsyncIterator[Served]:
    """A running server; in the end nothing is in hand any more. ``limits_x`` is ``limits.x``."""
    config: Config = load(
        flags={
            "limits.diskReserveBytes": 0,
            "persistenceConfig.path": str(folder / "data"),
            "leaseGraceSeconds": 0,
            **{name.replace("_", "."): value for name, value in flags.items()},
        }
    )
    clock = Clock()
    disk = SlowDisk(clock)
    faults: list[str] = []
    shard = Shard.open(shard_settings(config), clock, disk, faults.append)
    node = Served(config, disk, shard)
    await node.start()
    try:
        async with node.stack:
            yield node
            await node.stack.aclose()
            await node.until(lambda: node.in_flight.total == 0)
    finally:
        node.app.stop()
        stops = [listener.stop(1) for listener in node.streams.values()]
        await asyncio.gather(node.http.stop(1), *stops)
        disk.stop()
        shard.close()
    assert not faults


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 100))  # type: ignore[arg-type]


def body(command: str = "job", size: int = 0) -> dict[str, Any]:
    return {"command": command, "payload": "x" * size}


def assert_refused(response: httpx.Response, message: str) -> None:
    """503 in the one shape, and when to come again."""
    assert refusal(response) == (503, "unavailable", message)
    assert int(response.headers["retry-after"]) >= 1


# --- REST creates


def test_creates_over_rest_are_bounded_and_shared_by_tenants(tmp_path: Path) -> None:
    """Ten times the bytes allowed at once from one tenant, and a little from another."""

    async def scenario() -> None:
        async with served(tmp_path, limits_inflightBytes=MB) as node:
            greedy, modest = await node.client("greedy/p"), await node.client("modest/p")
            with node.disk.stuck():
                asked = [
                    asyncio.create_task(greedy.post("/tasks", json=body(size=50 * KB)))
                    for _ in range(200)
                ]
                await node.until(lambda: sum(task.done() for task in asked) >= 170)  # 21 fit
                assert MB <= node.in_flight.total <= MB + 60 * KB
                fair = asyncio.create_task(modest.post("/tasks", json=body(size=50 * KB)))
                before = node.in_flight.total
                await node.until(lambda: node.in_flight.total > before)
                assert not fair.done()
            assert (await fair).status_code == 201
            answers = await asyncio.gather(*asked)
            refused = [answer for answer in answers if answer.status_code != 201]
            for answer in refused:
                assert_refused(answer, "too many bytes in hand")
            assert 15 <= len(answers) - len(refused) <= 30
            assert (await greedy.post("/tasks", json=body())).status_code == 201, "it is over"

    run(scenario)


def test_a_body_too_long_for_the_room_left_is_refused_while_it_comes(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with served(tmp_path, limits_inflightBytes=MB) as node:
            client = await node.client("shop/p")
            lone = await client.post("/tasks", json=body(size=3 * MB))
            assert lone.status_code == 201, "a body alone may be larger than the limit"
            await node.until(lambda: node.in_flight.total == 0)
            with node.disk.stuck():
                first = asyncio.create_task(client.post("/tasks", json=body(size=900 * KB)))
                await node.until(lambda: node.in_flight.total > 900 * KB)
                several = [
                    asyncio.create_task(client.post("/tasks", json=body(size=3 * MB)))
                    for _ in range(10)
                ]
                await node.until(lambda: sum(task.done() for task in several) == 9)
                assert node.in_flight.total <= 4 * MB, "the limit, and one body more"
                for task in several:
                    if task.done():
                        assert_refused(task.result(), "too many bytes in hand")
            made = [await task for task in (first, *several)]
            assert sum(answer.status_code == 201 for answer in made) == 2

    run(scenario)


# --- streams


def test_T47_producer_streams_are_read_only_as_fast_as_the_disk_takes_it(tmp_path: Path) -> None:
    """A stuck disk stops the reading, not the server; then all goes on, and no create is lost or
    refused."""
    streams, creates, size = 20, 40, 20 * KB

    async def scenario() -> None:
        async with served(tmp_path, limits_inflightBytes=MB) as node:
            lines = [await node.line("producer", f"t{i % 4}/p") for i in range(streams)]

            async def produce(line: Line) -> None:
                for seq in range(creates):
                    await line.send(create={"seq": seq, "command": "job", "payload": bytes(size)})

            with node.disk.stuck():
                sending = [asyncio.create_task(produce(line)) for line in lines]
                await node.until(lambda: node.in_flight.total >= MB)
                for _ in range(20):
                    await node.turn()
                message = size + AROUND_BYTES
                # What tenants lack of their quarters when all is spent, and a message a stream.
                most = MB * 7 // 4 + streams * message
                assert node.in_flight.total <= most < streams * creates * size // 4
                assert node.shard.engine.live_tasks <= most // size
            for line in lines:
                acks = await line.acks(creates)
                assert [ack.seq for ack in acks] == list(range(creates))
                assert all(ack.ok for ack in acks)
            await asyncio.gather(*sending)
            assert node.shard.engine.live_tasks == streams * creates

    run(scenario)


def test_T47_assignments_nobody_takes_are_bounded_and_stall_no_other_tenant(
    tmp_path: Path,
) -> None:
    """Fifty streams of one tenant that do not read, without a transport that would buffer."""
    node = Node(tmp_path / "data")
    house = House(node.shard, bytes_in_all=400 * KB)
    house.auth.tokens["other"] = FakePrincipal(tenant="other")
    for tenant in ("acme", "other"):
        node.create_batch([{"payload": bytes(100 * KB)} for _ in range(50)], tenant)
    slow = [house.worker(worker_id=f"w{i}") for i in range(50)]
    for line in slow:
        line.ready("job")
    node.settle()
    taken = [line for line in slow if line.session.take() is not None]
    assert len(taken) == 8, "twice the bytes allowed, in messages of a little over 100 KB"
    assert 800 * KB <= house.in_flight.total <= 900 * KB
    quick = house.worker(token="other")
    for _ in range(50):
        quick.ready("job")
        node.settle()
        assert quick.read().HasField("task")
    before = sum(line.writer_woken for line in slow)
    taken[0].session.sent()
    taken[1].session.close()
    woken = sum(line.writer_woken for line in slow) - before
    assert 2 <= woken <= 6, "as many as may find room, not all that wait"
    for line in slow:
        line.session.close()
    node.settle()
    assert house.in_flight.total == 0
    assert node.stats("job", "acme") == (49, 0, 1, 0)
    node.close()


def test_T47_a_stream_that_ends_while_it_waits_passes_its_turn_on() -> None:
    shared = InFlight(100)
    woken: list[str] = []
    wakes = {name: (lambda name=name: woken.append(name)) for name in "abc"}
    shared.take("x", 100)
    for wake in wakes.values():
        shared.wait("x", wake)
    shared.forget("x", wakes["a"])
    assert woken == []
    shared.release("x", 100)
    assert woken == ["b"]
    shared.forget("x", wakes["b"])  # it was woken, and ends instead of reading
    assert woken == ["b", "c"]


# --- what the journal has not written yet


def test_a_slow_disk_refuses_creates_and_takes_results(tmp_path: Path) -> None:
    """limits.journalPendingBytes: streams wait, REST says why, claims and results are decided and
    answered with the next groups."""
    size, most = 2 * KB, 256 * KB  # less than a group may hold

    async def scenario() -> None:
        async with served(tmp_path, limits_journalPendingBytes=most) as node:
            rest, worker = await node.client("shop/p"), await node.client("shop/w")
            for _ in range(3):
                await rest.post("/tasks", json=body("old"))
            first, second = [(await worker.post("/tasks/claim", json={})).json() for _ in range(2)]
            line = await node.line("producer", "shop/p")
            with node.disk.stuck():
                create = {"command": "job", "payload": bytes(size)}
                for seq in range(5):  # one is being written, two are too much
                    tasks = [{"seq": seq * 100 + i, **create} for i in range(100)]
                    await line.send(create_batch={"tasks": tasks})
                await node.until(lambda: node.shard.refuses_creates is not None)
                for _ in range(20):
                    await node.turn()
                assert node.shard.engine.pending_bytes <= most + 100 * (size + AROUND_BYTES)
                because = "too much waits to be written to disk"
                assert_refused(await rest.post("/tasks", json=body()), because)
                ready = await rest.get(f"http://{node.http.address}/readyz")
                assert ready.status_code == 503
                tasks = [first["id"], second["id"]]
                ends = [
                    asyncio.create_task(
                        worker.post(f"/tasks/{task}/result", json={"status": "COMPLETED"})
                    )
                    for task in tasks
                ]
                claim = asyncio.create_task(worker.post("/tasks/claim", json={"commands": ["old"]}))
                await node.until(lambda: in_progress(node) == 0)
                groups = node.shard.journal.groups
            assert [(await end).status_code for end in ends] == [200, 200]
            assert (await claim).status_code == 200
            assert node.shard.journal.groups <= groups + 3
            assert all(ack.ok for ack in await line.acks(500))
            assert node.shard.refuses_creates is None
            assert (await rest.post("/tasks", json=body())).status_code == 201

    def in_progress(node: Served) -> int:
        return node.shard.engine.stats(b"shop", b"old")[2]

    run(scenario)


def test_a_slow_disk_holds_creates_and_results_back_before_it_refuses_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit group is one write, which holds the loop: it must not grow with the sync before."""
    largest, size = 200 * KB, 20 * KB
    monkeypatch.setattr(shard_module, "GROUP_BYTES_MAX", largest)

    async def scenario() -> None:
        async with served(tmp_path) as node:
            rest, worker = await node.client("shop/p"), await node.client("shop/w")
            await fill(node, "shop", count=40, size=KB)
            claimed = await worker.post("/tasks/claim/batch", json={"count": 40})
            ids = [task["id"] for task in claimed.json()["tasks"]]
            producer, results = (
                await node.line("producer", "shop/p"),
                await node.line("worker", "shop/w"),
            )

            async def produce() -> None:
                for seq in range(100):
                    await producer.send(
                        create={"seq": seq, "command": "job", "payload": bytes(size)}
                    )

            async def finish() -> None:
                end = {"status": "COMPLETED", "result_json": b'"%s"' % bytes(b"x" * size)}
                for task_id in ids[:20]:
                    await results.send(result={"task_id": task_id, **end})

            end = {"status": "COMPLETED", "result": "x" * size}
            with node.disk.stuck():
                asked = [
                    asyncio.create_task(rest.post("/tasks", json=body(size=size)))
                    for _ in range(20)
                ]
                asked += [
                    asyncio.create_task(worker.post(f"/tasks/{task_id}/result", json=end))
                    for task_id in ids[20:]
                ]
                sending = [asyncio.create_task(produce()), asyncio.create_task(finish())]
                await node.until(lambda: node.shard.group_full)
                for _ in range(20):
                    await node.turn()
                assert node.shard.engine.pending_bytes <= largest + 3 * (size + AROUND_BYTES)
                assert node.shard.refuses_creates is None
            answers = await asyncio.gather(*asked)
            assert [answer.status_code for answer in answers] == [201] * 20 + [200] * 20
            assert all(ack.ok for ack in await producer.acks(100))
            await asyncio.gather(*sending)
            await node.until(lambda: node.shard.engine.stats(b"shop", b"job")[2] == 0)

    run(scenario)


def test_readyz_is_503_while_a_sync_takes_longer_than_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as node:
            client = await node.client("shop/p")

            async def ready() -> int:
                return (await client.get(f"http://{node.http.address}/readyz")).status_code

            began_s = node.shard.clock.monotonic_s()
            monkeypatch.setattr(node.shard.clock, "monotonic_s", lambda: began_s)
            with node.disk.stuck():
                create = asyncio.create_task(client.post("/tasks", json=body()))
                await node.until(lambda: node.shard.engine.live_tasks == 1)
                assert await ready() == 200
                monkeypatch.setattr(node.shard.clock, "monotonic_s", lambda: began_s + 5.1)
                assert await ready() == 503
            assert (await create).status_code == 201
            await node.until(lambda: node.shard.journal.syncing_s == 0)
            assert await ready() == 200

    run(scenario)


# --- live tasks, payloads in memory, connections


def test_claims_and_results_are_as_quick_as_ever_while_creates_are_refused(tmp_path: Path) -> None:
    """limits.liveTasks, with ten producers for each worker. Time is counted in commit groups: a
    claim and a result each take one group more than the one that is being written."""

    async def scenario() -> None:
        async with served(tmp_path, limits_liveTasks=50) as node:
            client, worker = await node.client("shop/p"), await node.client("shop/w")
            stop = asyncio.Event()
            statuses: dict[int, int] = {}

            async def flood() -> None:
                while not stop.is_set():
                    answer = await client.post("/tasks", json=body())
                    statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                    if answer.status_code != 201:
                        assert_refused(answer, "there are as many live tasks as allowed")

            floods = [asyncio.create_task(flood()) for _ in range(10)]
            await node.until(lambda: statuses.get(503, 0) > 20)
            waits = []
            for _ in range(30):
                before = node.shard.journal.groups
                task = (await worker.post("/tasks/claim", json={"waitSeconds": 20})).json()
                waits.append(node.shard.journal.groups - before)
                before = node.shard.journal.groups
                end = await worker.post(f"/tasks/{task['id']}/result", json={"status": "COMPLETED"})
                assert end.status_code == 200
                waits.append(node.shard.journal.groups - before)
                assert node.shard.engine.live_tasks <= 50
            stop.set()
            await asyncio.gather(*floods)
            assert max(waits) <= 4
            assert statuses[201] >= 30, "the place of each ended task was taken again"

    run(scenario)


def test_a_create_refused_in_the_shard_says_why_on_rest_only(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with served(tmp_path, limits_liveTasks=2, limits_createBatch=2) as node:
            line = await node.line("producer", "shop/p")
            tasks = [{"seq": seq, "command": "job"} for seq in range(4)]
            await line.send(create_batch={"tasks": tasks})
            acks = await line.acks(4)
            assert [ack.error_message for ack in acks] == ["", "", "unavailable", "unavailable"]
            rest, worker = await node.client("shop/p"), await node.client("shop/w")
            [task] = (await worker.post("/tasks/claim/batch", json={"count": 1})).json()["tasks"]
            await worker.post(f"/tasks/{task['id']}/result", json={"status": "COMPLETED"})
            with node.disk.stuck():  # both pass the first look, one finds the place taken
                both = [asyncio.create_task(rest.post("/tasks", json=body())) for _ in range(2)]
                await node.until(lambda: node.shard.engine.live_tasks == 2)
            answers = sorted(await asyncio.gather(*both), key=lambda answer: answer.status_code)
            assert answers[0].status_code == 201
            assert_refused(answers[1], "there are as many live tasks as allowed")

    run(scenario)


def test_payloads_in_memory_are_bounded_whatever_waits(tmp_path: Path) -> None:
    """limits.payloadMemoryBytes: ten times as much waits, and comes back whole from disk."""
    node = Node(tmp_path / "data", payload_memory_bytes=100 * KB)
    payloads = [b"%d" % i * (10 * KB // len(b"%d" % i)) for i in range(100)]
    for payload in payloads:
        node.create(payload=payload)
        assert node.shard.engine.body_bytes <= 100 * KB + 20 * KB
    assert [view.payload for view in node.claim(count=100, bytes_max=10 * MB)] == payloads
    node.close()


def test_T48_streams_past_the_limit_of_connections_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path, limits_connections=3) as node:
            lines = [await node.line("worker", "shop/w") for _ in range(3)]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await node.line("worker", "shop/w")
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            lines[0].call.cancel()
            await node.until(lambda: node.streams["worker"].streams_of(None) == 2)
            await node.line("worker", "shop/w")

    run(scenario)


# --- readers of REST that do not read


async def fill(node: Served, tenant: str, count: int, size: int) -> None:
    """``count`` tasks whose payloads have this size."""
    client = await node.client(f"{tenant}/p")
    each = max(1, MB // size)
    for begin in range(0, count, each):
        tasks = [body(size=size) for _ in range(min(each, count - begin))]
        assert (await client.post("/tasks/batch", json=tasks)).status_code == 200


def test_T47_answers_that_a_slow_client_does_not_take_are_bounded(tmp_path: Path) -> None:
    """Twenty requests for 4 MB each, of which nothing is read, with 4 MB allowed in hand."""
    limit, answer = 4 * MB, 4 * MB

    async def scenario() -> None:
        flags = {"limits_inflightBytes": limit, "limits_payloadMemoryBytes": 512 * MB}
        async with served(tmp_path, **flags) as node:
            await fill(node, "slow", count=80, size=MB)
            await fill(node, "quick", count=4, size=MB)
            ask = ("slow/w", "/tasks/claim/batch", {"count": 4})
            slow = [await node.raw(*ask)]
            await node.until(lambda: node.in_flight.total >= answer)
            slow += [await node.raw(*ask) for _ in range(19)]
            await node.until(lambda: node.in_flight.total >= 2 * limit)
            for _ in range(20):
                await node.turn()
            assert node.in_flight.total <= 2 * limit + answer + 4 * KB
            more = await node.client("slow/w2")
            assert_refused(await more.post("/tasks/claim", json={}), "too many bytes in hand")
            refused = await (await node.client("slow/p")).post("/tasks", json=body())
            assert_refused(refused, "too many bytes in hand")
            quick = await node.client("quick/w")
            got = await quick.post("/tasks/claim/batch", json={"count": 4})
            assert len(got.json()["tasks"]) == 4
            whole = await slow[0].read_all()
            assert whole.count(b'"payload":"') == 4
            for connection in slow[1:]:
                connection.close()
            await node.until(lambda: node.in_flight.total == 0)
            await node.until(lambda: node.shard.engine.stats(b"slow", b"job")[2] == 4)
            task = (await more.post("/tasks/claim", json={})).json()
            assert task["attempts"] == 1, "what was not taken went back untried"

    run(scenario)


def test_T48_an_answer_that_is_not_taken_is_cut_off_and_its_tasks_go_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as node:
            await fill(node, "slow", count=5, size=MB)
            stalled = await node.raw("slow/w", "/tasks/claim/batch", {"count": 5})
            await node.until(lambda: node.in_flight.total > 5 * MB)
            node.app.edge.transfers.end_older(0)
            await node.until(lambda: node.in_flight.total == 0)
            await node.until(lambda: node.shard.engine.stats(b"slow", b"job")[0] == 5)
            cut = await stalled.read_all()
            assert len(cut) < 5 * MB

    run(scenario)


def test_T48_the_kernel_drops_a_connection_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "STALL_SECONDS", 4)

    async def scenario() -> None:
        async with served(tmp_path) as node:
            await fill(node, "slow", count=5, size=MB)
            await node.raw("slow/w", "/tasks/claim/batch", {"count": 5})
            await node.until(lambda: node.in_flight.total > 5 * MB)
            other = await node.client("slow/w2")
            got = await other.post("/tasks/claim/batch", json={"count": 5, "waitSeconds": 20})
            assert len(got.json()["tasks"]) == 5, "they went back when the kernel gave up"

    run(scenario)


def test_a_long_answer_arrives_whole(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path) as node:
            producer, worker = await node.client("shop/p"), await node.client("shop/w")
            for size in (PART_BYTES - AROUND_BYTES, PART_BYTES, 3 * PART_BYTES + 1, 4_000_000):
                task = (await producer.post("/tasks", json=body(size=size))).json()
                assert task["payload"] == json.dumps("x" * size)
                answer = await worker.post("/tasks/claim", json={})
                assert answer.json()["payload"] == task["payload"]
                assert int(answer.headers["content-length"]) == len(answer.content)
                again = await producer.get(f"/tasks/{task['id']}")
                assert again.json()["payload"] == task["payload"]

    run(scenario)
