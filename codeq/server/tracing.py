"""Spans of what the server does, and the only file that knows OpenTelemetry (extra codeq[otel]).

Imported only when tracing is on. ``Tracer`` makes the spans of requests and webhooks, and a shard
whose operations have spans: one for each call of an edge, so one for each message however many
tasks it has. A task keeps the trace context of its create. A span of tasks that all have one
context hangs on it; else it hangs on its request and links to the contexts of its first tasks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from codeq import __version__, errors
from codeq.config import Config
from codeq.engine._wire import Creates, Finishes, format_id
from codeq.engine.claims import ClaimRequest, Delivery, Waiter
from codeq.engine.clock import Clock
from codeq.engine.shard import Shard, ShardSettings, TaskView

log = logging.getLogger("codeq.tracing")

#: Tasks of one message whose trace contexts are looked up for its span
LINKS_MAX = 32
#: How long the spans made last may take on their way out when the server stops
CLOSE_SECONDS = 3.0
TRACE_PARENT, TRACE_STATE = "traceparent", "tracestate"

_propagator = TraceContextTextMapPropagator()

#: traceparent and tracestate as texts
Texts = tuple[str, str]


def from_config(config: Config) -> Tracer:
    """The tracer that the settings ask for."""
    resource = Resource.create(
        {
            "service.name": config.tracing_service_name,
            "service.version": __version__,
            "deployment.environment.name": config.env,
        }
    )
    sampler = ParentBased(TraceIdRatioBased(config.tracing_sample_ratio))
    provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(
        endpoint=config.tracing_otlp_endpoint, insecure=config.tracing_otlp_insecure
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider)


class Tracer:
    """Makes spans with what ``provider`` does with them."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("codeq", __version__)

    def close(self) -> None:
        """Sends what is left, in bounded time."""
        sender = threading.Thread(target=self._provider.shutdown, daemon=True)
        sender.start()
        sender.join(CLOSE_SECONDS)

    def open_shard(
        self, settings: ShardSettings, clock: Clock, runner: Any, fault: Callable[[str], None]
    ) -> TracedShard:
        """As ``Shard.open``, with a span for each operation."""
        shard = TracedShard.open(settings, clock, runner, fault)
        assert isinstance(shard, TracedShard)
        shard.tracer = self
        return shard

    # --- requests and webhooks

    @contextmanager
    def request(
        self, method: str, route: str, headers: Mapping[bytes, bytes]
    ) -> Iterator[Callable[[int], None]]:
        """The span of one HTTP request while it is answered; told the status of the answer."""
        texts = (headers.get(b"traceparent", b""), headers.get(b"tracestate", b""))
        with self._tracer.start_as_current_span(
            f"{method} {route}",
            _context(_decoded(texts)),
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route},
        ) as span:
            yield partial(_answered, span)

    def webhook(self, kind: str, trace_parent: str, trace_state: str) -> CallbackSpan:
        """A span ``codeq.webhook.<kind>`` (task_result, queue_ready) for one try, on the trace
        context of the task; empty texts when there is none."""
        span = self._tracer.start_span(
            f"codeq.webhook.{kind}", _context((trace_parent, trace_state)), SpanKind.CLIENT
        )
        return CallbackSpan(span)

    # --- operations

    def start(self, name: str, contexts: Sequence[Texts], count: int) -> Span:
        """A span of an operation on so many tasks of which these are trace contexts."""
        parent, links = _place(contexts, trace.get_current_span())
        return self._tracer.start_span(
            f"codeq.task.{name}", parent, attributes={"codeq.count": count}, links=links
        )

    def record(self, done: Operation, contexts: Sequence[Texts]) -> None:
        """The span of an operation that is over."""
        parent, links = _place(contexts, done.request)
        span = self._tracer.start_span(
            f"codeq.task.{done.name}",
            parent,
            attributes=done.attributes,
            links=links,
            start_time=done.began_ns,
        )
        span.end(done.ended_ns)


class CallbackSpan:
    """The span of one try of a webhook; ``headers`` are what goes with it."""

    def __init__(self, span: Span) -> None:
        self._span = span
        texts = zip((TRACE_PARENT, TRACE_STATE), _texts(span), strict=True)
        self.headers = {name: text for name, text in texts if text}

    def end(self, failure: str = "") -> None:
        """The try is over; ``failure`` says why it failed."""
        if failure:
            self._span.set_status(Status(StatusCode.ERROR, failure))
        self._span.end()


