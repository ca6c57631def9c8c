"""One REST exchange: what the handlers see of a request, and what they answer.

No routes here, and nothing that knows what a task is.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec

from codeq import errors
from codeq.config import Config
from codeq.engine.shard import Shard
from codeq.errors import SLUGS, CodeqError, Refusal
from codeq.model import ErrorBody, RateLimitedBody
from codeq.server.auth import Auth
from codeq.server.limits import Limits, RateLimited
from codeq.server.overview import Overviews
from codeq.server.streams import InFlight

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

HEADERS_BYTES_MAX = 32 << 10
REQUEST_ID_CHARS_MAX = 128
STALL_SECONDS = 30
RETRY_AFTER_SECONDS = 1
#: A longer answer goes out in parts, each when the transport has room for it
PART_BYTES = 64 << 10

JSON_TYPE: Header = (b"content-type", b"application/json; charset=utf-8")
CLOSE: Header = (b"connection", b"close")

encode = msgspec.json.Encoder().encode


class Reply:
    """An answer. ``settle`` is called once it is known whether the client could be told:
    with True when the transport took it whole, with False when the client had gone."""

    __slots__ = ("body", "headers", "settle", "status")

    def __init__(
        self,
        status: int,
        body: bytes = b"",
        headers: tuple[Header, ...] = (JSON_TYPE,),
        settle: Callable[[bool], None] | None = None,
    ) -> None:
        self.status = status
        self.body = body
        self.headers = headers
        self.settle = settle


NO_CONTENT = Reply(204, b"", ())


class Refused(Exception):
    """Ends a request with this reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


class ClientGone(Exception):
    """The client went away, or sent what is no HTTP, before its request was whole."""


def error_reply(
    slug: str, message: str, http: int | None = None, kind: type[ErrorBody] = ErrorBody, **more: Any
) -> Reply:
    """An error with the status of its slug, or with another; ``more`` are the further members of
    its ``kind``, by the names they have in Python."""
    status = http or SLUGS[slug][0]
    headers: tuple[Header, ...] = (JSON_TYPE,)
    if status == 503:
        headers += ((b"retry-after", b"%d" % RETRY_AFTER_SECONDS),)
    elif status == 401:
        headers += ((b"www-authenticate", b"Bearer"),)
    return Reply(status, encode(kind(slug, message, message, **more)), headers)


def limited_reply(limited: RateLimited) -> Reply:
    """429, with the time after which to ask again."""
    seconds = limited.retry_after_seconds
    operation = limited.operation
    body = RateLimitedBody(
        *(limited.slug, limited.message, limited.message),
        scope=operation.scope,
        operation=operation.name,
        retry_after_seconds=seconds,
    )
    return Reply(limited.http, encode(body), (JSON_TYPE, (b"retry-after", b"%d" % seconds)))


def refusal_reply(row: Refusal) -> Reply:
    """The answer for one row of the table of refusals."""
    return error_reply(row.slug, row.message, row.http)


def refuse(row: Refusal, *said: object) -> CodeqError:
    """The exception that ends a request with this refusal; ``said`` stands in its text for {}."""
    return CodeqError(row.slug, row.message.format(*said) if said else row.message)


def _final(row: Refusal) -> Reply:
    """A refusal after which the connection is of no more use."""
    reply = refusal_reply(row)
    return Reply(reply.status, reply.body, (*reply.headers, CLOSE))


NO_ROUTE = refusal_reply(errors.PATH_UNKNOWN)
INTERNAL = refusal_reply(errors.INTERNAL)
UNAVAILABLE = refusal_reply(errors.UNAVAILABLE)
BYTES_SPENT = refusal_reply(errors.BYTES_SPENT)
HEADERS_TOO_LARGE = _final(errors.HEADERS_TOO_LARGE)
BODY_TOO_LARGE = _final(errors.BODY_TOO_LARGE)
STALLED = _final(errors.BODY_STALLED)
INVALID_BODY = refusal_reply(errors.BODY_INVALID)


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The body as the decoder's type, or the refusal ``invalid body``."""
    try:
        if not body.isascii():
            body.decode()  # the decoder does not look into what it passes over
        return decoder.decode(body)
    except (ValueError, RecursionError):
        raise Refused(INVALID_BODY) from None


