"""REST for admins: queues and their depths, the overview, lists of tasks, dead letters, pauses,
cleanup. Topic policies are in rest_topics.

An admin sees and changes what is of the own tenant. An operator sees every tenant, or the one that
the query parameter ``tenant`` names, and changes what is of that one, else of the own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from codeq.engine.queues import Depths
from codeq.engine.shard import TaskView
from codeq.engine.stored import Wanted
from codeq.errors import (
    BATCH_TOO_LARGE,
    BEFORE_INVALID,
    COMMAND_INVALID,
    CURSOR_INVALID,
    LIMIT_INVALID,
    STATE_INVALID,
    STATUS_INVALID,
    TENANT_NAME_INVALID,
)
from codeq.model import (
    BLANKS,
    CLEANUP_LIMIT_MAX,
    DEAD_IDS_MAX,
    INT32_MAX,
    TIME_MAX_MS,
    TIME_MIN_MS,
    Cleaned,
    CleanupBody,
    DeadBody,
    PurgeBody,
    Purged,
    QueuePause,
    Queues,
    QueueStats,
    Requeued,
    TaskPage,
    is_command,
    parse_rfc3339,
    rfc3339,
)
from codeq.server.auth import Principal, is_tenant
from codeq.server.limits import CLEANUP
from codeq.server.request import (
    Edge,
    Reply,
    Request,
    decode,
    encode,
    promise,
    refuse,
    settle,
)
from codeq.server.views import COMPLETED, DEAD, DELAYED, FAILED, LEASED, READY, task_of

PAGE_TASKS_MAX = 1_000
PAGE_TASKS_DEFAULT = 100
#: payload in one page of a list
PAGE_BYTES_MAX = 4 << 20
#: queues in one overview; making it holds the loop
OVERVIEW_QUEUES_MAX = 1_000
DEAD_LIMIT_DEFAULT = 100
CLEANUP_LIMIT_DEFAULT = 1_000
#: states of the engine, a bit for each, by status
STATES = {
    "PENDING": 1 << READY | 1 << DELAYED,
    "IN_PROGRESS": 1 << LEASED,
    "COMPLETED": 1 << COMPLETED,
    "FAILED": 1 << FAILED | 1 << DEAD,
}
ALL_STATES = sum(STATES.values())
_CURSOR = re.compile("[0-9a-f]{12}")

_dead = msgspec.json.Decoder(DeadBody)
_purge = msgspec.json.Decoder(PurgeBody)
_cleanup = msgspec.json.Decoder(CleanupBody)

Counting = Callable[[str, str, Sequence[str] | None, int, Callable[[int], None]], None]


# --- what is asked for ---------------------------------------------------------------------------


def seen(request: Request, principal: Principal) -> str | None:
    """The tenant whose things are shown; None is every tenant. Refuses what can be none."""
    if not principal.is_operator:
        return principal.tenant
    named = request.parameter(b"tenant")
    if named and not is_tenant(named):
        raise refuse(TENANT_NAME_INVALID)
    return named or None


def one_tenant(request: Request, principal: Principal) -> str:
    """The tenant whose things are read or changed, where it must be one: an operator may name
    another than the own."""
    return seen(request, principal) or principal.tenant


def _command(text: str) -> str:
    """A command as queues are named by it."""
    command = text.strip(BLANKS)
    if not is_command(command):
        raise refuse(COMMAND_INVALID)
    return command


def _limit(text: str, default: int = PAGE_TASKS_DEFAULT) -> int:
    """``limit`` of a list."""
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 4):
        raise refuse(LIMIT_INVALID)
    if not 1 <= int(text) <= PAGE_TASKS_MAX:
        raise refuse(LIMIT_INVALID)
    return int(text)


def _cursor(text: str) -> int:
    """The number a cursor leads to: hexadecimal, of a task's place among all creates."""
    if not text:
        return 0
    if not _CURSOR.fullmatch(text):
        raise refuse(CURSOR_INVALID)
    return int(text, 16)


# --- queues --------------------------------------------------------------------------------------


async def queues(edge: Edge, request: Request, principal: Principal) -> Reply:
    """GET /admin/queues"""
    answer, done = promise(edge.loop)
    edge.shard.queues.all(seen(request, principal), done)
    found: list[Depths] = await answer
    shown = [_stats(depths, principal) for depths in found]
    return Reply(200, encode(Queues(shown)))


async def queue_stats(edge: Edge, request: Request, principal: Principal) -> Reply:
    """GET /admin/queues/{command}; for an operator who names no tenant that of all together."""
    command = _command(request.text())
    tenant = seen(request, principal)
    answer, done = promise(edge.loop)
    if tenant is not None:
        edge.shard.queues.stats(tenant, command, done)
        depths: Depths = await answer
        return Reply(200, encode(_stats(depths, principal)))
    edge.shard.queues.all(None, done)
    rows = [depths[1:5] for depths in await answer if depths[0] == command]
    ready, delayed, leased, dead = (sum(column) for column in zip((0, 0, 0, 0), *rows, strict=True))
    return Reply(200, encode(QueueStats(command, ready, delayed, leased, dead)))


def _stats(depths: Depths, principal: Principal) -> QueueStats:
    command, ready, delayed, leased, dead, tenant = depths
    shown = tenant if principal.is_operator else ""
    return QueueStats(command, ready, delayed, leased, dead, shown)


