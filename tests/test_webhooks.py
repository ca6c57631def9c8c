"""Result webhooks against real receivers, under a fake clock: what is sent, when, how often, and
what a slow receiver holds up."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from codeq.engine.clock import FakeClock
from codeq.server.callbacks import Lookup

from .conftest import Server, claim, create
from .receiver import SECONDS, Sender, names, receiver, sender

SECRET = "between us"
ONE_A_SECOND = {
    "rateLimit__webhook__requestsPerMinute": 60,
    "rateLimit__webhook__burstSize": 1,
}
COMPLETED = {
    "result": b'{"n": 9007199254740993}',
    "artifacts": b'[{"name":"a","url":"u"},{"name":"b c","contentBase64":"aGk="}]',
}


async def delivered(node: Sender) -> None:
    """Until nothing is pending, also not in the store."""
    await node.until(lambda: node.shard.deliveries.pending == 0)
    await node.drained()


def test_body_and_headers(tmp_path: Path) -> None:
    async def run() -> None:
        async with receiver() as hook, sender(tmp_path, webhookHmacSecret=SECRET) as node:
            (task_id,) = await node.end(hook.url("/a%2Fb?c=%7E"), **COMPLETED)
            got = await hook.next()
            assert (got.method, got.path) == ("POST", "/a%2Fb?c=%7E"), "the URL as it was given"
            assert b'"result":{"n": 9007199254740993}' in got.body, "bytes of the result are kept"
            assert got.json == {
                "taskId": task_id,
                "eventType": "job",
                "status": "COMPLETED",
                "result": {"n": 9007199254740993},
                "error": "",
                "artifacts": [
                    {"name": "a", "url": "u"},
                    {"name": "b c", "url": f"/v1/codeq/tasks/{task_id}/artifacts/b%20c"},
                ],
                "completedAt": "2023-11-14T22:13:20.000Z",
            }
            assert got.headers["content-type"] == "application/json"
            assert got.headers["host"] == f"127.0.0.1:{hook.port}"
            stamp = got.headers["x-codeq-timestamp"]
            assert stamp == "1700000000"
            signed = hmac.new(SECRET.encode(), stamp.encode() + b"." + got.body, hashlib.sha256)
            assert got.headers["x-codeq-signature"] == signed.hexdigest()
            assert "traceparent" not in got.headers, "tracing is off"
            await delivered(node)
            assert dict(node.shard._store.scan(b"w", b"x")) == {}

    asyncio.run(run())


def test_body_of_a_failure_unsigned(tmp_path: Path) -> None:
    async def run() -> None:
        async with receiver() as hook, sender(tmp_path, webhookHmacSecret=" ") as node:
            await node.end(hook.url(), status=b"FAILED", error=b"it broke")
            got = await hook.next()
            assert got.json["status"] == "FAILED" and got.json["error"] == "it broke"
            assert got.json["result"] is None and got.json["artifacts"] is None
            assert not [name for name in got.headers if name.startswith("x-codeq")]
            await delivered(node)

    asyncio.run(run())


@pytest.mark.parametrize("status", [302, 404, 500])
def test_retries_wait_longer_each_time_and_come_to_an_end(
    tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        flags: dict[str, Any] = {
            "resultWebhookMaxAttempts": 4,
            "resultWebhookBaseBackoffSeconds": 3,
            "resultWebhookMaxBackoffSeconds": 10,
        }
        async with receiver() as hook, sender(tmp_path, **flags) as node:
            hook.status, hook.headers = status, {"location": hook.url("/elsewhere")}
            (task_id,) = await node.end(hook.url())
            await hook.next()
            for tries, wait_s in ((1, 3), (2, 6), (3, 10)):
                await node.until(lambda: bool(node.webhooks._later))
                node.runner.advance(wait_s * 1000 - 1)
                await node.drained()
                assert len(hook.all) == tries, "not a moment too early"
                node.runner.advance(1)
                got = await hook.next()
                assert got.path == "/hook", "redirects are not followed"
            await delivered(node)
            node.runner.advance(3_600_000)
            await node.drained()
            assert len(hook.all) == 4
            (entry,) = node.webhooks.exhausted
            assert (entry.task_id, entry.tries, entry.tenant_id) == (task_id, 4, "t")
            assert entry.error == f"status {status}" and node.webhooks.exhausted_count == 1
            counted = {"kind": "task_result", "command": "job", "outcome": "failure"}
            assert node.metric("codeq_webhook_deliveries_total", **counted) == 4
            assert node.metric("codeq_webhooks_pending") == 0

    with caplog.at_level(logging.WARNING, "codeq.webhooks"):
        asyncio.run(run())
    assert "was given up after 4 tries" in caplog.text


def test_a_receiver_that_comes_back_is_told_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with receiver() as hook, sender(tmp_path) as node:
            hook.status = 503
            await node.end(hook.url())
            await hook.next()
            await node.until(lambda: bool(node.webhooks._later))
            assert node.metric("codeq_webhooks_pending") == 1
            hook.status = 204
            node.runner.advance(2_000)
            await hook.next()
            await delivered(node)
            assert len(hook.all) == 2 and not node.webhooks.exhausted
            counted = {"kind": "task_result", "command": "job", "outcome": "success"}
            assert node.metric("codeq_webhook_deliveries_total", **counted) == 1

    asyncio.run(run())


def test_a_try_ends_after_fifteen_seconds(tmp_path: Path) -> None:
    async def run() -> None:
        async with receiver() as hook, sender(tmp_path, resultWebhookMaxAttempts=1) as node:
            hook.status = None
            await node.end(hook.url())
            await hook.next()
            node.runner.advance(14_999)
            await node.drained()
            assert node.shard.deliveries.pending == 1 and hook.open == 1
            node.runner.advance(1)
            await delivered(node)
            assert node.webhooks.exhausted[0].error == "no answer within 15 s"

    asyncio.run(run())


def test_a_closed_port_is_a_failure(tmp_path: Path) -> None:
    async def run() -> None:
        with socket.socket() as held:  # it has the port, and does not listen
            held.bind(("127.0.0.1", 0))
            async with sender(tmp_path, resultWebhookMaxAttempts=1) as node:
                await node.end(f"http://127.0.0.1:{held.getsockname()[1]}/hook")
                await delivered(node)
                assert "onnect" in node.webhooks.exhausted[0].error

    asyncio.run(run())


def test_T18_pending_webhooks_go_on_after_a_restart(tmp_path: Path) -> None:
    async def run() -> None:
        clock = FakeClock()
        async with receiver() as hook:
            hook.status = 500
            async with sender(tmp_path, clock) as node:
                ids = await node.end(hook.url(), hook.url())
                await hook.take(2)
                await node.until(lambda: len(node.webhooks._later) == 2)
            hook.status = 200
            async with sender(tmp_path, clock) as node:
                told = [got.json["taskId"] for got in await hook.take(2)]
                assert sorted(told) == sorted(ids)
                await delivered(node)
            async with sender(tmp_path, clock) as node:
                await node.end(hook.url("/later"))
                assert (await hook.next()).path == "/later", "the others are not sent again"

    asyncio.run(run())


def hosts(count: int, prefix: str = "h") -> list[str]:
    return [f"{prefix}{n}.test" for n in range(count)]


def all_here(*found: str) -> Lookup:
    """A name service in which these names lead to this machine."""
    return names(**{name.replace(".", "_"): ["127.0.0.1"] for name in found})


def test_T52_a_slow_host_delays_no_other_host_and_no_result(tmp_path: Path) -> None:
    """A host that never answers has more deliveries than memory holds of it."""
    lookup = all_here("slow.test", "fast.test")
    flags: dict[str, Any] = {"webhooks__concurrency": 6, "webhooks__perHost": 2}

    async def run() -> None:
        window = {"host_max": 8, "window_max": 96}
        async with (
            receiver() as slow,
            receiver() as fast,
            sender(tmp_path, lookup=lookup, window=window, **flags) as node,
        ):
            await node.end(slow.url(host="slow.test"))
            await slow.next()
            await delivered(node)
            slow.status = None
            await node.end(*[slow.url(host="slow.test")] * 40)
            await slow.take(2)
            for _ in range(3):
                ids = await node.end(*[fast.url(host="fast.test")] * 10)
                assert sorted(got.json["taskId"] for got in await fast.take(10)) == sorted(ids)
            assert slow.open_max == 2 and len(slow.all) == 3
            assert fast.open_max <= 2
            assert node.webhooks.held <= 12 and node.shard.deliveries.pending >= 40

    asyncio.run(run())


def test_T52_many_slow_hosts_delay_no_other_tenant_and_no_quick_host(tmp_path: Path) -> None:
    """More names than there are places, of one tenant; then of several."""
    slow_hosts, tenants = hosts(24, "s"), ("t", "u", "v", "w")
    lookup = all_here("fast.test", "first.test", *slow_hosts)

    async def run() -> None:
        async with (
            receiver() as slow,
            receiver() as fast,
            sender(tmp_path, lookup=lookup, webhooks__concurrency=16) as node,
        ):
            slow.status = None
            await node.end(fast.url(host="fast.test"))
            await fast.next()
            for number, tenant in enumerate(tenants, 1):
                urls = [slow.url(host=host) for host in slow_hosts] * 8
                await node.end(*urls, tenant=tenant)
                await node.end(fast.url(host="first.test"), tenant="other")
                await fast.next()
                for _ in range(9):
                    await node.end(fast.url(host="fast.test"))
                    await fast.next()
                await node.until(lambda n=number: node.shard.deliveries.pending == n * 192)
                if tenant != tenants[-1]:
                    node.runner.advance(15_000)
            assert slow.open_max <= 12, "a quarter is left to those that are quick"

    asyncio.run(run())


def test_T52_names_that_nobody_knows_delay_no_other(tmp_path: Path) -> None:
    """Their look-ups last longer than tries, each keeps the place of the try it was begun for, and
    none is waited for inside another try."""
    unknown = hosts(40, "u")
    known = all_here("fast.test")
    answer = threading.Event()
    asked: list[str] = []

    def lookup(host: str, port: int) -> list[tuple[Any, ...]]:
        if host in unknown:
            asked.append(host)
            answer.wait(SECONDS)
            raise OSError("no such name")
        return known(host, port)

    async def run() -> None:
        flags: dict[str, Any] = {"webhooks__concurrency": 32, "resultWebhookMaxAttempts": 1}
        async with receiver() as fast, sender(tmp_path, lookup=lookup, **flags) as node:
            await node.end(*[fast.url(host=host) for host in unknown])
            await node.until(lambda: len(asked) == 12)
            await node.end(fast.url(host="fast.test"), tenant="u")
            await fast.next()
            await node.until(lambda: node.shard.deliveries.pending == 40)
            node.runner.advance(15_000)
            await node.until(lambda: node.webhooks.exhausted_count == 12)
            await node.end(fast.url(host="fast.test"), tenant="u")
            await fast.next()
            assert len(asked) == 12, "their threads still run, so nothing took their places"
            answer.set()
            await node.until(lambda: len(asked) == 40)

    asyncio.run(run())


@pytest.mark.parametrize(("count", "others"), [(6, "tu"), (20, "u")])
def test_T52_a_tenant_with_many_dead_hosts_fills_no_window(
    tmp_path: Path, count: int, others: str
) -> None:
    """Other deliveries are read all the same, also after a start; those of the same tenant if what
    is in memory of the dead hosts leaves room for it."""
    dead = hosts(count, "d")
    lookup = all_here("fast.test", *dead)
    window = {"host_max": 4, "window_max": 320}

    async def run() -> None:
        async with receiver() as slow, receiver() as fast:
            slow.status = None
            urls = [slow.url(host=host) for host in dead] * 20
            async with sender(tmp_path, lookup=lookup, window=window) as node:
                await node.end(*urls)
            async with sender(tmp_path, lookup=lookup, window=window) as node:
                for tenant in others:
                    await node.end(*[fast.url(host="fast.test")] * 30, tenant=tenant)
                    await fast.take(30)
                    await node.until(lambda: node.shard.deliveries.pending == len(urls))
                assert node.webhooks.held == min(4 * count, 320 // 8)

    asyncio.run(run())


@pytest.mark.parametrize(("status", "known"), [(None, False), (None, True), (503, True)])
def test_T52_hosts_that_were_quick_and_are_not_any_more_fill_no_window(
    tmp_path: Path, status: int | None, known: bool
) -> None:
    """As many deliveries of each as a quick host may have in memory would leave no room. ``known``:
    one try has told before the others come."""
    dead = hosts(5, "d")
    lookup = all_here("fast.test", *dead)
    window = {"host_max": 32, "window_max": 1_024}

    async def run() -> None:
        async with (
            receiver() as slow,
            receiver() as fast,
            sender(tmp_path, lookup=lookup, window=window) as node,
        ):
            urls = [slow.url(host=host) for host in dead]
            await node.end(*urls, fast.url(host="fast.test"))
            await fast.next()
            await delivered(node)
            slow.status = status
            if known:
                await node.end(*urls)
                await slow.take(10)
                await node.until(lambda: status is None or len(node.webhooks._later) == 5)
                node.clock.advance(1_001)
            await node.end(*urls * 40)
            await node.end(fast.url(host="fast.test"))
            await fast.next()
            await node.until(lambda: node.shard.deliveries.pending == (40 + known) * 5)
            assert node.webhooks.held == 16 * 5

    asyncio.run(run())


@pytest.mark.parametrize(("host_max", "window_max"), [(4, 16), (1, 8), (3, 40), (20, 9), (2, 160)])
def test_what_has_no_room_in_memory_is_delivered_once_there_is(
    tmp_path: Path, host_max: int, window_max: int
) -> None:
    tenants, found = "tuvw", hosts(5)
    lookup = all_here(*found)

    async def run() -> None:
        clock = FakeClock()
        window = {"host_max": host_max, "window_max": window_max}
        async with receiver() as hook:
            urls = [hook.url(host=host) for host in found] * 20
            async with sender(tmp_path, clock, lookup=names(), window=window) as node:  # none known
                ids = [i for tenant in tenants for i in await node.end(*urls, tenant=tenant)]
            async with sender(tmp_path, clock, lookup=lookup, window=window) as node:
                await delivered(node)
                assert node.webhooks.held == 0 and node.webhooks._window._owners == {}
                assert node.webhooks._window._hungry == {}
        told = [got.json["taskId"] for got in hook.all]
        assert sorted(told) == sorted(ids), "each of them, and once"

    asyncio.run(run())


def test_places_are_bounded_in_all(tmp_path: Path) -> None:
    found = hosts(9)

    async def run() -> None:
        flags: dict[str, Any] = {"webhooks__concurrency": 8, "webhooks__perHost": 3}
        async with receiver() as hook, sender(tmp_path, lookup=all_here(*found), **flags) as node:
            hook.status = None
            for tenant in "tuv":
                await node.end(*[hook.url(host=host) for host in found], tenant=tenant)
            await hook.take(6)
            await node.drained()
            assert hook.open == 6, "two are left to those that are quick"
            node.runner.advance(15_000)
            assert len(await hook.take(6)) == 6
            assert hook.open_max == 6

    asyncio.run(run())


def test_a_limited_result_waits_and_that_is_no_try(tmp_path: Path) -> None:
    async def run() -> None:
        async with receiver() as hook, sender(tmp_path, **ONE_A_SECOND) as node:
            await node.end(hook.url(), hook.url(), hook.url("/other"))
            assert sorted(got.path for got in await hook.take(2)) == ["/hook", "/other"]
            await node.until(lambda: bool(node.webhooks._later))
            node.runner.advance(999)
            await node.drained()
            assert len(hook.all) == 2, "each URL has a bucket of its own"
            node.runner.advance(1)
            await hook.next()
            await delivered(node)
            assert node.metric("codeq_webhook_deliveries_total", outcome="failure") == 0
            assert node.metric("codeq_rate_limit_hits_total", operation="task_result") == 1

    asyncio.run(run())


class Hook(BaseHTTPRequestHandler):
    """For servers in a process of their own: notes each body in ``server.got``."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        hangs = self.server.hangs.is_set()  # type: ignore[attr-defined]
        self.server.got.put(body["taskId"])  # type: ignore[attr-defined]
        if hangs:
            self.connection.recv(1)  # until the server is gone
            return
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[ThreadingHTTPServer]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    made.got = queue.Queue()  # type: ignore[attr-defined]
    made.hangs = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_T18_kill_while_webhooks_are_pending(
    start_server: Callable[..., Server], hook: Any
) -> None:
    """Killed -9 with deliveries under way and in line: each is made after the restart."""
    settings = {"WEBHOOKS_ALLOW_PRIVATE_NETWORKS": "true", "WEBHOOKS_PER_HOST": "3"}
    server = start_server(**settings)
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    url = f"http://127.0.0.1:{hook.server_address[1]}/"

    def end(count: int) -> list[str]:
        ids = [str(create(producer, "job", webhook=url)["id"]) for _ in range(count)]
        for _ in ids:
            task_id = claim(worker, "job")["id"]
            assert worker.post(f"/tasks/{task_id}/result", json={"status": "COMPLETED"}).is_success
        return ids

    assert end(1) == [hook.got.get(timeout=SECONDS)], "now the host is known to be quick"
    hook.hangs.set()
    ids = end(8)
    under_way = {hook.got.get(timeout=SECONDS) for _ in range(3)}
    server.kill()
    hook.hangs.clear()
    server.start()
    told = [hook.got.get(timeout=SECONDS) for _ in ids]
    assert sorted(told) == sorted(ids) and under_way < set(told)
    server.terminate()
    assert hook.got.empty()
    assert "webhookHmacSecret is empty" in server.stderr_path.read_text()