class Edge:
    """What all handlers share; one per listener."""

    def __init__(
        self,
        shard: Shard,
        auth: Auth,
        config: Config,
        in_flight: InFlight,
        limits: Limits,
        overviews: Overviews,
    ) -> None:
        self.shard = shard
        self.overviews = overviews
        self.auth = auth
        self.config = config
        self.clock = shard.clock
        self.in_flight = in_flight
        self.limits = limits
        self.loop = asyncio.get_running_loop()
        self.stopping = False
        self.transfers = Transfers(self.loop)
        self._waits: set[Callable[[], None]] = set()

    def require_ready(self) -> None:
        """Refuses while creates and claims are not served."""
        if self.stopping or not self.shard.ready:
            raise Refused(UNAVAILABLE)

    def require_creates(self, tenant: str) -> None:
        """Refuses while no creates are taken, or none of the tenant."""
        self.require_ready()
        if self.shard.refuses_creates is not None:
            raise CodeqError("unavailable", self.shard.refuses_creates)
        if not self.in_flight.room(tenant):
            raise Refused(BYTES_SPENT)

    def require_room(self, tenant: str) -> None:
        """Refuses an answer that may be long while clients of the tenant that do not take theirs
        hold too many bytes."""
        if not self.in_flight.room(tenant, spare=True):
            raise Refused(BYTES_SPENT)

    async def group_room(self) -> None:
        """Waits while the open commit group is as large as it should get."""
        while self.shard.group_full:
            written, done = promise(self.loop)
            self.shard.drain(partial(done, None))
            await written

    def add_wait(self, end: Callable[[], None]) -> None:
        """``end`` is called when the server stops, now if it does already, unless ``drop_wait`` is
        called before."""
        self._waits.add(end)
        if self.stopping:
            end()

    def drop_wait(self, end: Callable[[], None]) -> None:
        self._waits.discard(end)

    def stop(self) -> None:
        """Ends every wait; what arrives from now on is refused as unavailable."""
        self.stopping = True
        for end in list(self._waits):
            end()


