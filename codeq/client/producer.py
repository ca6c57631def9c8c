"""Producer: creates tasks over one stream, which is opened again when it breaks."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import msgspec

from codeq.client.stream import Credentials, Dialer, Session, Token, log, refusal_of
from codeq.engine import _wire
from codeq.engine._client import Group, item_of, producer_event
from codeq.errors import CodeqError

METHOD = "/producerpb.ProducerStream/Stream"
#: A create with a key is sent at most this often again: one that breaks every stream must end.
RESENDS_MAX = 8

BROKEN = (
    "the connection broke before the acknowledgement: outcome unknown "
    "(an idempotency key makes it safe to send again)"
)


class NewTask(msgspec.Struct, frozen=True, gc=False):
    """One task to create.

    ``payload``: any JSON value, msgspec Struct or dataclass; bytes go as they are. ``priority``:
    higher goes first. ``max_attempts``: 0 = the server's default. ``idempotency_key``: the same
    key makes only one task, whoever sends it how often (empty: see ``make_keys`` of Producer).
    ``run_at``: not before this time (with a time zone; wins over ``delay_seconds``).
    """

    command: str
    payload: Any = None
    priority: int = 0
    webhook: str = ""
    max_attempts: int = 0
    idempotency_key: str = ""
    run_at: datetime | None = None
    delay_seconds: int = 0


def _random_keys() -> Iterator[bytes]:
    """Idempotency keys that nobody else makes."""
    prefix = secrets.token_hex(12).encode()
    return (b"made-%s-%d" % (prefix, number) for number in itertools.count(1))


class _Room:
    """How much may be unacknowledged at a time. Who finds no room waits, in order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def try_take(self, size: int) -> bool:
        """A lone piece always fits, however large."""
        if self._waiting or (self._used and self._used + size > self._limit):
            return False
        self._used += size
        return True

    async def take(self, size: int) -> None:
        if self.try_take(size):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, future))
        try:
            await future
        except asyncio.CancelledError:
            taken = future.done() and not future.cancelled() and future.exception() is None
            self.give(size if taken else 0)
            raise

    def give(self, size: int) -> None:
        self._used -= size
        while self._waiting:
            wanted, future = self._waiting[0]
            if not future.done():
                if self._used and self._used + wanted > self._limit:
                    return
                self._used += wanted
                future.set_result(None)
            self._waiting.popleft()

    def refuse(self, error: CodeqError) -> None:
        while self._waiting:
            future = self._waiting.popleft()[1]
            if not future.done():
                future.set_exception(error)


