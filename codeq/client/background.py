"""The threads of the synchronous client: one with an event loop, some that call handlers."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from codeq.errors import CodeqError

R = TypeVar("R")

STOP_SECONDS = 5.0
#: A signal that comes just before a wait, or to another thread, does not end it: who waits looks up
#: so often.
LOOK_SECONDS = 0.2


class Closed(Protocol):
    """What can be closed."""

    def close(self) -> object:
        """Ends it."""


class Background:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._opened: weakref.WeakSet[Closed] = weakref.WeakSet()
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="codeq-client", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def call(self, work: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """What the coroutine returns or raises. It is cancelled when this call is interrupted."""
        self._check()
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            while True:
                try:
                    return future.result(LOOK_SECONDS)
                except TimeoutError:
                    if future.done():  # it may be that of the work
                        return future.result()
        finally:
            future.cancel()

    def close_at_exit(self, one: Closed) -> None:
        """Has it closed when the program ends."""
        self._opened.add(one)

    def soon(self, call: Callable[[], object]) -> None:
        """Calls it on the loop and waits for nothing; also from a signal handler."""
        self._check()
        self._loop.call_soon_threadsafe(call)

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise CodeqError("unavailable", "made before a fork: make a new one in this process")
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "codeq.sync was called on its own event loop: it would wait for itself"
            )

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _stop(self) -> None:
        if self._pid != os.getpid():
            return
        for one in list(self._opened):
            with contextlib.suppress(CodeqError):
                one.close()
        self.call(_cancel_others)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


_background: Background | None = None
_starting = threading.Lock()


def background() -> Background:
    """That of this process."""
    global _background
    with _starting:
        if _background is None:
            _background = Background()
        return _background


def _forked() -> None:
    global _background, _starting
    _background, _starting = None, threading.Lock()


os.register_at_fork(after_in_child=_forked)


class Threads:
    """So many threads that call functions in order of arrival. They hold up no program's end."""

    def __init__(self, count: int, name: str) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._work = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Has it called; a future that is cancelled before then is not."""
        future: Future[Any] = Future()
        self._work.put((future, function, arguments))
        return future

    def stop(self) -> None:
        """Ends each thread after what is waiting."""
        for _ in self._threads:
            self._work.put(None)

    def join(self) -> None:
        """Returns when all have ended."""
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            future, function, arguments = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                # Futures of asyncio do not take it.
                stopped = isinstance(error, StopIteration)
                future.set_exception(RuntimeError(f"raised {error!r}") if stopped else error)
            except BaseException as error:  # sys.exit() in a handler is not to end the client
                future.set_exception(RuntimeError(f"raised {error!r}"))
            del work, future
