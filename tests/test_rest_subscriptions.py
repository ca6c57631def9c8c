"""Subscriptions from outside: both routes with every refusal, and what a callback receives."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from codeq.model import BLANKS
from codeq.server.auth import WORKER_SCOPES, Principal

from .conftest import PREFIX, Tokens, refusal
from .lines import FakePrincipal, House, Line
from .receiver import Sender, names, receiver, sender

PATH = "/workers/subscriptions"
SECRET = "between us"


def tokens() -> Tokens:
    """Besides "tenant/subject": a worker of tenant t that may do little, and one without scope."""
    return Tokens(
        few=Principal("few", WORKER_SCOPES, ["job", "Größe"], {"tid": "shop"}),
        unscoped=Principal("u", ["codeq:claim"], ["*"], {"tid": "shop"}),
    )


@asynccontextmanager
async def client(node: Sender, token: str = "shop/w") -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=node.app),
        base_url=f"http://node{PREFIX}",
        headers={"authorization": f"Bearer {token}"},
    ) as made:
        yield made


async def subscribe(worker: httpx.AsyncClient, **fields: Any) -> str:
    answer = await worker.post(PATH, json=fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["subscriptionId"])


async def create(worker: httpx.AsyncClient, command: str, **fields: Any) -> str:
    answer = await worker.post("/tasks", json={"command": command, "payload": 1, **fields})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def test_subscribe_and_keep(tmp_path: Path) -> None:
    async def run() -> None:
        async with sender(tmp_path) as node, client(node) as worker:
            answer = await worker.post(PATH)
            assert answer.status_code == 200
            name = answer.json()["subscriptionId"]
            assert answer.json() == {
                "subscriptionId": name,
                "expiresAt": "2023-11-14T22:18:20.000Z",
            }, "300 seconds"
            node.runner.advance(1_000)
            await create(worker, "job")
            kept = await worker.post(f"{PATH}/{name}/heartbeat/")
            assert kept.status_code == 200
            assert kept.json() == {
                "subscriptionId": name,
                "expiresAt": "2023-11-14T22:18:21.000Z",
                "available": [{"eventType": "job", "queueDepth": 1}],
            }
            long = await worker.post(f"{PATH}/{name}/heartbeat", json={"ttlSeconds": 10**12})
            assert long.json()["expiresAt"] == "2023-11-15T22:13:21.000Z", "a day at most"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"callbackUrl": "ftp://host/"}, "invalid callback url"),
        ({"callbackUrl": "http://10.0.0.1/"}, "invalid callback url"),
        ({"callbackUrl": "https://host/" + "x" * 2048}, "invalid callback url"),
        ({"deliveryMode": "FANOUT"}, "invalid deliveryMode"),
        ({"deliveryMode": "group", "groupId": " "}, "groupId is required"),
        ({"groupId": "g" * 257}, "invalid groupId"),
        ({"eventTypes": [f"e{n}" for n in range(101)]}, "invalid body"),
        ({"eventTypes": "job"}, "invalid body"),
        ({"eventTypes": ["job", "a\x00b"]}, "invalid command"),
        ({"eventTypes": ["*", "\x85\x9f"]}, "invalid command"),
        ({"ttlSeconds": 1.5}, "invalid body"),
        ([], "invalid body"),
    ],
)
def test_refusals(tmp_path: Path, body: Any, message: str) -> None:
    async def run() -> None:
        flags = {"webhooks__allowPrivateNetworks": False}
        async with sender(tmp_path, **flags) as node, client(node) as worker:
            answer = refusal(await worker.post(PATH, json=body))
            assert answer == (400, "validation-error", message)

    asyncio.run(run())


def test_T45_T48_what_a_subscription_names_is_bounded_as_commands_are(tmp_path: Path) -> None:
    """Whatever it names is stored and is a label of a metric."""

    async def run() -> None:
        async with sender(tmp_path) as node, client(node) as worker:
            longest = "ß" * 128
            for kinds in ([longest + "s"], ["*", longest + "s"], ["job", "x" * (1 << 20)]):
                answer = refusal(await worker.post(PATH, json={"eventTypes": kinds}))
                assert answer == (400, "validation-error", "invalid command"), len(kinds[-1])
            assert node.shard.subscriptions.active() == {}
            await subscribe(worker, eventTypes=[f" {longest}\u3000", "", "job"])
            assert node.shard.subscriptions.active() == {longest: 1, "job": 1}

    asyncio.run(run())


async def read(node: Sender, line: Line) -> Any:
    """The next message of a stream."""
    found: list[Any] = []

    def came() -> bool:
        found.append(line.read())
        return found[-1] is not None

    await node.until(came)
    return found[-1]


@pytest.mark.parametrize("blank", [*BLANKS, " \t\u3000"], ids=ascii)
def test_T43_odd_blanks_name_the_same_queue_on_every_surface(tmp_path: Path, blank: str) -> None:
    async def run() -> None:
        async with sender(tmp_path) as node, client(node) as worker:
            odd = f"{blank}job{blank}"
            path = f"{PATH}/{await subscribe(worker, eventTypes=[odd])}/heartbeat"
            house = House(node.shard)
            house.auth.tokens["token"] = FakePrincipal(tenant="shop")
            line, producer = house.worker(), house.producer()
            producer.create(1, odd)
            line.ready(odd)
            assert (await read(node, line)).task.task.command == "job"
            assert (await read(node, producer)).create_ack.ok
            await create(worker, odd)
            told = (await worker.post(path)).json()["available"]
            assert told == [{"eventType": "job", "queueDepth": 1}]
            claimed = await worker.post("/tasks/claim", json={"commands": [odd]})
            assert claimed.json()["command"] == "job"

    asyncio.run(run())


@pytest.mark.parametrize("other", ["\x1c", "\x1d", "\x1e", "\x1f", "\u200b", "\ufeff"], ids=ascii)
def test_T43_what_is_no_blank_names_another_queue_on_every_surface(
    tmp_path: Path, other: str
) -> None:
    async def run() -> None:
        async with sender(tmp_path) as node, client(node) as worker:
            odd = f"{other}job{other}"
            await create(worker, "job")
            house = House(node.shard)
            house.auth.tokens["token"] = FakePrincipal(tenant="shop")
            line = house.worker()
            line.ready(odd)
            nothing = await worker.post("/tasks/claim", json={"commands": [odd]})
            assert nothing.status_code == 204
            await node.drained()
            assert line.read() is None
            named = await worker.post(PATH, json={"eventTypes": [odd]})
            assert named.status_code == (400 if other < " " else 200), "a control character"

    asyncio.run(run())


@pytest.mark.parametrize("field", ["groupId", "deliveryMode", "callbackUrl"])
def test_separators_are_no_blanks_of_a_subscription(tmp_path: Path, field: str) -> None:
    async def run() -> None:
        async with sender(tmp_path) as node, client(node) as worker:
            answer = await worker.post(PATH, json={"deliveryMode": "group", field: "\x1c"})
            assert answer.status_code == (200 if field == "groupId" else 400), answer.text

    asyncio.run(run())


def test_T40_event_types_of_the_token_and_the_tenant(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            sender(tmp_path, tokens=tokens()) as node,
            client(node) as every,
            client(node, "few") as few,
            client(node, "other/w") as other,
            client(node, "unscoped") as unscoped,
        ):
            for kinds in (["elsewhere"], ["job", "elsewhere"], ["*"], [" "], ["JOB"]):
                refused = refusal(await few.post(PATH, json={"eventTypes": kinds}))
                assert refused == (403, "permission-denied", "event type not allowed"), kinds
            assert refusal(await unscoped.post(PATH))[2] == "missing scope"
            mine, theirs = await subscribe(few), await subscribe(every)
            assert refusal(await unscoped.post(f"{PATH}/{mine}/heartbeat"))[2] == ("missing scope")
            for name in (mine, theirs, "sub-none", "%ff"):
                foreign = refusal(await other.post(f"{PATH}/{name}/heartbeat"))
                assert foreign == (404, "not-found", "not-found")
            await create(every, "Größe")
            await create(every, "elsewhere")
            await create(other, "job")
            path = f"{PATH}/{{}}/heartbeat"

            async def available(worker: httpx.AsyncClient, name: str) -> list[str]:
                answer = await worker.post(path.format(name))
                return [one["eventType"] for one in answer.json()["available"]]

            assert await available(few, mine) == ["Größe"]
            assert await available(every, theirs) == ["Größe", "elsewhere"]
            assert await available(few, theirs) == ["Größe"], "as far as this token may see"

    asyncio.run(run())


def test_a_notification_as_it_arrives(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            receiver() as hook,
            sender(tmp_path, webhookHmacSecret=SECRET, subscriptionMinIntervalSeconds=9) as node,
            client(node) as worker,
        ):
            await subscribe(worker, callbackUrl=hook.url("/ready"), eventTypes=["JOB"])
            await create(worker, "job")
            await create(worker, "JOB")
            first = await hook.next()
            body = first.json
            assert re.fullmatch("ntf-[0-9a-f]{32}", body.pop("notificationId"))
            assert body == {
                "eventType": "JOB",
                "available": True,
                "queueDepth": 1,
                "claimUrl": "/v1/codeq/tasks/claim",
                "sentAt": "2023-11-14T22:13:20.000Z",
            }
            stamp = first.headers["x-codeq-timestamp"].encode()
            signed = hmac.new(SECRET.encode(), stamp + b"." + first.body, hashlib.sha256)
            assert first.headers["x-codeq-signature"] == signed.hexdigest()
            hook.status = 500
            await create(worker, "JOB")
            node.runner.advance(8_999)
            await node.drained()
            assert len(hook.all) == 1
            await node.until(lambda: 0 not in hook_idle(node))
            node.runner.advance(1)
            second = await hook.next()
            assert second.json["queueDepth"] == 2
            assert second.json["notificationId"] != first.json["notificationId"]
            counted = {"kind": "queue_ready", "command": "JOB"}
            name = "codeq_webhook_deliveries_total"
            await node.until(lambda: node.metric(name, **counted, outcome="failure") == 1)
            assert node.metric(name, **counted, outcome="success") == 1
            assert node.metric("codeq_subscriptions_active", command="JOB") == 1
            node.runner.advance(60_000)
            await node.drained()
            assert len(hook.all) == 2, "a single try"

    asyncio.run(run())


def test_the_interval_asked_for_is_kept(tmp_path: Path) -> None:
    async def run() -> None:
        async with receiver() as hook, sender(tmp_path) as node, client(node) as worker:
            await subscribe(worker, callbackUrl=hook.url(), minIntervalSeconds=20)
            await create(worker, "job")
            await hook.next()
            await create(worker, "job")
            node.runner.advance(19_999)
            await node.drained()
            assert len(hook.all) == 1
            await node.until(lambda: 0 not in hook_idle(node))
            node.runner.advance(1)
            await hook.next()

    asyncio.run(run())


def test_what_has_ended_is_cleaned_up_as_often_as_set(tmp_path: Path) -> None:
    async def run() -> None:
        flags = {"subscriptionCleanupIntervalSeconds": 7}
        async with sender(tmp_path, **flags) as node, client(node) as worker:
            await subscribe(worker, ttlSeconds=1)
            node.runner.advance(6_999)
            assert len(node.shard.subscriptions._members) == 1
            node.runner.advance(1)
            assert not node.shard.subscriptions._members

    asyncio.run(run())


def hook_idle(node: Sender) -> list[int]:
    """For each subscription 0 while a notification is on its way."""
    return [int(not one.busy) for one in node.shard.subscriptions._members.values()]


def test_T52_a_slow_subscriber_delays_no_other(tmp_path: Path) -> None:
    async def run() -> None:
        lookup = names(slow_test=["127.0.0.1"], fast_test=["127.0.0.1"])
        flags: dict[str, Any] = {"webhooks__perHost": 1, "webhooks__concurrency": 2}
        async with (
            receiver() as slow,
            receiver() as fast,
            sender(tmp_path, lookup=lookup, **flags) as node,
            client(node) as worker,
        ):
            slow.status = None
            for _ in range(5):
                await subscribe(worker, callbackUrl=slow.url(host="slow.test"))
            await subscribe(worker, callbackUrl=fast.url(host="fast.test"))
            for _ in range(3):
                await create(worker, "job")
                await fast.next()
                await node.until(lambda: bool(hook_idle(node)[-1]))
                node.runner.advance(5_000)
            assert slow.open_max == 1

    asyncio.run(run())


def test_T52_slow_subscribers_of_a_tenant_delay_no_other_tenant(tmp_path: Path) -> None:
    async def run() -> None:
        slow_names = {f"s{number}_test": ["127.0.0.1"] for number in range(12)}
        lookup = names(fast_test=["127.0.0.1"], **slow_names)
        async with (
            receiver() as slow,
            receiver() as fast,
            sender(tmp_path, lookup=lookup, webhooks__concurrency=8) as node,
            client(node) as worker,
            client(node, "other/w") as other,
        ):
            slow.status = None
            for name in slow_names:
                await subscribe(worker, callbackUrl=slow.url(host=name.replace("_", ".")))
            await subscribe(other, callbackUrl=fast.url(host="fast.test"))
            await create(worker, "job")
            await slow.take(3)
            await create(other, "job")
            await fast.next()
            assert slow.open == 3, "three quarters of the tenant's half"

    asyncio.run(run())


def test_a_limited_notification_is_left_out(tmp_path: Path) -> None:
    async def run() -> None:
        flags = {
            "rateLimit__webhook__requestsPerMinute": 1,
            "rateLimit__webhook__burstSize": 1,
        }
        async with receiver() as hook, sender(tmp_path, **flags) as node, client(node) as worker:
            await subscribe(worker, callbackUrl=hook.url(), minIntervalSeconds=1)
            await create(worker, "job")
            await hook.next()
            await node.until(lambda: bool(hook_idle(node)[0]))
            node.runner.advance(1_000)
            await create(worker, "job")
            await node.drained()
            assert node.metric("codeq_rate_limit_hits_total", operation="queue_ready") == 1
            node.runner.advance(59_000)
            await node.drained()
            assert len(hook.all) == 1
            await create(worker, "job")
            assert (await hook.next()).json["queueDepth"] == 3

    asyncio.run(run())


def test_long_poll(tmp_path: Path) -> None:
    async def run() -> None:
        async with sender(tmp_path) as node, client(node) as worker:
            path = f"{PATH}/{await subscribe(worker, eventTypes=['job'])}/heartbeat"
            waiting = asyncio.ensure_future(worker.post(path, json={"waitSeconds": 30}))
            await node.until(lambda: bool(node.shard.subscriptions._polls))
            await create(worker, "other")
            assert not waiting.done()
            await create(worker, "job")
            answer = await waiting
            assert answer.json()["available"] == [{"eventType": "job", "queueDepth": 1}]
            await node.claim(tenant="shop")
            over = asyncio.ensure_future(worker.post(path, json={"waitSeconds": 99}))
            await node.until(lambda: bool(node.shard.subscriptions._polls))
            node.runner.advance(30_000)
            assert (await over).json()["available"] == []

    asyncio.run(run())


def test_a_stop_ends_long_polls(tmp_path: Path) -> None:
    async def run() -> None:
        async with sender(tmp_path) as node, client(node) as worker:
            path = f"{PATH}/{await subscribe(worker)}/heartbeat"
            waiting = asyncio.ensure_future(worker.post(path, json={"waitSeconds": 30}))
            await node.until(lambda: bool(node.shard.subscriptions._polls))
            node.app.stop()
            assert (await waiting).status_code == 503
            assert node.shard.subscriptions._polls == {}

    asyncio.run(run())
