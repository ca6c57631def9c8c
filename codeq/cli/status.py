"""``codeq status``: how a server is."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

from codeq.cli.connection import Call, remote
from codeq.cli.output import EXIT_UNREACHABLE, print_fields
from codeq.errors import CodeqError

if TYPE_CHECKING:
    from codeq.model import Overview

T = TypeVar("T")


@remote
async def status(call: Call) -> int:
    """Says whether a server runs, is ready, and what it holds.

    Ends with 0 when it is ready, else with 4. The totals are for admins.
    """
    client = call.client
    await client.health()
    ready, why = await _or_why(client.ready())
    raft, _ = await _or_why(client.raft_status())
    overview, hidden = await _or_why(client.overview())
    body = {
        "baseUrl": client.base_url,
        "health": "ok",
        "ready": ready is not None,
        "notReady": why,
        "raft": raft,
        "overview": overview,
        "overviewRefused": hidden,
    }
    shown = {name: value for name, value in body.items() if value not in (None, "")}
    call.show(shown, lambda: print_fields(_lines(body)))
    return 0 if ready else EXIT_UNREACHABLE


async def _or_why(answer: Awaitable[T]) -> tuple[T | None, str]:
    try:
        return await answer, ""
    except CodeqError as error:
        return None, error.message


def _lines(body: dict[str, Any]) -> list[tuple[str, object]]:
    raft, overview = body["raft"], body["overview"]
    lines: list[tuple[str, object]] = [
        ("server", body["baseUrl"]),
        ("ready", "yes" if body["ready"] else f"no: {body['notReady']}"),
    ]
    if raft is not None:
        lines.append(("replication", "on" if raft.enabled else "off"))
    if overview is None:
        return [*lines, ("totals", f"not shown: {body['overviewRefused']}")]
    queues = overview.queues
    dead = sum(queue.dlq for queue in queues)
    paused = [queue.command for queue in queues if queue.paused]
    return [
        *lines,
        ("version", overview.version),
        ("up", duration(overview.uptime_seconds)),
        ("queues", len(queues) + overview.queues_left_out),
        ("live tasks", overview.live_tasks),
        ("dead letters", dead),
        ("paused", ", ".join(paused)),
        ("waiting claims", overview.waiting_claims),
        ("streams", open_streams(overview)),
        ("webhooks", f"{overview.webhooks.pending:,} pending"),
        ("memory", size(overview.memory.resident_bytes)),
        ("disk free", size(overview.disk_free_bytes)),
    ]


def open_streams(overview: Overview) -> str:
    """How many of each kind."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(overview.streams.items()))


def duration(seconds: float) -> str:
    """A span in its two largest units."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    parts = [(days, "d"), (hour, "h"), (minute, "m"), (second, "s")]
    first = next((place for place, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2])


def size(count: float) -> str:
    """Bytes in the unit that keeps the number short."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"
