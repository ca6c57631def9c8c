"""REST for workers: claims, and what the holder of a lease may say about it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec

from codeq import errors
from codeq.engine._wire import Finishes
from codeq.engine.shard import ClaimRequest, Delivery
from codeq.errors import OK, Refusal
from codeq.model import (
    BLANKS,
    CLAIM_WAIT_SECONDS_MAX,
    COMMAND_BYTES_MAX,
    COMMANDS_MAX,
    INT32_MAX,
    WORKER_ID_BYTES_MAX,
    ClaimBatchBody,
    ClaimBody,
    GivenBack,
    HeartbeatBody,
    ItemRefusal,
    LeaseBody,
    LeaseKept,
    NackBody,
    Nacked,
    RawResultBatchBody,
    ResultBatchBody,
    ResultBody,
    ResultItem,
    ResultItems,
    ResultRecord,
    Tasks,
)
from codeq.server import artifacts
from codeq.server.auth import Principal
from codeq.server.limits import CLAIM
from codeq.server.request import (
    BYTES_SPENT,
    INVALID_BODY,
    NO_CONTENT,
    Edge,
    Refused,
    Reply,
    Request,
    decode,
    encode,
    promise,
    refusal_reply,
    refuse,
)
from codeq.server.views import item_refusal, record, task_of

#: JSON text is at most six times as long as the bytes it escapes
ESCAPED_BYTES_PER_BYTE = 6
#: What a claimed task adds to the answer beside its payload and texts, at most
TASK_OVERHEAD_BYTES = 1024

T = TypeVar("T")

_claim = msgspec.json.Decoder(ClaimBody)
_claim_batch = msgspec.json.Decoder(ClaimBatchBody)
_heartbeat = msgspec.json.Decoder(HeartbeatBody)
_abandon = msgspec.json.Decoder(LeaseBody)
_nack = msgspec.json.Decoder(NackBody)
_result = msgspec.json.Decoder(ResultBody)
_result_batch = msgspec.json.Decoder(ResultBatchBody)
_raw_result_batch = msgspec.json.Decoder(RawResultBatchBody)

_HEARTBEAT_DONE = Reply(200, encode(LeaseKept(True)))
_ABANDON_DONE = Reply(200, encode(GivenBack("requeued")))
_REFUSALS = {row.number or 0: refusal_reply(row) for row in errors.BY_NUMBER.values()}


# --- claims --------------------------------------------------------------------------------------


async def claim(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /tasks/claim"""
    _admit(edge, principal)
    body = decode(_claim, await request.body(edge) or b"{}")
    return await _claimed(edge, request, principal, body, count=1, single=True)


