"""The REST edge: an ASGI application that finds the route, lets the caller in, and answers.

Errors become statuses here and nowhere else. What the routes do is in the modules rest_...
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from codeq.config import Config
from codeq.engine.shard import Shard
from codeq.errors import CodeqError
from codeq.server import (
    auth,
    logs,
    rest_admin,
    rest_leases,
    rest_operator,
    rest_subscriptions,
    rest_tasks,
    rest_topics,
)
from codeq.server.auth import (
    KEY_WAITS_MAX,
    KEYS_UNAVAILABLE,
    Auth,
    AuthError,
    KeysAwaited,
    Principal,
    bearer,
)
from codeq.server.limits import Limits, RateLimited
from codeq.server.metrics import Metrics
from codeq.server.overview import Overviews
from codeq.server.request import (
    CLOSE,
    HEADERS_BYTES_MAX,
    HEADERS_TOO_LARGE,
    INTERNAL,
    INVALID_BODY,
    NO_ROUTE,
    PART_BYTES,
    UNAVAILABLE,
    ClientGone,
    Edge,
    Header,
    Message,
    Receive,
    Refused,
    Reply,
    Request,
    Send,
    error_reply,
    limited_reply,
    promise,
)
from codeq.server.streams import InFlight

if TYPE_CHECKING:
    from codeq.server.tracing import Tracer  # it needs what not every installation has

log = logging.getLogger("codeq.rest")

PREFIX = b"/v1/codeq"
#: A sync that runs longer makes the node not ready
SYNC_SECONDS_MAX = 5
SERVER: Header = (b"server", b"codeq")

Handler = Callable[[Edge, Request, Principal], Awaitable[Reply]]
Admit = Callable[[Auth, str], Principal]


class Route(NamedTuple):
    """What a route asks of the token, and what it does."""

    admit: Admit
    handle: Handler


def _worker(scope: str) -> Admit:
    return lambda known, token: known.worker(token, scope)


_CLAIM = _worker(auth.SCOPE_CLAIM)

#: Routes without a variable part, by method and path
STATIC: dict[tuple[str, bytes], Route] = {
    ("POST", PREFIX + b"/tasks"): Route(Auth.producer, rest_tasks.create),
    ("POST", PREFIX + b"/tasks/batch"): Route(Auth.producer, rest_tasks.create_batch),
    ("POST", PREFIX + b"/tasks/claim"): Route(_CLAIM, rest_leases.claim),
    ("POST", PREFIX + b"/tasks/claim/batch"): Route(_CLAIM, rest_leases.claim_batch),
    ("POST", PREFIX + b"/tasks/batch/results"): Route(
        _worker(auth.SCOPE_RESULT), rest_leases.result_batch
    ),
    ("POST", PREFIX + b"/workers/subscriptions"): Route(
        _worker(auth.SCOPE_SUBSCRIBE), rest_subscriptions.subscribe
    ),
    ("POST", PREFIX + b"/admin/backup"): Route(Auth.operator, rest_operator.backup),
    ("GET", PREFIX + b"/raft/status"): Route(Auth.any, rest_tasks.raft_status),
    ("GET", PREFIX + b"/admin/queues"): Route(Auth.admin, rest_admin.queues),
    ("GET", PREFIX + b"/admin/overview"): Route(Auth.admin, rest_admin.overview),
    ("GET", PREFIX + b"/admin/tasks"): Route(Auth.admin, rest_admin.tasks),
    ("POST", PREFIX + b"/admin/tasks/cleanup"): Route(Auth.admin, rest_admin.cleanup),
}
#: Routes with variable parts, written {}, by method and path behind the prefix
VARIABLE: dict[tuple[str, bytes], Route] = {
    ("GET", b"tasks/{}"): Route(Auth.any, rest_tasks.get_task),
    ("GET", b"tasks/{}/result"): Route(Auth.any, rest_tasks.get_result),
    ("GET", b"tasks/{}/artifacts/{}"): Route(Auth.any, rest_tasks.get_artifact),
    ("POST", b"tasks/{}/heartbeat"): Route(_worker(auth.SCOPE_HEARTBEAT), rest_leases.heartbeat),
    ("POST", b"tasks/{}/abandon"): Route(_worker(auth.SCOPE_ABANDON), rest_leases.abandon),
    ("POST", b"tasks/{}/nack"): Route(_worker(auth.SCOPE_NACK), rest_leases.nack),
    ("POST", b"tasks/{}/result"): Route(_worker(auth.SCOPE_RESULT), rest_leases.result),
    ("POST", b"workers/subscriptions/{}/heartbeat"): Route(
        _worker(auth.SCOPE_SUBSCRIBE), rest_subscriptions.heartbeat
    ),
    ("POST", b"tasks/{}/cancel"): Route(Auth.producer, rest_tasks.cancel),
    ("GET", b"admin/queues/{}"): Route(Auth.admin, rest_admin.queue_stats),
    ("GET", b"admin/queues/{}/dead"): Route(Auth.admin, rest_admin.dead),
    ("POST", b"admin/queues/{}/dead/requeue"): Route(Auth.admin, rest_admin.requeue),
    ("POST", b"admin/queues/{}/dead/purge"): Route(Auth.admin, rest_admin.purge_dead),
    ("POST", b"admin/queues/{}/pause"): Route(Auth.admin, rest_admin.pause),
    ("POST", b"admin/queues/{}/resume"): Route(Auth.admin, rest_admin.resume),
    ("POST", b"admin/queues/{}/purge"): Route(Auth.admin, rest_admin.purge_waiting),
    ("PUT", b"admin/topics/{}"): Route(Auth.admin, rest_topics.put),
    ("GET", b"admin/topics/{}"): Route(Auth.admin, rest_topics.get),
    ("DELETE", b"admin/topics/{}"): Route(Auth.admin, rest_topics.delete),
}
#: What spans call a route
NAMES: dict[Route, str] = {
    **{route: path.decode() for (_, path), route in STATIC.items()},
    **{route: f"{PREFIX.decode()}/{path.decode()}" for (_, path), route in VARIABLE.items()},
}
_HEALTHY = Reply(200, b'{"status":"ok"}')


class RestApp:
    """The ASGI application. Make it inside the loop it is to run in."""

    def __init__(
        self,
        shard: Shard,
        known: Auth,
        config: Config,
        metrics: Metrics,
        in_flight: InFlight,
        limits: Limits,
        tracer: Tracer | None = None,
    ) -> None:
        self.overviews = Overviews(shard, metrics)
        self.edge = Edge(shard, known, config, in_flight, limits, self.overviews)
        self.leaving = False
        self._metrics = metrics
        self._tracer = tracer
        self._open = {b"/healthz": self._healthz, b"/readyz": self._readyz}
        self._open[b"/metrics"] = self._scrape

    def stop(self) -> None:
        """Ends the waits; readyz and what needs the shard answer 503 from now on."""
        self.edge.stop()

    def twin(self) -> RestApp:
        """The same application for one more server. What the clients of a server are answered
        while its application is ``leaving`` asks them to connect again."""
        return copy.copy(self)

    def cut(self) -> None:
        """Ends the requests whose body has not come yet, or whose answer is not taken."""
        self.edge.transfers.end_older(0)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        logs.REQUEST_ID.set(request.request_id)
        try:
            answer = self._answer if self._tracer is None else self._traced
            reply = await answer(scope["method"], scope["raw_path"], request)
            if request.unread and CLOSE not in reply.headers:
                await request.drain(self.edge)
            await _write(self.edge, reply, request, send, leaving=self.leaving)
        finally:
            request.end(self.edge)

    async def _traced(self, method: str, path: bytes, request: Request) -> Reply:
        """As ``_answer``, with a span when there is such a route."""
        route = self._route(method, path, request)
        if route is None or self._tracer is None:
            return await self._answer(method, path, request)
        with self._tracer.request(method, NAMES[route], request.headers) as answered:
            reply = await self._answer(method, path, request)
            answered(reply.status)
            return reply

    async def _answer(self, method: str, path: bytes, request: Request) -> Reply:
        """Every outcome of a request as a reply."""
        try:
            if request.headers_bytes > HEADERS_BYTES_MAX:
                return HEADERS_TOO_LARGE
            route = self._route(method, path, request)
            if route is None:
                return self._outside(method, path)
            token = bearer_of(request, route)
            try:
                principal = route.admit(self.edge.auth, token)
            except KeysAwaited as awaited:
                principal = await self._admit_later(route, token, awaited)
            request.tenant = principal.tenant
            return await route.handle(self.edge, request, principal)
        except Refused as refused:
            return refused.reply
        except RateLimited as limited:
            return limited_reply(limited)
        except CodeqError as error:
            return error_reply(error.slug, error.message)
        except ClientGone:
            return INVALID_BODY
        except Exception:
            log.exception("a fault in %s %s", method, path.decode("ascii", "replace"))
            return INTERNAL

    async def _admit_later(self, route: Route, token: str, awaited: KeysAwaited) -> Principal:
        """As ``route.admit``, once the keys that it needs have come or could not be had."""
        edge = self.edge
        for _ in range(KEY_WAITS_MAX):
            come, done = promise(edge.loop)
            call = partial(done, None)
            awaited.then(call)
            edge.add_wait(call)
            try:
                await come
            finally:
                edge.drop_wait(call)
            if edge.stopping:
                raise Refused(UNAVAILABLE)
            try:
                return route.admit(edge.auth, token)
            except KeysAwaited as again:
                awaited = again
        raise AuthError("unavailable", KEYS_UNAVAILABLE)

    def _route(self, method: str, path: bytes, request: Request) -> Route | None:
        route = STATIC.get((method, path))
        if route is not None:
            return route
        path = path.removesuffix(b"/")
        if not path.startswith(PREFIX + b"/"):
            return None
        return STATIC.get((method, path)) or _variable(method, path, request)

    def _outside(self, method: str, path: bytes) -> Reply:
        """The routes that need no token, and all that is no route."""
        handle = self._open.get(path.removesuffix(b"/") or path)
        return NO_ROUTE if handle is None or method != "GET" else handle()

    def _healthz(self) -> Reply:
        return _HEALTHY

    def _readyz(self) -> Reply:
        edge = self.edge
        shard = edge.shard
        if edge.stopping or not shard.ready or shard.refuses_creates is not None:
            return UNAVAILABLE
        if shard.journal.syncing_s > SYNC_SECONDS_MAX:
            return UNAVAILABLE
        return _HEALTHY

    def _scrape(self) -> Reply:
        return Reply(200, self._metrics.scrape(), ((b"content-type", self._metrics.content_type),))


def _variable(method: str, path: bytes, request: Request) -> Route | None:
    """The route of a path with variable parts, which are left in the request."""
    parts = path[len(PREFIX) + 1 :].split(b"/")
    place = 1 if parts[0] == b"tasks" else 2
    if len(parts) <= place or not parts[place]:
        return None
    places = (place,) if parts[place + 1 : -1] != [b"artifacts"] else (place, place + 2)
    request.variables = tuple(parts[place] for place in places)
    for place in places:
        parts[place] = b"{}"
    return VARIABLE.get((method, b"/".join(parts)))


def bearer_of(request: Request, route: Route) -> str:
    """The token of the request; routes open to any token say only that theirs is invalid."""
    try:
        return bearer(request.headers.get(b"authorization"))
    except auth.AuthError:
        if route.admit is Auth.any:
            raise auth.AuthError("unauthenticated", "invalid token") from None
        raise


async def _write(edge: Edge, reply: Reply, request: Request, send: Send, *, leaving: bool) -> None:
    """Hands the reply to the transport and settles it."""
    settle = reply.settle
    if settle is not None and request.gone:
        settle(False)
        return
    told = False
    more = (CLOSE,) if leaving else ()
    try:
        if len(reply.body) <= PART_BYTES:
            await send(_start(reply, request, *more))
            await send({"type": "http.response.body", "body": reply.body})
            told = not request.gone
        else:
            told = await _write_parts(edge, reply, request, send, *more)
    finally:
        if settle is not None:
            settle(told)


def _start(reply: Reply, request: Request, *more: Header) -> Message:
    headers = [*reply.headers, (b"x-request-id", request.request_id), SERVER, *more]
    return {"type": "http.response.start", "status": reply.status, "headers": headers}


async def _write_parts(
    edge: Edge, reply: Reply, request: Request, send: Send, *more: Header
) -> bool:
    """Hands a long reply over as fast as the client takes it; until then it counts as in hand.

    Whether the transport took it whole: False when the client went away or stalls.
    """
    body, size = reply.body, len(reply.body)
    request.watch()
    edge.in_flight.take(request.tenant, size)
    try:
        await send(_start(reply, request, (b"content-length", b"%d" % size), *more))
        for begin in range(0, size, PART_BYTES):
            if request.gone:
                return False
            part = body[begin : begin + PART_BYTES]
            last = begin + PART_BYTES >= size
            message = {"type": "http.response.body", "body": part, "more_body": not last}
            if not await _taken(edge, send(message)):
                return False
        return True
    finally:
        edge.in_flight.release(request.tenant, size)


async def _taken(edge: Edge, sending: Awaitable[None]) -> bool:
    """Waits until the transport has taken a part; False when its client stalls."""
    task = asyncio.current_task(edge.loop)
    assert task is not None
    edge.transfers.begin(task)
    try:
        await sending
    except asyncio.CancelledError:
        if edge.transfers.took(task):
            return False
        raise
    finally:
        edge.transfers.end(task)
    return True
