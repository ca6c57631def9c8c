"""REST for topic policies: what an admin lays down for the queue of the same name."""

from __future__ import annotations

import asyncio
import re

import msgspec

from codeq.engine.policies import Policy, Topic
from codeq.errors import (
    DELETION_POLICY_REQUIRED,
    TOPIC_ABSENT,
    TOPIC_BODY_INVALID,
    TOPIC_INVALID,
    TOPICS_UNAVAILABLE,
)
from codeq.model import (
    INT32_MAX,
    TOPIC_ATTEMPTS_MAX,
    TOPIC_CONSUMERS_MAX,
    TOPIC_NAME_CHARS_MAX,
    TOPIC_TIER_MAX,
    TOPIC_TIERS_MAX,
    TopicBody,
    TopicPolicy,
    TopicShown,
    UnprocessableBody,
    rfc3339,
)
from codeq.server.auth import Principal
from codeq.server.request import (
    NO_CONTENT,
    Edge,
    Refused,
    Reply,
    Request,
    encode,
    error_reply,
    promise,
    refuse,
    settle,
)
from codeq.server.rest_admin import one_tenant

BODY_BYTES_MAX = 1 << 20
_NAME = re.compile("[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_A_NAME = f"must be a lower-case DNS label of at most {TOPIC_NAME_CHARS_MAX} characters"

_body = msgspec.json.Decoder(TopicBody)


# --- routes --------------------------------------------------------------------------------------


async def put(edge: Edge, request: Request, principal: Principal) -> Reply:
    """PUT /admin/topics/{topicName}"""
    body = _decode(await request.body(edge))
    name = _named(request)
    policy = _policy(body, name)
    _require_ready(edge)
    tenant = one_tenant(request, principal)
    answer: asyncio.Future[tuple[Topic, bool]] = edge.loop.create_future()
    edge.shard.policies.put(tenant, name, policy, lambda topic, new: settle(answer, (topic, new)))
    topic, new = await answer
    return Reply(201 if new else 200, encode(_shown(tenant, name, topic)))


async def get(edge: Edge, request: Request, principal: Principal) -> Reply:
    """GET /admin/topics/{topicName}"""
    name = _named(request)
    _require_ready(edge)
    tenant = one_tenant(request, principal)
    answer, done = promise(edge.loop)
    edge.shard.policies.get(tenant, name, done)
    topic: Topic | None = await answer
    if topic is None:
        raise refuse(TOPIC_ABSENT, f"{tenant}.{name}")
    return Reply(200, encode(_shown(tenant, name, topic)))


async def delete(edge: Edge, request: Request, principal: Principal) -> Reply:
    """DELETE /admin/topics/{topicName}?deletionPolicy=Delete"""
    await request.body(edge)
    if request.parameter(b"deletionPolicy") != "Delete":
        raise refuse(DELETION_POLICY_REQUIRED)
    name = _named(request)
    _require_ready(edge)
    answer: asyncio.Future[None] = edge.loop.create_future()
    edge.shard.policies.delete(one_tenant(request, principal), name, lambda: settle(answer, None))
    await answer
    return NO_CONTENT


def _require_ready(edge: Edge) -> None:
    if edge.stopping or not edge.shard.ready:
        raise refuse(TOPICS_UNAVAILABLE, "the server is stopping")


def _shown(tenant: str, name: str, topic: Topic) -> TopicShown:
    policy = topic.policy
    return TopicShown(
        f"{tenant}.{name}",
        tenant,
        name,
        TopicPolicy(
            policy.priority_tiers,
            policy.max_attempts,
            policy.dead_letter_topic_ref,
            policy.retention_seconds,
            policy.max_consumers,
        ),
        topic.version,
        rfc3339(topic.created_ms),
        rfc3339(topic.updated_ms),
    )


# --- what is asked for ---------------------------------------------------------------------------


def _decode(body: bytes) -> TopicBody:
    """The body, strictly: no member that is not known, nothing behind the value."""
    if len(body) > BODY_BYTES_MAX:
        raise _malformed(f"more than {BODY_BYTES_MAX} bytes")
    try:
        body.decode()
        return _body.decode(body)
    except (ValueError, RecursionError) as error:
        raise _malformed(str(error)) from None


def _malformed(why: str) -> Exception:
    return refuse(TOPIC_BODY_INVALID, why)


def _invalid(field: str, why: str) -> Refused:
    message = TOPIC_INVALID.message.format(field, why)
    return Refused(error_reply(TOPIC_INVALID.slug, message, kind=UnprocessableBody, field=field))


def _is_name(text: str) -> bool:
    return len(text) <= TOPIC_NAME_CHARS_MAX and _NAME.fullmatch(text) is not None


def _named(request: Request) -> str:
    name = request.text()
    if not _is_name(name):
        raise _invalid("topicName", _A_NAME)
    return name


def _policy(body: TopicBody, name: str) -> Policy:
    """The policy, every bound kept."""
    reference = body.dead_letter_topic_ref
    if reference is None or not _is_name(reference):
        why = "is required" if reference is None else _A_NAME
        raise _invalid("deadLetterTopicRef", why)
    if reference == name:
        raise _invalid("deadLetterTopicRef", "must be another topic")
    return Policy(
        _tiers(body.priority_tiers),
        _number("maxAttempts", body.max_attempts, 1, TOPIC_ATTEMPTS_MAX),
        reference,
        _number("retentionSeconds", body.retention_seconds or 0, 0, INT32_MAX),
        _number("maxConsumers", body.max_consumers or 0, 0, TOPIC_CONSUMERS_MAX),
    )


def _tiers(tiers: list[int] | None) -> tuple[int, ...]:
    if tiers is None:
        raise _invalid("priorityTiers", "is required")
    if not 1 <= len(tiers) <= TOPIC_TIERS_MAX:
        raise _invalid("priorityTiers", f"must have 1 to {TOPIC_TIERS_MAX} tiers")
    if not all(0 <= tier <= TOPIC_TIER_MAX for tier in tiers):
        raise _invalid("priorityTiers", f"each must be 0 to {TOPIC_TIER_MAX}")
    if len(set(tiers)) != len(tiers):
        raise _invalid("priorityTiers", "must be different from each other")
    return tuple(sorted(tiers))


def _number(field: str, number: int | None, least: int, most: int) -> int:
    if number is None:
        raise _invalid(field, "is required")
    if not least <= number <= most:
        raise _invalid(field, f"must be {least} to {most}")
    return number
