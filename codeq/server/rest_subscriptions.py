"""REST for subscriptions: making one, keeping it, and waiting for work with it."""

from __future__ import annotations

import secrets
from functools import partial
from typing import cast

import msgspec

from codeq import errors
from codeq.engine.subscriptions import Available, Mode, Subscription
from codeq.model import (
    BLANKS,
    CLAIM_WAIT_SECONDS_MAX,
    COMMANDS_MAX,
    DELIVERY_MODES,
    INT32_MAX,
    AvailableQueue,
    SubscribeBody,
    Subscribed,
    SubscriptionHeartbeatBody,
    SubscriptionKept,
    is_command,
    rfc3339,
)
from codeq.server.auth import WILDCARD, Principal
from codeq.server.request import (
    INVALID_BODY,
    Edge,
    Refused,
    Reply,
    Request,
    decode,
    encode,
    promise,
    refusal_reply,
    refuse,
)

TTL_SECONDS = 300
TTL_SECONDS_MAX = 86_400
GROUP_BYTES_MAX = 256

_subscribe = msgspec.json.Decoder(SubscribeBody)
_heartbeat = msgspec.json.Decoder(SubscriptionHeartbeatBody)
_ABSENT = refusal_reply(errors.NOT_FOUND)


async def subscribe(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /workers/subscriptions"""
    body = decode(_subscribe, await request.body(edge) or b"{}")
    edge.require_ready()
    url = (body.callback_url or "").strip(BLANKS)
    if url and not edge.shard.target_valid(url):
        raise refuse(errors.CALLBACK_INVALID)
    mode = _mode(body.delivery_mode)
    group = _group(body.group_id, mode)
    commands = _commands(body.event_types, principal)
    answer, done = promise(edge.loop)
    edge.shard.subscriptions.add(
        f"sub-{secrets.token_hex(16)}",
        principal.tenant,
        url=url,
        commands=commands,
        mode=mode,
        group=group,
        ttl_ms=_ttl_ms(body.ttl_seconds) or TTL_SECONDS * 1000,
        interval_ms=_interval_ms(edge, body.min_interval_seconds),
        done=done,
    )
    made: Subscription | None = await answer
    if made is None:
        raise refuse(errors.SUBSCRIPTIONS_FULL)
    return Reply(200, encode(Subscribed(made.id, rfc3339(made.expires_ms))))


async def heartbeat(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /workers/subscriptions/{id}/heartbeat"""
    body = decode(_heartbeat, await request.body(edge) or b"{}")
    edge.require_ready()
    wait_s = max(0, min(body.wait_seconds or 0, CLAIM_WAIT_SECONDS_MAX))
    answer, finish = promise(edge.loop)

    def done(kept: Subscription | None, available: Available) -> None:
        finish((kept, available))

    poll = edge.shard.subscriptions.renew(
        request.text(),
        principal.tenant,
        _ttl_ms(body.ttl_seconds),
        wait_s * 1000,
        principal.may_claim,
        done,
    )
    if poll is None:
        kept, available = await answer
    else:
        give_up = partial(finish, None)
        request.watch(give_up)
        edge.add_wait(give_up)
        try:
            outcome = await answer
        finally:
            poll.cancel()
            edge.drop_wait(give_up)
        edge.require_ready()
        kept, available = outcome or (None, [])
    if kept is None:
        return _ABSENT
    queues = [AvailableQueue(command, depth) for command, depth in available]
    return Reply(200, encode(SubscriptionKept(kept.id, rfc3339(kept.expires_ms), queues)))


def _mode(text: str | None) -> Mode:
    mode = (text or "").strip(BLANKS) or "fanout"
    if mode not in DELIVERY_MODES:
        raise refuse(errors.MODE_INVALID)
    return cast(Mode, mode)


def _group(text: str | None, mode: Mode) -> str:
    group = (text or "").strip(BLANKS)
    if mode == "group" and not group:
        raise refuse(errors.GROUP_REQUIRED)
    if len(group.encode()) > GROUP_BYTES_MAX:
        raise refuse(errors.GROUP_INVALID)
    return group


def _commands(named: list[str] | None, principal: Principal) -> tuple[str, ...] | None:
    """The commands asked for, else all that the token allows; None = every one."""
    if not named:
        if principal.any_command:
            return None
        return tuple(command.decode() for command in principal.event_types)
    commands = tuple(dict.fromkeys(name for text in named if (name := text.strip(BLANKS))))
    if len(commands) > COMMANDS_MAX:
        raise Refused(INVALID_BODY)
    every = WILDCARD in commands
    allowed = principal.any_command or (
        not every and all(principal.may_claim(command.encode()) for command in commands)
    )
    if not commands or not allowed:
        raise refuse(errors.EVENT_TYPE_DENIED)
    if not all(map(is_command, commands)):
        raise refuse(errors.COMMAND_INVALID)
    return None if every else commands


def _ttl_ms(seconds: int | None) -> int | None:
    """As asked, cut to the longest; None when nothing was asked."""
    if seconds is None or seconds <= 0:
        return None
    return min(seconds, TTL_SECONDS_MAX) * 1000


def _interval_ms(edge: Edge, seconds: int | None) -> int:
    if seconds is None or seconds <= 0:
        seconds = edge.config.subscription_min_interval_seconds
    return min(seconds, INT32_MAX) * 1000
