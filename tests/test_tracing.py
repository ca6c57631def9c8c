"""Tracing end to end: over REST, over streams, out of the process."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from codeq.config import Config, ConfigError, dev_config
from codeq.engine.shard import Shard
from codeq.server import app, tracing
from codeq.server.tracing import LINKS_MAX, Tracer

from .conftest import ANY_PORT, PREFIX, START_SECONDS, STOP_SECONDS, Server
from .receiver import receiver
from .test_streams import WORKER, Line, channel

#: What a client sends as traceparent: a sampled span of its own
REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-1af7651916cd43dd8448eb211c80319c-c7ad6b7169203331-01"
UNSAMPLED = "00-2af7651916cd43dd8448eb211c80319c-d7ad6b7169203331-00"
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
LIFE = ("create", "claim", "heartbeat", "abandon", "nack", "submit_result")


def ids(trace_parent: str) -> tuple[int, int]:
    """(trace, span) of a traceparent."""
    _, trace_id, span_id, _ = trace_parent.split("-")
    return int(trace_id, 16), int(span_id, 16)


def own_ids(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def parent_ids(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


def link_ids(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


class Spans(InMemorySpanExporter):
    """Keeps the spans that ended; ``wait_for`` gives those of one name once there are enough."""

    def __init__(self) -> None:
        super().__init__()
        self._more = threading.Condition()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._more:
            result = super().export(spans)
            self._more.notify_all()
        return result

    def wait_for(self, name: str, count: int = 1) -> list[ReadableSpan]:
        def there() -> list[ReadableSpan]:
            return [span for span in self.get_finished_spans() if span.name == name]

        with self._more:
            assert self._more.wait_for(lambda: len(there()) >= count, START_SECONDS), self.names()
        assert len(there()) == count
        return there()

    def names(self) -> list[str]:
        return [span.name for span in self.get_finished_spans()]


class TracingNode:
    """A whole node in a thread of its own, whose spans stay here."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._started: Future[str] = Future()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self.node: app.Node

    async def run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.node = app.Node(self._config, self._started.set_exception)  # type: ignore[arg-type]
        self._started.set_result(await self.node.start())
        await self._stop.wait()
        await self.node.stop()

    def addresses(self) -> dict[str, str]:
        words = self._started.result(START_SECONDS).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)


@contextmanager
def running(config: Config) -> Iterator[tuple[TracingNode, dict[str, str]]]:
    one = TracingNode(config)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(lambda: asyncio.run(one.run()))
        try:
            yield one, one.addresses()
        finally:
            one.stop()
            ended.result(STOP_SECONDS)


