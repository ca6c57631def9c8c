"""Client: everything that codeq does over REST, one method a route."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec
from msgspec import Raw, Struct

from codeq import model
from codeq.client.http import Bearer, Caller, NotEnded, members, read
from codeq.errors import CodeqError
from codeq.model import (
    BLANKS,
    BackupMade,
    Cleaned,
    GivenBack,
    Health,
    LeaseKept,
    Nacked,
    Overview,
    Purged,
    QueuePause,
    Queues,
    QueueStats,
    RaftStatus,
    Requeued,
    ResultRecord,
    Subscribed,
    SubscriptionKept,
    Task,
    TaskPage,
    TaskResult,
    Tasks,
    TopicPolicy,
    TopicShown,
)

if TYPE_CHECKING:
    from codeq.client.producer import NewTask
    from codeq.client.stream import Token
    from codeq.client.tls import Tls

T = TypeVar("T")

#: A server copies its whole store before it answers.
BACKUP_SECONDS = 3600.0

_encode = msgspec.json.Encoder().encode
_raw: msgspec.json.Decoder[Raw] = msgspec.json.Decoder(Raw)


class Artifact(Struct, frozen=True):
    """A file of a result: its ``content``, or the ``url`` where it lies."""

    name: str
    content: bytes | None = None
    content_type: str = ""
    url: str = ""


class Finish(Struct, frozen=True):
    """How a task ended: FAILED with the text ``error``, or COMPLETED when that is None.

    ``result``: any JSON value, msgspec Struct or dataclass; msgspec.Raw for JSON text. ``attempt``:
    that of the task as it was claimed; another one means that the lease is somebody else's by now.
    """

    task_id: str
    result: Any = None
    error: str | None = None
    artifacts: Sequence[Artifact] = ()
    attempt: int | None = None


class _CreatedItem(Struct):
    """An item of a batch of creates: a task, or why there is none."""

    task: Task | None = None
    code: str = "internal"
    message: str = ""


class _EndedItem(Struct):
    """An item of a batch of results: the result as it is kept, or why not."""

    result: ResultRecord | None = None
    code: str = "internal"
    message: str = ""


class _EndedItems(Struct):
    results: list[_EndedItem]


class Client:
    """``async with Client("http://host:8080", token="...") as client: await client.get(id)``.

    ``token``: text, or a function (plain or async) that is asked for one when the first call needs
    it, and again when the server answers 401. Producers and workers may have different ones:
    ``producer_token`` and ``worker_token`` win over ``token``. ``credentials``: a Tls, for
    https:// with authorities or a certificate of one's own. ``timeout_seconds``: how long the
    server may take to connect or to answer, beyond a wait that a call asks for.

    Every refusal is a CodeqError; when no answer came, its slug is ``unavailable``. Reads, and
    creates that have an idempotency key, are tried again for up to ``retry_seconds`` when the
    connection breaks or the server answers 503 or 429 and says when to come again. Nothing else is
    sent twice: after a broken connection nobody knows whether it was done.

    Admin calls of an operator take ``tenant``: "" means every tenant in reads, the own in changes
    and where a task is named by its id.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:8080",
        *,
        token: Token = "",
        producer_token: Token | None = None,
        worker_token: Token | None = None,
        credentials: Tls | None = None,
        timeout_seconds: float = 30.0,
        retry_seconds: float = 10.0,
    ) -> None:
        self._http = Caller(base_url, credentials, timeout_seconds, retry_seconds)
        self.base_url = self._http.base_url
        self._producer = Bearer(token if producer_token is None else producer_token)
        self._worker = Bearer(token if worker_token is None else worker_token)
        self._any = self._producer if token or producer_token else self._worker

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.close()

    # --- tasks, for those who make them

    async def create(
        self,
        command: str,
        payload: Any,
        *,
        priority: int = 0,
        webhook: str = "",
        max_attempts: int = 0,
        idempotency_key: str = "",
        run_at: datetime | None = None,
        delay_seconds: int = 0,
        trace_parent: str = "",
        trace_state: str = "",
    ) -> Task:
        """Creates a task, or finds the one that ``idempotency_key`` made before.

        ``payload``: any JSON value but null, msgspec Struct or dataclass; bytes and msgspec.Raw are
        JSON text and go as they are. ``priority``: higher goes first. ``max_attempts``: 0 = the
        topic's or the server's default. ``run_at``: not before this time (with a time zone; wins
        over ``delay_seconds``). ``trace_parent``, ``trace_state``: W3C trace context.
        """
        body = _create_body(
            command,
            payload,
            priority,
            webhook,
            max_attempts,
            idempotency_key,
            run_at,
            delay_seconds,
        )
        return await self._http.call(
            Task,
            "POST /tasks",
            bearer=self._producer,
            body=body,
            repeatable=bool(idempotency_key.strip(BLANKS)),
            headers=_trace(trace_parent, trace_state),
        )

    async def create_many(
        self, tasks: Iterable[NewTask], *, trace_parent: str = "", trace_state: str = ""
    ) -> list[Task | CodeqError]:
        """Creates many tasks in one commit; returns, in the same order, each task or why it was
        refused. The server bounds their number (``limits.createBatch``, 1000)."""
        bodies = [_create_body(*msgspec.structs.astuple(task)) for task in tasks]
        if not bodies:
            return []
        items = await self._http.call(
            list[_CreatedItem],
            "POST /tasks/batch",
            bearer=self._producer,
            body=[members(body) for body in bodies],
            repeatable=all((body.idempotency_key or "").strip(BLANKS) for body in bodies),
            headers=_trace(trace_parent, trace_state),
        )
        return [item.task or CodeqError(item.code, item.message) for item in items]

    async def get(self, task_id: str, *, tenant: str = "") -> Task:
        """The task as it is now. Operators name the ``tenant`` when it is not their own, here and
        in the next three."""
        query = {"tenant": tenant}
        return await self._http.call(
            Task, "GET /tasks/{}", task_id, bearer=self._by_id(tenant), query=query
        )

    async def cancel(self, task_id: str, *, tenant: str = "") -> Task:
        """Ends a task that nobody has claimed: FAILED, error CANCELLED."""
        query = {"tenant": tenant}
        return await self._http.call(
            Task, "POST /tasks/{}/cancel", task_id, bearer=self._producer, query=query
        )

    async def result(
        self, task_id: str, *, wait_seconds: int = 0, tenant: str = ""
    ) -> TaskResult | None:
        """Task and result, None when it has not ended within ``wait_seconds`` (0 to 60)."""
        try:
            return await self._http.call(
                TaskResult,
                "GET /tasks/{}/result",
                task_id,
                bearer=self._by_id(tenant),
                query={"waitSeconds": str(wait_seconds) if wait_seconds else "", "tenant": tenant},
                wait_seconds=wait_seconds,
            )
        except NotEnded:
            return None

    async def wait_for_result(
        self, task_id: str, *, timeout_seconds: float | None = None, tenant: str = ""
    ) -> TaskResult:
        """Task and result as soon as it has ended. Raises TimeoutError when it has not by then."""

        def ask() -> Awaitable[TaskResult | None]:
            return self.result(task_id, wait_seconds=wait_seconds, tenant=tenant)

        wait_seconds = model.RESULT_WAIT_SECONDS_MAX
        if timeout_seconds is not None and timeout_seconds <= 0:
            wait_seconds = 0
        try:
            async with asyncio.timeout(timeout_seconds if wait_seconds else None):
                while (found := await ask()) is None:
                    if not wait_seconds:
                        raise TimeoutError
                return found
        except TimeoutError:
            text = f"task {task_id} has not ended within {timeout_seconds} s"
            raise TimeoutError(text) from None

    def _by_id(self, tenant: str) -> Bearer:
        """Any token reads a task of its tenant; an operator's is a producer's."""
        return self._producer if tenant else self._any

    async def artifact(self, task_id: str, name: str) -> Artifact:
        """A file of a result, with its content."""
        answer = await self._http.send(
            "GET /tasks/{}/artifacts/{}", task_id, name, bearer=self._any
        )
        return Artifact(name, answer.content, answer.headers.get("content-type", ""))

    # --- leases, for workers

    async def claim(
        self,
        commands: Sequence[str] = (),
        *,
        lease_seconds: int = 0,
        wait_seconds: int = 0,
        worker_id: str = "",
    ) -> Task | None:
        """A task, leased; None when nothing was ready within ``wait_seconds`` (0 to 30).

        ``commands``: tried in this order; empty = all that the token allows. ``lease_seconds``:
        0 = the server's default. ``worker_id``: default the subject of the token.
        """
        body = model.ClaimBody(
            list(commands) or None, lease_seconds or None, wait_seconds or None, worker_id or None
        )
        answer = await self._http.send(
            "POST /tasks/claim", bearer=self._worker, body=body, wait_seconds=wait_seconds
        )
        return read(Task, answer) if answer.content else None

    async def claim_many(
        self,
        count: int,
        commands: Sequence[str] = (),
        *,
        lease_seconds: int = 0,
        wait_seconds: int = 0,
        worker_id: str = "",
    ) -> list[Task]:
        """Up to ``count`` tasks as soon as there is one, as ``claim`` would have them."""
        body = model.ClaimBatchBody(
            list(commands) or None,
            lease_seconds or None,
            wait_seconds or None,
            worker_id or None,
            count=count,
        )
        answer = await self._http.send(
            "POST /tasks/claim/batch", bearer=self._worker, body=body, wait_seconds=wait_seconds
        )
        return read(Tasks, answer).tasks if answer.content else []

    async def heartbeat(
        self,
        task_id: str,
        *,
        extend_seconds: int = 0,
        worker_id: str = "",
        attempt: int | None = None,
    ) -> LeaseKept:
        """Sets the end of the lease to now and ``extend_seconds`` (0 = the server's default)."""
        body = model.HeartbeatBody(worker_id or None, attempt, extend_seconds or None)
        return await self._lease(LeaseKept, "heartbeat", task_id, body)

    async def abandon(
        self, task_id: str, *, worker_id: str = "", attempt: int | None = None
    ) -> GivenBack:
        """Gives the task back untried; the attempt does not count."""
        body = model.LeaseBody(worker_id or None, attempt)
        return await self._lease(GivenBack, "abandon", task_id, body)

    async def nack(
        self,
        task_id: str,
        *,
        delay_seconds: int | None = None,
        reason: str = "",
        worker_id: str = "",
        attempt: int | None = None,
    ) -> Nacked:
        """Gives the task back after a failed try. ``delay_seconds``: None = by the backoff of the
        server, 0 = at once."""
        body = model.NackBody(worker_id or None, attempt, delay_seconds, reason or None)
        return await self._lease(Nacked, "nack", task_id, body)

    async def complete(
        self,
        task_id: str,
        result: Any = None,
        *,
        artifacts: Sequence[Artifact] = (),
        worker_id: str = "",
        attempt: int | None = None,
    ) -> ResultRecord:
        """Ends the task COMPLETED; ``result`` as in Finish."""
        end = Finish(task_id, result, None, artifacts, attempt)
        return await self._finish(end, worker_id)

    async def fail(
        self,
        task_id: str,
        error: str,
        *,
        result: Any = None,
        artifacts: Sequence[Artifact] = (),
        worker_id: str = "",
        attempt: int | None = None,
    ) -> ResultRecord:
        """Ends the task FAILED with the text ``error``, which may not be blank; no retry."""
        end = Finish(task_id, result, error, artifacts, attempt)
        return await self._finish(end, worker_id)

    async def finish_many(
        self, ends: Iterable[Finish], *, worker_id: str = ""
    ) -> list[ResultRecord | CodeqError]:
        """Ends many tasks in one commit; returns, in the same order, each result as it is kept or
        why it was refused. The server bounds their number (``limits.resultBatch``, 1000)."""
        bodies = [members(_result_body(end)) for end in ends]
        if not bodies:
            return []
        body = {"results": bodies, **({"workerId": worker_id} if worker_id else {})}
        found = await self._http.call(
            _EndedItems, "POST /tasks/batch/results", bearer=self._worker, body=body
        )
        return [item.result or CodeqError(item.code, item.message) for item in found.results]

    async def _finish(self, end: Finish, worker_id: str) -> ResultRecord:
        body = _result_body(end)
        body.worker_id = worker_id or None
        return await self._lease(ResultRecord, "result", end.task_id, body)

    async def _lease(self, kind: type[T], what: str, task_id: str, body: Struct) -> T:
        return await self._http.call(
            kind, f"POST /tasks/{{}}/{what}", task_id, bearer=self._worker, body=body
        )

    # --- subscriptions

    async def subscribe(
        self,
        commands: Sequence[str] = (),
        *,
        callback_url: str = "",
        ttl_seconds: int = 0,
        delivery_mode: str = "",
        group_id: str = "",
        min_interval_seconds: int = 0,
    ) -> Subscribed:
        """Asks to be told when queues have work: at ``callback_url``, or by ``keep_subscription``.

        ``delivery_mode``: fanout (default), group (needs ``group_id``) or hash. 0 seconds = the
        server's default.
        """
        body = model.SubscribeBody(
            callback_url or None,
            list(commands) or None,
            ttl_seconds or None,
            delivery_mode or None,
            group_id or None,
            min_interval_seconds or None,
        )
        return await self._http.call(
            Subscribed, "POST /workers/subscriptions", bearer=self._worker, body=body
        )

    async def keep_subscription(
        self, subscription_id: str, *, ttl_seconds: int = 0, wait_seconds: int = 0
    ) -> SubscriptionKept:
        """Keeps a subscription for ``ttl_seconds`` more (0 = as it is), and says which of its
        queues have work, after a wait of up to ``wait_seconds`` (0 to 30) for one."""
        return await self._http.call(
            SubscriptionKept,
            "POST /workers/subscriptions/{}/heartbeat",
            subscription_id,
            bearer=self._worker,
            body=model.SubscriptionHeartbeatBody(ttl_seconds or None, wait_seconds or None),
            wait_seconds=wait_seconds,
        )

    # --- queues, for admins

    async def queues(self, *, tenant: str = "") -> list[QueueStats]:
        """The queues that hold something."""
        found = await self._admin(Queues, "GET /admin/queues", tenant=tenant)
        return found.queues

    async def queue(self, command: str, *, tenant: str = "") -> QueueStats:
        """The depths of a queue; zeros for an unknown one."""
        return await self._admin(QueueStats, "GET /admin/queues/{}", command, tenant=tenant)

    async def pause(self, command: str, *, tenant: str = "") -> QueuePause:
        """Stops claims from a queue; creates go on."""
        return await self._admin(QueuePause, "POST /admin/queues/{}/pause", command, tenant=tenant)

    async def resume(self, command: str, *, tenant: str = "") -> QueuePause:
        """Lets claims from a queue go on."""
        return await self._admin(QueuePause, "POST /admin/queues/{}/resume", command, tenant=tenant)

    async def purge(self, command: str, state: str, *, tenant: str = "") -> Purged:
        """Ends the waiting tasks of a queue as ``cancel`` does: those that are ``ready``, those
        that are ``delayed``, or ``all``."""
        return await self._admin(
            Purged,
            "POST /admin/queues/{}/purge",
            command,
            tenant=tenant,
            body=model.PurgeBody(state),
        )

    def dead_letters(self, command: str, *, tenant: str = "") -> AsyncIterator[Task]:
        """The dead letters of a queue, in creation order, page by page."""
        return _each(lambda cursor: self.dead_page(command, cursor=cursor, tenant=tenant))

    async def dead_page(
        self, command: str, *, limit: int = 0, cursor: str = "", tenant: str = ""
    ) -> TaskPage:
        """A page of dead letters; ``limit`` 1 to 1000, 0 = 100; ``cursor``: the last page's
        ``next_cursor``."""
        return await self._admin(
            TaskPage,
            "GET /admin/queues/{}/dead",
            command,
            tenant=tenant,
            query=_page(limit, cursor),
        )

    async def requeue_dead(
        self, command: str, ids: Sequence[str] | None = None, *, limit: int = 0, tenant: str = ""
    ) -> Requeued:
        """Makes dead letters ready again: those of ``ids`` (at most 1000), else the oldest
        ``limit`` (0 = 100)."""
        return await self._dead(Requeued, "requeue", command, ids, limit, tenant)

    async def purge_dead(
        self, command: str, ids: Sequence[str] | None = None, *, limit: int = 0, tenant: str = ""
    ) -> Purged:
        """Takes dead letters away, chosen as for ``requeue_dead``."""
        return await self._dead(Purged, "purge", command, ids, limit, tenant)

    async def _dead(
        self,
        kind: type[T],
        what: str,
        command: str,
        ids: Sequence[str] | None,
        limit: int,
        tenant: str,
    ) -> T:
        body = model.DeadBody(None if ids is None else list(ids), limit or None)
        path = f"POST /admin/queues/{{}}/dead/{what}"
        return await self._admin(kind, path, command, tenant=tenant, body=body)

    # --- tasks and the whole, for admins

    def tasks(
        self, *, status: str = "", command: str = "", tenant: str = ""
    ) -> AsyncIterator[Task]:
        """Tasks in creation order, page by page: all, or those with this status or command."""
        return _each(
            lambda cursor: self.task_page(
                status=status, command=command, cursor=cursor, tenant=tenant
            )
        )

    async def task_page(
        self,
        *,
        status: str = "",
        command: str = "",
        limit: int = 0,
        cursor: str = "",
        tenant: str = "",
    ) -> TaskPage:
        """A page of tasks, as ``dead_page``. It may hold fewer, or none, and not be the last: that
        one has no ``next_cursor``."""
        query = {**_page(limit, cursor), "status": status, "command": command}
        return await self._admin(TaskPage, "GET /admin/tasks", tenant=tenant, query=query)

    async def cleanup(
        self, *, limit: int = 0, before: datetime | None = None, tenant: str = ""
    ) -> Cleaned:
        """Removes up to ``limit`` (0 = 1000) ended tasks whose keeping time ends by ``before``
        (with a time zone; None = now)."""
        body = model.CleanupBody(limit or None, None if before is None else _time(before))
        return await self._admin(Cleaned, "POST /admin/tasks/cleanup", tenant=tenant, body=body)

    async def overview(self, *, limit: int = 0, tenant: str = "") -> Overview:
        """The state of everything in one answer; ``limit``: so many queues (0 = 1000)."""
        query = {"limit": str(limit)} if limit else {}
        return await self._admin(Overview, "GET /admin/overview", tenant=tenant, query=query)

    async def backup(self, name: str, *, timeout_seconds: float = BACKUP_SECONDS) -> BackupMade:
        """Has the server copy its store to the folder ``name`` in its backupDir; for operators."""
        return await self._admin(
            BackupMade,
            "POST /admin/backup",
            body=model.BackupBody(name),
            wait_seconds=timeout_seconds,
        )

    async def put_topic(self, name: str, policy: TopicPolicy, *, tenant: str = "") -> TopicShown:
        """Lays down the policy of the queue of this name."""
        return await self._admin(
            TopicShown, "PUT /admin/topics/{}", name, tenant=tenant, body=policy
        )

    async def get_topic(self, name: str, *, tenant: str = "") -> TopicShown:
        """The policy of a topic."""
        return await self._admin(TopicShown, "GET /admin/topics/{}", name, tenant=tenant)

    async def delete_topic(self, name: str, *, tenant: str = "") -> None:
        """Takes the policy of a topic away; its queue and tasks stay."""
        query = {"deletionPolicy": "Delete", "tenant": tenant}
        await self._http.send("DELETE /admin/topics/{}", name, bearer=self._producer, query=query)

    async def _admin(
        self,
        kind: type[T],
        path: str,
        *names: str,
        tenant: str = "",
        query: Mapping[str, str] | None = None,
        body: Any = None,
        wait_seconds: float = 0,
    ) -> T:
        return await self._http.call(
            kind,
            path,
            *names,
            bearer=self._producer,
            query={**(query or {}), "tenant": tenant},
            body=body,
            wait_seconds=wait_seconds,
        )

    # --- the server

    async def raft_status(self) -> RaftStatus:
        """The state of replication."""
        return await self._http.call(RaftStatus, "GET /raft/status", bearer=self._any)

    async def health(self) -> Health:
        """Whether the process runs. Tried once."""
        return await self._http.call(Health, "GET //healthz", repeatable=False)

    async def ready(self) -> Health:
        """Whether creates and claims are served; else CodeqError ``unavailable``. Tried once."""
        return await self._http.call(Health, "GET //readyz", repeatable=False)

    async def metrics(self) -> str:
        """Counters and gauges as Prometheus reads them."""
        return (await self._http.send("GET //metrics")).text

    async def openapi(self) -> dict[str, Any]:
        """The description of the REST interface."""
        return await self._http.call(dict[str, Any], "GET //openapi.json")