class Producer:
    """Creates tasks: ``async with Producer("host:9092", token="...") as p: await p.produce(...)``.

    ``token``: text, or a function (plain or async) asked for a fresh one at every connection.
    ``credentials``: a Tls, when the server speaks it. ``inflight_bytes_max``: calls wait while this
    much is unacknowledged. ``connect_timeout_seconds``: how long entering may try. ``merge=False``
    sends every single create as its own message.

    When the stream breaks it is opened again. Creates that were never sent wait for it. Those that
    were sent and not acknowledged are sent again under their idempotency key, so that each makes
    one task. A create without a key gets one of the producer's making. It costs the server an entry
    on disk and about three times the CPU for the whole life of a task, which then stays until the
    window of its key is over (``idempotencyWindowSeconds``). With ``make_keys=False`` such creates
    have no key, and fail with CodeqError ``unavailable`` when the stream breaks: nobody knows
    whether the task was made.
    """

    def __init__(
        self,
        address: str,
        *,
        token: Token,
        credentials: Credentials = None,
        inflight_bytes_max: int = 8 * 1024 * 1024,
        connect_timeout_seconds: float = 10.0,
        merge: bool = True,
        make_keys: bool = True,
    ) -> None:
        self._made_keys = _random_keys() if make_keys else itertools.repeat(b"")
        self._dialer = Dialer(
            address,
            METHOD,
            token,
            _wire.encode_producer_hello,
            _wire.decode_producer_server_event,
            credentials,
        )
        self._connect_timeout_seconds = connect_timeout_seconds
        self._merge = merge
        self._room = _Room(inflight_bytes_max)
        self._numbers = 0
        self._queue: deque[Group] = deque()  # not sent
        self._sent: dict[int, Group] = {}  # by number; sent, not wholly acknowledged
        self._moment: Group | None = None  # last of the queue, still open for single creates
        self._session: Session | None = None
        self._runner: asyncio.Task[None] | None = None
        self._refuses: CodeqError | None = CodeqError("unavailable", "the producer is not started")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close(flush=error is None)

    async def start(self) -> None:
        """Connects. Raises CodeqError when the token is refused or nobody answers in time."""
        if self._runner is not None:
            raise CodeqError("unavailable", "a producer starts only once")
        self._session = await self._dialer.dial(self._connect_timeout_seconds)
        self._refuses = None
        self._runner = asyncio.create_task(self._run(self._session))

    async def close(self, *, flush: bool = True, timeout_seconds: float = 10.0) -> None:
        """Ends the stream. With ``flush`` it first waits, at most ``timeout_seconds``, until all
        creates are acknowledged; what is still open then fails with CodeqError ``unavailable``."""
        closed = CodeqError("unavailable", "the producer is closed")
        self._refuses = self._refuses or closed
        self._room.refuse(closed)
        if self._runner is None:
            return
        if flush and (self._session is not None or self._queue or self._sent):
            self._finish_when_idle()
            await asyncio.wait({self._runner}, timeout=timeout_seconds)
        self._runner.cancel()
        await asyncio.gather(self._runner, return_exceptions=True)
        self._fail("the producer was closed")

    async def produce(
        self,
        command: str,
        payload: Any = None,
        *,
        priority: int = 0,
        webhook: str = "",
        max_attempts: int = 0,
        idempotency_key: str = "",
        run_at: datetime | None = None,
        delay_seconds: int = 0,
    ) -> str:
        """Creates one task and returns its id once it is durable; raises CodeqError.

        The fields are those of NewTask. Calls made in the same turn of the event loop, or while a
        message is being written, share a message.
        """
        item = item_of(
            NewTask(
                command,
                payload,
                priority,
                webhook,
                max_attempts,
                idempotency_key,
                run_at,
                delay_seconds,
            ),
            next(self._made_keys),
        )
        self._check_usable()
        if not self._room.try_take(item.weight):
            await self._room.take(item.weight)
            self._check_usable()
        waiter: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        group = self._moment
        if group is None or not group.has_room(item):
            group = self._moment = self._enqueue(self._new_group(singles=True))
        group.add(item, waiter)
        if not self._merge:
            self._moment = None
        self._wake()
        return await waiter

    async def produce_batch(
        self, tasks: Iterable[NewTask | tuple[str, Any]]
    ) -> list[str | CodeqError]:
        """Creates many tasks, each a NewTask or a pair (command, payload).

        Returns, in the order given, the id of each task or the CodeqError that refused it.
        """
        left = iter(tasks)
        groups: list[Group] = []
        over, ended = None, False
        while not ended:
            group = self._new_group(singles=False)
            ended = group.fill(left, self._made_keys, over)
            over = group.over
            groups.append(group)
            if group.left:
                await self._send(group)
        results: list[str | CodeqError] = []
        for group in groups:
            if group.left:
                await group.done
            results += group.results
        return results

    async def _send(self, group: Group) -> None:
        try:
            self._check_usable()
            await self._room.take(group.weight)
            self._check_usable()
        except CodeqError as error:
            group.settle_rest(error)
            return
        self._moment = None
        self._enqueue(group)
        self._wake()

    def _new_group(self, *, singles: bool) -> Group:
        self._numbers += 1
        done = asyncio.get_running_loop().create_future()
        return Group(self._numbers, done, singles=singles)

    def _enqueue(self, group: Group) -> Group:
        self._queue.append(group)
        return group

    def _check_usable(self) -> None:
        if self._refuses is not None:
            raise CodeqError(self._refuses.slug, self._refuses.message)

    def _wake(self) -> None:
        if self._session is not None:
            self._session.wake()

    async def _run(self, session: Session) -> None:
        """Keeps a stream open until the producer is closed and everything is acknowledged."""
        try:
            while True:
                self._finish_when_idle()
                end = await session.exchange(self._next_message, self._received)
                self._session = None
                if self._refuses is not None and not self._sent and not self._queue:
                    return
                log.warning(
                    "%s: the stream ended: %s", self._dialer.address, end or "by the server"
                )
                self._recover()
                session = self._session = await self._dialer.dial()
        except CodeqError as refusal:
            self._refuses = refusal
            self._fail(str(refusal))
        except Exception as bug:
            log.exception("%s: the producer ends", self._dialer.address)
            self._refuses = CodeqError("internal", repr(bug))
            self._fail(repr(bug))
        finally:
            self._session = None
            await session.close()

    def _finish_when_idle(self) -> None:
        closing = self._refuses is not None
        if closing and not self._queue and not self._sent and self._session is not None:
            self._session.finish()

    def _next_message(self) -> bytes | None:
        if not self._queue:
            return None
        group = self._queue.popleft()
        if group is self._moment:
            self._moment = None
        self._sent[group.number] = group
        return group.message()

    def _received(self, message: bytes) -> None:
        kind, value = producer_event(message, self._sent, refusal_of)
        if kind == _wire.CREATE_ACKS:
            for group in value:  # type: ignore[attr-defined]
                self._room.give(group.weight)
            if self._refuses is not None:
                self._finish_when_idle()
        elif kind == _wire.ERROR:
            log.warning("%s: the server says: %s", self._dialer.address, value)

    def _recover(self) -> None:
        """The stream broke: what may be sent again goes first in the queue, the rest fails."""
        unknown = CodeqError("unavailable", BROKEN)
        again = []
        for group in self._sent.values():
            group.resends += 1
            group.settle_rest(unknown, keep_keyed=group.resends <= RESENDS_MAX)
            if group.left:
                again.append(group)
            else:
                self._room.give(group.weight)
        self._sent.clear()
        self._queue.extendleft(reversed(again))

    def _fail(self, why: str) -> None:
        """Nothing will be sent any more: every open create fails."""
        self._refuses = self._refuses or CodeqError("unavailable", why)
        self._room.refuse(self._refuses)
        for group in self._sent.values():
            group.settle_rest(CodeqError("unavailable", f"{why}: outcome unknown"))
        for group in self._queue:
            fate = "outcome unknown" if group.sent else "never sent"
            group.settle_rest(CodeqError("unavailable", f"{why}: {fate}"))
        self._sent.clear()
        self._queue.clear()
        self._moment = None
