"""Signed tokens at the edges: requests and streams that wait for keys, and streams that end with
their token."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from codeq import CodeqError, Producer, Task, Worker
from codeq.server import streams
from codeq.server.auth import KEY_WAITS_MAX, Auth, KeysAwaited
from codeq.server.jwks import KEPT_MS, RETRY_MS, Download, JwksProvider, KeySource
from codeq.server.providers import MultiProvider
from codeq.server.streams import Status

from .conftest import ANY_PORT, RestNode, Server, Tokens, refusal, rest_node
from .fake_shard import FakeShard
from .issuer import AUDIENCE, ISSUER, Desk, Issuer, JwksServer, jwks_server
from .lines import House
from .protos import producerpb, workerpb

STORM = 1000


@pytest.fixture
def served() -> Iterator[JwksServer]:
    with jwks_server() as server:
        yield server


def downloading(desk: Desk, server: JwksServer) -> JwksProvider:
    """The desk's provider with its keys on a real server."""
    server.document = desk.issuer.document()
    load = Download(server.url, 20_000)
    desk.provider._source = desk.source = KeySource("jwksUrl", load, desk.clock.now_ms)
    return desk.provider


# --- REST


def play(
    folder: Path, server: JwksServer, scenario: Callable[[RestNode, Desk], Awaitable[None]]
) -> None:
    """A node that knows "tenant/subject" tokens and those of an issuer."""

    async def run() -> None:
        desk = Desk()
        provider = MultiProvider([Tokens(), downloading(desk, server)])
        async with asyncio.timeout(90), rest_node(folder, provider) as node:
            await scenario(node, desk)

    asyncio.run(run())


async def held(server: JwksServer) -> None:
    """Until the server has been asked for its keys."""
    assert await asyncio.to_thread(server.asked.wait, 20)
    server.asked.clear()


async def status(node: RestNode, token: str) -> int:
    return (await (await node.client(token)).get("/raft/status")).status_code


def test_T41_who_needs_keys_waits_and_others_go_on(tmp_path: Path, served: JwksServer) -> None:
    async def scenario(node: RestNode, desk: Desk) -> None:
        served.hold.clear()
        bodies = [{"command": "job", "payload": n} for n in range(3)]
        client = await node.client(desk.issuer.token())
        waiting = [asyncio.create_task(client.post("/tasks", json=body)) for body in bodies]
        await held(served)
        assert await status(node, "acme/p") == 200
        assert not any(task.done() for task in waiting)
        served.hold.set()
        assert [(await task).status_code for task in waiting] == [201] * 3
        assert served.hits == 1

    play(tmp_path, served, scenario)


def test_T41_a_storm_of_unknown_kids_over_rest_is_one_fetch(
    tmp_path: Path, served: JwksServer
) -> None:
    async def scenario(node: RestNode, desk: Desk) -> None:
        assert await status(node, desk.issuer.token()) == 200
        desk.clock.advance(RETRY_MS)
        served.asked.clear()
        served.hold.clear()
        client = await node.client("")
        storm = [
            asyncio.create_task(client.post("/tasks/claim", headers=bearer(desk, f"unknown-{n}")))
            for n in range(STORM)
        ]
        await held(served)
        assert await status(node, desk.issuer.token()) == 200
        served.hold.set()
        for answer in await asyncio.gather(*storm):
            assert refusal(answer)[:2] == (401, "unauthenticated")
        assert served.hits == 2

    play(tmp_path, served, scenario)


def bearer(desk: Desk, kid: str) -> dict[str, str]:
    return {"authorization": f"Bearer {desk.issuer.token(kid)}"}


def test_T41_keys_turn_and_a_withdrawn_one_dies(tmp_path: Path, served: JwksServer) -> None:
    async def scenario(node: RestNode, desk: Desk) -> None:
        old = desk.issuer.token()
        assert await status(node, old) == 200
        desk.issuer.add("k2")
        new = desk.issuer.token("k2")
        served.document = desk.issuer.document("k2")
        desk.clock.advance(RETRY_MS - 1)
        assert [await status(node, token) for token in (old, new)] == [200, 401]
        desk.clock.advance(1)
        assert [await status(node, token) for token in (new, old)] == [200, 401]
        served.status = 500
        desk.clock.advance(KEPT_MS)
        assert await status(node, new) == 200
        assert served.hits == 3

    play(tmp_path, served, scenario)


def test_no_keys_at_all_is_503(tmp_path: Path, served: JwksServer) -> None:
    async def scenario(node: RestNode, desk: Desk) -> None:
        served.status = 503
        client = await node.client(desk.issuer.token())
        text = "multi auth: token rejected by every provider: invalid token; "
        for _ in range(2):
            answer = await client.post("/tasks", json={})
            expected = (503, "unavailable", text + "token keys cannot be fetched")
            assert refusal(answer) == expected
            assert answer.headers["retry-after"] == "1"
        assert (await client.get("/raft/status")).status_code == 503
        assert served.hits == 1

    play(tmp_path, served, scenario)


