"""One stream to a codeq server: dialled, greeted, and dialled again when it breaks.

Bytes only: what the messages mean is known to the producer and the worker.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from codeq import errors
from codeq.client.tls import Tls
from codeq.engine import _wire
from codeq.errors import CodeqError

log = logging.getLogger("codeq.client")

#: A token, or a function (plain or async) that gives a fresh one for every connection.
Token = str | Callable[[], str | Awaitable[str]]
#: None is clear text.
Credentials = grpc.ChannelCredentials | Tls | None

HELLO_TIMEOUT_SECONDS = 15.0
BACKOFF_FIRST_SECONDS = 0.05
BACKOFF_MAX_SECONDS = 5.0
#: A stream that lived this long counts as a success: the next break is retried at once again.
SETTLED_SECONDS = 5.0
MESSAGE_BYTES_MAX = 64 * 1024 * 1024

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # Each dial is an attempt of its own: it shares no connection, failure or pause with others.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    # A worker waits for hours without a byte: pings tell a quiet server from a dead one.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
]

SLUGS_BY_STATUS = {
    grpc.StatusCode.UNAUTHENTICATED: "unauthenticated",
    grpc.StatusCode.PERMISSION_DENIED: "permission-denied",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "rate-limited",
    grpc.StatusCode.UNIMPLEMENTED: "not-found",
    grpc.StatusCode.FAILED_PRECONDITION: "validation-error",
    grpc.StatusCode.INVALID_ARGUMENT: "validation-error",
    grpc.StatusCode.INTERNAL: "internal",
}
#: Refusals that another attempt does not change.
FINAL_SLUGS = {"unauthenticated", "permission-denied", "not-found", "validation-error"}
#: The refusal behind the text of an acknowledgement, which carries nothing else.
SLUGS_BY_TEXT = {
    text: row.slug
    for row in errors.BY_NUMBER.values()
    for text in (row.stream_message, row.message)
}


def refusal_of(text: str) -> CodeqError:
    """The refusal that an acknowledgement with this text stands for."""
    return CodeqError(SLUGS_BY_TEXT.get(text, "validation-error"), text)


def broken(error: grpc.aio.AioRpcError) -> CodeqError:
    slug = SLUGS_BY_STATUS.get(error.code(), "unavailable")
    return CodeqError(slug, error.details() or error.code().name.lower())


class Session:
    """One open stream, greeted. ``exchange`` uses it up."""

    def __init__(self, channel: grpc.aio.Channel, call: Any) -> None:
        self._channel = channel
        self._call = call
        self._wake = asyncio.Event()
        self._ending = False

    def wake(self) -> None:
        """There is something to send: it is asked for in the next turn of the event loop."""
        self._wake.set()

    def finish(self) -> None:
        """Half-closes the stream once nothing is left to send."""
        self._ending = True
        self._wake.set()

    async def exchange(
        self, next_message: Callable[[], bytes | None], received: Callable[[bytes], None]
    ) -> CodeqError | None:
        """Sends and receives until the stream ends; returns why, or None for a clean end.

        ``next_message`` is asked for one message at a time, just before it is sent, so that what
        it never gave away was surely never sent.
        """
        writer = asyncio.create_task(self._write(next_message))
        writer.add_done_callback(self._writer_done)
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                received(message)
        except grpc.aio.AioRpcError as error:
            return broken(error)
        except _wire.WireError as error:
            return CodeqError("internal", f"the server sent no codeq message: {error}")
        except asyncio.CancelledError:
            if writer.done() and not writer.cancelled() and (bug := writer.exception()):
                raise bug from None
            raise
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            await self.close()
        return None

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()

    def _writer_done(self, writer: asyncio.Task[None]) -> None:
        if not writer.cancelled() and writer.exception():
            self._call.cancel()  # a bug in next_message: ends the reader, which raises it

    async def _write(self, next_message: Callable[[], bytes | None]) -> None:
        try:
            while True:
                self._wake.clear()
                while (message := next_message()) is not None:
                    await self._call.write(message)
                if self._ending:
                    await self._call.done_writing()
                    return
                await self._wake.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream is over; the reader learns why


class Dialer:
    """Opens streams to one address, with growing, random pauses between attempts.

    ``hello`` makes the first message from a token, ``decode`` reads the answer to it.
    """

    def __init__(
        self,
        address: str,
        method: str,
        token: Token,
        hello: Callable[[str], bytes],
        decode: Callable[[bytes], tuple[int, object]],
        credentials: Credentials,
    ) -> None:
        self.address = address
        self._method = method
        self._token = token
        self._hello = hello
        self._decode = decode
        self._credentials = credentials
        self._attempt = 0
        self._opened_at: float | None = None

    async def dial(self, timeout_seconds: float | None = None) -> Session:
        """A greeted session. Raises the refusal when trying again is useless, or when
        ``timeout_seconds`` are over (None: tries for ever)."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout_seconds is None else loop.time() + timeout_seconds
        if self._opened_at is not None and loop.time() - self._opened_at > SETTLED_SECONDS:
            self._attempt = 0
        while True:
            pause = self._pause()
            try:
                session = await self._open(deadline)
            except CodeqError as error:
                if self._is_final(error):
                    raise
                if deadline is not None and loop.time() + pause >= deadline:
                    raise
                log.warning("%s: %s; next attempt in %.1f s", self.address, error, pause)
            else:
                self._opened_at = loop.time()
                return session
            await asyncio.sleep(pause)

    def _pause(self) -> float:
        longest: float = min(
            BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(self._attempt, 16)
        )
        self._attempt += 1
        return longest * (0.5 + random.random() / 2)

    def _is_final(self, error: CodeqError) -> bool:
        if error.slug == "unauthenticated" and callable(self._token):
            return self._opened_at is None  # the next token may be better
        return error.slug in FINAL_SLUGS

    async def _open(self, deadline: float | None) -> Session:
        token = await self._fresh_token()
        channel = self._channel()
        call: Any = channel.stream_stream(self._method)()
        session = Session(channel, call)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_SECONDS) as limit:
                if deadline is not None and (when := limit.when()) is not None:
                    limit.reschedule(min(when, deadline))
                await call.write(self._hello(token))
                self._greeted(await call.read())
        except grpc.aio.AioRpcError as error:
            await session.close()
            raise broken(error) from None
        except (TimeoutError, asyncio.InvalidStateError):
            await session.close()
            raise CodeqError("unavailable", f"no answer from {self.address}") from None
        except BaseException:
            await session.close()
            raise
        return session

    def _greeted(self, message: Any) -> None:
        if message is grpc.aio.EOF:
            raise CodeqError("unavailable", f"{self.address} closed the stream")
        try:
            kind, _ = self._decode(message)
        except _wire.WireError:
            kind = _wire.UNKNOWN
        if kind != _wire.HELLO_ACK:
            raise CodeqError("validation-error", f"{self.address} does not speak this stream")

    async def _fresh_token(self) -> str:
        if isinstance(self._token, str):
            return self._token
        try:
            token = self._token()
            return await token if inspect.isawaitable(token) else token
        except Exception as error:  # as a refused one: later, the next attempt may do better
            raise CodeqError("unauthenticated", f"there is no token: {error!r}") from error

    def _channel(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.address, OPTIONS)
        if not isinstance(self._credentials, Tls):
            return grpc.aio.secure_channel(self.address, self._credentials, OPTIONS)
        tls = self._credentials
        return grpc.aio.secure_channel(self.address, tls.credentials(), [*OPTIONS, *tls.options()])
