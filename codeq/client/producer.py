"""Producer: creates tasks over one stream, which is opened again when it breaks."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self

import msgspec

from codeq import errors
from codeq.client.stream import Credentials, Dialer, Session, Token, log, refusal_of
from codeq.engine import _wire
from codeq.errors import CodeqError

METHOD = "/producerpb.ProducerStream/Stream"
#: A message carries at most this many creates, and about this many bytes unless one is larger.
GROUP_ITEMS_MAX = 1000
GROUP_BYTES_MAX = 1024 * 1024
#: An acknowledgement names its create by ``group number << SEQ_SHIFT | place in the group``.
SEQ_SHIFT = 10
SEQ_MASK = (1 << SEQ_SHIFT) - 1
#: Larger creates are refused here: no server takes a message that long, it would end the stream.
ITEM_BYTES_MAX = 15 * 1024 * 1024
#: What a create counts beside its texts when unacknowledged bytes are bounded.
ITEM_OVERHEAD_BYTES = 128
#: A create with a key is sent at most this often again: one that breaks every stream must end.
RESENDS_MAX = 8

NOT_ANSWERED = CodeqError("internal", "no answer")

BROKEN = (
    "the connection broke before the acknowledgement: outcome unknown "
    "(an idempotency key makes it safe to send again)"
)

EPOCH = datetime.fromtimestamp(0, UTC)
MILLISECOND = timedelta(milliseconds=1)

_encode_json = msgspec.json.Encoder().encode


class NewTask(msgspec.Struct, frozen=True):
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


class _Item:
    """A create as the codec takes it."""

    __slots__ = ("command", "key", "more", "payload", "weight")

    def __init__(self, task: NewTask, made_key: bytes) -> None:
        """``made_key`` is for a task without a key. Raises CodeqError for what can be told without
        a server."""
        payload = task.payload
        try:
            if type(payload) is not bytes:
                raw = isinstance(payload, bytearray | memoryview)
                payload = bytes(payload) if raw else _encode_json(payload)
            self.command = task.command.encode()
            key = task.idempotency_key
            self.key = (key.strip().encode() if key else b"") or made_key
            plain = not (task.priority or task.webhook or task.max_attempts or task.delay_seconds)
            self.more = None if plain and task.run_at is None else _more(task)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CodeqError("validation-error", f"this cannot be a task: {error}") from None
        self.payload = payload
        self.weight = len(payload) + len(self.command) + len(self.key) + ITEM_OVERHEAD_BYTES
        if self.weight > ITEM_BYTES_MAX:
            raise refusal_of(errors.PAYLOAD_TOO_LARGE.stream_message)

    def add_to(self, creates: _wire.Creates, seq: int) -> None:
        if self.more is None and not self.key:
            creates.add(self.command, self.payload, seq=seq)
        else:
            creates.add(self.command, self.payload, key=self.key, seq=seq, **(self.more or {}))


def _random_keys() -> Iterator[bytes]:
    """Idempotency keys that nobody else makes."""
    prefix = secrets.token_hex(12).encode()
    return (b"made-%s-%d" % (prefix, number) for number in itertools.count(1))


def _more(task: NewTask) -> dict[str, Any]:
    """The rarer fields."""
    numbers = (task.priority, task.max_attempts, task.delay_seconds)
    if not all(-(2**31) <= number < 2**31 for number in numbers):
        raise ValueError("priority, max_attempts and delay_seconds are 32-bit numbers")
    return {
        "priority": task.priority,
        "webhook": task.webhook.encode(),
        "max_attempts": task.max_attempts,
        "run_at_ms": None if task.run_at is None else _milliseconds(task.run_at),
        "delay_seconds": task.delay_seconds,
    }


def _milliseconds(time: datetime) -> int:
    if time.tzinfo is None:
        raise ValueError("run_at needs a time zone")
    return -((EPOCH - time) // MILLISECOND)  # rounded up


class _Group:
    """The creates of one message, from the call to the last acknowledgement."""

    __slots__ = ("creates", "done", "keyed", "left", "number", "resends", "results", "room",
                 "waiters", "weight")  # fmt: skip

    def __init__(self, number: int, *, singles: bool) -> None:
        self.number = number
        self.creates: _wire.Creates | None = _wire.Creates()
        self.results: list[str | CodeqError | None] = []
        self.left = 0
        self.weight = 0
        self.keyed: dict[int, _Item] = {}
        self.resends = 0
        #: one future per create for single produces, else one for the whole group
        self.waiters: list[asyncio.Future[str]] | None = [] if singles else None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def has_room(self, item: _Item) -> bool:
        return not self.results or (
            len(self.results) < GROUP_ITEMS_MAX and self.weight + item.weight <= GROUP_BYTES_MAX
        )

    def add(self, item: _Item) -> None:
        assert self.creates is not None
        index = len(self.results)
        item.add_to(self.creates, self.number << SEQ_SHIFT | index)
        if item.key:
            self.keyed[index] = item
        self.results.append(None)
        self.left += 1
        self.weight += item.weight

    def message(self) -> bytes:
        """The one message with all creates that wait for an acknowledgement."""
        creates = self.creates or self._again()
        self.creates = None
        (message,) = _wire.encode_creates(creates, 2 * ITEM_BYTES_MAX)
        return message

    def _again(self) -> _wire.Creates:
        creates = _wire.Creates()
        for index, item in self.keyed.items():
            if self.results[index] is None:
                item.add_to(creates, self.number << SEQ_SHIFT | index)
        return creates

    def settle(self, index: int, result: str | CodeqError) -> None:
        if index >= len(self.results) or self.results[index] is not None:
            return
        self.results[index] = result
        self.left -= 1
        if self.waiters is not None:
            waiter = self.waiters[index]
            if not waiter.done():
                if isinstance(result, str):
                    waiter.set_result(result)
                else:
                    waiter.set_exception(result)
        if not self.left and not self.done.done():
            self.done.set_result(None)

    def settle_rest(self, error: CodeqError, *, keep_keyed: bool = False) -> None:
        for index, result in enumerate(self.results):
            if result is None and not (keep_keyed and index in self.keyed):
                self.settle(index, error)


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
    one task. A create without a key gets one of the producer's making. It costs an entry on the
    server's disk, some CPU on both sides, and an ended task stays there until the window of its key
    is over (``idempotencyWindowSeconds``). With ``make_keys=False`` such creates have no key, and
    fail with CodeqError ``unavailable`` when the stream breaks: nobody knows whether the task was
    made.
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
        self._queue: deque[_Group] = deque()  # not sent
        self._sent: dict[int, _Group] = {}  # by number; sent, not wholly acknowledged
        self._moment: _Group | None = None  # last of the queue, still open for single creates
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
        item = _Item(
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
        group.add(item)
        assert group.waiters is not None
        group.waiters.append(waiter)
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
        results: list[str | CodeqError] = []
        pieces: list[tuple[_Group, list[int]]] = []  # a message, the places of its creates
        for place, task in enumerate(tasks):
            try:
                new = task if isinstance(task, NewTask) else NewTask(*task)
                item = _Item(new, next(self._made_keys))
            except CodeqError as error:
                results.append(error)
                continue
            results.append(NOT_ANSWERED)
            if not pieces or not pieces[-1][0].has_room(item):
                if pieces:
                    await self._send(pieces[-1][0])
                pieces.append((self._new_group(singles=False), []))
            group, places = pieces[-1]
            group.add(item)
            places.append(place)
        if pieces:
            await self._send(pieces[-1][0])
        for group, places in pieces:
            await group.done
            for place, result in zip(places, group.results, strict=True):
                results[place] = result or NOT_ANSWERED
        return results

    async def _send(self, group: _Group) -> None:
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

    def _new_group(self, *, singles: bool) -> _Group:
        self._numbers += 1
        return _Group(self._numbers, singles=singles)

    def _enqueue(self, group: _Group) -> _Group:
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
        kind, value = _wire.decode_producer_server_event(message)
        if kind == _wire.CREATE_ACKS:
            self._acknowledged(value)  # type: ignore[arg-type]
        elif kind == _wire.ERROR:
            log.warning("%s: the server says: %s", self._dialer.address, value)

    def _acknowledged(self, acks: list[tuple[int, bool, str, str]]) -> None:
        group = None
        number = -1
        for seq, ok, task_id, text in acks:
            if seq >> SEQ_SHIFT != number:
                self._retire(group)
                number = seq >> SEQ_SHIFT
                group = self._sent.get(number)
            if group is not None:
                group.settle(seq & SEQ_MASK, task_id if ok else refusal_of(text))
        self._retire(group)
        if self._refuses is not None:
            self._finish_when_idle()

    def _retire(self, group: _Group | None) -> None:
        if group is not None and not group.left and group.number in self._sent:
            del self._sent[group.number]
            self._room.give(group.weight)

    def _recover(self) -> None:
        """The stream broke: what may be sent again goes first in the queue, the rest fails."""
        unknown = CodeqError("unavailable", BROKEN)
        again = []
        for group in list(self._sent.values()):
            group.resends += 1
            group.settle_rest(unknown, keep_keyed=group.resends <= RESENDS_MAX)
            if group.left:
                again.append(group)
                del self._sent[group.number]
            else:
                self._retire(group)
        self._queue.extendleft(reversed(again))

    def _fail(self, why: str) -> None:
        """Nothing will be sent any more: every open create fails."""
        self._refuses = self._refuses or CodeqError("unavailable", why)
        self._room.refuse(self._refuses)
        for group in self._sent.values():
            group.settle_rest(CodeqError("unavailable", f"{why}: outcome unknown"))
        for group in self._queue:
            resent = group.creates is None
            fate = "outcome unknown" if resent else "never sent"
            group.settle_rest(CodeqError("unavailable", f"{why}: {fate}"))
        self._sent.clear()
        self._queue.clear()
        self._moment = None