async def pause(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /admin/queues/{command}/pause"""
    command = await _queue_of_change(edge, request, principal)
    answer: asyncio.Future[None] = edge.loop.create_future()
    edge.shard.queues.pause(one_tenant(request, principal), command, partial(settle, answer, None))
    await answer
    return Reply(200, encode(QueuePause(command, True)))


async def resume(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /admin/queues/{command}/resume"""
    command = await _queue_of_change(edge, request, principal)
    answer: asyncio.Future[None] = edge.loop.create_future()
    edge.shard.queues.resume(one_tenant(request, principal), command, partial(settle, answer, None))
    await answer
    return Reply(200, encode(QueuePause(command, False)))


async def _queue_of_change(edge: Edge, request: Request, principal: Principal) -> str:
    """The command of a change that reads nothing of its body."""
    command = _command(request.text())
    await request.body(edge)
    edge.require_ready()
    return command


async def purge_waiting(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /admin/queues/{command}/purge: ends the waiting tasks that are there now."""
    command = _command(request.text())
    state = decode(_purge, await request.body(edge) or b"{}").state
    if state not in ("ready", "delayed", "all"):
        raise refuse(STATE_INVALID)
    edge.require_ready()
    answer, done = promise(edge.loop)
    edge.shard.queues.purge_waiting(
        one_tenant(request, principal),
        command,
        ready=state != "delayed",
        delayed=state != "ready",
        done=done,
    )
    return Reply(200, encode(Purged(await answer)))


async def overview(edge: Edge, request: Request, principal: Principal) -> Reply:
    """GET /admin/overview"""
    limit = _limit(request.parameter(b"limit"), OVERVIEW_QUEUES_MAX)
    edge.require_room(principal.tenant)
    answer, done = promise(edge.loop)
    tenant = seen(request, principal)
    edge.overviews.make(tenant, limit, done, operator=principal.is_operator)
    return Reply(200, encode(await answer))


# --- dead letters --------------------------------------------------------------------------------


async def dead(edge: Edge, request: Request, principal: Principal) -> Reply:
    """GET /admin/queues/{command}/dead"""
    command = _command(request.text())
    page = await _page(edge, request, principal, command, 1 << DEAD)
    tenant = seen(request, principal)
    topic = None if tenant is None else edge.shard.policies.find(tenant, command)
    if topic is not None:
        page.dead_letter_topic_ref = topic.policy.dead_letter_topic_ref
    return Reply(200, encode(page))


async def requeue(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /admin/queues/{command}/dead/requeue"""
    count = await _dead_letters(edge, request, principal, edge.shard.queues.requeue)
    return Reply(200, encode(Requeued(count)))


async def purge_dead(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /admin/queues/{command}/dead/purge"""
    count = await _dead_letters(edge, request, principal, edge.shard.queues.purge_dead)
    return Reply(200, encode(Purged(count)))


async def _dead_letters(
    edge: Edge, request: Request, principal: Principal, change: Counting
) -> int:
    command = _command(request.text())
    body = decode(_dead, await request.body(edge) or b"{}")
    limit = DEAD_LIMIT_DEFAULT if body.limit is None else body.limit
    if body.ids is not None and len(body.ids) > DEAD_IDS_MAX:
        raise refuse(BATCH_TOO_LARGE, DEAD_IDS_MAX)
    if not 1 <= limit <= INT32_MAX:
        raise refuse(LIMIT_INVALID)
    edge.require_ready()
    answer, done = promise(edge.loop)
    change(one_tenant(request, principal), command, body.ids, limit, done)
    count: int = await answer
    return count


# --- tasks ---------------------------------------------------------------------------------------


async def tasks(edge: Edge, request: Request, principal: Principal) -> Reply:
    """GET /admin/tasks"""
    status = request.parameter(b"status")
    if status and status not in STATES:
        raise refuse(STATUS_INVALID)
    named = request.parameter(b"command")
    command = _command(named) if named else None
    page = await _page(edge, request, principal, command, STATES.get(status, ALL_STATES))
    return Reply(200, encode(page))


async def _page(
    edge: Edge, request: Request, principal: Principal, command: str | None, states: int
) -> TaskPage:
    """One page of tasks in creation order."""
    limit = _limit(request.parameter(b"limit"))
    begin = _cursor(request.parameter(b"cursor"))
    tenant = seen(request, principal)
    wanted = Wanted(
        None if tenant is None else tenant.encode(),
        None if command is None else command.encode(),
        states,
    )
    answer: asyncio.Future[tuple[list[TaskView], int | None]] = edge.loop.create_future()
    edge.shard.listing.page(
        wanted,
        begin,
        limit,
        PAGE_BYTES_MAX,
        lambda views, after: settle(answer, (views, after)),
    )
    views, after = await answer
    cursor = "" if after is None else f"{after:012x}"
    return TaskPage([task_of(view) for view in views], cursor)


async def cleanup(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /admin/tasks/cleanup"""
    body = decode(_cleanup, await request.body(edge) or b"{}")
    before_ms = edge.clock.now_ms() if body.before is None else parse_rfc3339(body.before)
    if before_ms is None or not TIME_MIN_MS <= before_ms <= TIME_MAX_MS:
        raise refuse(BEFORE_INVALID)
    limit = body.limit or 0
    limit = min(limit, CLEANUP_LIMIT_MAX) if limit > 0 else CLEANUP_LIMIT_DEFAULT
    tenant = one_tenant(request, principal)
    edge.require_ready()
    edge.limits.admit(CLEANUP, principal)
    answer, done = promise(edge.loop)
    edge.shard.cleanup.run(tenant, before_ms, limit, done)
    return Reply(200, encode(Cleaned(await answer, rfc3339(before_ms), limit)))
