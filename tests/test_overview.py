"""The overview: what it counts, for whom, and what it costs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import httpx
import pytest

from codeq import __version__
from codeq.server.auth import WORKER_SCOPES, Principal
from codeq.server.metrics import LATENCY_BUCKETS

from . import receiver
from .conftest import Server, Tokens, claimed, create, refusal, wait_for_claims
from .node import Node
from .protos import workerpb

ADMIN = ["codeq:admin", *WORKER_SCOPES]


def admins() -> Tokens:
    return Tokens(
        ours=Principal("a", ADMIN, ["*"], {"tid": "ours"}),
        theirs=Principal("b", ADMIN, ["*"], {"tid": "theirs"}),
        operator=Principal("o", ["codeq:operator"], [], {"tid": "home"}),
    )


def tallied(node: Node, tenant: str = "t") -> dict[str, Any]:
    """By command: depths, counts, since when the oldest ready task is ready, ends by latency."""
    rows, left_out, _ = node.shard.engine.tallies(tenant.encode(), 1000)
    assert not left_out
    return {row[1].decode(): row[2:] for row in rows}


# --- counts of the engine


def test_T66_every_end_is_counted_once_by_queue(node: Node) -> None:
    owner = {"worker": "w", "subject": "s"}
    ids = []
    for fields in ({}, {}, {"max_attempts": 1}, {"max_attempts": 1}, {"max_attempts": 2}):
        ids.append(node.create(**fields))
    node.create(delay_seconds=60)
    node.claim(count=4, lease_ms=1_000)
    assert node.finish(ids[0]) == b"\0"
    assert node.finish(ids[1], status="FAILED") == b"\0"
    assert node.nack(ids[2], **owner)[2] is True, "a nack that is the last"
    node.advance(2_000)  # a lease over that is the last
    node.claim(lease_ms=1_000)
    node.advance(2_000)  # a lease over that is not
    depths, counts, *_ = tallied(node)["job"]
    assert depths[2:] == (0, 2)
    assert counts == (6, 5, 1, 1, 2, 2)
    assert node.ask(node.shard.queues.purge_waiting, "t", "job", ready=True, delayed=True) == 2
    assert node.ask(node.shard.queues.purge_dead, "t", "job", None, 9) == 2
    depths, counts, *_ = tallied(node)["job"]
    assert (depths, counts) == ((0, 0, 0, 0), (6, 5, 1, 3, 2, 2)), "a purge of dead is no end"
    [(name, label, *_)] = node.shard.engine.command_stats()
    assert (name, label) == ("job", (6, 5, 1, 5, 2)), "dead letters are FAILED for the metrics"


def test_counts_outlive_a_queue_that_runs_empty(node: Node) -> None:
    for command in ("job", "other") * 3:  # each takes the other out of memory
        node.create_batch([{"command": command}] * 300)
        ids = [view.id for view in node.claim((command,), count=300)]
        assert not any(node.finish(*ids))
    assert node.ask(node.shard.queues.all, "t") == []
    assert tallied(node)["job"][1] == (900, 900, 900, 0, 0, 0)
    node.restart()
    assert "job" not in tallied(node), "since the start of the process"


def test_T45_counts_of_queues_that_are_gone_are_bounded(node: Node) -> None:
    for begin in range(0, 20_480, 1_024):
        node.create_batch([{"command": f"q{begin + i}"} for i in range(1_024)])
        ids = [view.id for view in node.claim(None, count=1_024)]
        assert not any(node.finish(*ids))
    rows, _, live = node.shard.engine.tallies(None, 100_000)
    assert len(rows) <= 16_384 + 256 and live == 0
    node.create(command="q0")
    assert tallied_first(node, 2) == [b"q0", b"q1"]


def tallied_first(node: Node, count: int) -> list[bytes]:
    rows, left_out, _ = node.shard.engine.tallies(b"t", count)
    assert len(rows) == count and left_out > 0
    return [row[1] for row in rows]


def test_leases_are_counted_by_worker(node: Node) -> None:
    node.create_batch([{}] * 6)
    for worker, subject in (("a", "s1"), ("a", "s2"), ("b", "s1"), ("a", "s1")):
        node.claim(worker=worker, subject=subject)
    node.create(tenant="u")
    node.claim(tenant="u", worker="a", subject="s1")
    expected = [(b"t", b"a", 1), (b"t", b"a", 2), (b"t", b"b", 1)]
    assert sorted(node.shard.engine.leases(b"t")) == expected
    node.restart()
    assert sorted(node.shard.engine.leases(b"t")) == expected
    assert len(node.shard.engine.leases(None)) == 4
    node.advance(100_000)
    assert node.shard.engine.leases(None) == []


def test_every_end_is_counted_by_the_time_since_the_create(node: Node) -> None:
    node.create_batch([{}] * 4 + [{"max_attempts": 1}] * 2 + [{"command": "other"}])
    in_time, slow, failed, last_try = [], [], [], []
    for kind, count in ((in_time, 2), (slow, 1), (failed, 1), (last_try, 2)):
        kind.extend(view.id for view in node.claim(count=count))
    node.advance(100)
    assert not any(node.finish(*in_time))
    node.advance(150)
    assert node.nack(last_try[0])[2] is True, "a dead letter is an end"
    node.advance(40_000)
    assert node.finish(*failed, status="FAILED") == b"\0"
    node.advance(20_000)  # the leases are over: for the last try the end, at 60 s
    node.claim()
    node.advance(3_600_000)
    latency = tallied(node)["job"][3]
    assert latency == (2, 1, *(0,) * 6, 2, *(0,) * 6), "the bounds belong to what is below them"
    assert sum(tallied(node)["other"][3]) == 0
    assert node.finish(*slow) != b"\0"
    node.claim()
    assert node.finish(*slow) == b"\0"
    assert tallied(node)["job"][3][-1] == 1, "longer than the last bound"


# --- age of the oldest ready task


def oldest(node: Node, command: str = "job") -> int | None:
    """How long, in ms; None when nothing is ready."""
    since = node.shard.engine.ready_since().get(command)
    assert tallied(node)[command][2] == since
    return None if since is None else node.clock.now_ms() - since


def test_the_age_counts_from_when_a_task_became_ready(node: Node) -> None:
    task_id = node.create(delay_seconds=60)
    assert oldest(node) is None
    node.advance(60_000)
    assert oldest(node) == 0, "it was not ready while it was delayed"
    node.advance(5_000)
    assert oldest(node) == 5_000
    node.restart()
    assert oldest(node) == 5_000
    node.claim()
    assert oldest(node) is None
    assert node.abandon(task_id) == 0
    node.advance(1_000)
    assert oldest(node) == 1_000


def test_the_age_is_that_of_any_priority_and_not_hidden_by_one_that_came_back(node: Node) -> None:
    first = node.create()
    node.claim()
    node.create(priority=-3)
    node.advance(1_000)
    node.create()
    node.create(priority=9)
    node.advance(3_000)
    assert node.abandon(first) == 0
    assert oldest(node) == 4_000, "the lowest priority waits longest"
    assert len(node.claim(count=2)) == 2
    assert oldest(node) == 4_000
    [view] = node.claim()
    assert view.priority == 0
    assert node.abandon(view.id) == 0
    assert oldest(node) == 4_000


def test_a_task_that_came_back_does_not_hide_the_age_of_the_others(node: Node) -> None:
    first = node.create()
    node.claim()
    node.create()
    node.advance(3_000)
    assert node.abandon(first) == 0
    assert oldest(node) == 3_000
    cancelled = node.claim()[0].id
    assert cancelled == first


def test_T50_the_overview_costs_the_same_with_more_tasks(node: Node) -> None:
    for command in ("a", "b"):
        node.create_batch([{"command": command, "priority": i % 3} for i in range(900)])
    looked = node.shard.engine.looked
    rows, _, live = node.shard.engine.tallies(None, 10)
    assert (live, len(rows)) == (1800, 2)
    assert node.shard.engine.looked == looked, "no task was looked at"


# --- over REST


def with_node(
    folder: Path, scenario: Callable[[receiver.Sender], Awaitable[None]], **flags: Any
) -> None:
    async def run() -> None:
        async with receiver.sender(folder, tokens=admins(), **flags) as node:
            await scenario(node)

    asyncio.run(run())


async def call(
    node: receiver.Sender, token: str, method: str, path: str, **fields: Any
) -> httpx.Response:
    transport = httpx.ASGITransport(app=node.app)
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(transport=transport, headers=headers) as client:
        answer = await client.request(method, f"http://node/v1/codeq{path}", **fields)
    assert answer.status_code < 300, answer.text
    return answer


async def seen(node: receiver.Sender, token: str, **query: Any) -> dict[str, Any]:
    shown: dict[str, Any] = (await call(node, token, "GET", "/admin/overview", params=query)).json()
    return shown


async def post(node: receiver.Sender, path: str, body: Any, token: str = "ours") -> Any:
    return (await call(node, token, "POST", path, json=body)).json()


async def make(node: receiver.Sender, command: str, **fields: Any) -> str:
    task = await post(node, "/tasks", {"command": command, "payload": {}, **fields})
    return str(task["id"])


async def lease(node: receiver.Sender, command: str, worker: str) -> str:
    body = {"commands": [command], "workerId": worker}
    return str((await post(node, "/tasks/claim", body))["id"])


async def give_up_a_webhook(node: receiver.Sender, command: str) -> str:
    """A task whose webhook was refused for the last time."""
    async with receiver.receiver() as hook:
        hook.status = 500
        task_id = await make(node, command, webhook=hook.url())
        assert await lease(node, command, "w") == task_id
        body = {"status": "COMPLETED", "workerId": "w"}
        await post(node, f"/tasks/{task_id}/result", body)
        await node.until(lambda: node.webhooks.exhausted_count == 1)
    return task_id


def test_the_overview_whole(tmp_path: Path) -> None:
    async def scenario(node: receiver.Sender) -> None:
        policy = {"priorityTiers": [0], "maxAttempts": 1, "deadLetterTopicRef": "graveyard"}
        await call(node, "ours", "PUT", "/admin/topics/job", json=policy)
        task_id = await give_up_a_webhook(node, "job")
        await make(node, "job")
        await make(node, "job")
        await lease(node, "job", "w")
        await post(node, "/admin/queues/job/pause", None)
        node.runner.advance(2_500)
        shown = await seen(node, "ours")
        queue = {
            "command": "job",
            "ready": 1,
            "delayed": 0,
            "inProgress": 1,
            "dlq": 0,
            "created": 3,
            "claimed": 2,
            "completed": 1,
            "failed": 0,
            "dead": 0,
            "expiredLeases": 0,
            "oldestReadySeconds": 2.5,
            "paused": True,
            "deadLetterTopicRef": "graveyard",
            "latencyCounts": [1] + [0] * 14,
        }
        assert shown["queues"] == [queue] and shown["queuesLeftOut"] == 0
        assert shown["latencyBoundsSeconds"] == list(LATENCY_BUCKETS)
        assert shown["leases"] == [{"workerId": "w", "leases": 1}] and shown["leasesLeftOut"] == 0
        (given_up,) = shown["webhooks"].pop("exhausted")
        assert shown["webhooks"] == {"pending": 0, "exhaustedCount": 1}
        assert (given_up["taskId"], given_up["tries"]) == (task_id, 1)
        assert given_up["error"] == "status 500"
        assert (shown["liveTasks"], shown["version"]) == (2, __version__)
        assert shown["uptimeSeconds"] >= 0
        assert shown["memory"]["residentBytes"] > 10 << 20
        assert shown["memory"]["payloadBytes"] > 0 and shown["diskFreeBytes"] > 0
        for kind in ("commits", "syncs"):
            buckets = shown[kind]["buckets"]
            assert buckets[-1] == {"le": None, "count": shown[kind]["count"]}
        assert shown["at"].endswith("Z") and shown["waitingClaims"] == 0

    with_node(tmp_path, scenario, resultWebhookMaxAttempts=1)


def test_T32_T36_admins_see_their_tenant_and_operators_all(tmp_path: Path) -> None:
    async def scenario(node: receiver.Sender) -> None:
        await give_up_a_webhook(node, "job")
        await make(node, "a")
        await make(node, "b")
        await lease(node, "b", "w")
        ours, theirs = await seen(node, "ours"), await seen(node, "theirs")
        every = await seen(node, "operator")
        picked = await seen(node, "operator", tenant="ours")
        assert [row["command"] for row in ours["queues"]] == ["a", "b", "job"]
        assert [row["tenantId"] for row in every["queues"]] == ["ours"] * 3
        assert every["leases"] == [{"workerId": "w", "leases": 1, "tenantId": "ours"}]
        assert theirs["queues"] == theirs["leases"] == []
        assert theirs["liveTasks"] == theirs["webhooks"]["exhaustedCount"] == 0
        assert theirs["webhooks"]["exhausted"] == []
        assert [one["liveTasks"] for one in (ours, every, picked)] == [2, 2, 2]
        assert [len(one["webhooks"]["exhausted"]) for one in (ours, every, picked)] == [1, 1, 1]
        assert picked["queues"] == every["queues"]
        assert (await seen(node, "theirs", tenant="ours"))["queues"] == []
        assert (await seen(node, "operator", tenant="theirs"))["queues"] == []

    with_node(tmp_path, scenario, resultWebhookMaxAttempts=1)


def test_T36_an_admin_sees_all_that_the_own_tenant_is_owed(tmp_path: Path) -> None:
    """Also what has no room in memory, and after a restart."""
    window = {"host_max": 2, "window_max": 8}

    async def pending(node: receiver.Sender) -> list[int]:
        shown = [await seen(node, token) for token in ("ours", "theirs", "operator")]
        return [one["webhooks"]["pending"] for one in shown]

    async def run() -> None:
        async with receiver.receiver() as hook:
            hook.status = None
            async with receiver.sender(tmp_path, tokens=admins(), window=window) as node:
                for _ in range(5):
                    task_id = await make(node, "job", webhook=hook.url())
                    await lease(node, "job", "w")
                    body = {"status": "COMPLETED", "workerId": "w"}
                    await post(node, f"/tasks/{task_id}/result", body)
                assert await pending(node) == [5, 0, 5]
                await hook.next()
            async with receiver.sender(tmp_path, tokens=admins(), window=window) as node:
                assert await pending(node) == [5, 0, 5]
                await hook.next()  # a try that is not answered
                hook.status = 200
                node.runner.advance(15_000)
                await node.until(lambda: bool(node.webhooks._later))
                node.runner.advance(2_000)
                await node.until(lambda: node.shard.deliveries.pending == 0)
                assert await pending(node) == [0, 0, 0]

    asyncio.run(run())


def test_the_overview_shows_so_many_queues(tmp_path: Path) -> None:
    async def scenario(node: receiver.Sender) -> None:
        for number in range(12):
            await make(node, f"q{number:02}")
        shown = await seen(node, "ours", limit=5)
        assert [row["command"] for row in shown["queues"]] == [f"q{n:02}" for n in range(5)]
        assert (shown["queuesLeftOut"], shown["liveTasks"]) == (7, 12)

    with_node(tmp_path, scenario)


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1", "1.5"])
def test_a_bad_limit_is_refused(producer: httpx.Client, limit: str) -> None:
    answer = producer.get("/admin/overview", params={"limit": limit})
    assert refusal(answer) == (400, "validation-error", "invalid limit")


def test_T36_the_overview_is_for_admins(worker: httpx.Client) -> None:
    assert worker.get("/admin/overview").status_code in (401, 403)


def test_streams_and_waiting_claims_of_a_real_server(start_server: Callable[..., Server]) -> None:
    server = start_server()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    claimed(producer, worker, "busy")
    create(producer, "busy")
    with grpc.insecure_channel(server.worker) as channel:
        stream = channel.stream_stream("/workerpb.WorkerStream/Stream")
        out: SimpleQueue[bytes | None] = SimpleQueue()
        call = stream(iter(out.get, None))
        out.put(workerpb.WorkerEvent(hello={"token": "dev-worker"}).SerializeToString())
        next(iter(call))
        out.put(workerpb.WorkerEvent(ready={"commands": ["idle"]}).SerializeToString())
        wait_for_claims(server, 1)
        shown = producer.get("/admin/overview").json()
        assert shown["streams"] == {"producer": 0, "worker": 1}
        assert (shown["waitingClaims"], shown["liveTasks"]) == (1, 2)
        assert shown["leases"] == [{"workerId": "dev-worker", "leases": 1}]
        assert shown["commits"]["count"] > 0 and shown["syncs"]["seconds"] > 0
        out.put(None)
        call.cancel()