def test_a_stop_ends_the_wait_for_keys(tmp_path: Path, served: JwksServer) -> None:
    async def scenario(node: RestNode, desk: Desk) -> None:
        served.hold.clear()
        client = await node.client(desk.issuer.token())
        waiting = asyncio.create_task(client.post("/tasks", json={}))
        await held(served)
        node.app.stop()
        assert refusal(await waiting) == (503, "unavailable", "unavailable")

    play(tmp_path, served, scenario)


def test_nobody_waits_for_keys_for_ever(tmp_path: Path) -> None:
    class Never:
        asked = 0

        def identify(self, token: str) -> Any:
            self.asked += 1
            raise KeysAwaited(lambda call: call())

    async def run() -> None:
        never = Never()
        async with rest_node(tmp_path, never) as node:
            client = await node.client("x")
            answer = await client.post("/tasks", json={})
            assert refusal(answer) == (503, "unavailable", "token keys cannot be fetched")
            assert never.asked == KEY_WAITS_MAX + 1
            house = House(FakeShard())
            house.edge.auth = Auth(never, never)
            line = house.producer(token=None)
            line.send(hello={"token": "x"})
            assert line.session.status == Status("UNAVAILABLE", "token keys cannot be fetched")

    asyncio.run(run())


# --- Hello


class Lobby:
    """Both kinds of stream on one clock, with the tokens of a desk."""

    def __init__(self, **settings: Any) -> None:
        self.desk = Desk()
        shard = FakeShard()
        shard.clock = self.desk.clock
        self.house = House(shard, **settings)
        self.house.edge.auth = Auth(self.desk.provider, self.desk.provider)

    def lines(self) -> list[Any]:
        return [self.house.producer(token=None), self.house.worker(token=None)]


def test_a_hello_that_needs_keys_waits_and_reads_nothing_meanwhile() -> None:
    lobby = Lobby()
    lines = lobby.lines()
    for line in lines:
        line.send(hello={"token": lobby.desk.issuer.token()})
        assert line.read() is None and line.session.status is None
        assert not line.session.may_read()
    assert lobby.desk.place.fetches == 1
    assert lobby.house.in_flight.total == 0
    lobby.desk.place.answer(lobby.desk.issuer.document())
    for line in lines:
        assert line.reader_woken and line.session.may_read()
        assert line.read().WhichOneof("event") == "hello_ack"
        assert line.session.status is None
    assert all(timer.cancelled for timer in lobby.house.timers)


def test_a_hello_whose_keys_do_not_come() -> None:
    lobby = Lobby()
    lines = lobby.lines()
    for line in lines:
        line.send(hello={"token": lobby.desk.issuer.token()})
    lobby.desk.place.answer(OSError("no route to host"))
    for line in lines:
        assert line.session.status == Status("UNAVAILABLE", "token keys cannot be fetched")
        assert line.session.over


def test_a_stream_may_end_while_its_hello_waits() -> None:
    lobby = Lobby()
    overdue, stopped, gone = (lobby.house.worker(token=None) for _ in range(3))
    for line in (overdue, stopped, gone):
        line.send(hello={"token": lobby.desk.issuer.token()})
    lobby.house.timers[0].callback()
    stopped.session.end(*streams.STOPPING)
    gone.session.close()
    for line in (overdue, stopped, gone):
        assert line.session.over
    lobby.desk.place.answer(lobby.desk.issuer.document())
    assert overdue.read() is None and overdue.session.over
    assert lobby.house.in_flight.total == 0


def test_T41_tokens_refused_at_hello() -> None:
    lobby = Lobby()
    lobby.desk.fetched()
    desk = lobby.desk
    for token, text in (
        (desk.issuer.token("k9"), "unknown kid"),
        (desk.issuer.token(None), "missing kid"),
        (desk.issuer.token(exp=None), "missing exp"),
        (desk.issuer.token(exp=5), "token expired"),
    ):
        for line in lobby.lines():
            line.send(hello={"token": token})
            assert line.session.status == Status("UNAUTHENTICATED", f"auth failed: {text}")


# --- the end of a token


def test_T42_streams_end_with_their_token_when_so_set() -> None:
    lobby = Lobby(end_at_token_expiry=True)
    lobby.desk.fetched()
    lines = lobby.lines()
    long = lobby.desk.issuer.token(exp=lobby.desk.issuer.now_s + 100_000)
    for line in lines:
        line.send(hello={"token": long})
        line.read_hello_ack()
    timers = lobby.house.timers[-2:]
    assert [timer.seconds for timer in timers] == [86_400, 86_400]
    lobby.desk.clock.advance(86_400_000)
    for timer in timers:
        timer.callback()
    timers = lobby.house.timers[-2:]
    assert [timer.seconds for timer in timers] == [13_600, 13_600]
    lobby.desk.clock.advance(13_600_000 - 1)
    for timer in timers:  # a timer that rings early
        timer.callback()
    assert [line.session.status for line in lines] == [None, None]
    lobby.desk.clock.advance(1)
    lines[0].create(1)
    lines[1].ready()
    for timer in lobby.house.timers[-2:]:
        timer.callback()
    for line in lines:
        assert line.session.status == Status("UNAUTHENTICATED", "auth failed: token expired")
    assert lines[1].session.over and not lobby.house.shard.waiters
    assert not lines[0].session.over, "the create in hand is acknowledged first"
    lobby.house.shard.commit()
    assert lines[0].read().WhichOneof("event") in ("create_ack", "create_ack_batch")
    assert lines[0].session.over


