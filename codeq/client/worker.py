"""Worker: claims tasks over one stream, calls a handler for each, sends the results back."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from typing import Any

from codeq.client.handlers import Handlers
from codeq.client.signals import stopping
from codeq.client.stream import Credentials, Dialer, Session, Token, log, refusal_of
from codeq.client.task import Fail, Nack, Task
from codeq.engine import _wire
from codeq.engine._client import UNTRIED, Counts, Results, worker_event
from codeq.errors import CodeqError

METHOD = "/workerpb.WorkerStream/Stream"
#: Results of one moment go out in messages of at most about this size.
RESULTS_BYTES_MAX = 1024 * 1024
#: Handlers that never wait are interrupted this often, so that heartbeats and results get out.
SLICE_SECONDS = 0.05
#: Leases are looked after this many times in their length; a heartbeat is sent at the latest
#: when a third of the lease is over.
LOOKS_PER_LEASE = 6

#: Errors of the server that mean a Ready, which would be the same the next time, was not taken.
SLUGS_BY_ERROR = {"PermissionDenied": "permission-denied", "InvalidArgument": "validation-error"}
#: Stands for the tasks of a whole message while its batch handler is suspended.
ALL = "all"
#: The outcome of a handler that was cancelled, as opposed to None, which is a result.
INTERRUPTED = object()

Handler = Callable[[Task], Any]
BatchHandler = Callable[[list[Task]], Any]
Refused = Callable[[str, CodeqError], None]


class _Assignment:
    """The tasks of one message while they are worked on, one after the other or all at once."""

    __slots__ = ("at_once", "beaten_at", "interrupted", "lost", "open", "runner", "tasks",
                 "waiting_for")  # fmt: skip

    def __init__(self, tasks: list[Task], now: float) -> None:
        self.tasks = tasks
        self.open = 0  # place of the first task that is not finished
        self.beaten_at = now
        self.lost: set[str] = set()
        self.runner: asyncio.Task[None] | None = None
        self.waiting_for: str | None = None  # id of the task whose handler is suspended
        self.at_once = tasks  # what a batch handler has
        self.interrupted = False

    def lose(self, task_id: str) -> None:
        self.lost.add(task_id)
        if self.waiting_for == task_id or (
            self.waiting_for == ALL and all(task.id in self.lost for task in self.at_once)
        ):
            self.interrupt()

    def interrupt(self) -> None:
        """Cancels the suspended handler alone; the assignment goes on with the next task."""
        if self.waiting_for is not None and not self.interrupted and self.runner is not None:
            self.interrupted = True
            self.runner.cancel()

    def take_interrupt(self) -> bool:
        """Whether the cancellation that is under way was meant for the handler only."""
        if not self.interrupted:
            return False
        self.interrupted = False
        assert self.runner is not None
        self.runner.uncancel()
        return True


class Worker(Handlers):
    """Works on tasks: ``await Worker("host:9091", token="...", commands=["resize"]).run(handle)``,
    or with a handler for each command (``@worker.task("resize")``, see ``task``) and ``run()``.

    ``commands``: served in this order; empty = those that have a decorated handler or, if none has,
    every queue the token allows. ``concurrency``: how many handlers run at a time. ``batch``: how
    many tasks each of them gets per message, handled one after the other. ``lease_seconds``: a task
    is another worker's after this time without a heartbeat. ``on_refused(task_id, error)`` hears of
    results the server did not accept. ``merge=False`` sends every result as its own message.
    ``credentials``: a Tls, when the server speaks it.

    A handler may be plain or async, or return an awaitable. What it returns is the result (any
    JSON value, msgspec Struct or dataclass; msgspec.Raw for JSON text). Fail ends the task FAILED,
    Nack and every other exception give it back. Heartbeats go out while a handler is suspended; a
    plain handler holds the event loop and so must be short (wrap a long one in asyncio.to_thread).
    An async handler is cancelled when its lease turns out to be lost.
    """

    def __init__(
        self,
        address: str,
        *,
        token: Token,
        commands: Sequence[str] = (),
        worker_id: str | None = None,
        concurrency: int = 1,
        batch: int = 1,
        lease_seconds: int = 60,
        credentials: Credentials = None,
        connect_timeout_seconds: float | None = None,
        stop_timeout_seconds: float = 10.0,
        on_refused: Refused | None = None,
        merge: bool = True,
    ) -> None:
        if min(concurrency, batch, lease_seconds) < 1:
            raise ValueError("concurrency, batch and lease_seconds are at least 1")
        super().__init__()
        self.worker_id = worker_id or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.counts = Counts()
        self._dialer = Dialer(
            address,
            METHOD,
            token,
            lambda text: _wire.encode_worker_hello(text, self.worker_id),
            _wire.decode_worker_server_event,
            credentials,
        )
        self._connect_timeout_seconds = connect_timeout_seconds
        self._stop_timeout_seconds = stop_timeout_seconds
        self._concurrency = concurrency
        self._lease_seconds = lease_seconds
        self._look_seconds = lease_seconds / LOOKS_PER_LEASE
        self._commands = tuple(commands)
        self._batch = batch
        self._ready = b""
        self._on_refused = on_refused
        self._work: Callable[[_Assignment], Awaitable[None]]
        self._assignments: set[_Assignment] = set()
        self._session: Session | None = None
        self._runner: asyncio.Task[None] | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._lease_known = False
        self._giving_up: asyncio.TimerHandle | None = None
        self._fatal: Exception | None = None
        self._stopping = False
        self._given_up = False
        # What goes out, in this order.
        self._results = Results(self.counts, merge=merge)
        self._messages: deque[bytes] = deque()
        self._returns: deque[tuple[str, bytes]] = deque()  # nacks and abandons
        self._beats: deque[bytes] = deque()
        self._asking = 0  # Readys
        self._returning: set[str] = set()  # sent, or about to be, and not acknowledged

    # --- running

    async def run(self, handler: Handler | None = None, *, signals: bool = False) -> None:
        """Calls ``handler(task)``, or the decorated handler of its command, for each task until
        ``stop``.

        With ``signals`` (in the main thread only) SIGTERM or SIGINT is a ``stop()``, a second one
        ``stop(abandon=True)``, a third what it was before. Raises CodeqError when the token or the
        commands are refused, or the first connection fails for connect_timeout_seconds; ValueError
        when a command has no handler, or there are decorated ones and another.
        """
        commands = self._commands_served(self._commands, handler)
        one = handler or self._handle_one

        async def work(assignment: _Assignment) -> None:
            await self._one_by_one(assignment, one)

        mixed = handler is None and any(known.at_once for known in self._handlings.values())
        await self._serve(commands, self._by_command if mixed else work, signals)

    async def run_batches(self, handler: BatchHandler, *, signals: bool = False) -> None:
        """Like ``run``, but calls ``handler(tasks)`` with all tasks of a message. It returns a
        list with the result of each, where Fail(...) and Nack(...) stand for themselves."""
        commands = self._commands_served(self._commands, handler)

        async def work(assignment: _Assignment) -> None:
            await self._all_at_once(assignment, handler)

        await self._serve(commands, work, signals)

    def stop(self, *, abandon: bool = False) -> None:
        """Ends ``run``: takes no more tasks, finishes those in hand and sends their results. With
        ``abandon`` running handlers are cancelled and unfinished tasks go back untried."""
        self._stopping = True
        self._asking = 0
        if abandon:
            self._results.abandoning = True
            for assignment in self._assignments:
                assignment.interrupt()
        self._settle()

    async def _serve(
        self, commands: list[str], work: Callable[[_Assignment], Awaitable[None]], signals: bool
    ) -> None:
        if self._runner is not None:
            raise CodeqError("unavailable", "a worker runs only once")
        named = [text.encode() for text in commands]
        self._ready = _wire.encode_ready(named, self._lease_seconds, self._batch)
        self._work = work
        soon = asyncio.get_running_loop().call_soon_threadsafe  # a signal may come at any moment
        told = stopping(lambda abandon: soon(partial(self.stop, abandon=abandon)))
        with told if signals else nullcontext():
            await self._run_to_the_end()

    async def _run_to_the_end(self) -> None:
        self._runner = asyncio.create_task(self._keep_open())
        self._settle()
        try:
            await self._runner
        except asyncio.CancelledError:
            if not self._given_up:
                raise
        finally:
            self._runner.cancel()
            for timer in (self._looking, self._giving_up):
                if timer is not None:
                    timer.cancel()
            await self._drop_assignments()
        if self._fatal is not None:
            raise self._fatal

    async def _keep_open(self) -> None:
        session = await self._dialer.dial(self._connect_timeout_seconds)
        while True:
            self._greet(session)
            try:
                end = await session.exchange(self._next_message, self._received)
            finally:
                self._session = None
            if self._fatal is not None or (self._stopping and not self._in_hand()):
                return
            log.warning("%s: the stream ended: %s", self._dialer.address, end or "by the server")
            session = await self._dialer.dial()

    def _greet(self, session: Session) -> None:
        """A stream is open: what the last one may have swallowed is said again. Nacks and abandons
        are not, since the task may be claimed again by now: its lease runs out instead."""
        self._session = session
        self._lease_known = False
        self._messages.clear()
        self._beats.clear()
        self._returning = {task_id for task_id, _ in self._returns}
        self._results.tell_again()
        self._asking = 0 if self._stopping else self._concurrency - len(self._assignments)
        self._settle()

    async def _drop_assignments(self) -> None:
        runners = [a.runner for a in self._assignments if a.runner is not None]
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)

    def _in_hand(self) -> bool:
        return bool(
            self._assignments
            or self._results.count
            or self._returning
            or self._returns
            or self._messages
        )

    def _settle(self) -> None:
        """When stopping: ends the stream once nothing is in hand, and gives up after a while when
        only the server's word is missing."""
        if not self._stopping or self._runner is None:
            return
        if not self._in_hand():
            if self._session is not None:
                self._session.finish()
            else:
                self._give_up()
        if not self._assignments:
            self._give_up_later()

    def _give_up_later(self) -> None:
        if self._giving_up is None:
            loop = asyncio.get_running_loop()
            self._giving_up = loop.call_later(self._stop_timeout_seconds, self._give_up)

    def _give_up(self) -> None:
        if self._runner is not None and not self._runner.done():
            if self._results.count:
                log.warning("stopped with %d results not acknowledged", self._results.count)
            self._given_up = True
            self._runner.cancel()

    # --- what comes in

    def _received(self, message: bytes) -> None:
        kind, value = worker_event(message, self._results)
        if kind == _wire.TASKS:
            self._assigned(value)  # type: ignore[arg-type]
        elif kind == _wire.RESULT_ACKS:
            self._results_acknowledged(value)  # type: ignore[arg-type]
        elif kind == _wire.HEARTBEAT_ACK:
            self._heartbeat_acknowledged(*value)  # type: ignore[misc]
        elif kind in (_wire.NACK_ACK, _wire.ABANDON_ACK):
            self._return_acknowledged(*value[:3])  # type: ignore[index]
        elif kind == _wire.ERROR:
            self._error(*value)  # type: ignore[misc]

    def _error(self, code: str, message: str) -> None:
        """The server dropped an event. A Ready it does not take would never be answered."""
        log.warning("%s: the server says %s: %s", self._dialer.address, code, message)
        slug = SLUGS_BY_ERROR.get(code)
        if slug is not None:
            self._end_with(CodeqError(slug, message))

    def _end_with(self, error: Exception) -> None:
        """Makes ``run`` raise this, after a last word to the server."""
        self._fatal = self._fatal or error
        self._stopping = True
        self._asking = 0
        if self._session is None:
            self._give_up()
        else:
            self._session.finish()
            self._give_up_later()

    def _assigned(self, tasks: list[Task]) -> None:
        loop = asyncio.get_running_loop()
        self.counts.delivered += len(tasks)
        assignment = _Assignment(tasks, loop.time())
        if self._stopping:
            for task in assignment.tasks:
                self._abandon(task.id)
            self._wake()
            return
        self._assignments.add(assignment)
        if not self._lease_known:
            self._learn_lease(tasks[0])
        if self._looking is None:
            self._looking = loop.call_later(self._look_seconds, self._look)
        assignment.runner = asyncio.create_task(self._handle(assignment))

    def _learn_lease(self, task: Task) -> None:
        """The server may grant less than was asked; both times are its own clock's."""
        self._lease_known = True
        try:
            granted = datetime.fromisoformat(task.lease_until).timestamp() - task.updated_ms / 1000
        except ValueError:
            granted = self._lease_seconds
        self._look_seconds = max(0.1, min(self._lease_seconds, granted)) / LOOKS_PER_LEASE

    def _results_acknowledged(self, refused: list[tuple[str, str]]) -> None:
        for task_id, text in refused:
            self._refused_by_server(task_id, text)
        if self._stopping:
            self._settle()

    def _return_acknowledged(self, task_id: str, ok: bool, text: str) -> None:
        self._returning.discard(task_id)
        if ok:
            self.counts.acknowledged += 1
        else:
            self._refused_by_server(task_id, text)
        if self._stopping:
            self._settle()

    def _refused_by_server(self, task_id: str, text: str) -> None:
        self.counts.refused += 1
        log.warning("task %s: the server did not accept the outcome: %s", task_id, text)
        if self._on_refused is not None:
            self._on_refused(task_id, refusal_of(text))

    def _heartbeat_acknowledged(self, task_id: str, ok: bool, text: str) -> None:
        if ok:
            return
        for assignment in self._assignments:
            if any(task.id == task_id for task in assignment.tasks[assignment.open :]):
                log.warning("task %s: the lease is lost: %s", task_id, text)
                assignment.lose(task_id)

    # --- work

    async def _handle(self, assignment: _Assignment) -> None:
        try:
            await self._work(assignment)
        except Exception as bug:
            self._end_with(bug)
        finally:
            self._assignments.discard(assignment)
            if not self._stopping:
                self._asking += 1
            self._wake()
            self._settle()

    async def _one_by_one(self, assignment: _Assignment, handler: Handler) -> None:
        """Handlers that are done when they return are called one after the other in C."""
        time = asyncio.get_running_loop().time
        tasks, place = assignment.tasks, 0
        slice_end = time() + SLICE_SECONDS
        while True:
            place, outcome = self._results.work(tasks, place, handler, assignment.lost, slice_end)
            assignment.open = place
            if place == len(tasks):
                return
            task = tasks[place]
            if outcome is not UNTRIED:
                await self._one(assignment, task, outcome)
                place += 1
            elif self._results.abandoning:
                self._abandon(task.id)
                place += 1
            elif task.id in assignment.lost:
                place += 1
            if time() > slice_end:
                self._wake()
                await asyncio.sleep(0)
                slice_end = time() + SLICE_SECONDS

    async def _one(self, assignment: _Assignment, task: Task, outcome: Any) -> None:
        """What the handler gave is still to be awaited, or is a failure."""
        if hasattr(outcome, "__await__"):
            try:
                outcome = await self._interruptible(assignment, task.id, outcome)
                self._wake()
            except Exception as error:
                outcome = error
        self._conclude(task, outcome)

    async def _by_command(self, assignment: _Assignment) -> None:
        """Batch handlers and others, each with the tasks of its command."""
        parts = self._parts(assignment.tasks)
        assignment.tasks = [task for tasks, _ in parts for task in tasks]
        for tasks, handler in parts:
            assignment.at_once = [task for task in tasks if task.id not in assignment.lost]
            if assignment.at_once:
                await self._all_at_once(assignment, handler)
                self._wake()
                await asyncio.sleep(0)
            assignment.open += len(tasks)

    async def _all_at_once(self, assignment: _Assignment, handler: BatchHandler) -> None:
        tasks = assignment.at_once
        if self._results.abandoning:
            outcomes: Any = INTERRUPTED
        else:
            try:
                outcomes = handler(tasks)
                if hasattr(outcomes, "__await__"):
                    outcomes = await self._interruptible(assignment, ALL, outcomes)
                if outcomes is not INTERRUPTED and len(outcomes) != len(tasks):
                    raise ValueError(f"{len(outcomes)} results for {len(tasks)} tasks")
            except Exception as error:
                outcomes = [error] * len(tasks)
        if outcomes is INTERRUPTED:
            outcomes = [INTERRUPTED] * len(tasks)
        for task, outcome in zip(tasks, outcomes, strict=True):
            if not assignment.lost or task.id not in assignment.lost:
                self._conclude(task, outcome)

    async def _interruptible(
        self, assignment: _Assignment, task_id: str, handling: Awaitable[Any]
    ) -> Any:
        """What the handler returns, or INTERRUPTED when it was cancelled for its lost lease or to
        abandon its task, also if it took no notice of that."""
        assignment.waiting_for = task_id
        try:
            outcome = await handling
        except asyncio.CancelledError:
            if assignment.take_interrupt():
                return INTERRUPTED
            if assignment.runner is None or assignment.runner.cancelling():
                raise
            return RuntimeError("the handler cancelled itself")
        finally:
            assignment.waiting_for = None
        return INTERRUPTED if assignment.take_interrupt() else outcome

    def _conclude(self, task: Task, outcome: Any) -> None:
        """Turns what a handler returned or raised into the message that says so."""
        if outcome is INTERRUPTED:
            if self._results.abandoning:
                self._abandon(task.id)
            return
        if not isinstance(outcome, Exception):
            try:
                self._results.complete(task, outcome)
                return
            except Exception as error:
                outcome = error
        if isinstance(outcome, Fail):
            self._results.fail(task, str(outcome).encode(errors="replace"))
        elif isinstance(outcome, Nack):
            self._nack(task.id, outcome.delay_seconds, outcome.reason)
        else:
            log.error("task %s: the handler failed", task.id, exc_info=outcome)
            self._nack(task.id, 0, f"{type(outcome).__name__}: {outcome}")

    def _nack(self, task_id: str, delay_seconds: int, reason: str) -> None:
        text = reason.encode(errors="replace").decode()
        self._give_back(task_id, _wire.encode_nack(task_id, delay_seconds, text))

    def _abandon(self, task_id: str) -> None:
        self._give_back(task_id, _wire.encode_abandon(task_id))

    def _give_back(self, task_id: str, message: bytes) -> None:
        self.counts.returned += 1
        self._returning.add(task_id)
        self._returns.append((task_id, message))

    # --- what goes out

    def _wake(self) -> None:
        if self._session is not None:
            self._session.wake()

    def _next_message(self) -> bytes | None:
        """Results first and the Readys right behind them."""
        if not self._messages and self._results.waiting:
            self._messages.extend(self._results.messages(RESULTS_BYTES_MAX))
        if self._messages:
            return self._messages.popleft()
        if self._returns:
            return self._returns.popleft()[1]
        if self._beats:
            return self._beats.popleft()
        if self._asking:
            self._asking -= 1
            return self._ready
        return None

    def _look(self) -> None:
        """Sends heartbeats for tasks that have been in hand for long; runs while any are."""
        self._looking = None
        if not self._assignments:
            return
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(self._look_seconds, self._look)
        if self._session is None:
            return
        for assignment in self._assignments:
            if loop.time() - assignment.beaten_at >= self._look_seconds * 0.9:
                assignment.beaten_at = loop.time()
                for task in assignment.tasks[assignment.open :]:
                    if task.id not in assignment.lost:
                        self._beats.append(_wire.encode_heartbeat(task.id, self._lease_seconds))
        self._wake()