# --- what is sent --------------------------------------------------------------------------------


def _json(value: Any) -> Raw:
    """The JSON text of a payload or a result."""
    try:
        if isinstance(value, bytes | bytearray | memoryview | Raw):
            return _raw.decode(bytes(value))
        return Raw(_encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CodeqError("validation-error", f"this is no JSON value: {error}") from None


def _create_body(
    command: str,
    payload: Any,
    priority: int,
    webhook: str,
    max_attempts: int,
    idempotency_key: str,
    run_at: datetime | None,
    delay_seconds: int,
) -> model.CreateBody:
    """The fields of NewTask, in its order, as they are sent."""
    return model.CreateBody(
        command,
        _json(payload),
        priority or None,
        webhook or None,
        max_attempts or None,
        idempotency_key or None,
        None if run_at is None else _time(run_at),
        delay_seconds or None,
    )


def _time(time: datetime) -> str:
    """RFC 3339, rounded up to milliseconds."""
    if time.tzinfo is None:
        raise CodeqError("validation-error", "a time needs a time zone")
    return model.rfc3339(model.since_epoch_ms(time))


def _trace(parent: str, state: str) -> dict[str, str]:
    named = {"traceparent": parent, "tracestate": state}
    return {name: text for name, text in named.items() if text}


def _page(limit: int, cursor: str) -> dict[str, str]:
    return {"limit": str(limit) if limit else "", "cursor": cursor}


def _result_body(end: Finish) -> model.ResultBody:
    return model.ResultBody(
        end.task_id,
        "COMPLETED" if end.error is None else "FAILED",
        Raw() if end.result is None else _json(end.result),
        end.error,
        [_artifact(one) for one in end.artifacts] or None,
        None,
        end.attempt,
    )


def _artifact(one: Artifact) -> model.Artifact:
    content = None if one.content is None else b64encode(one.content).decode()
    return model.Artifact(one.name, one.url or None, content, one.content_type or None)


# --- what is answered ----------------------------------------------------------------------------


async def _each(page: Callable[[str], Any]) -> AsyncIterator[Task]:
    """The tasks of all pages."""
    cursor = ""
    while True:
        found: TaskPage = await page(cursor)
        for task in found.tasks:
            yield task
        cursor = found.next_cursor
        if not cursor:
            return