async def claim_batch(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /tasks/claim/batch"""
    _admit(edge, principal)
    body = decode(_claim_batch, await request.body(edge))
    if body.count < 1:
        raise Refused(INVALID_BODY)
    largest = edge.config.limits.claim_batch
    if body.count > largest:
        raise refuse(errors.COUNT_TOO_LARGE, largest)
    return await _claimed(edge, request, principal, body, count=body.count, single=False)


def _admit(edge: Edge, principal: Principal) -> None:
    edge.require_ready()
    edge.limits.admit(CLAIM, principal)


async def _claimed(
    edge: Edge,
    request: Request,
    principal: Principal,
    body: ClaimBody,
    *,
    count: int,
    single: bool,
) -> Reply:
    edge.require_ready()
    edge.require_room(principal.tenant)
    wait_s = max(0, min(body.wait_seconds or 0, CLAIM_WAIT_SECONDS_MAX))
    commands, in_order = _commands(body.commands, principal)
    answer, deliver = promise(edge.loop)
    waiter = edge.shard.claim(
        ClaimRequest(
            tenant=principal.tenant,
            commands=commands,
            in_order=in_order,
            worker=_worker_id(body.worker_id) or principal.subject,
            subject=principal.subject,
            count=count,
            lease_ms=_lease_ms(edge, body.lease_seconds),
            bytes_max=_bytes_max(edge, count),
            wait=wait_s > 0,
            deliver=deliver,
        )
    )

    def give_up() -> None:
        if not answer.done():
            waiter.cancel()
            deliver(None)

    request.watch(give_up)
    edge.add_wait(give_up)
    timer = edge.loop.call_later(wait_s, give_up) if wait_s else None
    try:
        delivery: Delivery | None = await answer
    except BaseException:
        waiter.cancel()
        raise
    finally:
        edge.drop_wait(give_up)
        if timer is not None:
            timer.cancel()
    if delivery is None:
        edge.require_ready()
        return NO_CONTENT
    if not edge.in_flight.room(principal.tenant, spare=True):  # many were answered since the start
        delivery.give_back()
        raise Refused(BYTES_SPENT)
    edge.limits.pay(CLAIM, principal, len(delivery) - 1)  # the first was paid for with the claim
    return _assignment(edge, delivery, single=single)


def _assignment(edge: Edge, delivery: Delivery, *, single: bool) -> Reply:
    """The claimed tasks; they go back when the answer cannot be written."""

    def settle(written: bool) -> None:
        if written and edge.clock.now_ms() < delivery.lease_until_ms:
            delivery.accepted()
        else:
            delivery.give_back()

    try:
        views = delivery.views()
        body = encode(task_of(views[0]) if single else Tasks([task_of(view) for view in views]))
    except BaseException:
        delivery.give_back()
        raise
    return Reply(200, body, settle=settle)


def _commands(
    named: list[str] | None, principal: Principal
) -> tuple[tuple[bytes, ...] | None, bool]:
    """(commands, in the order given): those named, else all the token allows (None = every one)."""
    if not named:
        return (None if principal.any_command else principal.event_types), False
    commands = tuple(dict.fromkeys(name.encode() for text in named if (name := text.strip(BLANKS))))
    if len(commands) > COMMANDS_MAX:
        raise Refused(INVALID_BODY)
    if not commands or not all(principal.may_claim(command) for command in commands):
        raise refuse(errors.EVENT_TYPE_DENIED)
    if any(len(command) > COMMAND_BYTES_MAX for command in commands):
        raise refuse(errors.COMMAND_INVALID)
    return commands, True


def _bytes_max(edge: Edge, count: int) -> int:
    """Bytes of stored tasks that surely fit into an answer below the limit of bodies."""
    limit = edge.config.limits.body_bytes - count * TASK_OVERHEAD_BYTES
    return max(1, limit // ESCAPED_BYTES_PER_BYTE)


def _lease_ms(edge: Edge, seconds: int | None) -> int:
    if seconds is None or seconds <= 0:
        seconds = edge.config.default_lease_seconds
    return min(seconds, edge.config.lease_max_seconds) * 1000


def _worker_id(text: str | None) -> str:
    """The worker id named in a body; empty when none is."""
    name = (text or "").strip(BLANKS)
    if len(name.encode()) > WORKER_ID_BYTES_MAX:
        raise Refused(_REFUSALS[errors.WORKER_ID_INVALID.number or 0])
    return name


# --- heartbeat, abandon, nack --------------------------------------------------------------------


async def heartbeat(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /tasks/{id}/heartbeat"""
    body = await _lease_body(edge, request, _heartbeat)
    answer, done = promise(edge.loop)
    edge.shard.heartbeat(
        request.text(),
        principal.tenant,
        _worker_id(body.worker_id),
        principal.subject,
        _lease_ms(edge, body.extend_seconds),
        done,
        attempt=_attempt(body.attempt),
    )
    number: int = await answer
    return _HEARTBEAT_DONE if number == OK else _REFUSALS[number]


async def abandon(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /tasks/{id}/abandon"""
    body = await _lease_body(edge, request, _abandon)
    answer, done = promise(edge.loop)
    edge.shard.abandon(
        request.text(),
        principal.tenant,
        _worker_id(body.worker_id),
        principal.subject,
        done,
        attempt=_attempt(body.attempt),
    )
    number: int = await answer
    return _ABANDON_DONE if number == OK else _REFUSALS[number]


async def nack(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /tasks/{id}/nack: the answer says the delay that was applied."""
    body = await _lease_body(edge, request, _nack)
    answer, done = promise(edge.loop)
    edge.shard.nack(
        request.text(),
        principal.tenant,
        _worker_id(body.worker_id),
        principal.subject,
        body.delay_seconds,
        body.reason or "",
        lambda number, delay, dead: done((number, delay, dead)),
        attempt=_attempt(body.attempt),
    )
    number, delay, dead = await answer
    if number != OK:
        return _REFUSALS[number]
    return Reply(200, encode(Nacked("dlq", 0) if dead else Nacked("requeued", delay)))


async def _lease_body(edge: Edge, request: Request, decoder: msgspec.json.Decoder[T]) -> T:
    body = decode(decoder, await request.body(edge) or b"{}")
    edge.require_ready()
    return body


def _attempt(sent: int | None) -> int:
    """As the shard wants it: -1 = any. What cannot be the number of an attempt equals none."""
    if sent is None:
        return -1
    return sent if 0 < sent <= INT32_MAX else 0


# --- results -------------------------------------------------------------------------------------


async def result(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /tasks/{id}/result"""
    item = decode(_result, await request.body(edge))
    edge.require_ready()
    batch = Batch(edge, principal, "")
    item.task_id = request.text()
    batch.add(item)
    answer = await batch.finish()
    if isinstance(answer[0], Refusal):
        return refusal_reply(answer[0])
    return Reply(200, encode(answer[0]))


async def result_batch(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /tasks/batch/results: a bad item is refused in its place, the others are one commit."""
    body = await request.body(edge)
    items, worker = _result_items(body)
    if not items:
        raise Refused(INVALID_BODY)
    largest = edge.config.limits.result_batch
    if len(items) > largest:
        raise refuse(errors.BATCH_TOO_LARGE, largest)
    edge.require_ready()
    batch = Batch(edge, principal, _worker_id(worker))
    for item in items:
        batch.add(item)
    answers = await batch.finish()
    results: list[ResultItem | ItemRefusal] = [
        item_refusal(answer, task_id)
        if isinstance(answer, Refusal)
        else ResultItem(task_id, answer)
        for task_id, answer in zip(batch.task_ids, answers, strict=True)
    ]
    return Reply(200, encode(ResultItems(results)))


def _result_items(body: bytes) -> tuple[list[ResultBody | None], str | None]:
    """(items, worker id of all); None for an item that is no result. All at once where all are
    good."""
    try:
        batch = decode(_result_batch, body)
        return list(batch.results or ()), batch.worker_id
    except Refused:
        raw = decode(_raw_result_batch, body)
        return [_result_item(bytes(item)) for item in raw.results], raw.worker_id


def _result_item(raw: bytes) -> ResultBody | None:
    try:
        return decode(_result, raw)
    except Refused:
        return None


class Batch:
    """Results on their way to the shard, each with its place in the request.

    Items that name an ``attempt`` go in a call of their own, since a call has one; calls of one
    moment are one commit all the same. A second mention of a task is refused: inside a call by the
    engine, over calls here.
    """

    def __init__(self, edge: Edge, principal: Principal, worker: str) -> None:
        self._edge = edge
        self._principal = principal
        self._worker = worker
        self._calls: dict[int, Finishes] = {}
        self._first_call: dict[str, Finishes] = {}
        self._places: list[tuple[Finishes, int] | Refusal] = []
        self.task_ids: list[str] = []

    def add(self, item: ResultBody | None) -> None:
        """Appends an item; None is one that could not be read."""
        task_id = "" if item is None else item.task_id or ""
        self.task_ids.append(task_id)
        row, kept = _looked_at(item, self._edge.config.limits.result_bytes)
        if row is not None or item is None:
            self._places.append(row or errors.BODY_INVALID)
            return
        finishes = self._calls.setdefault(_attempt(item.attempt), Finishes())
        if self._first_call.setdefault(task_id, finishes) is not finishes:
            self._places.append(errors.NOT_IN_PROGRESS)
            return
        sent = bytes(item.result)
        index = finishes.add(
            task_id.encode(),
            (item.status or "").encode(),
            result=None if sent in (b"", b"null") else sent,
            error=(item.error or "").encode(),
            artifacts=kept,
            worker=(item.worker_id or "").strip(BLANKS).encode(),
        )
        self._places.append((finishes, index))

    async def finish(self) -> list[ResultRecord | Refusal]:
        """Ends the tasks and returns what became of each item, in order."""
        await self._edge.group_room()
        answers = []
        for attempt, finishes in self._calls.items():
            finishes.check(self._edge.config.limits.result_bytes, lenient_error=False)
            answer, done = promise(self._edge.loop)
            self._call(finishes, attempt, partial(done, None))
            answers.append(answer)
        for answer in answers:
            await answer
        return [
            place if isinstance(place, Refusal) else _answer_of(*place) for place in self._places
        ]

    def _call(self, finishes: Finishes, attempt: int, done: Callable[[], None]) -> None:
        self._edge.shard.finish(
            finishes,
            self._principal.tenant,
            self._worker,
            self._principal.subject,
            done,
            attempt=attempt,
        )


def _answer_of(finishes: Finishes, index: int) -> ResultRecord | Refusal:
    number = finishes.codes[index]
    if number != OK:
        return errors.BY_NUMBER[number]
    status, sent, error, kept, _ = finishes.item(index)
    completed_ms = finishes.completed_ms(index)
    return record(finishes.task_id(index), status, completed_ms, sent, error, kept)


def _looked_at(item: ResultBody | None, artifacts_max: int) -> tuple[Refusal | None, bytes]:
    """(refusal or None, artifacts as stored) of an item, before the task is looked for."""
    if item is None:
        return errors.BODY_INVALID, b""
    if len((item.worker_id or "").strip(BLANKS).encode()) > WORKER_ID_BYTES_MAX:
        return errors.WORKER_ID_INVALID, b""
    return artifacts.kept(item.artifacts or [], artifacts_max)
