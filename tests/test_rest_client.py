"""Client over REST against a real server: every method, every row of the route table, refusals,
tokens, and what is tried again and what never."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from codeq import Client, CodeqError, NewTask, Tls
from codeq.client import http
from codeq.client.rest import Artifact, Finish
from codeq.model import TopicPolicy
from codeq.server.routes import OPEN, TABLE

from .authority import Authority
from .conftest import ABSENT_ID, Server
from .guarded import OPERATOR, OTHER, guarded_server
from .test_tls import settings

#: Pages for people, which no method of Client asks for
PAGES = {"/docs", "/ui"}
TOKENS = {"producer_token": "dev-producer", "worker_token": "dev-worker"}


def client_of(server: Server, **options: Any) -> Client:
    return Client(f"http://{server.http}", **{**TOKENS, **options})


def run(server: Server, body: Callable[[Client], Awaitable[None]], **options: Any) -> None:
    """``body`` with a client of the server."""

    async def within() -> None:
        async with client_of(server, **options) as client:
            await body(client)

    asyncio.run(within())


@contextlib.contextmanager
def refused(slug: str, text: str = "") -> Iterator[None]:
    with pytest.raises(CodeqError) as caught:
        yield
    assert caught.value.slug == slug, caught.value
    assert text in caught.value.message


async def listed(tasks: AsyncIterator[Any]) -> list[str]:
    return [task.id async for task in tasks]


# --- every method --------------------------------------------------------------------------------


async def making(client: Client, command: str) -> None:
    run_at = datetime(2099, 1, 1, tzinfo=UTC) + timedelta(microseconds=1)
    task = await client.create(
        command,
        {"n": 9007199254740993},
        priority=3,
        webhook="http://example.org/hook",
        max_attempts=2,
        idempotency_key="once",
        run_at=run_at,
        trace_parent="00-" + 32 * "1" + "-" + 16 * "2" + "-01",
        trace_state="a=b",
    )
    assert (task.command, task.json(), task.priority) == (command, {"n": 9007199254740993}, 3)
    assert task.last_known_location == "DELAYED_ZSET" and task.max_attempts == 2
    assert task.webhook and task.trace_parent.startswith("00-1") and task.trace_state == "a=b"
    again = await client.create(
        command,
        b'{"n":9007199254740993}',
        priority=3,
        webhook="http://example.org/hook",
        max_attempts=2,
        idempotency_key="once",
        run_at=run_at,
    )
    assert again.id == task.id
    assert (await client.get(task.id)).id == task.id
    with refused("conflict"):
        await client.create(command, 1, idempotency_key="once")
    cancelled = await client.cancel(task.id)
    assert (cancelled.status, cancelled.error) == ("FAILED", "CANCELLED")
    with refused("conflict", "not pending"):
        await client.cancel(task.id)
    made = await client.create_many(
        [NewTask(command, 1, delay_seconds=9), NewTask(""), NewTask(command, b'{"a" : 1}')]
    )
    assert [isinstance(one, CodeqError) for one in made] == [False, True, False]
    assert isinstance(made[1], CodeqError) and made[1].slug == "validation-error"
    assert not isinstance(made[2], CodeqError) and made[2].payload == '{"a" : 1}'
    assert await client.create_many([]) == []


async def leasing(client: Client, command: str) -> None:
    assert await client.claim([command]) is None
    assert await client.claim_many(2, [command]) == []
    ids = [(await client.create(command, {"n": n})).id for n in range(6)]
    task = await client.claim([command], lease_seconds=60, worker_id="w", wait_seconds=1)
    assert task is not None and (task.id, task.worker_id, task.attempts) == (ids[0], "w", 1)
    with refused("not-owner"):
        await client.heartbeat(task.id, worker_id="w", attempt=2)
    assert (await client.heartbeat(task.id, worker_id="w", extend_seconds=90, attempt=1)).ok
    assert await client.result(task.id, wait_seconds=0) is None
    with pytest.raises(TimeoutError, match=task.id):
        await client.wait_for_result(task.id, timeout_seconds=0)
    assert (await client.abandon(task.id, worker_id="w")).status == "requeued"
    task = await client.claim([command])
    assert task is not None and task.attempts == 1
    nacked = await client.nack(task.id, delay_seconds=700, reason="later")
    assert (nacked.status, nacked.delay_seconds) == ("requeued", 700)
    tasks = await client.claim_many(9, [command], lease_seconds=60, wait_seconds=1)
    assert [task.id for task in tasks] == ids[1:]
    file = Artifact("a b.txt", b"\0file", "text/plain")
    link = Artifact("elsewhere", url="https://example.org/x")
    record = await client.complete(ids[1], {"ok": True}, artifacts=[file, link])
    assert record.json() == {"ok": True} and [one.name for one in record.files()] == [
        file.name,
        link.name,
    ]
    assert await client.artifact(ids[1], "a b.txt") == file
    ended = await client.wait_for_result(ids[1], timeout_seconds=60)
    assert ended.task.status == "COMPLETED" and ended.result.completed_at == record.completed_at
    failed = await client.fail(ids[2], "no such file", result=[1], attempt=1)
    assert (failed.status, failed.error, failed.json()) == ("FAILED", "no such file", [1])
    ends = await client.finish_many(
        [Finish(ids[3], msgspec.Raw(b"[1 ]")), Finish(ABSENT_ID), Finish(ids[4], error="bad")]
    )
    assert not isinstance(ends[0], CodeqError) and bytes(ends[0].result) == b"[1 ]"
    assert isinstance(ends[1], CodeqError) and ends[1].slug == "not-found"
    assert not isinstance(ends[2], CodeqError) and ends[2].error == "bad"
    assert await client.finish_many([]) == []
    assert (await client.complete(ids[5])).json() is None


async def waiting(client: Client, command: str) -> None:
    """A claim and a result that are waited for."""
    claim = asyncio.create_task(client.claim([command], wait_seconds=30))
    task = await client.create(command, 1)
    result = asyncio.create_task(client.wait_for_result(task.id))
    claimed = await claim
    assert claimed is not None and claimed.id == task.id
    await client.complete(task.id, 2)
    assert (await result).result.json() == 2


async def subscribing(client: Client, command: str) -> None:
    made = await client.subscribe(
        [command], ttl_seconds=60, delivery_mode="group", group_id="g", min_interval_seconds=1
    )
    kept = await client.keep_subscription(made.subscription_id, ttl_seconds=90)
    assert kept.available == [] and kept.expires_at > made.expires_at
    waits = asyncio.create_task(client.keep_subscription(made.subscription_id, wait_seconds=30))
    await client.create(command, 1)
    assert [queue.event_type for queue in (await waits).available] == [command]
    with refused("not-found"):
        await client.keep_subscription("sub-none")
    with refused("validation-error", "callback"):
        await client.subscribe([command], callback_url="ftp://x")


async def dead(client: Client, command: str, count: int) -> list[str]:
    ids = []
    for n in range(count):
        task = await client.create(command, n, max_attempts=1)
        assert await client.claim([command]) is not None
        assert (await client.nack(task.id, reason="broken")).status == "dlq"
        ids.append(task.id)
    return ids


async def ruling(client: Client, command: str) -> None:
    """What admins do."""
    ids = await dead(client, command, 5)
    page = await client.dead_page(command, limit=2)
    assert [task.id for task in page.tasks] == ids[:2] and page.next_cursor
    rest = await client.dead_page(command, limit=1000, cursor=page.next_cursor)
    assert [task.id for task in rest.tasks] == ids[2:] and not rest.next_cursor
    assert await listed(client.dead_letters(command)) == ids
    assert (await client.requeue_dead(command, [ids[4], ABSENT_ID])).requeued == 1
    assert (await client.requeue_dead(command, limit=1)).requeued == 1
    assert (await client.purge_dead(command, [ids[1]])).purged == 1
    assert (await client.purge_dead(command)).purged == 2
    late = await client.create(command, 1, delay_seconds=600)
    queue = await client.queue(command)
    assert (queue.ready, queue.delayed, queue.dlq) == (2, 1, 0)
    assert queue in await client.queues()
    assert (await client.pause(command)).paused
    assert await client.claim([command]) is None
    assert not (await client.resume(command)).paused
    pending = await listed(client.tasks(status="PENDING", command=command))
    assert pending == [ids[0], ids[4], late.id]
    first = await client.task_page(command=command, limit=1)
    while not first.tasks and first.next_cursor:  # the server looks at 10,000 tasks at a time
        first = await client.task_page(command=command, limit=1, cursor=first.next_cursor)
    assert [task.id for task in first.tasks] == ids[:1] and first.next_cursor
    assert (await client.purge(command, "delayed")).purged == 1
    assert (await client.purge(command, "all")).purged == 2
    overview = await client.overview()
    [mine] = [one for one in overview.queues if one.command == command]
    assert (mine.created, mine.dead, mine.ready) == (6, 5, 0)
    assert len((await client.overview(limit=1)).queues) == 1
    cleaned = await client.cleanup(limit=7, before=datetime(2000, 1, 1, tzinfo=UTC))
    assert (cleaned.deleted, cleaned.limit) == (0, 7)
    with refused("permission-denied", "operator only"):  # test_backup.py has an operator
        await client.backup(command)


async def topics(client: Client, command: str) -> None:
    policy = TopicPolicy((0, 5), 3, "the-dead", max_consumers=2)
    shown = await client.put_topic(command, policy)
    assert (shown.policy, shown.version) == (policy, 1)
    assert await client.get_topic(command) == shown
    with refused("unprocessable", "priorityTiers"):
        await client.put_topic(command, TopicPolicy((), 3, "the-dead"))
    await client.delete_topic(command)
    with refused("not-found"):
        await client.get_topic(command)


async def server_itself(client: Client, command: str) -> None:
    assert (await client.health()).status == (await client.ready()).status == "ok"
    assert not (await client.raft_status()).enabled
    assert "codeq_build_info" in await client.metrics()
    assert (await client.openapi())["openapi"].startswith("3.1")


SCENES = (making, leasing, waiting, subscribing, ruling, topics, server_itself)


def test_every_method_and_every_row_of_the_route_table(
    server: Server, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = set()
    send = http.Caller.send

    def noted(caller: http.Caller, route: str, *names: str, **options: Any) -> Any:
        reached.add(route)
        return send(caller, route, *names, **options)

    monkeypatch.setattr(http.Caller, "send", noted)

    async def body(client: Client) -> None:
        for scene in SCENES:
            await scene(client, f"{scene.__name__.replace('_', '-')}-{command[-12:]}")

    run(server, body)
    rows = {f"{row.method} {row.path.removeprefix(http.PREFIX)}" for row in TABLE}
    rows |= {f"GET /{row.path}" for row in OPEN if row.path not in PAGES}
    missed = {re.sub(r"\{\w+\}", "{}", row) for row in rows} - reached
    assert missed == set(), "give codeq/client/rest.py a method for it, and a scene here"


def test_T36_an_operator_names_the_tenant_of_a_task(tmp_path: Path) -> None:
    with guarded_server(tmp_path) as guarded:

        async def body(other: Client) -> None:
            task, gone = [await other.create("job", n) for n in range(2)]
            async with Client(other.base_url, token=OPERATOR) as operator:
                for reach in (operator.get, operator.result, operator.cancel):
                    with refused("not-found"):
                        await reach(task.id)
                assert (await operator.get(task.id, tenant="globex")).id == task.id
                assert await operator.result(task.id, tenant="globex") is None
                await operator.cancel(gone.id, tenant="globex")
                ended = await operator.wait_for_result(gone.id, tenant="globex")
                assert ended.result.error == "CANCELLED"

        run(guarded, body, producer_token=OTHER)


# --- names, refusals, tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["a/b", "..", ".", "a b?c#d%2F", "größe:1", "{}"])
def test_T20_commands_of_any_kind_are_one_part_of_a_path(server: Server, odd: str) -> None:
    async def body(client: Client) -> None:
        await client.create(odd, 1)
        assert (await client.queue(odd)).command == odd
        assert (await client.purge(odd, "all")).purged >= 1

    run(server, body)


def test_what_cannot_be_sent_is_refused_here(server: Server, command: str) -> None:
    async def body(client: Client) -> None:
        for payload in (b'1,"priority":7', b"", object(), b"\xff"):
            with refused("validation-error", "no JSON value"):
                await client.create(command, payload)
        with refused("validation-error", "time zone"):
            await client.create(command, 1, run_at=datetime(2099, 1, 1))
        with refused("validation-error", "empty"):
            await client.get("")
        with refused("validation-error", "invalid command"):
            await client.create(" ", 1)
        with refused("not-found", "not found"):
            await client.get(ABSENT_ID)
        with refused("not-found", "task not found"):
            await client.result(ABSENT_ID, wait_seconds=60)

    run(server, body)
    for url in ("", "host:1", "ftp://host", "http://", "http://host:x", "http://h/?a=1"):
        with refused("validation-error", "http://HOST:PORT"):
            Client(url)


def test_a_token_function_is_asked_again_after_401(server: Server, command: str) -> None:
    given = iter(["stale", "dev-producer", "never"])
    asked = []

    def plain() -> str:
        asked.append(next(given))
        return asked[-1]

    async def later() -> str:
        return plain()

    for token in (plain, later):
        given, asked = iter(["stale", "dev-producer", "never"]), []

        async def body(client: Client) -> None:
            # Also what is never sent twice otherwise: a refused token means nothing was done.
            many = [client.create(command, 1) for _ in range(3)]
            assert len({task.id for task in await asyncio.gather(*many)}) == 3

        run(server, body, producer_token=token)
        assert asked[0] == "stale" and "dev-producer" in asked[1:] and len(asked) <= 3


def test_a_token_that_stays_refused_is_an_error(server: Server) -> None:
    asked = []

    def wrong() -> str:
        asked.append(1)
        return "wrong"

    async def body(client: Client) -> None:
        with refused("unauthenticated", "invalid token"):
            await client.queues()

    run(server, body, producer_token=wrong)
    assert len(asked) == 2
    run(server, body, producer_token="wrong")

    async def nothing(client: Client) -> None:
        with refused("unauthenticated", "missing Authorization"):
            await client.queues()

    run(server, nothing, producer_token="")

    async def odd(client: Client) -> None:
        with refused("unauthenticated", "visible ASCII"):
            await client.queues()

    run(server, odd, producer_token="a\nb: c")


def test_one_token_for_all(server: Server, command: str) -> None:
    async def producing(client: Client) -> None:
        task = await client.create(command, 1)
        assert (await client.get(task.id)).id == task.id
        with refused("unauthenticated"):
            await client.claim([command])

    async def working(client: Client) -> None:
        task = await client.claim([command])
        assert task is not None and (await client.get(task.id)).status == "IN_PROGRESS"

    run(server, producing, token="dev-producer", producer_token=None, worker_token=None)
    run(server, working, token="", producer_token=None)


def test_tls_with_a_certificate_of_the_client(
    start_server: Callable[..., Server], tmp_path: Path, command: str
) -> None:
    authority = Authority(tmp_path / "authority", "root")
    ours, theirs = authority.issue("server"), authority.issue("client")
    server = start_server(**settings(ours, authority.ca))
    url = f"https://{server.http}"

    async def body() -> None:
        good = Tls(authority.ca, theirs.cert, theirs.key, server_name="localhost")
        async with Client(url, credentials=good, **TOKENS) as client:
            assert (await client.create(command, 1)).command == command
        for bad in (None, Tls(authority.ca, server_name="localhost")):
            async with Client(url, credentials=bad, retry_seconds=0, **TOKENS) as client:
                with refused("unavailable", "did not answer"):
                    await client.create(command, 1)

    asyncio.run(body())
    for files in (Tls("none.pem"), Tls(authority.ca, authority.ca)):
        with refused("validation-error", ".pem"):
            Client(url, credentials=files)


# --- what is tried again -------------------------------------------------------------------------


class Stub:
    """A server whose answers are scripted: one script line per request, "drop" ends the connection
    without an answer. The last line goes on. Real sockets, no codeq."""

    def __init__(self, *script: str) -> None:
        self.script = list(script)
        self.requests: list[str] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        await reader.readexactly(int(length.group(1)) if length else 0)
        self.requests.append(head.split("\r\n")[0])
        line = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if line != "drop":
            status, _, more = line.partition(" ")
            fields, _, body = more.partition("|")
            lines = [f"HTTP/1.1 {status} Word", "connection: close", *fields.split()]
            text = "\r\n".join(one.replace("=", ": ") for one in lines)
            writer.write(f"{text}\r\n\r\n{body}".encode())
        writer.close()
        await writer.wait_closed()


TASK = json.dumps(
    {
        **dict.fromkeys(("id", "command", "payload", "status", "tenantId"), "x"),
        **dict.fromkeys(("lastKnownLocation", "createdAt", "updatedAt"), "x"),
        **dict.fromkeys(("priority", "attempts", "maxAttempts"), 1),
    }
)
GOOD = f"200 |{TASK}"
BUSY = '503 retry-after=1 |{"code":"unavailable","message":"unavailable"}'
LIMITED = '429 retry-after=1 |{"code":"rate-limited","message":"slow"}'


def stubbed(
    monkeypatch: pytest.MonkeyPatch, stub: Stub, body: Callable[[Client], Awaitable[None]]
) -> list[float]:
    """Runs ``body`` against the stub; returns the pauses the client made, which take no time."""
    pauses: list[float] = []
    real = asyncio.sleep

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    async def within() -> None:
        server = await asyncio.start_server(stub.handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setattr(http.asyncio, "sleep", pause)
        async with server, Client(f"http://127.0.0.1:{port}", token="t") as client:
            await body(client)
        monkeypatch.setattr(http.asyncio, "sleep", real)

    asyncio.run(within())
    return pauses


async def reads(client: Client) -> None:
    assert (await client.get("x")).id == "x"


async def creates_with_a_key(client: Client) -> None:
    assert (await client.create("x", 1, idempotency_key="k")).id == "x"


@pytest.mark.parametrize("call", [reads, creates_with_a_key])
def test_what_may_be_repeated_is(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Client], Awaitable[None]]
) -> None:
    stub = Stub("drop", BUSY, LIMITED, "drop", GOOD)
    pauses = stubbed(monkeypatch, stub, call)
    assert len(stub.requests) == 5 and len(set(stub.requests)) == 1
    assert pauses[1:3] == [1, 1] and 0 < pauses[0] < pauses[3]


@pytest.mark.parametrize("line", ["drop", BUSY, LIMITED])
def test_nothing_else_is_sent_twice(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    async def body(client: Client) -> None:
        calls = [
            client.create("x", 1),
            client.create_many([NewTask("x", 1, idempotency_key="k"), NewTask("x")]),
            client.claim(["x"]),
            client.complete("x"),
            client.nack("x"),
            client.pause("x"),
            client.delete_topic("x"),
            client.ready(),
        ]
        for call in calls:
            with pytest.raises(CodeqError) as caught:
                await call
            assert caught.value.retry_after_seconds == (0 if line == "drop" else 1)
            said = "nobody knows whether it was done" in caught.value.message
            assert said == (line == "drop")

    stub = Stub(line)
    assert stubbed(monkeypatch, stub, body) == []
    assert len(stub.requests) == 8


def test_repeating_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: Client) -> None:
        with refused("unavailable"):
            await client.get("x")

    # A refusal that says nothing of when to come again, or names a time too far away.
    for line in ('503 |{"code":"unavailable","message":"off"}', BUSY.replace("=1", "=11")):
        stub = Stub(line)
        assert stubbed(monkeypatch, stub, body) == [] and len(stub.requests) == 1


@pytest.mark.parametrize(
    ("line", "slug"),
    [
        ("502 |<html>", "unavailable"),
        ("404 |<html>", "not-found"),
        ("307 location=http://127.0.0.1:1/ |", "internal"),
        ("200 |<html>", "internal"),
        ("200 |{}", "internal"),
        ('503 |{"code":5}', "unavailable"),
    ],
)
def test_answers_that_are_not_of_codeq(
    monkeypatch: pytest.MonkeyPatch, line: str, slug: str
) -> None:
    async def body(client: Client) -> None:
        with refused(slug, client.base_url):
            await client.get("x")

    stubbed(monkeypatch, Stub(line), body)


def test_reads_go_on_after_a_restart_of_the_server(
    start_server: Callable[..., Server], tmp_path: Path, command: str
) -> None:
    server = start_server()

    async def body() -> None:
        async with client_of(server, retry_seconds=60) as client:
            task = await client.create(command, 1)
            waits = asyncio.create_task(client.wait_for_result(task.id, timeout_seconds=60))
            server.arguments += ["--http", server.http]
            await asyncio.to_thread(server.kill)
            with refused("unavailable"):
                await client.create(command, 2)
            await asyncio.to_thread(server.start)
            assert (await client.cancel(task.id)).status == "FAILED"
            assert (await waits).result.error == "CANCELLED"

    asyncio.run(body())


def test_a_claim_that_is_given_up_takes_nothing(server: Server, command: str) -> None:
    async def body(client: Client) -> None:
        claim = asyncio.create_task(client.claim([command], wait_seconds=30))
        await asyncio.sleep(0)
        claim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claim
        await client.create(command, 1)
        assert await client.claim([command], wait_seconds=30) is not None

    run(server, body)