class Operation:
    """An operation under way, from the call to its answer."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.request = trace.get_current_span()
        self.began_ns = time.time_ns()
        self.ended_ns = 0
        self.attributes: dict[str, str | int] = {"codeq.count": count}

    def over(self, refused: int = 0) -> None:
        """The answer is there; so many tasks were refused."""
        self.ended_ns = time.time_ns()
        if refused:
            self.attributes["codeq.refused"] = refused


class TracedShard(Shard):
    """A shard whose operations have spans. The answers wait for nothing of it: the trace contexts
    of the tasks are looked up afterwards."""

    tracer: Tracer

    def create(
        self,
        creates: Creates,
        tenant: str,
        done: Callable[[list[TaskView | None] | None], None],
        *,
        views: bool = False,
    ) -> None:
        own = creates.trace(b"")
        if len(own) < len(creates):
            own.insert(0, (b"", b""))
        contexts = [_decoded(texts) for texts in own[:LINKS_MAX]]
        span = self.tracer.start("create", contexts, len(creates))
        creates.trace(_texts(span)[0].encode())

        def created(made: list[TaskView | None] | None) -> None:
            done(made)
            refused = len(creates.codes) - creates.codes.count(errors.OK)
            if refused:
                span.set_attribute("codeq.refused", refused)
            span.end()

        super().create(creates, tenant, created, views=views)

    def claim(self, request: ClaimRequest) -> Waiter:
        asked_ns = time.time_ns()
        here = trace.get_current_span()

        def deliver(delivery: Delivery | None) -> None:
            if delivery is None:
                request.deliver(None)
                return
            operation = Operation("claim", len(delivery))
            operation.request = here
            operation.attributes["codeq.waited_ms"] = (operation.began_ns - asked_ns) // 1_000_000
            ids = [format_id(task_id) for task_id in delivery.ids()[:LINKS_MAX]]
            request.deliver(delivery)
            operation.over()
            self._record(operation, ids, request.tenant)

        return super().claim(msgspec.structs.replace(request, deliver=deliver))

    def heartbeat(
        self,
        task_id: str,
        tenant: str,
        worker: str,
        subject: str,
        lease_ms: int,
        done: Callable[[int], None],
        *,
        attempt: int = -1,
    ) -> None:
        traced = self._traced("heartbeat", task_id, tenant, done)
        super().heartbeat(task_id, tenant, worker, subject, lease_ms, traced, attempt=attempt)

    def abandon(
        self,
        task_id: str,
        tenant: str,
        worker: str,
        subject: str,
        done: Callable[[int], None],
        *,
        attempt: int = -1,
    ) -> None:
        traced = self._traced("abandon", task_id, tenant, done)
        super().abandon(task_id, tenant, worker, subject, traced, attempt=attempt)

    def nack(
        self,
        task_id: str,
        tenant: str,
        worker: str,
        subject: str,
        delay_seconds: int | None,
        reason: str,
        done: Callable[[int, int, bool], None],
        *,
        attempt: int = -1,
    ) -> None:
        traced = self._traced("nack", task_id, tenant, done)
        super().nack(
            task_id, tenant, worker, subject, delay_seconds, reason, traced, attempt=attempt
        )

    def finish(
        self,
        finishes: Finishes,
        tenant: str,
        worker: str,
        subject: str,
        done: Callable[[], None],
        *,
        attempt: int = -1,
    ) -> None:
        operation = Operation("submit_result", len(finishes))

        def finished() -> None:
            codes = finishes.codes
            ids = [finishes.task_id(index) for index in range(min(len(codes), LINKS_MAX))]
            done()
            operation.over(len(codes) - codes.count(errors.OK))
            self._record(operation, ids, tenant)

        super().finish(finishes, tenant, worker, subject, finished, attempt=attempt)

    def _traced(
        self, name: str, task_id: str, tenant: str, done: Callable[..., None]
    ) -> Callable[..., None]:
        """``done`` of an operation on one task, with a span when it was called."""
        operation = Operation(name, 1)

        def over(number: int, *more: object) -> None:
            done(number, *more)
            operation.over(int(number != errors.OK))
            self._record(operation, [task_id], tenant)

        return over

    def _record(self, operation: Operation, ids: list[str], tenant: str) -> None:
        """Makes the span once the trace contexts of these tasks are known."""
        views: list[TaskView | None] = []

        def got(view: TaskView | None) -> None:
            views.append(view)
            if len(views) == len(ids):
                self.tracer.record(operation, [_texts_of(view) for view in views])

        for task_id in ids:
            self.get(task_id, tenant, got)


def _place(contexts: Sequence[Texts], request: Span) -> tuple[Context, list[Link]]:
    """(parent, links) of a span in a request, or in none, for tasks with these trace contexts."""
    distinct = dict.fromkeys(contexts)
    here = request.get_span_context()
    parsed = [trace.get_current_span(_context(texts)).get_span_context() for texts in distinct]
    valid = [context for context in parsed if context.is_valid]
    if here.is_valid and all(context.trace_id == here.trace_id for context in valid):
        return trace.set_span_in_context(request), []
    if len(distinct) == len(valid) == 1:
        links = [Link(here)] if here.is_valid else []
        return _context(next(iter(distinct))), links
    return trace.set_span_in_context(request), [Link(context) for context in valid]


def _context(texts: Texts) -> Context:
    """The context of these headers; an empty one when they say nothing."""
    return _propagator.extract({TRACE_PARENT: texts[0], TRACE_STATE: texts[1]}, Context())


def _texts(span: Span) -> Texts:
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span, Context()))
    return carrier.get(TRACE_PARENT, ""), carrier.get(TRACE_STATE, "")


def _texts_of(view: TaskView | None) -> Texts:
    return ("", "") if view is None else (view.trace_parent, view.trace_state)


def _decoded(texts: tuple[bytes, bytes]) -> Texts:
    return texts[0].decode("latin-1"), texts[1].decode("latin-1")


def _answered(span: Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))
