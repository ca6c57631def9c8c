"""Rate limits: the arithmetic on a fake clock, then REST and both streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from codeq.config import RateLimit, RateLimitBucket
from codeq.engine.clock import FakeClock
from codeq.server.auth import Principal
from codeq.server.limits import (
    CLAIM,
    CLEANUP,
    CREATE_TASK,
    OPERATIONS,
    QUEUE_READY,
    TASK_RESULT,
    Limits,
    RateLimited,
)
from codeq.server.streams import Status

from .conftest import Server, Tokens, refusal, rest_node
from .fake_shard import FakeShard
from .lines import FakePrincipal, House
from .test_streams import Line, channel

ALICE = Principal("alice", [], [], {"tid": "acme"})
BOB = Principal("bob", [], [], {"tid": "acme"})
ELSEWHERE = Principal("alice", [], [], {"tid": "other"})


def limits(per_minute: int, burst: int) -> tuple[Limits, FakeClock]:
    """The same bucket for every scope."""
    clock = FakeClock()
    bucket = RateLimitBucket(per_minute, burst)
    return Limits(RateLimit(bucket, bucket, bucket, bucket), clock), clock


def spare(limited: Limits, who: Principal = ALICE) -> int:
    """Single creates that are admitted now."""
    for count in range(10_000):
        try:
            limited.admit(CREATE_TASK, who)
        except RateLimited:
            return count
    return 10_000


# --- the bucket


@pytest.mark.parametrize(("per_minute", "burst"), [(0, 0), (60, 0), (0, 60)])
def test_a_limit_is_off_unless_both_are_set(per_minute: int, burst: int) -> None:
    limited, _ = limits(per_minute, burst)
    for operation in OPERATIONS:
        limited.admit(operation, ALICE, 10**9)
        assert limited.wait_ms(operation, "acme", "http://x") == 0
        assert limited.held(operation.scope) == 0


def test_a_bucket_is_full_at_first_and_refills_to_the_millisecond() -> None:
    limited, clock = limits(120, 5)
    assert spare(limited) == 5
    clock.advance(499)
    assert spare(limited) == 0
    clock.advance(1)
    assert spare(limited) == 1
    clock.advance(10_000_000)
    assert spare(limited) == 5


def test_each_scope_tenant_and_subject_has_its_own_bucket() -> None:
    limited, _ = limits(60, 3)
    assert [spare(limited, who) for who in (ALICE, BOB, ELSEWHERE, ALICE)] == [3, 3, 3, 0]
    for operation in (CLAIM, CLEANUP):
        limited.admit(operation, ALICE)


def test_T53_a_batch_pays_for_its_whole_size() -> None:
    limited, clock = limits(60, 10)
    limited.admit(CREATE_TASK, ALICE, 4)
    assert spare(limited) == 6
    clock.advance(6_000)
    with pytest.raises(RateLimited) as refused:
        limited.admit(CREATE_TASK, ALICE, 7)
    assert refused.value.retry_after_seconds == 1
    limited.admit(CREATE_TASK, ALICE, 6)
    assert spare(limited) == 0


def test_T53_a_batch_above_the_burst_needs_a_full_bucket_and_leaves_a_debt() -> None:
    limited, clock = limits(60, 10)
    limited.admit(CREATE_TASK, ALICE, 100)
    with pytest.raises(RateLimited) as refused:
        limited.admit(CREATE_TASK, ALICE)
    assert refused.value.retry_after_seconds == 91
    clock.advance(90_000)
    assert spare(limited) == 0
    clock.advance(1_000)
    assert spare(limited) == 1
    clock.advance(9_999)
    with pytest.raises(RateLimited) as refused:
        limited.admit(CREATE_TASK, ALICE, 100)
    assert refused.value.retry_after_seconds == 1
    clock.advance(1)
    limited.admit(CREATE_TASK, ALICE, 100)


def test_what_is_refused_costs_nothing() -> None:
    limited, clock = limits(60, 2)
    assert spare(limited) == 2
    for _ in range(100):
        assert spare(limited) == 0
    clock.advance(1_000)
    assert spare(limited) == 1


def test_what_is_required_is_not_paid() -> None:
    limited, _ = limits(60, 2)
    for _ in range(5):
        limited.require(CREATE_TASK, ALICE)
    assert spare(limited) == 2
    with pytest.raises(RateLimited):
        limited.require(CREATE_TASK, ALICE)


def test_a_claim_may_end_below_zero() -> None:
    limited, clock = limits(60, 10)
    limited.admit(CLAIM, ALICE)
    limited.pay(CLAIM, ALICE, 99)
    clock.advance(90_999)
    with pytest.raises(RateLimited):
        limited.admit(CLAIM, ALICE)
    clock.advance(1)
    limited.admit(CLAIM, ALICE)
    limited.pay(CLAIM, ALICE, 0)


def test_huge_settings_do_not_wrap() -> None:
    limited, clock = limits(2**53, 2**53)
    limited.admit(CREATE_TASK, ALICE, 2**53)
    clock.advance(1)
    limited.admit(CREATE_TASK, ALICE)
    slow, _ = limits(1, 1)
    slow.admit(CREATE_TASK, ALICE, 100_000)
    with pytest.raises(RateLimited) as refused:
        slow.admit(CREATE_TASK, ALICE)
    assert refused.value.retry_after_seconds == 100_000 * 60


def test_full_and_idle_buckets_are_dropped() -> None:
    limited, clock = limits(60, 2)
    debtor = Principal("debtor", [], [], {"tid": "acme"})
    limited.admit(CREATE_TASK, debtor, 10_000)
    for number in range(1000):
        limited.admit(CREATE_TASK, Principal(f"p{number}", [], [], {"tid": "acme"}))
    assert limited.held("producer") == 1001
    clock.advance(1_000)
    for _ in range(1000):
        limited.admit(CREATE_TASK, ALICE, 0)
    assert limited.held("producer") <= 2, "the debtor, and perhaps the one who asked"
    with pytest.raises(RateLimited):
        limited.admit(CREATE_TASK, debtor)


def test_webhooks_wait_by_tenant_and_url() -> None:
    limited, clock = limits(60, 1)
    assert limited.wait_ms(TASK_RESULT, "acme", "http://a") == 0
    assert limited.wait_ms(QUEUE_READY, "acme", "http://a") == 1_000
    assert limited.wait_ms(TASK_RESULT, "acme", "http://b") == 0
    assert limited.wait_ms(TASK_RESULT, "other", "http://a") == 0
    clock.advance(400)
    assert limited.wait_ms(TASK_RESULT, "acme", "http://a") == 600
    clock.advance(600)
    assert limited.wait_ms(TASK_RESULT, "acme", "http://a") == 0
    assert (limited.hits[TASK_RESULT], limited.hits[QUEUE_READY]) == (1, 1)


# --- REST

SLOW = {"requestsPerMinute": 1, "burstSize": 3}


def settings(**scopes: dict[str, int]) -> dict[str, Any]:
    return {f"rateLimit.{s}.{k}": v for s, named in scopes.items() for k, v in named.items()}


def limited_body(answer: httpx.Response, scope: str, operation: str) -> int:
    """The seconds to wait, after a look at the whole refusal."""
    assert refusal(answer) == (429, "rate-limited", "rate limit exceeded")
    body = answer.json()
    assert (body["scope"], body["operation"]) == (scope, operation)
    assert answer.headers["retry-after"] == str(body["retryAfterSeconds"])
    assert body["retryAfterSeconds"] >= 1
    return int(body["retryAfterSeconds"])


def create(n: int) -> dict[str, Any]:
    return {"command": "job", "payload": n}


async def hits(node: Any, operation: str) -> float:
    text = (await (await node.client("acme/x")).get("http://node/metrics")).text
    (line,) = (
        line
        for line in text.splitlines()
        if line.startswith("codeq_rate_limit_hits_total{") and f'"{operation}"' in line
    )
    return float(line.split()[-1])


def test_T53_batches_over_rest_pay_for_every_task(tmp_path: Path) -> None:
    async def check() -> None:
        async with rest_node(tmp_path, flags=settings(producer=SLOW)) as node:
            node.app.edge.limits._clock = FakeClock()
            alice, bob = await node.client("acme/alice"), await node.client("acme/bob")
            assert await hits(node, "create_task") == 0
            for client in (alice, bob):
                assert (await client.post("/tasks/batch", json=[create(1)] * 2)).status_code == 200
                refused = await client.post("/tasks/batch", json=[create(1)] * 2)
                assert limited_body(refused, "producer", "create_task") == 60
                assert (await client.post("/tasks", json=create(1))).status_code == 201
                refused = await client.post("/tasks", json=create(1))
                assert limited_body(refused, "producer", "create_task") == 60
            big = await node.client("acme/big")
            assert (await big.post("/tasks/batch", json=[create(1)] * 10)).status_code == 200
            refused = await big.post("/tasks/batch", content=b"x" * 1000)
            assert limited_body(refused, "producer", "create_task") == 480
            assert await hits(node, "create_task") == 5
            stats = node.shard.engine.queues(None)
            assert stats[0][2] == 16

    asyncio.run(check())


def test_claims_over_rest_pay_for_what_they_get(tmp_path: Path) -> None:
    async def check() -> None:
        async with rest_node(tmp_path, flags=settings(worker=SLOW)) as node:
            node.app.edge.limits._clock = FakeClock()
            producer = await node.client("acme/p")
            await producer.post("/tasks/batch", json=[create(n) for n in range(20)])
            worker = await node.client("acme/w")
            assert (await worker.post("/tasks/claim", json={})).status_code == 200
            got = await worker.post("/tasks/claim/batch", json={"count": 10})
            assert len(got.json()["tasks"]) == 10
            for path in ("/tasks/claim", "/tasks/claim/batch"):
                refused = await worker.post(path, json={"count": 1})
                assert limited_body(refused, "worker", "claim") == 540
            idle = await node.client("acme/idle")
            empty = {"commands": ["none"]}
            for status in (204, 204, 204, 429):
                answer = await idle.post("/tasks/claim", json=empty)
                assert answer.status_code == status
            task_id = got.json()["tasks"][0]["id"]
            beat = await worker.post(f"/tasks/{task_id}/heartbeat")
            assert beat.status_code == 200, "only claims are limited"
            assert await hits(node, "claim") == 3

    asyncio.run(check())


def test_the_scope_is_checked_before_the_limiter(tmp_path: Path) -> None:
    async def check() -> None:
        few = Tokens(few=Principal("w", ["codeq:result"], ["*"], {"tid": "acme"}))
        async with rest_node(tmp_path, few, settings(worker=SLOW)) as node:
            client = await node.client("few")
            for _ in range(10):
                answer = await client.post("/tasks/claim", json={})
                assert refusal(answer)[2] == "missing scope"
            assert await hits(node, "claim") == 0
            assert node.app.edge.limits.held("worker") == 0

    asyncio.run(check())


# --- streams


def test_a_stream_pays_one_token_at_hello_and_nothing_per_event() -> None:
    bucket = RateLimitBucket(60, 2)
    shard = FakeShard()
    house = House(shard, rate_limit=RateLimit(producer=bucket, worker=bucket))
    house.auth.tokens["other"] = FakePrincipal(subject="other")
    exceeded = Status("RESOURCE_EXHAUSTED", "rate limit exceeded")
    for opened, operation in ((house.producer, CREATE_TASK), (house.worker, CLAIM)):
        line, _ = opened(), opened()
        for number in range(50):
            if operation is CLAIM:
                line.ready()
            else:
                line.create(number)
        assert line.session.status is None
        third = opened(token=None)
        third.send(hello={"token": "token"})
        assert third.session.status == exceeded
        assert third.read() is None and third.session.over
        assert house.limits.hits[operation] == 1
        assert opened(token="other").session.status is None
    refused = house.producer(token=None)
    refused.send(hello={"token": "bad"})
    assert refused.session.status is not None and refused.session.status.code == "UNAUTHENTICATED"
    shard.clock.advance(1_000)
    assert house.producer().session.status is None


def test_rest_and_streams_share_the_buckets(tmp_path: Path) -> None:
    async def check() -> None:
        async with rest_node(tmp_path, flags=settings(producer=SLOW)) as node:
            house = House(node.shard)
            house.edge.limits = node.app.edge.limits
            house.auth.tokens["acme/p"] = FakePrincipal(tenant="acme", subject="p")
            for _ in range(3):
                house.producer("acme/p").session.close()
            client = await node.client("acme/p")
            assert (await client.post("/tasks", json=create(1))).status_code == 429

    asyncio.run(check())


def test_T62_the_settings_act_on_a_whole_server(start_server: Callable[..., Server]) -> None:
    server = start_server(
        RATE_LIMIT_PRODUCER_REQUESTS_PER_MINUTE="1", RATE_LIMIT_PRODUCER_BURST_SIZE="2"
    )

    client = server.client("dev-producer")
    assert client.post("/tasks", json=create(1)).status_code == 201
    with channel(server.producer) as opened:
        first, second = Line(opened), Line(opened)
        first.send(hello={"token": "dev-producer"})
        assert first.read().HasField("hello_ack")
        second.send(hello={"token": "dev-producer"})
        assert second.status() == ("RESOURCE_EXHAUSTED", "rate limit exceeded")
        first.send(create={"seq": 1, "command": "job"})
        assert first.read().create_ack.ok
        first.cancel()
        second.half_close()
    assert client.post("/tasks", json=create(1)).status_code == 429
    scrape = httpx.get(f"http://{server.http}/metrics").text
    hits = 'codeq_rate_limit_hits_total{operation="create_task",scope="producer"} 2.0'
    assert hits in scrape
