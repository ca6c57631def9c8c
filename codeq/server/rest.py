"""The REST edge: an ASGI application that finds the route, lets the caller in, and answers.

Errors become statuses here and nowhere else. Which routes there are is said in routes.py, what
they do in the modules rest_*.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from codeq import errors
from codeq.config import Config
from codeq.engine.shard import Shard
from codeq.errors import CodeqError
from codeq.model import PREFIX, Health
from codeq.server import logs, pages
from codeq.server.auth import (
    KEY_WAITS_MAX,
    Auth,
    AuthError,
    KeysAwaited,
    Principal,
    bearer,
    refused,
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
    encode,
    error_reply,
    limited_reply,
    promise,
)
from codeq.server.routes import ANY, TABLE, Admit, Route
from codeq.server.streams import InFlight

if TYPE_CHECKING:
    from codeq.server.tracing import Tracer  # it needs what not every installation has

log = logging.getLogger("codeq.rest")

BELOW = f"{PREFIX}/".encode()
#: A sync that runs longer makes the node not ready
SYNC_SECONDS_MAX = 5
SERVER: Header = (b"server", b"codeq")
METRICS = b"/metrics"

#: Routes without a variable part, by method and path
STATIC: dict[tuple[str, bytes], Route] = {
    (route.method, route.path.encode()): route for route in TABLE if "{" not in route.path
}
#: The others, by method and path behind the prefix with {} for each variable part
VARIABLE: dict[tuple[str, bytes], Route] = {
    (route.method, re.sub(r"\{\w+\}", "{}", route.path)[len(BELOW) :].encode()): route
    for route in TABLE
    if "{" in route.path
}
_HEALTHY = Reply(200, encode(Health("ok")))


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
        self.open: dict[bytes, Callable[[], Reply]] = {
            b"/healthz": self._healthz,
            b"/readyz": self._readyz,
            **{path: partial(_same, reply) for path, reply in pages.replies(config).items()},
        }

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
        with self._tracer.request(method, route.path, request.headers) as answered:
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
                return await self._outside(method, path)
            token = bearer_of(request, route)
            admit = route.access.admit
            try:
                principal = admit(self.edge.auth, token)
            except KeysAwaited as awaited:
                principal = await self._admit_later(admit, token, awaited)
            request.tenant = principal.tenant
            return await route.handle(self.edge, request, principal)
        except Refused as ended:
            return ended.reply
        except RateLimited as limited:
            return limited_reply(limited)
        except CodeqError as error:
            return error_reply(error.slug, error.message)
        except ClientGone:
            return INVALID_BODY
        except Exception:
            log.exception("a fault in %s %s", method, path.decode("ascii", "replace"))
            return INTERNAL

    async def _admit_later(self, admit: Admit, token: str, awaited: KeysAwaited) -> Principal:
        """As ``admit``, once the keys that it needs have come or could not be had."""
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
                return admit(edge.auth, token)
            except KeysAwaited as again:
                awaited = again
        raise refused(errors.KEYS_UNAVAILABLE)

    def _route(self, method: str, path: bytes, request: Request) -> Route | None:
        route = STATIC.get((method, path))
        if route is not None:
            return route
        path = path.removesuffix(b"/")
        if not path.startswith(BELOW):
            return None
        return STATIC.get((method, path)) or _variable(method, path, request)

    async def _outside(self, method: str, path: bytes) -> Reply:
        """The routes that need no token, and all that is no route."""
        path = path.removesuffix(b"/") or path
        if method == "GET" and path == METRICS:
            return await self._scrape()
        handle = self.open.get(path)
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

    async def _scrape(self) -> Reply:
        text = await asyncio.to_thread(self._metrics.prepare())
        return Reply(200, text, ((b"content-type", self._metrics.content_type),))


def _same(reply: Reply) -> Reply:
    return reply


def _variable(method: str, path: bytes, request: Request) -> Route | None:
    """The route of a path with variable parts, which are left in the request."""
    parts = path[len(BELOW) :].split(b"/")
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
    except AuthError:
        if route.access is ANY:
            raise refused(errors.TOKEN_INVALID) from None
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
