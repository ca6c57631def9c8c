"""REST for those who make tasks and look at them: creates, reads, cancel. An operator may read and
cancel the tasks of another tenant by naming it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

import msgspec
from msgspec import Raw

from codeq.engine._wire import Creates
from codeq.engine.shard import TaskView
from codeq.errors import (
    BATCH_TOO_LARGE,
    BODY_INVALID,
    BY_NUMBER,
    DELAY_INVALID,
    NOT_PENDING,
    OK,
    PRIORITY_INVALID,
    RESULT_ABSENT,
    RUN_AT_INVALID,
    TASK_ABSENT,
    TASK_NOT_FOUND,
    UNAVAILABLE,
    Refusal,
)
from codeq.model import (
    INT32_MAX,
    INT32_MIN,
    RESULT_WAIT_SECONDS_MAX,
    CreateBatchBody,
    CreateBody,
    CreatedItem,
    CreatedItems,
    ItemRefusal,
    RaftStatus,
    RawCreateBatchBody,
    ResultAbsentBody,
    TaskResult,
    parse_rfc3339,
)
from codeq.server import artifacts
from codeq.server.auth import Principal
from codeq.server.limits import CREATE_TASK
from codeq.server.request import (
    INVALID_BODY,
    Edge,
    Header,
    Refused,
    Reply,
    Request,
    decode,
    encode,
    error_reply,
    promise,
    refusal_reply,
    refuse,
    settle,
)
from codeq.server.rest_admin import one_tenant
from codeq.server.views import item_refusal, record_of, task_of

TRACE_BYTES_MAX = 512

_create = msgspec.json.Decoder(CreateBody)
_create_list: msgspec.json.Decoder[list[CreateBody]] = msgspec.json.Decoder(list[CreateBody])
_create_batch = msgspec.json.Decoder(CreateBatchBody)
_raw_list = msgspec.json.Decoder(list[Raw])
_raw_batch = msgspec.json.Decoder(RawCreateBatchBody)

_TASK_ABSENT = refusal_reply(TASK_ABSENT)
_RESULT_TASK_ABSENT = refusal_reply(TASK_NOT_FOUND)
_DOWNLOAD: tuple[Header, ...] = (
    (b"content-disposition", b"attachment"),
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"sandbox; default-src 'none'"),
)
_RAFT_OFF = Reply(200, encode(RaftStatus(False, 0)))


# --- creates -------------------------------------------------------------------------------------


async def create(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /tasks"""
    edge.require_creates(principal.tenant)
    edge.limits.admit(CREATE_TASK, principal)
    item = decode(_create, await request.body(edge, spare=False))
    if bytes(item.payload) in (b"", b"null"):
        raise Refused(INVALID_BODY)
    creates = Creates()
    _add(creates, [item], _trace(request))
    [view] = await _make(edge, creates, principal)
    if view is None:
        return refusal_reply(_refusal(edge, creates.codes[0]))
    return Reply(edge.config.compat.create_status, encode(task_of(view)))


