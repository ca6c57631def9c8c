"""``codeq topic``: the policy of a queue, for admins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from codeq.cli.connection import Call, Tenant, remote
from codeq.cli.output import print_fields, print_text

if TYPE_CHECKING:
    from codeq.model import TopicShown

app = typer.Typer(rich_markup_mode=None, help="Policies of queues; for admins.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="the queue that it is for")]


@app.command("get")
@remote
async def topic_get(call: Call, name: Name, tenant: Tenant = "") -> None:
    """Shows the policy of a queue."""
    topic = await call.client.get_topic(name, tenant=tenant)
    call.show(topic, lambda: _show(topic))


@app.command("set")
@remote
async def topic_set(
    call: Call,
    name: Name,
    tiers: Annotated[str, typer.Option(metavar="0,5,...", help="priorities that it takes")],
    max_attempts: Annotated[int, typer.Option(help="of tasks that name none")],
    dead_letter_topic: Annotated[str, typer.Option(metavar="NAME", help="shown with the dead")],
    retention_seconds: Annotated[int, typer.Option(help="0: as the server has it")] = 0,
    max_consumers: Annotated[int, typer.Option(help="workers at a time; 0: any number")] = 0,
    tenant: Tenant = "",
) -> None:
    """Lays down the policy of a queue; what is not named has its default."""
    from codeq.model import TopicPolicy

    policy = TopicPolicy(
        _tiers(tiers), max_attempts, dead_letter_topic, retention_seconds, max_consumers
    )
    topic = await call.client.put_topic(name, policy, tenant=tenant)
    call.show(topic, lambda: _show(topic))


def _tiers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--tiers: not numbers with commas: {text!r}") from None


@app.command("delete")
@remote
async def topic_delete(call: Call, name: Name, tenant: Tenant = "") -> None:
    """Takes the policy of a queue away; its tasks stay."""
    await call.client.delete_topic(name, tenant=tenant)
    call.show({}, lambda: print_text(f"{name} has no policy"))


def _show(topic: TopicShown) -> None:
    policy = topic.policy
    print_fields(
        [
            ("topic", topic.topic_id),
            ("tiers", ", ".join(map(str, policy.priority_tiers))),
            ("max attempts", policy.max_attempts),
            ("dead letter topic", policy.dead_letter_topic_ref),
            ("retention seconds", policy.retention_seconds or None),
            ("max consumers", policy.max_consumers or None),
            ("version", topic.version),
            ("created", topic.created_at),
            ("updated", topic.updated_at),
        ]
    )
