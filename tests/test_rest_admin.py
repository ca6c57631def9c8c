"""The admin routes and cancel over REST: answers, refusals with their texts, tenants, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from codeq.server.auth import WORKER_SCOPES, Principal

from .conftest import ABSENT_ID, Server, Tokens, claim, claimed, create, refusal, rest_node

NOT_FOUND = (404, "not-found", "not found")
NOT_PENDING = (409, "conflict", "task is not pending")
INVALID_BODY = (400, "validation-error", "invalid body")


def admins() -> Tokens:
    return Tokens(
        ours=Principal("a", ["codeq:admin", *WORKER_SCOPES], ["*"], {"tid": "ours"}),
        theirs=Principal("b", ["codeq:admin", *WORKER_SCOPES], ["*"], {"tid": "theirs"}),
        operator=Principal("o", ["codeq:operator"], [], {"tid": "home"}),
    )


def bury(producer: httpx.Client, worker: httpx.Client, command: str, **fields: Any) -> str:
    """A dead letter."""
    task_id = claimed(producer, worker, command, maxAttempts=1, **fields)
    answer = worker.post(f"/tasks/{task_id}/nack", json={"reason": "broken", "delaySeconds": 0})
    assert answer.json() == {"status": "dlq", "delaySeconds": 0}
    return task_id


def done(producer: httpx.Client, worker: httpx.Client, command: str) -> str:
    """A completed task."""
    task_id = claimed(producer, worker, command)
    worker.post(f"/tasks/{task_id}/result", json={"status": "COMPLETED"}).raise_for_status()
    return task_id


def listed(client: httpx.Client, path: str, **query: Any) -> list[dict[str, Any]]:
    """The tasks of all pages."""
    tasks: list[dict[str, Any]] = []
    cursor = None
    while True:
        more = {} if cursor is None else {"cursor": cursor}
        answer = client.get(path, params={**query, **more})
        assert answer.status_code == 200, answer.text
        page = answer.json()
        tasks += page["tasks"]
        cursor = page.get("nextCursor")
        if cursor is None:
            return tasks


def ids_of(tasks: list[dict[str, Any]]) -> list[str]:
    return [task["id"] for task in tasks]


# --- cancel


def test_cancel(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    made = create(producer, command)
    cancelled = producer.post(f"/tasks/{made['id']}/cancel")
    assert cancelled.status_code == 200
    assert cancelled.json() == {
        **made,
        "status": "FAILED",
        "lastKnownLocation": "NONE",
        "error": "CANCELLED",
        "resultKey": "codeq:results",
        "updatedAt": cancelled.json()["updatedAt"],
    }
    record = producer.get(f"/tasks/{made['id']}/result").json()["result"]
    assert (record["status"], record["error"]) == ("FAILED", "CANCELLED")
    assert refusal(producer.post(f"/tasks/{made['id']}/cancel", json={})) == NOT_PENDING
    leased = claimed(producer, worker, command)
    assert refusal(producer.post(f"/tasks/{leased}/cancel")) == NOT_PENDING
    for task_id in (ABSENT_ID, "nonsense"):
        assert refusal(producer.post(f"/tasks/{task_id}/cancel")) == NOT_FOUND


def test_cancel_asks_for_a_producer(worker: httpx.Client, command: str) -> None:
    assert worker.post(f"/tasks/{ABSENT_ID}/cancel").status_code == 401


# --- dead letters


def test_T22_dead_letters_over_rest_survive_a_restart(
    start_server: Callable[..., Server], command: str
) -> None:
    server = start_server()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    queue = f"/admin/queues/{quote('a/b: ' + command, safe='')}"
    name = "a/b: " + command
    ids = [bury(producer, worker, name, payload={"n": n}) for n in range(4)]
    failed = claimed(producer, worker, name)
    worker.post(f"/tasks/{failed}/result", json={"status": "FAILED", "error": "no"})
    server.kill()
    server.start()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    dead = listed(producer, f"{queue}/dead", limit=3)
    assert ids_of(dead) == ids
    assert dead[1] == {
        **producer.get(f"/tasks/{ids[1]}").json(),
        "status": "FAILED",
        "lastKnownLocation": "DLQ_SET",
        "error": "broken",
        "payload": '{"n":1}',
        "resultKey": "codeq:results",
    }
    assert producer.post(f"{queue}/dead/requeue", json={"limit": 1}).json() == {"requeued": 1}
    assert producer.post(f"{queue}/dead/requeue", json={"ids": [failed]}).json() == {"requeued": 0}
    assert producer.post(f"{queue}/dead/purge", json={"ids": ids[:2]}).json() == {"purged": 1}
    server.kill()
    server.start()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    assert ids_of(listed(producer, f"{queue}/dead")) == ids[2:]
    assert refusal(producer.get(f"/tasks/{ids[1]}")) == NOT_FOUND
    again = claim(worker, name)
    assert (again["id"], again["attempts"], again.get("error")) == (ids[0], 1, None)
    assert "resultKey" not in again
    assert producer.post(f"{queue}/dead/requeue").json() == {"requeued": 2}
    assert producer.post(f"{queue}/dead/purge").json() == {"purged": 0}
    assert producer.get(queue).json()["dlq"] == 0


@pytest.mark.parametrize("what", ["requeue", "purge"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "invalid body"),
        (b'{"ids":[1]}', "invalid body"),
        (b'{"ids":"x"}', "invalid body"),
        (b'{"limit":1.5}', "invalid body"),
        (b'{"limit":"1"}', "invalid body"),
        (b'{"limit":0}', "invalid limit"),
        (b'{"limit":2147483648}', "invalid limit"),
        (b'{"ids":[%s]}' % b",".join([b'"x"'] * 1001), "batch size exceeds maximum of 1000"),
    ],
)
def test_bad_requests_for_dead_letters(
    producer: httpx.Client, what: str, body: bytes, message: str
) -> None:
    answer = producer.post(f"/admin/queues/x/dead/{what}", content=body)
    assert refusal(answer) == (400, "validation-error", message)


# --- lists


def test_task_lists_filter_and_page(start_server: Callable[..., Server], command: str) -> None:
    server = start_server()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    states = {
        "COMPLETED": [done(producer, worker, command) for _ in range(2)],
        "FAILED": [bury(producer, worker, command)],
        "IN_PROGRESS": [claimed(producer, worker, command)],
        "PENDING": [
            create(producer, command)["id"],
            create(producer, command, delaySeconds=600)["id"],
        ],
    }
    other = create(producer, "other")["id"]
    server.kill()
    server.start()
    producer = server.client("dev-producer")
    everything = [task_id for ids in states.values() for task_id in ids]
    assert ids_of(listed(producer, "/admin/tasks")) == [*everything, other]
    assert ids_of(listed(producer, "/admin/tasks", command=command, limit=1)) == everything
    for status, ids in states.items():
        tasks = listed(producer, "/admin/tasks", command=command, status=status, limit=1)
        assert ids_of(tasks) == ids
        assert tasks == [producer.get(f"/tasks/{task_id}").json() for task_id in ids]
    page = producer.get("/admin/tasks", params={"limit": 2}).json()
    assert len(page["tasks"]) == 2 and page["nextCursor"]
    assert "nextCursor" not in producer.get("/admin/tasks", params={"limit": 7}).json()


@pytest.mark.parametrize("path", ["/admin/tasks", "/admin/queues/x/dead"])
@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=0", "invalid limit"),
        ("limit=1001", "invalid limit"),
        ("limit=-1", "invalid limit"),
        ("limit=1.5", "invalid limit"),
        ("limit=%D9%A1", "invalid limit"),
        ("limit=99999999999999999999", "invalid limit"),
        ("cursor=x", "invalid cursor"),
        ("cursor=0000%200000%20%20", "invalid cursor"),
        ("cursor=00000000000g", "invalid cursor"),
    ],
)
def test_bad_pages(producer: httpx.Client, path: str, query: str, message: str) -> None:
    assert refusal(producer.get(f"{path}?{query}")) == (400, "validation-error", message)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("status=DEAD", "invalid status"),
        ("status=pending", "invalid status"),
        ("command=%20", "invalid command"),
        ("command=a%00b", "invalid command"),
        (f"command={'x' * 257}", "invalid command"),
    ],
)
def test_bad_filters(producer: httpx.Client, query: str, message: str) -> None:
    assert refusal(producer.get(f"/admin/tasks?{query}")) == (400, "validation-error", message)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("GET", "/dead"),
        ("POST", "/dead/requeue"),
        ("POST", "/dead/purge"),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("POST", "/purge"),
    ],
)
@pytest.mark.parametrize("command", ["%20", "a%0Ab", "x" * 257, "%FF", "%C2%84x"])
def test_bad_commands(producer: httpx.Client, method: str, path: str, command: str) -> None:
    answer = producer.request(method, f"/admin/queues/{command}{path}")
    assert refusal(answer) == (400, "validation-error", "invalid command")


# --- queues


def test_pause_and_resume_over_a_restart(start_server: Callable[..., Server], command: str) -> None:
    server = start_server()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    paused = producer.post(f"/admin/queues/{command}/pause")
    assert (paused.status_code, paused.json()) == (200, {"command": command, "paused": True})
    made = create(producer, command)
    server.kill()
    server.start()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    assert worker.post("/tasks/claim", json={"commands": [command]}).status_code == 204
    assert worker.post("/tasks/claim", json={}).status_code == 204
    resumed = producer.post(f"/admin/queues/{command}/resume", json={"unknown": 1})
    assert (resumed.status_code, resumed.json()) == (200, {"command": command, "paused": False})
    server.kill()
    server.start()
    assert claim(server.client("dev-worker"), command)["id"] == made["id"]


def test_purge_of_a_queue(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    for fields in ({}, {}, {"delaySeconds": 60}):
        create(producer, command, **fields)
    leased = claim(worker, command)
    queue = f"/admin/queues/{command}"
    assert producer.post(f"{queue}/purge", json={"state": "delayed"}).json() == {"purged": 1}
    assert producer.post(f"{queue}/purge", json={"state": "ready"}).json() == {"purged": 1}
    create(producer, command)
    assert producer.post(f"{queue}/purge", json={"state": "all"}).json() == {"purged": 1}
    assert producer.get(queue).json()["inProgress"] == 1
    assert producer.get(f"/tasks/{leased['id']}").json()["status"] == "IN_PROGRESS"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "invalid state"),
        (b"{}", "invalid state"),
        (b'{"state":null}', "invalid state"),
        (b'{"state":"leased"}', "invalid state"),
        (b'{"state":1}', "invalid body"),
        (b"x", "invalid body"),
    ],
)
def test_bad_purges(producer: httpx.Client, body: bytes, message: str) -> None:
    answer = producer.post("/admin/queues/x/purge", content=body)
    assert refusal(answer) == (400, "validation-error", message)


# --- cleanup


def test_T35_cleanup_with_before_in_2099(start_server: Callable[..., Server], command: str) -> None:
    server = start_server()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    ended = [done(producer, worker, command) for _ in range(3)] + [bury(producer, worker, command)]
    live = [claimed(producer, worker, command), create(producer, command)["id"]]
    none = producer.post("/admin/tasks/cleanup").json()
    assert (none["deleted"], none["limit"]) == (0, 1000)
    body = {"before": "2099-01-01T02:00:00+02:00", "limit": 2}
    first = producer.post("/admin/tasks/cleanup", json=body)
    assert first.status_code == 200
    assert first.json() == {"deleted": 2, "before": "2099-01-01T00:00:00.000Z", "limit": 2}
    server.kill()
    server.start()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    body["limit"] = 10**9
    rest = producer.post("/admin/tasks/cleanup", json=body).json()
    assert (rest["deleted"], rest["limit"]) == (2, 10_000)
    assert ids_of(listed(producer, "/admin/tasks")) == live
    for task_id in ended:
        assert refusal(producer.get(f"/tasks/{task_id}")) == NOT_FOUND


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"before":"yesterday"}', "invalid 'before' (use RFC3339)"),
        (b'{"before":""}', "invalid 'before' (use RFC3339)"),
        (b'{"before":"0001-01-01T00:00:00+01:00"}', "invalid 'before' (use RFC3339)"),
        (b'{"before":1}', "invalid body"),
        (b'{"limit":"1"}', "invalid body"),
        (b"[1]", "invalid body"),
    ],
)
def test_bad_cleanups(producer: httpx.Client, body: bytes, message: str) -> None:
    answer = producer.post("/admin/tasks/cleanup", content=body)
    assert refusal(answer) == (400, "validation-error", message)


def test_cleanup_is_limited(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = {"rateLimit.admin.requestsPerMinute": 1, "rateLimit.admin.burstSize": 1}
        async with rest_node(tmp_path, admins(), settings) as node:
            ours = await node.client("ours")
            assert (await ours.post("/admin/tasks/cleanup")).status_code == 200
            answer = await ours.post("/admin/tasks/cleanup")
            assert refusal(answer) == (429, "rate-limited", "rate limit exceeded")
            told = answer.json()
            assert (told["scope"], told["operation"]) == ("admin", "cleanup")
            assert (await ours.get("/admin/queues")).status_code == 200

    asyncio.run(scenario())


# --- tenants


async def put(client: httpx.AsyncClient, command: str, kind: str) -> str:
    """A task of this kind: ready, dead or ended."""
    made = await client.post("/tasks", json={"command": command, "payload": 1, "maxAttempts": 1})
    task_id = str(made.json()["id"])
    if kind != "ready":
        await client.post("/tasks/claim", json={"commands": [command]})
        call, body = ("nack", {}) if kind == "dead" else ("result", {"status": "COMPLETED"})
        assert (await client.post(f"/tasks/{task_id}/{call}", json=body)).status_code == 200
    return task_id


def test_T32_T36_admins_see_and_change_their_own_tenant_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rest_node(tmp_path, admins()) as node:
            ours, theirs = await node.client("ours"), await node.client("theirs")
            foreign = [await put(theirs, "job", kind) for kind in ("dead", "ended", "ready")]
            own = await put(ours, "own", "ready")
            assert (await ours.get("/admin/queues")).json() == {
                "queues": [{"command": "own", "ready": 1, "delayed": 0, "inProgress": 0, "dlq": 0}]
            }
            for query in ("", "?tenant=theirs"):
                tasks = (await ours.get(f"/admin/tasks{query}")).json()["tasks"]
                assert ids_of(tasks) == [own]
                dead = await ours.get(f"/admin/queues/job/dead{query}")
                assert dead.json() == {"tasks": []}
                stats = (await ours.get(f"/admin/queues/job{query}")).json()
                assert stats == {
                    "command": "job",
                    "ready": 0,
                    "delayed": 0,
                    "inProgress": 0,
                    "dlq": 0,
                }
            for task_id in foreign:
                assert refusal(await ours.post(f"/tasks/{task_id}/cancel")) == NOT_FOUND
            for what, body, answer in (
                ("queues/job/dead/requeue", {"ids": foreign}, {"requeued": 0}),
                ("queues/job/dead/purge", {"limit": 9}, {"purged": 0}),
                ("queues/job/purge", {"state": "all"}, {"purged": 0}),
                ("queues/job/pause", {}, {"command": "job", "paused": True}),
            ):
                asked = await ours.post(f"/admin/{what}?tenant=theirs", json=body)
                assert asked.json() == answer
            swept = await ours.post(
                "/admin/tasks/cleanup?tenant=theirs", json={"before": "2099-01-01T00:00:00Z"}
            )
            assert swept.json()["deleted"] == 0
            tasks = (await theirs.get("/admin/tasks")).json()["tasks"]
            assert ids_of(tasks) == foreign
            taken = await theirs.post("/tasks/claim", json={"commands": ["job"]})
            assert taken.json()["id"] == foreign[2], "the pause was of another tenant"

    asyncio.run(scenario())


def test_T36_operators_see_every_tenant_or_the_one_they_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rest_node(tmp_path, admins()) as node:
            ours, theirs = await node.client("ours"), await node.client("theirs")
            operator = await node.client("operator")
            first, second = await put(ours, "job", "ready"), await put(theirs, "job", "dead")
            third = await put(theirs, "only", "ended")
            queues = (await operator.get("/admin/queues")).json()["queues"]
            assert [(q["tenantId"], q["command"], q["ready"], q["dlq"]) for q in queues] == [
                ("ours", "job", 1, 0),
                ("theirs", "job", 0, 1),
            ]
            named = (await operator.get("/admin/queues?tenant=ours")).json()["queues"]
            assert named == queues[:1]
            total = (await operator.get("/admin/queues/job")).json()
            assert total == {"command": "job", "ready": 1, "delayed": 0, "inProgress": 0, "dlq": 1}
            one = (await operator.get("/admin/queues/job?tenant=theirs")).json()
            assert one == queues[1]
            for query, ids in (
                ("", [first, second, third]),
                ("?tenant=theirs", [second, third]),
                ("?tenant=nobody", []),
                ("?status=COMPLETED", [third]),
            ):
                tasks = (await operator.get(f"/admin/tasks{query}")).json()["tasks"]
                assert ids_of(tasks) == ids
                assert {t["tenantId"] for t in tasks} <= {"ours", "theirs"}
            dead = (await operator.get("/admin/queues/job/dead")).json()["tasks"]
            assert ids_of(dead) == [second]
            path = "/admin/queues/job/dead/requeue"
            assert (await operator.post(path)).json() == {"requeued": 0}, "of its own tenant"
            assert (await operator.post(f"{path}?tenant=theirs")).json() == {"requeued": 1}

    asyncio.run(scenario())


def test_T32_T36_operators_reach_a_task_of_the_tenant_they_name(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with rest_node(tmp_path, admins()) as node:
            ours, theirs = await node.client("ours"), await node.client("theirs")
            operator = await node.client("operator")
            ended, waiting = await put(theirs, "job", "ended"), await put(theirs, "job", "ready")
            for path in (f"/tasks/{ended}", f"/tasks/{ended}/result"):
                assert (await operator.get(path)).status_code == 404, "not of its own tenant"
                assert (await operator.get(f"{path}?tenant=theirs")).status_code == 200
                assert (await ours.get(f"{path}?tenant=theirs")).status_code == 404
            cancel = f"/tasks/{waiting}/cancel"
            assert (await ours.post(f"{cancel}?tenant=theirs")).status_code == 404
            assert (await operator.post(cancel)).status_code == 404
            done = await operator.post(f"{cancel}?tenant=theirs")
            assert done.json()["error"] == "CANCELLED"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/queues"),
        ("GET", "/admin/queues/x"),
        ("GET", "/admin/queues/x/dead"),
        ("GET", "/admin/tasks"),
        ("POST", "/admin/queues/x/dead/requeue"),
        ("POST", "/admin/queues/x/dead/purge"),
        ("POST", "/admin/queues/x/pause"),
        ("POST", "/admin/queues/x/resume"),
        ("POST", "/admin/queues/x/purge"),
        ("POST", "/admin/tasks/cleanup"),
    ],
)
def test_T54_only_admins_are_let_in(tmp_path: Path, method: str, path: str) -> None:
    async def scenario() -> None:
        async with rest_node(tmp_path) as node:
            plain = await node.client("shop/plain", **{"x-role": "ADMIN"})
            answer = await plain.request(method, path)
            assert refusal(answer) == (403, "permission-denied", "admin only")
            nobody = await node.client("nobody")
            assert refusal(await nobody.request(method, path))[:2] == (401, "unauthenticated")

    asyncio.run(scenario())


def test_a_stopping_node_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rest_node(tmp_path, admins()) as node:
            ours = await node.client("ours")
            task_id = await put(ours, "job", "ready")
            node.app.stop()
            for path, body in (
                (f"/tasks/{task_id}/cancel", {}),
                ("/admin/queues/job/pause", {}),
                ("/admin/queues/job/resume", {}),
                ("/admin/queues/job/purge", {"state": "all"}),
                ("/admin/queues/job/dead/purge", {}),
                ("/admin/tasks/cleanup", {}),
            ):
                answer = await ours.post(path, json=body)
                assert refusal(answer) == (503, "unavailable", "unavailable")

    asyncio.run(scenario())


def test_T66_ends_by_cancel_and_purge_are_counted(
    server: Server, producer: httpx.Client, command: str
) -> None:
    for _ in range(2):
        create(producer, command)
    producer.post(f"/tasks/{create(producer, command)['id']}/cancel")
    producer.post(f"/admin/queues/{command}/purge", json={"state": "all"})
    text = httpx.get(f"http://{server.http}/metrics").text
    line = f'codeq_task_completed_total{{command="{command}",status="FAILED"}} '
    assert float(text.partition(line)[2].split()[0]) == 3
