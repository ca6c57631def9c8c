"""``codeq queue``: depths, pauses and purges, for admins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from codeq.cli.connection import Call, Command, Tenant, remote
from codeq.cli.output import print_fields, print_table, print_text

if TYPE_CHECKING:
    from codeq.model import QueueStats

app = typer.Typer(rich_markup_mode=None, help="Depths of queues, pauses, purges; for admins.")


@app.command("list")
@remote
async def queue_list(call: Call, tenant: Tenant = "") -> None:
    """Lists the queues that hold something."""
    from codeq.model import Queues

    found = await call.client.queues(tenant=tenant)
    call.show(Queues(found), lambda: _show(found))


def _show(queues: Sequence[QueueStats]) -> None:
    tenants = any(queue.tenant_id for queue in queues)
    head = ("command", "ready", "delayed", "in progress", "dead")
    rows = [
        (
            queue.command,
            queue.ready,
            queue.delayed,
            queue.in_progress,
            queue.dlq,
            *((queue.tenant_id,) if tenants else ()),
        )
        for queue in queues
    ]
    print_table((*head, "tenant") if tenants else head, rows)


@app.command("inspect")
@remote
async def queue_inspect(call: Call, command: Command, tenant: Tenant = "") -> None:
    """Shows how many tasks of a queue are where; zeros for an unknown one."""
    queue = await call.client.queue(command, tenant=tenant)
    pairs = [
        ("command", queue.command),
        ("ready", queue.ready),
        ("delayed", queue.delayed),
        ("in progress", queue.in_progress),
        ("dead", queue.dlq),
        ("tenant", queue.tenant_id),
    ]
    call.show(queue, lambda: print_fields(pairs))


@app.command("pause")
@remote
async def queue_pause(call: Call, command: Command, tenant: Tenant = "") -> None:
    """Stops claims from a queue; creates go on."""
    queue = await call.client.pause(command, tenant=tenant)
    call.show(queue, lambda: print_text(f"{queue.command} is paused"))


@app.command("resume")
@remote
async def queue_resume(call: Call, command: Command, tenant: Tenant = "") -> None:
    """Lets claims from a queue go on."""
    queue = await call.client.resume(command, tenant=tenant)
    call.show(queue, lambda: print_text(f"{queue.command} goes on"))


@app.command("purge")
@remote
async def queue_purge(
    call: Call,
    command: Command,
    state: Annotated[str, typer.Option(metavar="ready|delayed|all", help="which of them")],
    tenant: Tenant = "",
) -> None:
    """Ends the waiting tasks of a queue: FAILED, error CANCELLED."""
    purged = await call.client.purge(command, state, tenant=tenant)
    call.show(purged, lambda: print_text(f"{purged.purged:,} ended"))