def settings(tmp_path: Path, **flags: Any) -> Config:
    addresses = dict.fromkeys(("httpAddr", "producerStreamAddr", "workerStreamAddr"), ANY_PORT)
    data = {"persistenceConfig.path": str(tmp_path / "data"), "limits.diskReserveBytes": 0}
    return dev_config(flags={**addresses, **data, "tracingEnabled": True, **flags})


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
def tracer(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of this test send their spans to ``spans``."""
    provider = TracerProvider(ParentBased(TraceIdRatioBased(1.0)), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(tracing, "from_config", lambda _: Tracer(provider))


@pytest.fixture
def node(tmp_path: Path, tracer: None) -> Iterator[dict[str, str]]:
    """Addresses of a node whose spans go to ``spans``."""
    with running(settings(tmp_path)) as (_, addresses):
        yield addresses


@contextmanager
def rest(node: dict[str, str], token: str, **headers: str) -> Iterator[httpx.Client]:
    headers["authorization"] = f"Bearer {token}"
    base = f"http://{node['http']}{PREFIX}"
    with httpx.Client(base_url=base, headers=headers, timeout=START_SECONDS) as client:
        yield client


def whole_life(node: dict[str, str], **headers: str) -> str:
    """A task through every operation over REST; the worker brings a trace of its own."""
    with (
        rest(node, "dev-producer", **headers) as producer,
        rest(node, "dev-worker", traceparent=OTHER) as worker,
    ):
        made = producer.post("/tasks", json={"command": "job", "payload": 1}).json()
        task = f"/tasks/{made['id']}"
        for ending in (f"{task}/abandon", f"{task}/nack"):
            assert worker.post("/tasks/claim", json={"commands": ["job"]}).status_code == 200
            assert worker.post(ending, json={"delaySeconds": 0}).status_code == 200
        assert worker.post("/tasks/claim", json={}).status_code == 200
        assert worker.post(f"{task}/heartbeat").status_code == 200
        assert worker.post(f"{task}/result", json={"status": "COMPLETED"}).status_code == 200
        return str(made["traceParent"])


def test_T67_a_life_over_rest_is_one_trace(node: dict[str, str], spans: Spans) -> None:
    assert whole_life(node, traceparent=REMOTE, tracestate="vendor=1") == REMOTE
    [request] = spans.wait_for("POST /v1/codeq/tasks")
    assert parent_ids(request) == ids(REMOTE)
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/codeq/tasks",
        "http.response.status_code": 201,
    }
    [create] = spans.wait_for("codeq.task.create")
    assert parent_ids(create) == own_ids(request)
    claims = spans.wait_for("POST /v1/codeq/tasks/claim", 3)
    assert {parent_ids(span) for span in claims} == {ids(OTHER)}
    for name in LIFE[1:]:
        found = spans.wait_for(f"codeq.task.{name}", 3 if name == "claim" else 1)
        for span in found:
            assert parent_ids(span) == ids(REMOTE), name
            assert [trace_id for trace_id, _ in link_ids(span)] == [ids(OTHER)[0]]
            assert span.parent is not None and span.parent.trace_state.get("vendor") == "1"
    linked = [link for span in spans.wait_for("codeq.task.claim", 3) for link in link_ids(span)]
    assert sorted(linked) == sorted(map(own_ids, claims))
    [result] = spans.wait_for("POST /v1/codeq/tasks/{id}/result")
    assert link_ids(spans.wait_for("codeq.task.submit_result")[0]) == [own_ids(result)]


def test_T67_without_a_trace_of_the_client_the_create_begins_one(
    node: dict[str, str], spans: Spans
) -> None:
    stored = whole_life(node)
    [create] = spans.wait_for("codeq.task.create")
    assert own_ids(create) == ids(stored)
    assert parent_ids(create) == own_ids(spans.wait_for("POST /v1/codeq/tasks")[0])
    for name in LIFE[1:]:
        for span in spans.wait_for(f"codeq.task.{name}", 3 if name == "claim" else 1):
            assert parent_ids(span) == ids(stored), name


def test_T67_refusals_and_faults_are_seen(node: dict[str, str], spans: Spans) -> None:
    with rest(node, "dev-worker") as worker:
        assert worker.post("/tasks/none/heartbeat").status_code == 404
        assert worker.post("/tasks/claim", headers={"authorization": ""}).status_code == 401
        assert worker.get("/nowhere").status_code == 404
    [heartbeat] = spans.wait_for("codeq.task.heartbeat")
    assert heartbeat.attributes == {"codeq.count": 1, "codeq.refused": 1}
    [request] = spans.wait_for("POST /v1/codeq/tasks/{id}/heartbeat")
    assert request.attributes and request.attributes["http.response.status_code"] == 404
    [request] = spans.wait_for("POST /v1/codeq/tasks/claim")
    assert request.attributes and request.attributes["http.response.status_code"] == 401
    assert len(spans.names()) == 3


def test_T67_an_unsampled_trace_stays_so(node: dict[str, str], spans: Spans) -> None:
    whole_life(node, traceparent=UNSAMPLED)
    assert not {f"codeq.task.{name}" for name in LIFE} & set(spans.names())
    assert "POST /v1/codeq/tasks" not in spans.names()


def test_T67_concurrent_requests_keep_their_spans_apart(node: dict[str, str], spans: Spans) -> None:
    async def create(client: httpx.AsyncClient, number: int) -> None:
        trace_parent = f"00-{number:032x}-b7ad6b7169203331-01"
        body = {"command": "job", "payload": number}
        await client.post("/tasks", json=body, headers={"traceparent": trace_parent})

    async def create_all() -> None:
        headers = {"authorization": "Bearer dev-producer"}
        base = f"http://{node['http']}{PREFIX}"
        async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60) as client:
            await asyncio.gather(*(create(client, number) for number in range(1, 51)))

    asyncio.run(create_all())
    requests = {own_ids(span)[0]: span for span in spans.wait_for("POST /v1/codeq/tasks", 50)}
    assert requests.keys() == set(range(1, 51))
    for span in spans.wait_for("codeq.task.create", 50):
        assert parent_ids(span) == own_ids(requests[own_ids(span)[0]])


# --- streams


def hello(line: Line, token: str) -> None:
    line.send(hello={"token": token})
    assert line.read().WhichOneof("event") == "hello_ack"


def test_T67_a_life_over_streams_is_one_trace(node: dict[str, str], spans: Spans) -> None:
    with channel(node["producer"]) as producers, channel(node["worker"]) as workers:
        producer, worker = Line(producers), Line(workers, WORKER)
        hello(producer, "dev-producer")
        hello(worker, "dev-worker")
        producer.send(create={"command": "job", "trace_parent": REMOTE, "seq": 1})
        task_id = producer.read().create_ack.task_id
        for ending in ("abandon", "nack", "result"):
            worker.send(ready={"commands": ["job"]})
            assert worker.read().task.task.id == task_id
            more = {"nack": {"delay_seconds": 1}, "result": {"status": "COMPLETED"}}
            if ending == "result":
                worker.send(heartbeat={"task_id": task_id})
                assert worker.read().heartbeat_ack.ok
            worker.send(**{ending: {"task_id": task_id, **more.get(ending, {})}})
            assert worker.read().WhichOneof("event") == f"{ending}_ack"
        producer.cancel()
        worker.cancel()
    for name in LIFE:
        for span in spans.wait_for(f"codeq.task.{name}", 3 if name == "claim" else 1):
            assert parent_ids(span) == ids(REMOTE), name
            assert link_ids(span) == []
    assert len(spans.names()) == len(LIFE) + 2


def test_T67_a_message_of_many_tasks_has_one_span(node: dict[str, str], spans: Spans) -> None:
    count = LINKS_MAX + 8
    with channel(node["producer"]) as producers, channel(node["worker"]) as workers:
        producer, worker = Line(producers), Line(workers, WORKER)
        hello(producer, "dev-producer")
        hello(worker, "dev-worker")
        traces = [REMOTE, OTHER, *[""] * (count - 2)]
        tasks = [{"command": "job", "trace_parent": text} for text in traces]
        producer.send(create_batch={"tasks": tasks})
        assert len(producer.read().create_ack_batch.acks) == count
        worker.send(ready={"count": count})
        claimed = [task.id for task in worker.read().task_batch.tasks]
        assert len(claimed) == count
        results = [{"task_id": task_id, "status": "COMPLETED"} for task_id in (*claimed, "x")]
        worker.send(result_batch={"results": results})
        assert len(worker.read().result_ack_batch.acks) == count + 1
        producer.cancel()
        worker.cancel()
    [create] = spans.wait_for("codeq.task.create")
    assert parent_ids(create) is None
    assert set(link_ids(create)) == {ids(REMOTE), ids(OTHER)}
    assert create.attributes == {"codeq.count": count}
    [claim] = spans.wait_for("codeq.task.claim")
    assert set(link_ids(claim)) == {ids(REMOTE), ids(OTHER), own_ids(create)}
    [result] = spans.wait_for("codeq.task.submit_result")
    assert set(link_ids(result)) == set(link_ids(claim))
    assert result.attributes == {"codeq.count": count + 1, "codeq.refused": 1}


# --- webhooks


def test_T67_webhooks_and_notifications_are_on_the_trace(
    tmp_path: Path, spans: Spans, tracer: None
) -> None:
    flags = {"webhooks.allowPrivateNetworks": True, "resultWebhookMaxAttempts": 1}

    async def check(addresses: dict[str, str]) -> None:
        async with receiver() as hook:
            hook.status = 500
            await asyncio.to_thread(ended_with_webhook, addresses, hook.url("/result"), "job")
            first = await hook.next()
            [result] = await asyncio.to_thread(spans.wait_for, "codeq.webhook.task_result")
            assert parent_ids(result) == ids(REMOTE)
            assert own_ids(result) == ids(first.headers["traceparent"])
            assert first.headers["tracestate"] == "vendor=1"
            assert result.status.description == "status 500"
            hook.status = 200
            await asyncio.to_thread(subscribed, addresses, hook.url("/ready"))
            second = await hook.next()
            [ready] = await asyncio.to_thread(spans.wait_for, "codeq.webhook.queue_ready")
            assert own_ids(ready) == ids(second.headers["traceparent"])
            assert (second.path, parent_ids(ready)) == ("/ready", None)
            assert ready.status.is_unset

    with running(settings(tmp_path, **flags)) as (_, addresses):
        asyncio.run(check(addresses))


def ended_with_webhook(node: dict[str, str], url: str, command: str) -> None:
    """A task that ends and has its result sent to the URL."""
    with (
        rest(node, "dev-producer", traceparent=REMOTE, tracestate="vendor=1") as producer,
        rest(node, "dev-worker") as worker,
    ):
        body = {"command": command, "payload": 1, "webhook": url}
        made = producer.post("/tasks", json=body).json()
        assert worker.post("/tasks/claim", json={}).status_code == 200
        body = {"status": "COMPLETED"}
        assert worker.post(f"/tasks/{made['id']}/result", json=body).status_code == 200


def subscribed(node: dict[str, str], url: str) -> None:
    """A subscription that is told of a task."""
    with rest(node, "dev-producer") as producer, rest(node, "dev-worker") as worker:
        body = {"callbackUrl": url, "eventTypes": ["other"]}
        assert worker.post("/workers/subscriptions", json=body).status_code == 200
        assert producer.post("/tasks", json={"command": "other", "payload": 1}).is_success


# --- settings


def test_T67_without_tracing_nothing_of_it_is_there(tmp_path: Path) -> None:
    with running(settings(tmp_path, tracingEnabled=False)) as (one, _):
        assert one.node._tracer is None
        assert type(one.node._shard) is Shard


def test_T67_without_the_extra_tracing_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "codeq.server.tracing")
    monkeypatch.delattr("codeq.server.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=re.escape("codeq[otel]")) as refused:
        app._tracer(dev_config(flags={"tracingEnabled": True}))
    assert refused.value.key == "tracingEnabled"


class Collector:
    """What an OpenTelemetry collector is told, over its own protocol."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers((self,))  # type: ignore[arg-type]
        self.port = self._server.add_insecure_port(ANY_PORT)
        self._server.start()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of the one method."""
        assert details.method == EXPORT
        return grpc.unary_unary_rpc_method_handler(
            self._export,
            ExportTraceServiceRequest.FromString,
            ExportTraceServiceResponse.SerializeToString,
        )

    def _export(self, request: ExportTraceServiceRequest, _: Any) -> ExportTraceServiceResponse:
        self.requests.append(request)
        return ExportTraceServiceResponse()

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.stop()


@pytest.mark.parametrize("ratio", ["1", "0"])
def test_T67_spans_reach_the_collector_that_the_settings_name(
    start_server: Callable[..., Server], collector: Collector, ratio: str
) -> None:
    server = start_server(
        TRACING_ENABLED="true",
        OTEL_SERVICE_NAME="queue",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"127.0.0.1:{collector.port}",
        OTEL_EXPORTER_OTLP_INSECURE="true",
        TRACING_SAMPLE_RATIO=ratio,
        ENV="staging",
    )
    server.client("dev-producer").post("/tasks", json={"command": "a", "payload": 1})
    assert server.terminate() == 0
    found = [resource for request in collector.requests for resource in request.resource_spans]
    names = {span.name for each in found for scope in each.scope_spans for span in scope.spans}
    if ratio == "0":
        assert not names
        return
    assert names == {"POST /v1/codeq/tasks", "codeq.task.create"}
    attributes = {each.key: each.value.string_value for each in found[0].resource.attributes}
    assert attributes["service.name"] == "queue"
    assert attributes["deployment.environment.name"] == "staging"