async def create_batch(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /tasks/batch: a bad item is refused in its place, the others are one commit."""
    edge.require_creates(principal.tenant)
    edge.limits.require(CREATE_TASK, principal)
    body = await request.body(edge, spare=False)
    bare = body.lstrip(b" \t\r\n")[:1] == b"["
    items = _batch_items(body, bare=bare)
    if not items:
        raise Refused(INVALID_BODY)
    largest = edge.config.limits.create_batch
    if len(items) > largest:
        raise refuse(BATCH_TOO_LARGE, largest)
    edge.limits.admit(CREATE_TASK, principal, len(items))
    creates = Creates()
    _add(creates, items, _trace(request))
    views = await _make(edge, creates, principal)
    results: list[CreatedItem | ItemRefusal] = [
        item_refusal(_refusal(edge, number)) if view is None else CreatedItem(task_of(view))
        for number, view in zip(creates.codes, views, strict=True)
    ]
    return Reply(200, encode(results if bare else CreatedItems(results)))


def _batch_items(body: bytes, *, bare: bool) -> list[CreateBody | None]:
    """The items of a batch; None for one that is no create. All at once where all are good."""
    try:
        items = decode(_create_list, body) if bare else decode(_create_batch, body).tasks
        return [*(items or ())]
    except Refused:
        raws = decode(_raw_list, body) if bare else decode(_raw_batch, body).tasks
        return [_batch_item(bytes(raw)) for raw in raws]


def _batch_item(raw: bytes) -> CreateBody | None:
    try:
        return decode(_create, raw)
    except Refused:
        return None


def _add(creates: Creates, items: Iterable[CreateBody | None], trace: tuple[bytes, bytes]) -> None:
    """Appends the items as they were sent, or their refusals; None is no create."""
    parent, state = trace
    for item in items:
        if item is None:
            creates.add_refused(BODY_INVALID.number or 0)
        elif (
            item.priority is None
            and item.webhook is None
            and item.max_attempts is None
            and item.idempotency_key is None
            and item.run_at is None
            and item.delay_seconds is None
        ):  # most often
            command, payload = (item.command or "").encode(), bytes(item.payload) or b"null"
            creates.add(command, payload, trace_parent=parent, trace_state=state)
        else:
            _add_full(creates, item, trace)


def _add_full(creates: Creates, item: CreateBody, trace: tuple[bytes, bytes]) -> None:
    """Appends one item, which may have every field, or its refusal."""
    row = _refusal_of(item)
    run_at_ms = None
    if row is None and item.run_at is not None:
        run_at_ms = parse_rfc3339(item.run_at)
        if run_at_ms is None:
            row = RUN_AT_INVALID
    if row is not None:
        creates.add_refused(row.number or 0)
        return
    creates.add(
        (item.command or "").encode(),
        bytes(item.payload) or b"null",
        priority=item.priority or 0,
        webhook=(item.webhook or "").encode(),
        max_attempts=max(item.max_attempts or 0, INT32_MIN),
        key=(item.idempotency_key or "").encode(),
        run_at_ms=run_at_ms,
        delay_seconds=item.delay_seconds or 0,
        trace_parent=trace[0],
        trace_state=trace[1],
    )


def _refusal_of(item: CreateBody) -> Refusal | None:
    """What is out of the bounds of the numbers."""
    if item.priority is not None and not INT32_MIN <= item.priority <= INT32_MAX:
        return PRIORITY_INVALID
    if item.delay_seconds is not None and not 0 <= item.delay_seconds <= INT32_MAX:
        return DELAY_INVALID
    if item.max_attempts is not None and item.max_attempts > INT32_MAX:
        return BODY_INVALID
    return None


def _trace(request: Request) -> tuple[bytes, bytes]:
    """The trace headers, as kept on the task."""
    headers = request.headers
    return _kept(headers.get(b"traceparent")), _kept(headers.get(b"tracestate"))


def _kept(header: bytes | None) -> bytes:
    if header is None or len(header) > TRACE_BYTES_MAX or not header.isascii():
        return b""
    return header


async def _make(edge: Edge, creates: Creates, principal: Principal) -> list[TaskView | None]:
    """The task of each item, once it is durable; None for a refused one."""
    if edge.shard.group_full:
        await edge.group_room()
    answer, done = promise(edge.loop)
    edge.shard.create(creates, principal.tenant, done, views=True)
    views: list[TaskView | None] = await answer
    return views


def _refusal(edge: Edge, number: int) -> Refusal:
    """Why an item became no task; one of overload has the reason the shard had."""
    # An accepted item without a task repeats one that was removed this very moment.
    row = UNAVAILABLE if number == OK else BY_NUMBER[number]
    return row if row is not UNAVAILABLE else row._replace(message=edge.shard.refused_because)


# --- reads ---------------------------------------------------------------------------------------


async def get_task(edge: Edge, request: Request, principal: Principal) -> Reply:
    """GET /tasks/{id}"""
    edge.require_room(principal.tenant)
    answer, done = promise(edge.loop)
    edge.shard.get(request.text(), one_tenant(request, principal), done)
    view: TaskView | None = await answer
    return _TASK_ABSENT if view is None else Reply(200, encode(task_of(view)))


async def get_result(edge: Edge, request: Request, principal: Principal) -> Reply:
    """GET /tasks/{id}/result?waitSeconds=N"""
    edge.require_room(principal.tenant)
    answer, done = promise(edge.loop)
    wait_ms = wait_seconds(request.parameter(b"waitSeconds")) * 1000
    wait = edge.shard.result(request.text(), one_tenant(request, principal), wait_ms, done)
    view: TaskView | None
    if wait is None:
        view = await answer
    else:
        give_up = partial(done, None)
        request.watch(give_up)
        edge.add_wait(give_up)
        try:
            view = await answer
        finally:
            wait.cancel()
            edge.drop_wait(give_up)
    if view is None:
        edge.require_ready()
        return _RESULT_TASK_ABSENT
    task = task_of(view)
    if not view.has_record:
        return error_reply(
            RESULT_ABSENT.slug, RESULT_ABSENT.message, kind=ResultAbsentBody, status=task.status
        )
    return Reply(200, encode(TaskResult(task, record_of(view))))


async def get_artifact(edge: Edge, request: Request, principal: Principal) -> Reply:
    """GET /tasks/{id}/artifacts/{name}: the file, for download only: it is a worker's word what it
    is, and nothing in it may run with the rights of this page."""
    edge.require_room(principal.tenant)
    answer, done = promise(edge.loop)
    edge.shard.get(request.text(), principal.tenant, done)
    view: TaskView | None = await answer
    found = None if view is None else artifacts.content_of(view.artifacts, request.text(1))
    if found is None:
        edge.require_ready()
        return _TASK_ABSENT
    content_type: Header = (b"content-type", found.content_type.encode())
    return Reply(200, found.content, (content_type, *_DOWNLOAD))


def wait_seconds(text: str) -> int:
    """``waitSeconds`` of a query: cut to its bounds, nonsense is 0."""
    if not (text.isascii() and text.isdecimal()):
        return 0
    return min(int(text[:9]), RESULT_WAIT_SECONDS_MAX)


async def cancel(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /tasks/{id}/cancel"""
    await request.body(edge)
    edge.require_ready()
    answer: asyncio.Future[tuple[int, TaskView | None]] = edge.loop.create_future()
    edge.shard.cancel(
        request.text(),
        one_tenant(request, principal),
        lambda code, view: settle(answer, (code, view)),
    )
    code, view = await answer
    if code == NOT_PENDING.number:
        return refusal_reply(NOT_PENDING)
    return _TASK_ABSENT if view is None else Reply(200, encode(task_of(view)))


async def raft_status(edge: Edge, request: Request, principal: Principal) -> Reply:
    """GET /raft/status: replication is off."""
    return _RAFT_OFF
