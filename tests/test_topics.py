"""Topic policies: what is stored, refused and enforced, in the engine and over REST."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import httpx
import pytest

from codeq import errors
from codeq.engine.policies import Policy
from codeq.engine.store import Store
from codeq.errors import StoreError
from codeq.server.auth import WORKER_SCOPES, Principal

from .conftest import Server, Tokens, claim, create, refusal, rest_node
from .node import Node
from .protos import producerpb

NO_TIER = errors.PRIORITY_NO_TIER.number
PLAIN = Policy(tuple(range(11)), 5, "graveyard")
BODY = {"priorityTiers": [5, 0, 9], "maxAttempts": 3, "deadLetterTopicRef": "graveyard"}


def govern(node: Node, *, tenant: str = "t", name: str = "job", **fields: Any) -> Any:
    """Sets a policy: (topic, whether it is new)."""
    values = {field: getattr(PLAIN, field) for field in Policy.__struct_fields__}
    return node.ask(node.shard.policies.put, tenant, name, Policy(**{**values, **fields}))


# --- creates


def test_T61_priorities_are_those_of_the_tiers(node: Node, again: Callable[[], None]) -> None:
    govern(node, priority_tiers=(3, 7))
    again()
    items = [{"priority": p} for p in (7, 3, 0, 5, -1, 8, 32, 2**31 - 1)]
    creates = node.create_batch([*items, {"command": "other", "priority": 99}])
    assert list(creates.codes) == [0, 0, 0, NO_TIER, NO_TIER, NO_TIER, NO_TIER, NO_TIER, 0]
    got = node.claim(count=9)
    assert [view.priority for view in got] == [7, 3, 3], "0 is no tier: the lowest"
    assert node.create_batch([{"priority": 99}], tenant="u").codes == b"\0"


def test_T61_zero_may_be_a_tier(node: Node) -> None:
    govern(node, priority_tiers=(0, 7))
    node.create()
    assert node.claim()[0].priority == 0


def test_T61_a_batch_that_is_refused_whole_leaves_nothing(node: Node) -> None:
    govern(node, priority_tiers=(3,))
    before = node.shard.engine.digest()
    creates = node.create_batch([{"priority": 4}] * 3)
    assert list(creates.codes) == [NO_TIER] * 3
    assert node.shard.engine.digest() == before
    assert node.ask(node.shard.queues.all, None) == []
    node.shard.engine.verify()


def test_T61_attempts_are_those_of_the_policy_unless_named(
    node: Node, again: Callable[[], None]
) -> None:
    govern(node, max_attempts=2)
    again()
    node.create_batch([{}, {"max_attempts": 7}, {"command": "other"}])
    views = node.claim(("job", "other"), count=9)
    assert [view.max_attempts for view in views] == [2, 7, 5]


def test_T61_T30_a_replay_is_the_same_whatever_the_policy_says_now(node: Node) -> None:
    first = node.create(key="k", priority=2)
    govern(node, priority_tiers=(7,), max_attempts=9)
    assert node.create(key="k", priority=2) == first, "same key, same request: the original"
    refused = node.create_batch([{"key": "new", "priority": 2}, {"key": "new", "priority": 2}])
    assert list(refused.codes) == [NO_TIER, NO_TIER]
    made = node.create(key="new")
    node.ask_done(node.shard.policies.delete, "t", "job")
    assert node.create(key="new") == made, "compared as sent, not as the policy made it"


# --- retention


@pytest.mark.parametrize("state", ["completed", "dead"])
def test_T61_T3_ended_tasks_are_kept_as_long_as_the_policy_says(node: Node, state: str) -> None:
    govern(node, retention_seconds=60)
    ids = []
    for command in ("job", "other"):
        task_id = node.create(command=command, max_attempts=1)
        node.claim((command,))
        if state == "dead":
            node.nack(task_id)
        else:
            assert node.finish(task_id) == b"\0"
        ids.append(task_id)
    node.advance(59_000)
    assert node.get(ids[0]) is not None
    node.restart()
    node.advance(2_000)
    assert node.get(ids[0]) is None and node.get(ids[1]) is not None
    assert node.stats() == (0, 0, 0, 0)


# --- consumers


def workers(node: Node, *names: str, commands: tuple[str, ...] | None = ("job",)) -> list[int]:
    """How many tasks each gets that asks for one."""
    return [len(node.claim(commands, worker=name, subject=name)) for name in names]


@pytest.mark.parametrize("commands", [("job",), ("none", "job"), None])
def test_T61_only_so_many_workers_hold_leases(
    node: Node, again: Callable[[], None], commands: tuple[str, ...] | None
) -> None:
    govern(node, max_consumers=2)
    node.create_batch([{}] * 9)
    assert workers(node, "a", "b", "c", "a", "b", commands=commands) == [1, 1, 0, 1, 1]
    again()
    assert workers(node, "c", "a", commands=commands) == [0, 1], "holders are counted again"
    assert node.stats() == (4, 0, 5, 0)
    node.shard.engine.verify()


def test_T61_every_end_of_a_lease_makes_room(node: Node) -> None:
    govern(node, max_consumers=1)
    ids = node.create_batch([{"max_attempts": 1}] * 6)
    owner = {"worker": "a", "subject": "a"}

    def lease(**fields: Any) -> str:
        [view] = node.claim(worker="a", subject="a", **fields)
        assert workers(node, "b") == [0]
        return str(view.id)

    assert node.finish(lease(), **owner) == b"\0"
    assert node.abandon(lease(), **owner) == errors.OK
    assert node.nack(lease(), 0, **owner)[2] is True
    lease(lease_ms=1_000)
    node.advance(2_000)
    got: list[Any] = []
    node.shard.claim(node.request(got.append, worker="a", subject="a"))
    node.settle()
    got[0].give_back()
    node.settle()
    assert workers(node, "b") == [1], "not delivered, so not held"
    assert len(ids.codes) == 6
    node.shard.engine.verify()


def test_T61_one_worker_id_is_one_consumer_whatever_its_subjects(node: Node) -> None:
    govern(node, max_consumers=1)
    first, second = node.create(), node.create()
    assert len(node.claim(worker="w", subject="s1")) == 1
    assert len(node.claim(worker="w", subject="s2")) == 1
    assert node.finish(first, worker="w", subject="s1") == b"\0"
    node.create()
    assert workers(node, "x") == [0]
    assert node.finish(second, worker="w", subject="s2") == b"\0"
    assert workers(node, "x") == [1]


def test_T61_wildcards_pass_a_full_queue_over_and_take_the_best_of_the_others(node: Node) -> None:
    govern(node, max_consumers=1)
    top = node.create(priority=9)
    middle = node.create(command="open", priority=5)
    second = node.create(priority=3)
    low = node.create(command="open", priority=1)
    assert [view.id for view in node.claim(None, worker="a")] == [top]
    assert [view.id for view in node.claim(None, worker="b")] == [middle]
    assert [view.id for view in node.claim(None, worker="a", count=9)] == [second, low]


def test_T61_T4_waiting_claims_are_looked_at_when_the_last_lease_of_a_holder_ends(
    node: Node,
) -> None:
    govern(node, max_consumers=1)
    first = node.create()
    node.claim(worker="a", subject="a")
    named: list[Any] = []
    every: list[Any] = []
    own: list[Any] = []
    node.park(named, worker="b", subject="b")
    node.park(every, None, worker="c", subject="c")
    node.park(own, worker="a", subject="a")
    second = node.create()
    assert [delivery.views()[0].id for delivery in own] == [second], "though others came before"
    own[0].accepted()
    third, fourth = node.create(), node.create()
    assert named == every == []
    assert node.finish(first, worker="a", subject="a") == b"\0"
    assert named == [], "one lease is left"
    assert node.finish(second, worker="a", subject="a") == b"\0"
    assert [delivery.views()[0].id for delivery in named] == [third]
    named[0].accepted()
    assert every == []
    assert node.finish(third, worker="b", subject="b") == b"\0"
    assert [delivery.views()[0].id for delivery in every] == [fourth]
    every[0].accepted()


def test_T61_a_wider_or_no_limit_serves_the_claims_that_wait(node: Node) -> None:
    govern(node, max_consumers=1)
    node.create_batch([{}] * 4)
    workers(node, "a")
    got: list[Any] = []
    for name in ("b", "c", "d"):
        node.park(got, worker=name, subject=name)
    govern(node, max_consumers=2)
    assert len(got) == 1
    node.ask_done(node.shard.policies.delete, "t", "job")
    assert len(got) == 3
    govern(node, max_consumers=3)
    node.create()
    assert workers(node, "e", "a") == [0, 1], "holders before the limit count"
    for delivery in got:
        delivery.accepted()
    node.shard.engine.verify()


def test_T61_T32_a_limit_is_of_one_tenant(node: Node) -> None:
    govern(node, max_consumers=1)
    node.create_batch([{}] * 2, tenant="u")
    got = [node.claim(tenant="u", worker=name) for name in ("a", "b")]
    assert [len(views) for views in got] == [1, 1]


# --- the store


def test_T61_a_policy_is_answered_after_its_sync_and_survives_a_crash(node: Node) -> None:
    answers: list[Any] = []
    node.runner.hold_syncs = True
    put = node.shard.policies.put
    put("t", "job", PLAIN, lambda topic, new: answers.append((topic.version, new)))
    node.shard.policies.get("t", "job", lambda topic: answers.append(topic.version))
    node.shard.policies.delete("t", "other", lambda: answers.append("deleted"))
    node.settle()
    assert answers == []
    node.runner.hold_syncs = False
    node.runner.release()
    assert answers == [(1, True), 1, "deleted"]
    node.restart()
    assert node.shard.policies.find("t", "job").policy == PLAIN


def test_T61_words_in_one_commit_group_leave_the_last_one(node: Node) -> None:
    for last in (None, PLAIN):
        node.shard.policies.put("t", "job", Policy((1,), 2, "x"), lambda *_: None)
        node.shard.policies.delete("t", "job", lambda: None)
        if last is not None:
            node.shard.policies.put("t", "job", last, lambda *_: None)
        node.settle()
        node.restart()
        topic = node.shard.policies.find("t", "job")
        assert (topic and topic.policy) == last


def test_T61_versions_and_times(node: Node) -> None:
    made, new = govern(node)
    node.advance(5_000)
    same, known = govern(node)
    assert (made.version, new, same, known) == (1, True, made, False)
    other, known = govern(node, max_attempts=9)
    assert (other.version, other.created_ms, known) == (2, made.created_ms, False)
    assert other.updated_ms == made.updated_ms + 5_000
    node.restart()
    assert node.shard.policies.find("t", "job") == other


@pytest.mark.parametrize("place", [0, 1, -1])
def test_T61_a_damaged_entry_stops_the_start(node: Node, tmp_path: Path, place: int) -> None:
    govern(node)
    node.settle()
    [(key, value)] = list(node.shard._store.scan(b"pt", b"pu"))
    node.shard.close()
    store = Store(tmp_path / "data")
    damaged = bytearray(value)
    damaged[place] ^= 1
    store.write([(key, bytes(damaged))])
    store.close()
    with pytest.raises(StoreError, match=key.hex()):
        Node(tmp_path / "data")
    store = Store(tmp_path / "data")
    store.write([(key, value)])
    store.close()
    node._open()


# --- REST


def test_T61_put_get_and_delete_over_rest(producer: httpx.Client, command: str) -> None:
    path = f"/admin/topics/{command}"
    made = producer.put(path, json=BODY)
    shown = made.json()
    assert made.status_code == 201
    assert shown == {
        "topicId": f"dev.{command}",
        "tenantId": "dev",
        "topicName": command,
        "policy": {**BODY, "priorityTiers": [0, 5, 9]},
        "version": 1,
        "createdAt": shown["createdAt"],
        "updatedAt": shown["createdAt"],
    }
    same = producer.put(path, json={**BODY, "priorityTiers": [9, 5, 0], "maxConsumers": None})
    assert (same.status_code, same.json()) == (200, shown)
    full = {**BODY, "retentionSeconds": 2**31 - 1, "maxConsumers": 10_000}
    other = producer.put(path, json=full)
    assert (other.status_code, other.json()["version"]) == (200, 2)
    assert other.json()["policy"] == {**full, "priorityTiers": [0, 5, 9]}
    assert other.json()["createdAt"] == shown["createdAt"]
    got = producer.get(path)
    assert (got.status_code, got.json()) == (200, other.json())
    assert refusal(producer.delete(path)) == (
        400, "validation-error", "deletionPolicy=Delete is required",
    )  # fmt: skip
    assert producer.delete(path, params={"deletionPolicy": "Keep"}).status_code == 400
    for _ in range(2):
        gone = producer.delete(path, params={"deletionPolicy": "Delete"})
        assert (gone.status_code, gone.content) == (204, b"")
    assert refusal(producer.get(path)) == (
        404, "not-found", f'queue topic "dev.{command}" not found',
    )  # fmt: skip


TIER_BOUNDS = "each must be 0 to 10"
NAME_RULE = "must be a lower-case DNS label of at most 63 characters"


@pytest.mark.parametrize(
    ("change", "field", "why"),
    [
        ({"priorityTiers": None}, "priorityTiers", "is required"),
        ({"priorityTiers": []}, "priorityTiers", "must have 1 to 10 tiers"),
        ({"priorityTiers": list(range(11))}, "priorityTiers", "must have 1 to 10 tiers"),
        ({"priorityTiers": [11]}, "priorityTiers", TIER_BOUNDS),
        ({"priorityTiers": [1, -1]}, "priorityTiers", TIER_BOUNDS),
        ({"priorityTiers": [1, 1]}, "priorityTiers", "must be different from each other"),
        ({"maxAttempts": None}, "maxAttempts", "is required"),
        ({"maxAttempts": 0}, "maxAttempts", "must be 1 to 100"),
        ({"maxAttempts": 101}, "maxAttempts", "must be 1 to 100"),
        ({"deadLetterTopicRef": None}, "deadLetterTopicRef", "is required"),
        ({"deadLetterTopicRef": "Upper"}, "deadLetterTopicRef", NAME_RULE),
        ({"deadLetterTopicRef": ""}, "deadLetterTopicRef", NAME_RULE),
        ({"deadLetterTopicRef": "bounds"}, "deadLetterTopicRef", "must be another topic"),
        ({"retentionSeconds": -1}, "retentionSeconds", f"must be 0 to {2**31 - 1}"),
        ({"retentionSeconds": 2**31}, "retentionSeconds", f"must be 0 to {2**31 - 1}"),
        ({"maxConsumers": -1}, "maxConsumers", "must be 0 to 10000"),
        ({"maxConsumers": 10_001}, "maxConsumers", "must be 0 to 10000"),
    ],
)
def test_T61_a_policy_out_of_bounds_is_not_stored(
    producer: httpx.Client, change: dict[str, Any], field: str, why: str
) -> None:
    answer = producer.put("/admin/topics/bounds", json={**BODY, **change})
    assert refusal(answer) == (422, "unprocessable", f"invalid {field}: {why}")
    assert answer.json()["field"] == field
    assert producer.get("/admin/topics/bounds").status_code == 404


@pytest.mark.parametrize("name", ["Mail", "a_b", "-a", "a-", "a.b", "x" * 64, "a%20b", "a%2Fb"])
def test_T61_a_name_is_a_dns_label(producer: httpx.Client, name: str) -> None:
    path = f"/admin/topics/{name}"
    for answer in (
        producer.put(path, json=BODY),
        producer.get(path),
        producer.delete(path, params={"deletionPolicy": "Delete"}),
    ):
        assert refusal(answer) == (422, "unprocessable", f"invalid topicName: {NAME_RULE}")
        assert answer.json()["field"] == "topicName"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "Input data was truncated"),
        (b"[]", "Expected `object`"),
        (b'{"priorityTiers":[1],"maxattempts":3}', "unknown field `maxattempts`"),
        (b'{"maxAttempts":"3"}', "Expected `int"),
        (b'{"maxAttempts":1.5}', "Expected `int"),
        (b'{"priorityTiers":[true]}', "Expected `int`"),
        (b"{} {}", "trailing characters"),
        (b'{"deadLetterTopicRef":"\xff"}', "utf-8"),
        (b"{" + b" " * (1 << 20) + b"}", "more than 1048576 bytes"),
    ],
)
def test_T61_the_body_is_strict_json(producer: httpx.Client, body: bytes, why: str) -> None:
    status, code, message = refusal(producer.put("/admin/topics/strict", content=body))
    assert (status, code) == (400, "validation-error")
    assert message.startswith("invalid request body: ") and why in message


def test_T61_policies_act_over_rest_and_survive_kill(start_server: Callable[..., Server]) -> None:
    server = start_server()
    producer = server.client("dev-producer")
    assert producer.put("/admin/topics/mail", json={**BODY, "maxConsumers": 1}).status_code == 201
    server.kill()
    server.start()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    refused = producer.post("/tasks", json={"command": "mail", "payload": 1, "priority": 4})
    assert refusal(refused) == (400, "validation-error", "priority not in topic tiers")
    items = [{"command": "mail", "payload": 1, "priority": p} for p in (9, 4)]
    made, not_made = producer.post("/tasks/batch", json=items).json()
    assert made["task"]["maxAttempts"] == 3
    assert not_made["message"] == "priority not in topic tiers"
    assert claim(worker, "mail", workerId="a")["priority"] == 9
    assert create(producer, "mail")["priority"] == 0
    other = worker.post("/tasks/claim", json={"commands": ["mail"], "workerId": "b"})
    assert other.status_code == 204
    assert claim(worker, "mail", workerId="a")["priority"] == 0


def test_T61_the_stream_refuses_items_outside_the_tiers(
    server: Server, producer: httpx.Client, command: str
) -> None:
    producer.put(f"/admin/topics/{command}", json=BODY).raise_for_status()
    tasks = [{"seq": n, "command": command, "priority": n} for n in (0, 1, 5)]
    out: SimpleQueue[bytes | None] = SimpleQueue()
    with grpc.insecure_channel(server.producer) as channel:
        answers = channel.stream_stream("/producerpb.ProducerStream/Stream")(iter(out.get, None))
        out.put(producerpb.ProducerEvent(hello={"token": "dev-producer"}).SerializeToString())
        next(answers)
        events = producerpb.ProducerEvent(create_batch={"tasks": tasks})
        out.put(events.SerializeToString())
        acks = producerpb.ServerEvent.FromString(next(answers)).create_ack_batch.acks
        out.put(None)
    assert [(ack.seq, ack.ok) for ack in acks] == [(0, True), (1, False), (5, True)]
    assert acks[1].error_message == "priority not in topic tiers"


def test_T61_the_reference_stands_beside_the_dead_letters(
    producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    path = f"/admin/queues/{command}/dead"
    assert producer.get(path).json() == {"tasks": []}
    producer.put(f"/admin/topics/{command}", json=BODY).raise_for_status()
    assert producer.get(path).json() == {"tasks": [], "deadLetterTopicRef": "graveyard"}


def test_T32_T36_topics_are_of_the_own_tenant_and_for_admins(tmp_path: Path) -> None:
    asyncio.run(topics_of_tenants(tmp_path))


async def topics_of_tenants(tmp_path: Path) -> None:
    tokens = Tokens(
        ours=Principal("a", ["codeq:admin", *WORKER_SCOPES], ["*"], {"tid": "ours"}),
        theirs=Principal("b", ["codeq:admin", *WORKER_SCOPES], ["*"], {"tid": "theirs"}),
        operator=Principal("o", ["codeq:operator"], [], {"tid": "home"}),
    )
    path = "/admin/topics/mail"
    delete = {"deletionPolicy": "Delete"}
    async with rest_node(tmp_path, tokens) as node:
        ours, theirs = await node.client("ours"), await node.client("theirs")
        operator, nobody = await node.client("operator"), await node.client("plain/x")
        for method, fields in (
            ("PUT", {"json": BODY}),
            ("GET", {}),
            ("DELETE", {"params": delete}),
        ):
            answer = await nobody.request(method, path, **fields)  # type: ignore[arg-type]
            assert refusal(answer) == (403, "permission-denied", "admin only")
        assert (await ours.put(path, json=BODY)).status_code == 201
        assert (await theirs.get(path)).status_code == 404
        assert (await theirs.get(path, params={"tenant": "ours"})).status_code == 404
        assert (await theirs.delete(path, params=delete)).status_code == 204
        assert (await operator.get(path)).status_code == 404, "that of its own tenant"
        got = await operator.get(path, params={"tenant": "ours"})
        assert got.json()["topicId"] == "ours.mail"
        put = await operator.put(path, json={**BODY, "maxAttempts": 9}, params={"tenant": "ours"})
        assert put.json()["version"] == 2
        assert (await ours.get(path)).json()["policy"]["maxAttempts"] == 9
        node.app.edge.stop()
        answer = await ours.put(path, json=BODY)
        status, code, message = refusal(answer)
        assert (status, code) == (503, "unavailable")
        assert message == "queue topic administration unavailable: the server is stopping"
