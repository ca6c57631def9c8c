"""``codeq dead``: dead letters of a queue, for admins."""

from __future__ import annotations

from typing import Annotated

import typer

from codeq.cli.connection import Call, Command, Tenant, remote
from codeq.cli.output import print_text
from codeq.cli.tasks import show_page

app = typer.Typer(rich_markup_mode=None, help="Dead letters of a queue; for admins.")

Ids = Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="only these; repeatable")]
Limit = Annotated[int, typer.Option(min=1, help="so many, oldest first")]


@app.command("list")
@remote
async def dead_list(
    call: Call,
    command: Command,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    cursor: Annotated[str, typer.Option(help="where the last page ended")] = "",
    tenant: Tenant = "",
) -> None:
    """Lists dead letters with the reason of their last failure."""
    page = await call.client.dead_page(command, limit=limit, cursor=cursor, tenant=tenant)
    call.show(page, lambda: show_page(page))


@app.command("requeue")
@remote
async def dead_requeue(
    call: Call, command: Command, ids: Ids = None, limit: Limit = 100, tenant: Tenant = ""
) -> None:
    """Makes dead letters ready again."""
    done = await call.client.requeue_dead(command, ids, limit=limit, tenant=tenant)
    call.show(done, lambda: print_text(f"{done.requeued:,} ready again"))


@app.command("purge")
@remote
async def dead_purge(
    call: Call, command: Command, ids: Ids = None, limit: Limit = 100, tenant: Tenant = ""
) -> None:
    """Takes dead letters away for good."""
    done = await call.client.purge_dead(command, ids, limit=limit, tenant=tenant)
    call.show(done, lambda: print_text(f"{done.purged:,} removed"))
