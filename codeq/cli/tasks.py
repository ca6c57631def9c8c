"""``codeq task``: making tasks, looking at them, ending them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codeq.cli.connection import Call, TaskTenant, Tenant, moment, remote
from codeq.cli.output import (
    EXIT_NOT_FOUND,
    complain,
    laid_out,
    print_fields,
    print_table,
    print_text,
)
from codeq.errors import CodeqError

if TYPE_CHECKING:
    from codeq.model import ResultRecord, Task, TaskPage

app = typer.Typer(rich_markup_mode=None, help="Make tasks, look at them, end them.")

TaskId = Annotated[str, typer.Argument(metavar="ID")]
#: A payload in a list of tasks is cut here
PAYLOAD_CHARS = 48


@app.command("create")
@remote
async def task_create(
    call: Call,
    event: Annotated[str, typer.Option(metavar="COMMAND", help="the queue")],
    payload: Annotated[
        str, typer.Option(metavar="JSON", help="any JSON but null; @FILE reads it, - the input")
    ],
    priority: Annotated[int, typer.Option(help="higher goes first")] = 0,
    webhook: Annotated[str, typer.Option(metavar="URL", help="told of the result")] = "",
    max_attempts: Annotated[int, typer.Option(min=0, help="0: as the server has it")] = 0,
    idempotency_key: Annotated[
        str, typer.Option(metavar="TEXT", help="the same key makes one task only")
    ] = "",
    run_at: Annotated[str, typer.Option(metavar="TIME", help="not before; RFC 3339")] = "",
    delay_seconds: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Makes a task and prints its id."""
    task = await call.client.create(
        event,
        _payload(payload),
        priority=priority,
        webhook=webhook,
        max_attempts=max_attempts,
        idempotency_key=idempotency_key,
        run_at=moment(run_at, "--run-at"),
        delay_seconds=delay_seconds,
    )
    call.show(task, lambda: print_text(task.id))


def _payload(text: str) -> bytes:
    """The JSON text that is meant."""
    import msgspec

    try:
        if text == "-":
            found = sys.stdin.buffer.read()
        else:
            found = Path(text[1:]).read_bytes() if text.startswith("@") else text.encode()
        msgspec.json.decode(found)
    except OSError as error:
        raise typer.BadParameter(f"--payload {text}: {error.strerror}") from None
    except ValueError as error:
        raise typer.BadParameter(f"--payload is no JSON (a text needs quotes): {error}") from None
    return found


@app.command("get")
@remote
async def task_get(call: Call, task_id: TaskId, tenant: TaskTenant = "") -> None:
    """Shows a task as it is now."""
    task = await call.client.get(task_id, tenant=tenant)
    call.show(task, lambda: _show(task))


@app.command("result")
@remote
async def task_result(
    call: Call,
    task_id: TaskId,
    wait_seconds: Annotated[
        float, typer.Option(min=0, help="for the end of the task, as long as you like")
    ] = 0,
    tenant: TaskTenant = "",
) -> int:
    """Prints the result of a task; ends with 3 when it has not ended in time."""
    try:
        ended = await call.client.wait_for_result(
            task_id, timeout_seconds=wait_seconds, tenant=tenant
        )
    except TimeoutError:
        complain(f"task {task_id} has not ended")
        return EXIT_NOT_FOUND
    call.show(ended, lambda: _show_result(ended.result))
    return 0


def _show_result(record: ResultRecord) -> None:
    print_fields(
        [
            ("task", record.task_id),
            ("status", record.status),
            ("completed", record.completed_at),
            ("error", record.error),
            *(("artifact", f"{one.name}  {one.url}") for one in record.files()),
        ]
    )
    if record.result:
        for line in laid_out(bytes(record.result)).splitlines():
            print_text(line)


@app.command("cancel")
@remote
async def task_cancel(call: Call, task_id: TaskId, tenant: TaskTenant = "") -> None:
    """Ends a task that nobody has claimed: FAILED, error CANCELLED."""
    task = await call.client.cancel(task_id, tenant=tenant)
    call.show(task, lambda: _show(task))


@app.command("artifact")
@remote
async def task_artifact(
    call: Call,
    task_id: TaskId,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    out: Annotated[str, typer.Option(metavar="FILE", help="- = standard output")] = "-",
) -> None:
    """Fetches a file of a result."""
    found = await call.client.artifact(task_id, name)
    content = found.content or b""
    if out == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        Path(out).write_bytes(content)
    except OSError as error:
        raise CodeqError("validation-error", f"{out}: {error.strerror}") from None
    shown = {"file": out, "bytes": len(content), "contentType": found.content_type}
    call.show(shown, lambda: print_text(f"{out} ({len(content):,} bytes)"))


@app.command("list")
@remote
async def task_list(
    call: Call,
    status: Annotated[
        str, typer.Option(metavar="STATUS", help="PENDING, IN_PROGRESS, COMPLETED or FAILED")
    ] = "",
    event: Annotated[str, typer.Option(metavar="COMMAND", help="of this queue")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    cursor: Annotated[str, typer.Option(help="where the last page ended")] = "",
    tenant: Tenant = "",
) -> None:
    """Lists tasks in the order in which they were made; for admins."""
    from codeq.model import TaskPage

    page = TaskPage([], cursor)
    while True:  # the server looks at so many tasks a call, and may find few among them
        more = await call.client.task_page(
            status=status,
            command=event,
            limit=limit - len(page.tasks),
            cursor=page.next_cursor,
            tenant=tenant,
        )
        page = TaskPage(page.tasks + more.tasks, more.next_cursor)
        if len(page.tasks) == limit or not page.next_cursor:
            break
    call.show(page, lambda: show_page(page))


@app.command("cleanup")
@remote
async def task_cleanup(
    call: Call,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 1000,
    before: Annotated[str, typer.Option(metavar="TIME", help="RFC 3339; default: now")] = "",
    tenant: Tenant = "",
) -> None:
    """Takes away ended tasks whose keeping time is over; for admins."""
    cleaned = await call.client.cleanup(
        limit=limit, before=moment(before, "--before"), tenant=tenant
    )
    call.show(cleaned, lambda: print_text(f"{cleaned.deleted:,} removed"))


def _show(task: Task) -> None:
    """One task, a line for each member."""
    import msgspec

    members = msgspec.to_builtins(task)
    payload = members.pop("payload")
    print_fields([*members.items(), ("payload", payload)])


def show_page(page: TaskPage) -> None:
    """A list of tasks, and how to have the next part of it."""
    rows = [
        (
            task.id,
            task.command,
            task.status if task.last_known_location != "DLQ_SET" else "DEAD",
            task.priority,
            f"{task.attempts}/{task.max_attempts}",
            task.created_at,
            task.error or _cut(task.payload),
        )
        for task in page.tasks
    ]
    head = ("id", "command", "status", "priority", "attempts", "created", "error or payload")
    print_table(head, rows)
    if page.next_cursor:
        complain(f"there is more: --cursor {page.next_cursor}")


def _cut(text: str) -> str:
    return text if len(text) <= PAYLOAD_CHARS else f"{text[: PAYLOAD_CHARS - 1]}…"