class Transfers:
    """Requests that wait for their client, to send a part of the body or to take a part of the
    answer, so that one that stalls can be ended.

    One timer for all of them: a timer per request would be paid by every request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._since: dict[asyncio.Task[Any], float] = {}
        self._stalled: set[asyncio.Task[Any]] = set()
        self._armed = False

    def begin(self, task: asyncio.Task[Any]) -> None:
        """The client is awaited from now on."""
        self._since[task] = self._loop.time()
        if not self._armed:
            self._armed = True
            self._loop.call_later(1, self._sweep)

    def end(self, task: asyncio.Task[Any]) -> None:
        self._since.pop(task, None)

    def took(self, task: asyncio.Task[Any]) -> bool:
        """Whether the task was cancelled because its client stalled; said once."""
        if task not in self._stalled:
            return False
        self._stalled.discard(task)
        task.uncancel()
        return True

    def end_older(self, seconds: float) -> None:
        """Ends the requests that have waited so long for their client."""
        oldest = self._loop.time() - seconds
        for task, since in list(self._since.items()):
            if since <= oldest:
                self.end(task)
                self._stalled.add(task)
                task.cancel()

    def _sweep(self) -> None:
        self.end_older(STALL_SECONDS)
        self._armed = bool(self._since)
        if self._armed:
            self._loop.call_later(1, self._sweep)


_request_ids = int.from_bytes(os.urandom(16))


def _new_request_id() -> bytes:
    global _request_ids
    _request_ids = (_request_ids + 1) & (2**128 - 1)
    return b"%032x" % _request_ids


class Request:
    """One request. ``variables`` are the variable parts of the path, still percent-encoded."""

    __slots__ = (
        "_complete",
        "_held",
        "_receive",
        "_watch",
        "gone",
        "headers",
        "headers_bytes",
        "query",
        "request_id",
        "tenant",
        "variables",
    )

    def __init__(self, scope: Message, receive: Receive) -> None:
        self._receive = receive
        self._watch: asyncio.Task[None] | None = None
        self._complete = False
        self._held = 0
        self.tenant = ""
        self.gone = False
        self.variables: tuple[bytes, ...] = ()
        self.query: bytes = scope["query_string"]
        headers: dict[bytes, bytes] = {}
        size = 0
        for name, value in scope["headers"]:
            headers[name] = value
            size += len(name) + len(value)
        self.headers = headers
        self.headers_bytes = size
        own = headers.get(b"x-request-id")
        self.request_id = own if own is not None and _visible(own) else _new_request_id()

    async def body(self, edge: Edge, *, spare: bool = True) -> bytes:
        """The whole body. Refuses one over the limit or one that stalls, and any while too many
        bytes are in hand (``spare`` as in InFlight). Its bytes count as in hand until ``end``."""
        limit = edge.config.limits.body_bytes
        announced = _length(self.headers.get(b"content-length"))
        if announced > limit:
            raise Refused(BODY_TOO_LARGE)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._next_part(edge)
            if message["type"] != "http.request":
                raise ClientGone
            part: bytes = message["body"]
            size += len(part)
            if size > limit:
                raise Refused(BODY_TOO_LARGE)
            if not edge.in_flight.room(self.tenant, spare=spare, apart=self._held):
                self._let_go(edge)
                raise Refused(BYTES_SPENT)
            if part:
                edge.in_flight.take(self.tenant, len(part))
                self._held = size
            if size == announced or not message["more_body"]:
                # The transport's empty last message is left to ``watch``; it costs a task switch.
                self._complete = True
                return part if not parts else b"".join((*parts, part))
            parts.append(part)

    @property
    def unread(self) -> bool:
        """Whether a body was announced that nobody has read to its end."""
        if self._complete:
            return False
        headers = self.headers
        return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

    async def drain(self, edge: Edge) -> None:
        """Reads what is left of the body and forgets it, so that an early refusal reaches a client
        that is still sending. Gives up where ``body`` would have refused."""
        left = edge.config.limits.body_bytes
        while left >= 0:
            try:
                message = await self._next_part(edge)
            except Refused:
                return
            if message["type"] != "http.request" or not message["more_body"]:
                return
            left -= len(message["body"])

    async def _next_part(self, edge: Edge) -> Message:
        task = asyncio.current_task(edge.loop)
        assert task is not None
        edge.transfers.begin(task)
        try:
            return await self._receive()
        except asyncio.CancelledError:
            if edge.transfers.took(task):
                raise Refused(STALLED) from None
            raise
        finally:
            edge.transfers.end(task)

    def _let_go(self, edge: Edge) -> None:
        if self._held:
            edge.in_flight.release(self.tenant, self._held)
            self._held = 0

    def end(self, edge: Edge) -> None:
        """The exchange is over."""
        self._let_go(edge)
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def watch(self, lost: Callable[[], None] = lambda: None) -> None:
        """Calls ``lost`` and sets ``gone`` when the client goes away; for requests that wait."""
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._until_gone(lost))

    async def _until_gone(self, lost: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        lost()

    def text(self, place: int = 0) -> str:
        """A variable part of the path, decoded; empty when it is not UTF-8."""
        raw = self.variables[place]
        try:
            return (unquote_to_bytes(raw) if b"%" in raw else raw).decode()
        except UnicodeDecodeError:
            return ""

    def parameter(self, name: bytes) -> str:
        """The first value of a query parameter; empty when there is none."""
        for pair in self.query.split(b"&"):
            key, _, value = pair.partition(b"=")
            if key == name:
                return unquote_to_bytes(value.replace(b"+", b" ")).decode("utf-8", "replace")
        return ""


def _length(header: bytes | None) -> int:
    """Content-Length, or -1."""
    return int(header) if header is not None and header.isdigit() else -1


def _visible(text: bytes) -> bool:
    return 0 < len(text) <= REQUEST_ID_CHARS_MAX and all(0x21 <= char <= 0x7E for char in text)


def settle(future: asyncio.Future[T], value: T) -> None:
    """Sets the result of a future that may have been given up."""
    if not future.done():
        future.set_result(value)


def promise(loop: asyncio.AbstractEventLoop) -> tuple[asyncio.Future[Any], Callable[[Any], None]]:
    """A future for one callback's value, and that callback."""
    future: asyncio.Future[Any] = loop.create_future()
    return future, partial(settle, future)