def test_T42_the_skew_counts_for_streams_as_for_requests() -> None:
    lobby = Lobby(end_at_token_expiry=True)
    lobby.desk.provider._skew_ms = 60_000
    lobby.desk.fetched()
    late = lobby.desk.issuer.token(exp=lobby.desk.issuer.now_s - 50)
    for line in lobby.lines():
        line.send(hello={"token": late})
        line.read_hello_ack()
        assert lobby.house.timers[-1].seconds == 10


def test_a_stream_outlives_its_token_otherwise() -> None:
    lobby = Lobby()
    lobby.desk.fetched()
    for line in lobby.lines():
        line.send(hello={"token": lobby.desk.issuer.token()})
        line.read_hello_ack()
    assert all(timer.cancelled for timer in lobby.house.timers)
    lobby.desk.clock.advance(10**9)
    assert all(not session.over for session in lobby.house.edge.sessions)


# --- a whole server


@pytest.fixture
def jwks_node(tmp_path: Path, served: JwksServer) -> Iterator[Server]:
    """``codeq serve`` whose both providers are signed tokens, their keys on the JWKS server."""
    environ = {
        "LIMITS_DISK_RESERVE_BYTES": "0",
        "IDENTITY_JWKS_URL": served.url,
        "IDENTITY_ISSUER": ISSUER,
        "IDENTITY_AUDIENCE": AUDIENCE,
        "WORKER_JWKS_URL": served.url,
        "WORKER_ISSUER": ISSUER,
        "STREAMS_END_AT_TOKEN_EXPIRY": "true",
    }
    listeners = ("--http", "--producer-stream", "--worker-stream")
    arguments = ["serve", "--data", str(tmp_path / "data")]
    for flag in listeners:
        arguments += [flag, ANY_PORT]
    server = Server(tmp_path, arguments, environ)
    yield server
    server.close()


def test_one_token_works_on_rest_and_in_hello(jwks_node: Server, served: JwksServer) -> None:
    issuer = Issuer(_now_s(), algorithm="RS256")
    served.document = issuer.document()
    producing = issuer.token(scope="codeq:admin")
    working = issuer.token(aud=["codeq-worker"], sub="w1")

    async def scenario() -> None:
        async with Producer(jwks_node.producer, token=producing) as producer:
            await producer.produce("job", {"n": 1})
        worker = Worker(jwks_node.worker, token=working, commands=["job"])

        async def handle(task: Task) -> int:
            worker.stop()
            return int(task.json()["n"])

        async with asyncio.timeout(60):
            await worker.run(handle)
        with pytest.raises(CodeqError, match="auth failed: invalid audience"):
            await Worker(jwks_node.worker, token=producing, commands=["job"]).run(handle)

    asyncio.run(scenario())
    assert served.hits == 1, "both providers and all surfaces share the keys"
    assert jwks_node.client(producing).get("/admin/queues/job").status_code == 200
    answer = jwks_node.client(working).post("/tasks", json={})
    assert refusal(answer) == (401, "unauthenticated", "invalid audience")
    claim = jwks_node.client(working).post("/tasks/claim", json={"commands": ["none"]})
    assert claim.status_code == 204
    assert jwks_node.terminate() == 0
    assert "Traceback" not in jwks_node.stderr_path.read_text()


def _now_s() -> int:
    from codeq.engine.clock import Clock

    return Clock().now_ms() // 1000


def test_a_server_starts_and_answers_while_the_issuer_is_away(
    jwks_node: Server, served: JwksServer
) -> None:
    served.status = 500
    answer = jwks_node.client(Issuer(_now_s()).token()).post("/tasks", json={})
    assert refusal(answer) == (503, "unavailable", "token keys cannot be fetched")
    assert httpx.get(f"http://{jwks_node.http}/readyz").status_code == 200
    assert "identityJwksUrl: the keys cannot be fetched: HTTP status 500" in (
        jwks_node.stderr_path.read_text()
    )


def test_hello_says_why_a_text_is_no_token() -> None:
    """The same words in both protocols."""
    lobby = Lobby()
    for line, proto in zip(lobby.lines(), (producerpb, workerpb), strict=True):
        line.send(hello=proto.Hello(token="nonsense"))
        assert line.session.status == Status("UNAUTHENTICATED", "auth failed: invalid token")
