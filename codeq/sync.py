"""The client without an event loop: ``from codeq.sync import Client, Producer, Worker``.

The methods are those of the classes of the same names in codeq, without ``await``. They run there,
on an event loop in a thread of its own that all objects of a process share; it begins with the
first object. An object may be used by many threads, and not in a child process that was forked
after it was made (CodeqError ``unavailable``). What is open when the program ends is closed then.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from codeq.client import producer as producers
from codeq.client import rest
from codeq.client import worker as workers
from codeq.client.background import Threads, background
from codeq.client.handlers import Decorators, Handling
from codeq.client.signals import stopping
from codeq.client.task import Counts
from codeq.client.worker import BatchHandler, Handler
from codeq.errors import CodeqError

__all__ = ["Client", "Producer", "Worker"]

log = logging.getLogger("codeq.client")

P = ParamSpec("P")
R = TypeVar("R")
Inner = TypeVar("Inner")


class Face(Generic[Inner]):
    """A blocking view of an asyncio object."""

    def __init__(self, inner: Inner) -> None:
        self._inner = inner
        self._background = background()


def blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Any, P], R]:
    """The method of a Face that runs this one of its asyncio object."""

    @functools.wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        given = [_made(value) for value in args]
        named = {name: _made(value) for name, value in kwargs.items()}
        result: R = self._background.call(lambda: method(self._inner, *given, **named))
        return result

    return call  # type: ignore[return-value]  # self is given by position only


def _made(value: Any) -> Any:
    """What an argument gives bit by bit is asked for here, not on the event loop: it may wait."""
    return list(value) if isinstance(value, Iterator) else value


def iterating(
    method: Callable[Concatenate[Any, P], AsyncIterator[R]],
) -> Callable[Concatenate[Any, P], Iterator[R]]:
    """The method of a Face that gives what this one of its asyncio object gives."""

    @functools.wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        items = method(self._inner, *args, **kwargs)

        async def following() -> R:
            return await anext(items)

        while True:
            try:
                item: R = self._background.call(following)
            except StopAsyncIteration:
                return
            yield item

    return call  # type: ignore[return-value]  # self is given by position only


def made_of(
    made: Callable[P, Inner],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Decorates the ``__init__`` of a Face that takes the arguments of its asyncio object."""

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        return functools.wraps(made.__init__, assigned=("__doc__",))(init)

    return decorate


class Opened(Face[Inner]):
    """One that is closed in the end."""

    def __init__(self, inner: Inner) -> None:
        super().__init__(inner)
        self._background.close_at_exit(self)

    def __enter__(self) -> Self:
        self._background.call(self._inner.__aenter__)  # type: ignore[attr-defined]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        leave = self._inner.__aexit__  # type: ignore[attr-defined]
        self._background.call(lambda: leave(kind, error, traceback))

    def close(self) -> None:
        """Leaves the object without a ``with``."""
        self.__exit__(None, None, None)


def in_a_thread(token: Any) -> Any:
    """A token, whose function may take its time."""
    return functools.partial(asyncio.to_thread, token) if callable(token) else token


class Producer(Opened[producers.Producer]):
    """codeq.Producer without ``await``: ``with Producer("host:9092", token="...") as p:
    p.produce(...)``. Arguments and methods are the same. ``token`` may be a function, which is
    called in a thread of its own."""

    @made_of(producers.Producer)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["token"] = in_a_thread(kwargs["token"])
        super().__init__(producers.Producer(*args, **kwargs))

    start = blocking(producers.Producer.start)
    close = blocking(producers.Producer.close)
    produce = blocking(producers.Producer.produce)

    produce_batch = blocking(producers.Producer.produce_batch)


