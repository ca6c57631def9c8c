"""``codeq worker``: a shell command for each task."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from codeq.cli.connection import Call, remote
from codeq.cli.output import EXIT_INTERRUPTED, complain, print_json, print_text

if TYPE_CHECKING:
    from codeq.cli.runner import Done
    from codeq.model import Task

app = typer.Typer(rich_markup_mode=None, help="Work on tasks.")

ACKS = ("complete", "abandon", "nack", "none")


@app.callback()
def worker() -> None:
    """Work on tasks."""  # with a callback, "start" stays a word of its own


@app.command("start")
@remote
async def worker_start(
    call: Call,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND ARG...]", show_default=False)
    ] = None,
    run: Annotated[str, typer.Option(metavar="TEXT", help="the same as text for /bin/sh")] = "",
    events: Annotated[
        str, typer.Option(metavar="A,B", help="queues, in this order; default: all allowed")
    ] = "",
    ack: Annotated[
        str, typer.Option(metavar="|".join(ACKS), help="without a command: after it is shown")
    ] = "",
    concurrency: Annotated[int, typer.Option(min=1, max=1000, help="tasks at a time")] = 1,
    lease_seconds: Annotated[int, typer.Option(min=1, help="heartbeats make it longer")] = 60,
    wait_seconds: Annotated[int, typer.Option(min=0, max=30, help="of a claim")] = 10,
    nack_delay: Annotated[
        int, typer.Option(help="seconds until a failed task comes again; -1: the server's backoff")
    ] = 5,
    worker_id: Annotated[str, typer.Option(metavar="NAME", help="default: host and pid")] = "",
    max_tasks: Annotated[int, typer.Option(min=0, help="end after so many; 0: never")] = 0,
) -> int:
    """Runs a command for each task: payload on its input, result from its output.

    Exit code 0 ends the task COMPLETED (output that is JSON is the result, other text is a JSON
    string), 100 ends it FAILED with the last line on standard error, any other one gives it back
    with that line as the reason. CODEQ_TASK_ID, CODEQ_COMMAND, CODEQ_ATTEMPTS and more are in its
    environment. It is killed when the lease is lost. Without a command each task is shown.

    SIGTERM or Ctrl-C: finishes the tasks in hand; again: kills the commands, gives the tasks back.
    """
    import asyncio

    from codeq.cli.runner import Plan, Runner

    argv = _argv(command or [], run, ack)
    plan = Plan(
        tuple(name.strip() for name in events.split(",") if name.strip()),
        argv,
        ack or "complete",
        worker_id or f"{socket.gethostname()}-{os.getpid()}",
        concurrency,
        lease_seconds,
        wait_seconds,
        nack_delay,
        max_tasks,
    )
    work = Runner(
        call.client,
        plan,
        _show_json if call.as_json else _show,
        _teller(call, shown=not argv),
        complain,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.stop)
    await work.run()
    return EXIT_INTERRUPTED if work.gave_back else 0


def _argv(command: list[str], run: str, ack: str) -> tuple[str, ...]:
    """The command to run; none when tasks are only shown."""
    if ack and ack not in ACKS:
        raise typer.BadParameter(f"--ack: one of {', '.join(ACKS)}, not {ack!r}")
    if sum(map(bool, (command, run, ack))) > 1:
        raise typer.BadParameter("a command, --run and --ack exclude each other")
    if run:
        return ("/bin/sh", "-c", run)
    if command and shutil.which(command[0]) is None:
        raise typer.BadParameter(f"there is no program {command[0]!r}")
    return tuple(command)


def _show(task: Task) -> None:
    print_text(f"{task.id} {task.command} attempt {task.attempts}: {task.payload}")


def _show_json(task: Task) -> None:
    print_json(task, line=True)


def _tell(done: Done) -> None:
    reason = f" ({done.reason})" if done.reason else ""
    print_text(f"{done.task_id} {done.command} attempt {done.attempts}: {done.outcome}{reason}")


def _tell_json(done: Done) -> None:
    print_json(done, line=True)


def _teller(call: Call, *, shown: bool) -> Callable[[Done], None]:
    """Says what became of a task; a program that reads tasks is told nothing else."""
    if call.as_json:
        return (lambda done: None) if shown else _tell_json
    return _tell
