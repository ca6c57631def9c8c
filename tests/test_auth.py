"""Tokens, tenants, scopes and classes of routes."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from codeq.config import ConfigError
from codeq.server import auth
from codeq.server.auth import WORKER_SCOPES, Auth, AuthError, Principal, bearer
from codeq.server.providers import StaticProvider
from codeq.server.streams import Status

from .conftest import RestNode, Server, Tokens, refusal, rest_node
from .lines import House

ALL_SCOPES = sorted(WORKER_SCOPES)


def static(**settings: Any) -> StaticProvider:
    return StaticProvider("workerAuthConfig", {"token": "secret", **settings})


def refused(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(AuthError) as caught:
        call()
    return caught.value.slug, caught.value.message


# --- the header


@pytest.mark.parametrize("header", [b"Bearer abc", b"bearer\t abc ", b"  BEARER   abc"])
def test_bearer_is_split_at_white_space(header: bytes) -> None:
    assert bearer(header) == "abc"


@pytest.mark.parametrize("header", [b"", b"Bearer", b"abc", b"Basic abc", b"Bearer a b"])
def test_malformed_headers(header: bytes) -> None:
    answer = refused(lambda: bearer(header))
    assert answer == ("unauthenticated", "invalid Authorization format")


def test_missing_header() -> None:
    assert refused(lambda: bearer(None)) == ("unauthenticated", "missing Authorization header")


# --- tenants and claims


@pytest.mark.parametrize(
    ("claims", "subject", "tenant"),
    [
        ({}, "shop-1", "shop-1"),
        ({}, "Shop", ""),
        ({}, "a", ""),
        ({}, "a" * 64, ""),
        ({"tid": " shop "}, "x", "shop"),
        ({"tenantId": "shop", "organization_id": "shop"}, "x", "shop"),
        ({"tenantId": "shop", "tid": "other"}, "x", ""),
        ({"tenant_id": ""}, "shop", ""),
        ({"organizationId": 5}, "shop", ""),
        ({"tid": None}, "shop", ""),
        ({"tid": "shop\n"}, "x", "shop"),
        ({"tid": "\u3000shop\x85"}, "x", "shop"),
        ({"tid": "shop\x1f"}, "x", ""),
        ({"tid": "sh\u00f6p"}, "x", ""),
        ({"tid": "shop", "unrelated": "other"}, "x", "shop"),
    ],
)
def test_tenant_of_claims(claims: dict[str, Any], subject: str, tenant: str) -> None:
    assert auth.tenant_of(claims, subject) == tenant


def test_scopes_of_both_claims_are_joined() -> None:
    raw = {"scope": "a  b", "scopes": ["c", "d e"]}
    principal = static(scopes=["x"], raw=raw).identify("secret")
    assert principal.scopes == {"x", "a", "b", "c", "d e"}
    assert static(raw={"scopes": "c d"}).identify("secret").scopes == {"c", "d"}


def test_T43_event_types_are_compared_as_commands_are() -> None:
    principal = static(eventTypes=[" a ", "B", "名前"]).identify("secret")
    assert principal.may_claim(b"a") and principal.may_claim("名前".encode())
    assert not principal.may_claim(b"b") and not principal.may_claim(b"*")
    assert static(eventTypes=["*"]).identify("secret").may_claim(b"anything")


# --- the static provider


def test_T42_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    provider = static()
    assert provider.identify(" secret ").subject == "static"
    assert refused(lambda: provider.identify("wrong")) == ("unauthenticated", "invalid token")
    assert compared == [(b"secret", b"secret"), (b"wrong", b"secret")]


def test_static_token_as_a_text() -> None:
    principal = StaticProvider("producerAuthConfig", " abc ").identify("abc")
    assert (principal.subject, principal.tenant) == ("static", "static")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (None, "c"),
        ("", "c.token"),
        ({"subject": "x"}, "c.token"),
        ({"token": "  "}, "c.token"),
        ({"token": ["x"]}, "c.token"),
        ({"token": "x", "scopes": 5}, "c.scopes"),
        ({"token": "x", "eventTypes": [5]}, "c.eventTypes"),
        ({"token": "x", "raw": "y"}, "c.raw"),
        ({"token": "x", "tokens": "y"}, "c.tokens"),
    ],
)
def test_bad_static_settings_name_their_key(settings: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StaticProvider("c", settings)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


# --- classes


def test_class_without_a_provider() -> None:
    nobody = Auth(None, None)
    assert refused(lambda: nobody.producer("x"))[1] == "producer validator not configured"
    assert refused(lambda: nobody.admin("x"))[1] == "producer validator not configured"
    assert refused(lambda: nobody.worker("x")) == (
        "unavailable",
        "worker validator not configured",
    )
    assert refused(lambda: nobody.any("x"))[0] == "unavailable"


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"subject": " "}, ("unauthenticated", "missing subject")),
        ({"eventTypes": []}, ("unauthenticated", "missing eventTypes")),
        ({"eventTypes": [" "]}, ("unauthenticated", "missing eventTypes")),
        ({"scopes": []}, ("unauthenticated", "missing scope")),
        ({"scopes": ["codeq:result"]}, ("permission-denied", "missing scope")),
        ({"raw": {"tid": "BAD"}}, ("permission-denied", "invalid tenant claims")),
    ],
)
def test_T37_incomplete_worker_tokens(settings: dict[str, Any], answer: tuple[str, str]) -> None:
    complete = {"subject": "w", "scopes": ALL_SCOPES, "eventTypes": ["*"], "raw": {"tid": "shop"}}
    known = Auth(None, static(**{**complete, **settings}))
    assert refused(lambda: known.worker("secret", auth.SCOPE_CLAIM)) == answer


@pytest.mark.parametrize(
    ("settings", "admin"),
    [
        ({}, False),
        ({"scopes": ["codeq:admin"]}, True),
        ({"scopes": ["codeq:operator"]}, True),
        ({"raw": {"role": "admin"}}, True),
        ({"raw": {"role": "ADMIN"}}, True),
        ({"raw": {"role": "administrator"}}, False),
        ({"raw": {"role": ["ADMIN"]}}, False),
        ({"scopes": ALL_SCOPES}, False),
    ],
)
def test_admins(settings: dict[str, Any], admin: bool) -> None:
    known = Auth(static(**settings), None)
    if admin:
        assert known.admin("secret").tenant == "static"
    else:
        assert refused(lambda: known.admin("secret")) == ("permission-denied", "admin only")


def test_any_takes_workers_then_producers() -> None:
    workers = static(token="w", subject="worker", eventTypes=["a"])
    producers = static(token="p", subject="producer")
    known = Auth(producers, workers)
    assert known.any("w").subject == "worker"
    assert known.any("p").subject == "producer"
    assert refused(lambda: known.any("x")) == ("unauthenticated", "invalid token")
    without_types = Auth(producers, static(token="w", subject="worker"))
    assert refused(lambda: without_types.any("w")) == ("unauthenticated", "invalid token")
    no_tenant = Auth(static(raw={"tid": "?"}), None)
    assert refused(lambda: no_tenant.any("secret"))[1] == "invalid tenant claims"


def test_T36_a_worker_is_no_operator() -> None:
    fields = {
        "token": "x",
        "eventTypes": ["a"],
        "scopes": ["codeq:operator"],
        "raw": {"tid": "ours"},
    }
    plain = static(token="x", raw={"tid": "ours"})
    none = Auth(static(token="p"), static(**fields)).any("x")
    assert (none.is_operator, none.is_admin, none.tenant) == (False, False, "ours")
    assert not Auth(plain, static(**fields)).any("x").is_operator
    assert Auth(static(**fields), static(**fields)).any("x").is_operator, "as a producer it is one"


def test_producer_as_worker() -> None:
    producers = static(token="p", subject="shop")
    workers = static(token="w", subject="worker", scopes=["codeq:claim"], eventTypes=["a"])
    known = Auth(producers, workers, allow_producer_as_worker=True)
    principal = known.worker("p", auth.SCOPE_NACK)
    assert (principal.scopes, principal.any_command) == (WORKER_SCOPES, True)
    assert (principal.tenant, principal.subject) == ("shop", "shop")
    assert refused(lambda: known.worker("w", auth.SCOPE_NACK))[1] == "missing scope"
    assert refused(lambda: known.worker("x")) == ("unauthenticated", "invalid token")
    assert refused(lambda: Auth(producers, workers).worker("p"))[1] == "invalid token"
    alone = Auth(producers, None, allow_producer_as_worker=True)
    assert alone.worker("p").tenant == "shop"
    assert refused(lambda: alone.worker("x")) == ("unauthenticated", "invalid token")


@pytest.mark.parametrize(
    "workers", [None, static(token="w", subject="w", scopes=ALL_SCOPES, eventTypes=["*"])]
)
def test_T37_a_producer_without_subject_is_no_worker(workers: StaticProvider | None) -> None:
    nameless = static(token="p", subject=" ", raw={"tid": "shop"})
    known = Auth(nameless, workers, allow_producer_as_worker=True)
    assert refused(lambda: known.worker("p")) == ("unauthenticated", "missing subject")
    assert known.producer("p").tenant == known.any("p").tenant == "shop", "to create and to read"


def test_T37_without_subject_no_lease_is_made_over_either_surface(tmp_path: Path) -> None:
    async def check() -> None:
        tokens = Tokens(nameless=Principal("", [], [], {"tid": "shop"}))
        known = Auth(tokens, None, allow_producer_as_worker=True)
        async with rest_node(tmp_path, tokens) as node:
            client = await node.client("nameless")
            node.app.edge.auth = known
            await client.post("/tasks", json={"command": "job", "payload": 1})
            answer = await client.post("/tasks/claim", json={"commands": ["job"]})
            assert refusal(answer) == (401, "unauthenticated", "missing subject")
            house = House(node.shard)
            house.edge.auth = known
            line = house.worker(token=None)
            line.send(hello={"token": "nameless", "worker_id": "w"})
            assert line.session.status == Status("UNAUTHENTICATED", "auth failed: missing subject")
            assert node.shard.engine.ready_count(b"shop", b"job") == 1

    in_loop(check)


# --- over REST


def test_tokens_over_rest(server: Server) -> None:
    nobody, wrong = server.client(None), server.client("wrong")
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    missing = (401, "unauthenticated", "missing Authorization header")
    invalid = (401, "unauthenticated", "invalid token")
    for method, path in (("POST", "/tasks"), ("POST", "/tasks/claim"), ("GET", "/admin/queues/x")):
        assert refusal(nobody.request(method, path)) == missing
        assert refusal(wrong.request(method, path)) == invalid
        malformed = nobody.request(method, path, headers={"authorization": "token"})
        assert refusal(malformed) == (401, "unauthenticated", "invalid Authorization format")
    for client in (nobody, wrong):
        assert refusal(client.get("/raft/status")) == invalid
    assert refusal(worker.post("/tasks", json={})) == invalid
    assert refusal(producer.post("/tasks/claim", json={})) == invalid
    assert refusal(worker.get("/admin/queues/x")) == invalid


def test_T34_no_header_makes_an_admin(start_server: Callable[..., Server]) -> None:
    server = start_server(ENV="dev")
    worker = server.client("dev-worker")
    for name in ("x-role", "x-admin", "x-user-role", "x-codeq-admin", "role"):
        for value in ("ADMIN", "true", "codeq:admin"):
            answer = worker.get("/admin/queues/x", headers={name: value})
            assert answer.status_code == 401


def in_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def test_T34_admin_needs_scope_or_role(tmp_path: Path) -> None:
    async def check() -> None:
        tokens = Tokens(admin=Principal("a", ["codeq:admin"], [], {"tid": "shop"}))
        async with rest_node(tmp_path, tokens) as node:
            plain = await node.client("shop/plain", **{"x-role": "ADMIN", "x-admin": "true"})
            answer = await plain.get("/admin/queues/x?role=ADMIN")
            assert refusal(answer) == (403, "permission-denied", "admin only")
            admin = await node.client("admin")
            assert (await admin.get("/admin/queues/x")).status_code == 200

    in_loop(check)


def test_T32_T33_another_tenants_task_is_not_found(tmp_path: Path) -> None:
    async def check() -> None:
        async with rest_node(tmp_path) as node:
            task_id = await _leased(node, "ours", worker="w1")
            foreign = await node.client("theirs/w1")
            body = {"workerId": "w1", "status": "COMPLETED"}
            for call in ("heartbeat", "abandon", "nack", "result"):
                answer = await foreign.post(f"/tasks/{task_id}/{call}", json=body)
                text = "task not found" if call == "result" else "not-found"
                assert refusal(answer) == (404, "not-found", text)
            batch = {"results": [{"taskId": task_id, **body}]}
            [item] = (await foreign.post("/tasks/batch/results", json=batch)).json()["results"]
            assert (item["code"], item["message"]) == ("not-found", "task not found")
            for path in (f"/tasks/{task_id}", f"/tasks/{task_id}/result?waitSeconds=60"):
                assert (await foreign.get(path)).status_code == 404
            assert (await foreign.post("/tasks/claim", json={})).status_code == 204
            own = await node.client("ours/w1")
            assert (await own.get(f"/tasks/{task_id}")).json()["status"] == "IN_PROGRESS"
            done = await own.post(f"/tasks/{task_id}/result", json=body)
            assert done.status_code == 200
            again = await foreign.post(f"/tasks/{task_id}/result", json=body)
            assert again.status_code == 404

    in_loop(check)


async def _leased(node: RestNode, tenant: str, worker: str) -> str:
    client = await node.client(f"{tenant}/{worker}")
    await client.post("/tasks", json={"command": "job", "payload": 1})
    answer = await client.post("/tasks/claim", json={"workerId": worker})
    return str(answer.json()["id"])


def test_T29_two_tenants_may_use_one_key(tmp_path: Path) -> None:
    async def check() -> None:
        async with rest_node(tmp_path) as node:
            body = {"command": "job", "payload": 1, "idempotencyKey": "same"}
            made: list[dict[str, Any]] = []
            for tenant in ("ours", "theirs"):
                client = await node.client(f"{tenant}/p")
                made.append((await client.post("/tasks", json=body)).json())
                assert (await client.post("/tasks", json=body)).json()["id"] == made[-1]["id"]
            assert made[0]["id"] != made[1]["id"]
            assert [task["tenantId"] for task in made] == ["ours", "theirs"]
            client = await node.client("ours/p")
            assert (await client.get(f"/tasks/{made[1]['id']}")).status_code == 404

    in_loop(check)


def test_T36_statistics_show_the_callers_tenant(tmp_path: Path) -> None:
    async def check() -> None:
        tokens = Tokens(
            admin=Principal("a", ["codeq:admin"], [], {"tid": "ours"}),
            operator=Principal("o", ["codeq:operator"], [], {"tid": "ours"}),
        )
        async with rest_node(tmp_path, tokens) as node:
            for tenant, count in (("ours", 1), ("theirs", 2)):
                client = await node.client(f"{tenant}/p")
                for _ in range(count):
                    await client.post("/tasks", json={"command": "job", "payload": 1})
            admin, operator = await node.client("admin"), await node.client("operator")
            own = (await admin.get("/admin/queues/job?tenant=theirs")).json()
            assert (own["ready"], own.get("tenantId")) == (1, None)
            other = (await operator.get("/admin/queues/job?tenant=theirs")).json()
            assert (other["ready"], other["tenantId"]) == (2, "theirs")
            assert (await operator.get("/admin/queues/job")).json()["ready"] == 3

    in_loop(check)


def test_each_lease_call_has_its_scope(tmp_path: Path) -> None:
    async def check() -> None:
        calls = {
            "codeq:claim": ("/tasks/claim", "/tasks/claim/batch"),
            "codeq:heartbeat": ("/tasks/x/heartbeat",),
            "codeq:abandon": ("/tasks/x/abandon",),
            "codeq:nack": ("/tasks/x/nack",),
            "codeq:result": ("/tasks/x/result", "/tasks/batch/results"),
        }
        tokens = Tokens(
            **{scope: Principal("w", [scope], ["*"], {"tid": "shop"}) for scope in calls}
        )
        async with rest_node(tmp_path, tokens) as node:
            for scope in calls:
                client = await node.client(scope)
                for needed, paths in calls.items():
                    for path in paths:
                        answer = await client.post(path, content=b"[")
                        if needed == scope:
                            assert refusal(answer)[2] == "invalid body"
                        else:
                            expected = (403, "permission-denied", "missing scope")
                            assert refusal(answer) == expected

    in_loop(check)


def test_event_types_bound_claims(tmp_path: Path) -> None:
    async def check() -> None:
        tokens = Tokens(few=Principal("w", WORKER_SCOPES, ["a", "b "], {"tid": "shop"}))
        async with rest_node(tmp_path, tokens) as node:
            client = await node.client("shop/p")
            for name, priority in (("a", 0), ("b", 1), ("c", 9)):
                body = {"command": name, "payload": 1, "priority": priority}
                await client.post("/tasks", json=body)
            few = await node.client("few")
            answer = await few.post("/tasks/claim", json={"commands": ["a", "c"]})
            assert refusal(answer) == (403, "permission-denied", "event type not allowed")
            taken = (await few.post("/tasks/claim/batch", json={"count": 9})).json()["tasks"]
            assert [task["command"] for task in taken] == ["b", "a"]

    in_loop(check)


def test_the_owner_of_a_lease(tmp_path: Path) -> None:
    async def check() -> None:
        async with rest_node(tmp_path) as node:
            task_id = await _leased(node, "shop", worker="alice")
            other = await node.client("shop/bob")
            assert refusal(await other.post(f"/tasks/{task_id}/heartbeat"))[1] == "not-owner"
            blank = await other.post(f"/tasks/{task_id}/heartbeat", json={"workerId": "  "})
            assert refusal(blank)[1] == "not-owner"
            named = await other.post(f"/tasks/{task_id}/heartbeat", json={"workerId": "alice"})
            assert named.status_code == 200
            own = await node.client("shop/alice")
            assert (await own.post(f"/tasks/{task_id}/abandon")).status_code == 200

    in_loop(check)


def test_secrets_stay_out_of_answers(server: Server) -> None:
    answer = server.client("dev-producer-x").post("/tasks", json={})
    assert b"dev-producer" not in answer.content
