"""Which function works on which command: the decorators of a Worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import msgspec

from codeq.client.task import Fail, Task

P = TypeVar("P")
R = TypeVar("R")

#: Takes a task, and the decoded payload where the decorator names a type.
Function = Callable[..., Any]


class Handling(NamedTuple):
    """What is called for the tasks of one command: with one of them, or with all of a message."""

    call: Callable[[Any], Any]
    at_once: bool


class Decorators:
    """``task`` and ``batch``, which decorate handlers."""

    @overload
    def task(self, command: str) -> Callable[[Callable[[Task], R]], Callable[[Task], R]]: ...
    @overload
    def task(
        self, command: str, *, type: type[P]
    ) -> Callable[[Callable[[Task, P], R]], Callable[[Task, P], R]]: ...
    @overload
    def task(
        self, command: str, *, type: Any
    ) -> Callable[[Callable[[Task, Any], R]], Callable[[Task, Any], R]]: ...
    def task(self, command: str, *, type: Any = None) -> Any:
        """Decorates what works on the tasks of ``command``, one at a time::

            @worker.task("resize", type=Resize)
            async def resize(task: Task, payload: Resize) -> Size: ...

        With ``type`` the payload is decoded from JSON (a msgspec Struct, a dataclass, a list of
        them, ...) and becomes the second argument; a task whose payload is something else ends
        FAILED with the reason, without a retry and without a call.

        Raises ValueError when the command has a handler or the worker runs.
        """
        decode = None if type is None else _decoder(type)

        def decorate(function: Function) -> Function:
            called = self._called(function)
            call = called if decode is None else _typed(called, decode)
            self._add(command, Handling(call, at_once=False))
            return function

        return decorate

    @overload
    def batch(
        self, command: str
    ) -> Callable[[Callable[[list[Task]], R]], Callable[[list[Task]], R]]: ...
    @overload
    def batch(
        self, command: str, *, type: type[P]
    ) -> Callable[[Callable[[list[Task], list[P]], R]], Callable[[list[Task], list[P]], R]]: ...
    @overload
    def batch(
        self, command: str, *, type: Any
    ) -> Callable[[Callable[[list[Task], list[Any]], R]], Callable[[list[Task], list[Any]], R]]: ...
    def batch(self, command: str, *, type: Any = None) -> Any:
        """As ``task``, for a function that gets all tasks of ``command`` in a message (and a list
        of their payloads) and returns a list with the outcome of each, where Fail(...) and
        Nack(...) stand for themselves."""
        decode = None if type is None else _decoder(type)

        def decorate(function: Function) -> Function:
            called = self._called(function)
            call = called if decode is None else _typed_batch(called, decode)
            self._add(command, Handling(call, at_once=True))
            return function

        return decorate

    def _called(self, function: Function) -> Function:
        """What the worker calls for a decorated function."""
        return function

    def _add(self, command: str, handling: Handling) -> None:
        raise NotImplementedError


class Handlers(Decorators):
    """The functions that were decorated, by command."""

    def __init__(self) -> None:
        self._handlings: dict[str, Handling] = {}
        self._fixed = False  # from the start of the worker on

    def _add(self, command: str, handling: Handling) -> None:
        name = command.strip()
        if not name:
            raise ValueError("a handler needs a command")
        if self._fixed:
            raise ValueError(f"the worker runs: a handler of {name!r} comes too late")
        if name in self._handlings:
            raise ValueError(f"two handlers of {name!r}")
        self._handlings[name] = handling

    def _commands_served(self, commands: Sequence[str], handler: Function | None) -> list[str]:
        """The commands to ask for, in order. Raises ValueError when it is not clear who is to
        handle them."""
        self._fixed = True
        if handler is not None:
            if self._handlings:
                raise ValueError("handlers are decorated or one is given to run, not both")
            return list(commands)
        if not self._handlings:
            raise ValueError("no handler: decorate one with @worker.task(...) or give one to run")
        if lacking := [name for name in commands if name.strip() not in self._handlings]:
            raise ValueError(f"no handler of {', '.join(map(repr, lacking))}")
        return [name.strip() for name in commands] or list(self._handlings)

    def _handle_one(self, task: Task) -> Any:
        """Calls the handler of the task's command."""
        handling = self._handlings.get(task.command)
        if handling is None:  # the server knows the command by another spelling
            raise LookupError(f"no handler of {task.command!r}")
        return handling.call(task)

    def _parts(self, tasks: list[Task]) -> list[tuple[list[Task], Callable[[list[Task]], Any]]]:
        """The tasks of a message as they are worked on, one part after the other: those of a batch
        handler together, the others alone."""
        together: dict[str, list[Task]] = {}
        parts: list[tuple[list[Task], Callable[[list[Task]], Any]]] = []
        for task in tasks:
            handling = self._handlings.get(task.command)
            if handling is None or not handling.at_once:
                parts.append(([task], _alone(self._handle_one)))
            elif task.command in together:
                together[task.command].append(task)
            else:
                together[task.command] = [task]
                parts.append((together[task.command], handling.call))
        return parts


def _alone(call: Callable[[Task], Any]) -> Callable[[list[Task]], Any]:
    """A handler of single tasks as one of batches."""

    async def handle(tasks: list[Task]) -> list[Any]:
        outcome = call(tasks[0])
        return [await outcome if hasattr(outcome, "__await__") else outcome]

    return handle


def _decoder(wanted: Any) -> Callable[[bytes], Any]:
    if wanted in (bytes, bytearray, memoryview):
        raise ValueError("a payload of raw bytes is task.payload, without a type")
    return msgspec.json.Decoder(wanted).decode


def _decoded(task: Task, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(task.payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Fail(f"the payload is not what the handler takes: {error}") from None


def _typed(function: Function, decode: Callable[[bytes], Any]) -> Callable[[Task], Any]:
    return lambda task: function(task, _decoded(task, decode))


def _typed_batch(function: Function, decode: Callable[[bytes], Any]) -> Callable[[list[Task]], Any]:
    async def handle(tasks: list[Task]) -> list[Any]:
        outcomes: list[Any] = [None] * len(tasks)
        good: list[tuple[int, Any]] = []
        for place, task in enumerate(tasks):
            try:
                good.append((place, _decoded(task, decode)))
            except Fail as misfit:
                outcomes[place] = misfit
        if not good:
            return outcomes
        try:
            results = function([tasks[place] for place, _ in good], [value for _, value in good])
            if hasattr(results, "__await__"):
                results = await results
            if len(results) != len(good):
                raise ValueError(f"{len(results)} results for {len(good)} tasks")
        except Exception as error:
            results = [error] * len(good)
        for (place, _), result in zip(good, results, strict=True):
            outcomes[place] = result
        return outcomes

    return handle