class Client(Opened[rest.Client]):
    """codeq.Client without ``await``: ``with Client("http://host:8080", token="...") as client:
    client.get(id)``. Arguments and methods are the same."""

    @made_of(rest.Client)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("token", "producer_token", "worker_token"):
            if name in kwargs:
                kwargs[name] = in_a_thread(kwargs[name])
        super().__init__(rest.Client(*args, **kwargs))
        self.base_url = self._inner.base_url

    close = blocking(rest.Client.close)
    create = blocking(rest.Client.create)
    create_many = blocking(rest.Client.create_many)
    get = blocking(rest.Client.get)
    cancel = blocking(rest.Client.cancel)
    result = blocking(rest.Client.result)
    wait_for_result = blocking(rest.Client.wait_for_result)
    artifact = blocking(rest.Client.artifact)
    claim = blocking(rest.Client.claim)
    claim_many = blocking(rest.Client.claim_many)
    heartbeat = blocking(rest.Client.heartbeat)
    abandon = blocking(rest.Client.abandon)
    nack = blocking(rest.Client.nack)
    complete = blocking(rest.Client.complete)
    fail = blocking(rest.Client.fail)
    finish_many = blocking(rest.Client.finish_many)
    subscribe = blocking(rest.Client.subscribe)
    keep_subscription = blocking(rest.Client.keep_subscription)
    queues = blocking(rest.Client.queues)
    queue = blocking(rest.Client.queue)
    pause = blocking(rest.Client.pause)
    resume = blocking(rest.Client.resume)
    purge = blocking(rest.Client.purge)
    dead_letters = iterating(rest.Client.dead_letters)
    dead_page = blocking(rest.Client.dead_page)
    requeue_dead = blocking(rest.Client.requeue_dead)
    purge_dead = blocking(rest.Client.purge_dead)
    tasks = iterating(rest.Client.tasks)
    task_page = blocking(rest.Client.task_page)
    cleanup = blocking(rest.Client.cleanup)
    overview = blocking(rest.Client.overview)
    backup = blocking(rest.Client.backup)
    put_topic = blocking(rest.Client.put_topic)
    get_topic = blocking(rest.Client.get_topic)
    delete_topic = blocking(rest.Client.delete_topic)
    raft_status = blocking(rest.Client.raft_status)
    health = blocking(rest.Client.health)
    ready = blocking(rest.Client.ready)
    metrics = blocking(rest.Client.metrics)
    openapi = blocking(rest.Client.openapi)


class _Threaded(workers.Worker):
    """A worker whose handlers are called in threads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.threads: Threads | None = None

    def _called(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(function):
            raise ValueError("handlers of codeq.sync are plain; codeq.Worker has async ones")

        async def call(*arguments: Any) -> Any:
            assert self.threads is not None
            return await asyncio.wrap_future(self.threads.begin(function, *arguments))

        return call


class Worker(Face[_Threaded], Decorators):
    """codeq.Worker without ``await``: ``Worker("host:9091", token="...").run()``. Arguments and
    methods are the same, handlers are plain functions.

    Handlers are called in threads, ``concurrency`` of them; leases are kept alive meanwhile. A
    handler cannot be cancelled: when its lease is lost or its task given back, it runs on and what
    it returns is dropped. ``on_refused`` is called in a thread of its own, and so is ``token``.
    """

    @made_of(workers.Worker)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["token"] = in_a_thread(kwargs["token"])
        self._concurrency: int = kwargs.get("concurrency", 1)
        self._on_refused = kwargs.pop("on_refused", None)
        self._reports: Threads | None = None
        if self._on_refused is not None:
            kwargs["on_refused"] = self._report
        super().__init__(_Threaded(*args, **kwargs))
        self.worker_id = self._inner.worker_id

    @property
    def counts(self) -> Counts:
        """What the worker has done since it was made."""
        return self._inner.counts

    def run(self, handler: Handler | None = None, *, signals: bool | None = None) -> None:
        """Calls ``handler(task)``, or the decorated handler of its command, for each task until
        ``stop``; errors as those of codeq.Worker.

        With ``signals`` (None: in the main thread) SIGTERM or SIGINT is a ``stop()``, a second one
        ``stop(abandon=True)``, a third what it was before.
        """
        called = handler and self._inner._called(handler)
        self._run(lambda: self._inner.run(called), signals)

    def run_batches(self, handler: BatchHandler, *, signals: bool | None = None) -> None:
        """Like ``run``, but calls ``handler(tasks)`` with all tasks of a message, as the
        ``run_batches`` of codeq.Worker does."""
        called = self._inner._called(handler)
        self._run(lambda: self._inner.run_batches(called), signals)

    def stop(self, *, abandon: bool = False) -> None:
        """Has ``run`` end and returns at once: no more tasks, those in hand are finished. With
        ``abandon`` they go back untried, and their handlers run on for nothing. May be called from
        handlers, other threads and signal handlers."""
        self._background.soon(functools.partial(self._inner.stop, abandon=abandon))

    def _run(self, work: Callable[[], Coroutine[Any, Any, None]], signals: bool | None) -> None:
        if signals is None:
            signals = threading.current_thread() is threading.main_thread()
        told = stopping(lambda abandon: self.stop(abandon=abandon))
        threads = self._inner.threads = Threads(self._concurrency, "codeq-handler")
        self._reports = Threads(1, "codeq-refused")
        try:
            with told if signals else contextlib.nullcontext():
                self._background.call(work)
        finally:
            threads.stop()
            self._reports.stop()
            self._reports.join()

    def _report(self, task_id: str, error: CodeqError) -> None:
        assert self._reports is not None and self._on_refused is not None
        self._reports.begin(self._on_refused, task_id, error).add_done_callback(_complain)

    def _called(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._inner._called(function)

    def _add(self, command: str, handling: Handling) -> None:
        self._inner._add(command, handling)


def _complain(called: Future[Any]) -> None:
    if error := called.exception():
        log.error("on_refused failed", exc_info=error)
