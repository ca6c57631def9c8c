"""Result webhooks against real receivers, under a fake clock: what is sent, when, how often, and
what a slow receiver holds up."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from codeq.engine.clock import FakeClock

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
        async with receiver() as hook:
            url = hook.url()
        async with sender(tmp_path, resultWebhookMaxAttempts=1) as node:
            await node.end(url)
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


def test_T52_a_slow_host_delays_no_other_host_and_no_result(tmp_path: Path) -> None:
    """A host that never answers has more deliveries than memory holds of it."""
    lookup = names(slow_test=["127.0.0.1"], fast_test=["127.0.0.1"])
    flags: dict[str, Any] = {"webhooks__concurrency": 6, "webhooks__perHost": 2}

    async def run() -> None:
        window = {"host_max": 8, "window_max": 12}
        async with (
            receiver() as slow,
            receiver() as fast,
            sender(tmp_path, lookup=lookup, window=window, **flags) as node,
        ):
            slow.status = None
            await node.end(*[slow.url(host="slow.test")] * 40)
            await slow.take(2)
            for _ in range(3):
                ids = await node.end(*[fast.url(host="fast.test")] * 10)
                assert sorted(got.json["taskId"] for got in await fast.take(10)) == sorted(ids)
            assert slow.open_max == 2 and len(slow.all) == 2
            assert fast.open_max <= 2
            assert node.webhooks.held <= 12 and node.shard.deliveries.pending >= 40

    asyncio.run(run())


def test_what_has_no_room_in_memory_is_delivered_once_there_is(tmp_path: Path) -> None:
    lookup = names(a_test=["127.0.0.1"], b_test=["127.0.0.1"], c_test=["127.0.0.1"])

    async def run() -> None:
        clock = FakeClock()
        window = {"host_max": 4, "window_max": 10}
        async with receiver() as hook:
            hook.status = None
            urls = [hook.url(host=f"{name}.test") for name in "abc"] * 100
            async with sender(tmp_path, clock, lookup=lookup, window=window) as node:
                ids = await node.end(*urls)
            hook.status = 200
            tried = len(hook.all)
            async with sender(tmp_path, clock, lookup=lookup, window=window) as node:
                await delivered(node)
                assert node.webhooks.held == 0 and node.webhooks._hosts == {}
        told = [got.json["taskId"] for got in hook.all[tried:]]
        assert sorted(told) == sorted(ids), "each of them, and once"

    asyncio.run(run())


def test_places_are_bounded_in_all(tmp_path: Path) -> None:
    lookup = names(**{f"h{n}_test": ["127.0.0.1"] for n in range(9)})
    flags: dict[str, Any] = {"webhooks__concurrency": 5, "webhooks__perHost": 3}

    async def run() -> None:
        async with receiver() as hook, sender(tmp_path, lookup=lookup, **flags) as node:
            hook.status = None
            await node.end(*[hook.url(host=f"h{n}.test") for n in range(9)])
            await hook.take(5)
            await node.drained()
            assert hook.open == 5
            node.runner.advance(15_000)
            assert len(await hook.take(4)) == 4
            assert hook.open_max == 5

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
        self.server.got.put(body["taskId"])  # type: ignore[attr-defined]
        if self.server.hangs.is_set():  # type: ignore[attr-defined]
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
    hook.hangs.set()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    url = f"http://127.0.0.1:{hook.server_address[1]}/"
    ids = [create(producer, "job", webhook=url)["id"] for _ in range(8)]
    for _ in ids:
        task_id = claim(worker, "job")["id"]
        assert worker.post(f"/tasks/{task_id}/result", json={"status": "COMPLETED"}).is_success
    under_way = {hook.got.get(timeout=SECONDS) for _ in range(3)}
    server.kill()
    hook.hangs.clear()
    server.start()
    told = [hook.got.get(timeout=SECONDS) for _ in ids]
    assert sorted(told) == sorted(ids) and under_way < set(told)
    server.terminate()
    assert hook.got.empty()
    assert "webhookHmacSecret is empty" in server.stderr_path.read_text()
