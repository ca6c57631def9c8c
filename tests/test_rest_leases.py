"""REST for workers against a real server: claims, lease calls, results, with every exact text."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import (
    ABSENT_ID,
    PREFIX,
    Server,
    claim,
    claimed,
    create,
    refusal,
    rest_node,
    wait_for_claims,
    waiting_claims,
)

# --- claims


def test_empty_claim(worker: httpx.Client, command: str) -> None:
    answer = worker.post("/tasks/claim", json={"commands": [command]})
    assert (answer.status_code, answer.content) == (204, b"")
    batch = worker.post("/tasks/claim/batch", json={"commands": [command], "count": 5})
    assert (batch.status_code, batch.content) == (204, b"")


def test_a_waiting_claim_gets_the_task_that_comes(
    server: Server, producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    others = waiting_claims(server)
    with ThreadPoolExecutor(1) as pool:
        body = {"commands": [command], "waitSeconds": 30, "workerId": " w "}
        waiting = pool.submit(worker.post, "/tasks/claim", json=body)
        wait_for_claims(server, others + 1)
        made = create(producer, command)
        taken = waiting.result(30).json()
    assert (taken["id"], taken["workerId"]) == (made["id"], "w")


def test_the_wait_of_a_claim_ends(worker: httpx.Client, command: str) -> None:
    answer = worker.post("/tasks/claim", json={"commands": [command], "waitSeconds": 1})
    assert answer.status_code == 204
    assert 1 <= answer.elapsed.total_seconds() < 5


def test_a_claim_whose_client_left_takes_nothing(
    server: Server, producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    body = json.dumps({"commands": [command], "waitSeconds": 30}).encode()
    head = f"POST {PREFIX}/tasks/claim HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer dev-worker\r\n"
    host, port = server.http.split(":")
    others = waiting_claims(server)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for_claims(server, others + 1)
    wait_for_claims(server, others)
    made = create(producer, command)
    taken = claim(worker, command)
    assert (taken["id"], taken["attempts"]) == (made["id"], 1)


def test_claim_batch(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    ids = [create(producer, command, priority=p)["id"] for p in (1, 3, 2, 3)]
    body = {"commands": [command, command], "count": 3, "leaseSeconds": 30}
    tasks = worker.post("/tasks/claim/batch", json=body).json()["tasks"]
    assert [task["id"] for task in tasks] == [ids[1], ids[3], ids[2]]
    assert {task["status"] for task in tasks} == {"IN_PROGRESS"}
    assert len(worker.post("/tasks/claim/batch", json=body).json()["tasks"]) == 1


@pytest.mark.parametrize(
    "fields", [{}, {"count": 0}, {"count": -1}, {"count": None}, {"count": 1.5}, {"count": "1"}]
)
def test_claim_batch_needs_a_count(worker: httpx.Client, fields: dict[str, Any]) -> None:
    answer = refusal(worker.post("/tasks/claim/batch", json=fields))
    assert answer == (400, "validation-error", "invalid body")


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"commands": "x"}, (400, "validation-error", "invalid body")),
        ({"commands": [1]}, (400, "validation-error", "invalid body")),
        ({"commands": [f"c{n}" for n in range(101)]}, (400, "validation-error", "invalid body")),
        ({"commands": ["x" * 257]}, (400, "validation-error", "invalid command")),
        ({"commands": [" "]}, (403, "permission-denied", "event type not allowed")),
        ({"workerId": "w" * 257}, (400, "validation-error", "invalid workerId")),
        ({"waitSeconds": "1"}, (400, "validation-error", "invalid body")),
        ({"leaseSeconds": 0.5}, (400, "validation-error", "invalid body")),
    ],
)
def test_claim_refusals(
    worker: httpx.Client, fields: dict[str, Any], answer: tuple[int, str, str]
) -> None:
    assert refusal(worker.post("/tasks/claim", json=fields)) == answer


def test_claims_without_commands_take_every_queue(
    start_server: Callable[..., Server], command: str
) -> None:
    server = start_server()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    create(producer, command + "/a", priority=1)
    create(producer, command + "/b", priority=2)
    first = worker.post("/tasks/claim", content=b"").json()
    second = worker.post("/tasks/claim", json={"commands": []}).json()
    assert [first["command"], second["command"]] == [command + "/b", command + "/a"]


def test_huge_leases_are_cut(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    create(producer, command)
    taken = claim(worker, command, leaseSeconds=10**18)
    assert taken["leaseUntil"] > taken["updatedAt"]
    answer = worker.post(f"/tasks/{taken['id']}/heartbeat", json={"extendSeconds": 10**18})
    assert answer.json() == {"ok": True}
    day_later = producer.get(f"/tasks/{taken['id']}").json()["leaseUntil"]
    assert day_later < "2100"


# --- lease calls


@pytest.mark.parametrize("call", ["heartbeat", "abandon", "nack", "result"])
def test_lease_call_refusals(
    producer: httpx.Client, worker: httpx.Client, command: str, call: str
) -> None:
    body = {"status": "COMPLETED"} if call == "result" else {}
    absent = "task not found" if call == "result" else "not-found"
    for task_id in (ABSENT_ID, "nonsense", "%ff", "a%2Fb"):
        answer = refusal(worker.post(f"/tasks/{task_id}/{call}", json=body))
        assert answer == (404, "not-found", absent)
    task_id = create(producer, command)["id"]
    path = f"/tasks/{task_id}/{call}"
    waiting = (409, "not-in-progress", "not-in-progress")
    assert refusal(worker.post(path, json=body)) == waiting
    claim(worker, command, workerId="mine")
    foreign = (403, "not-owner", "not-owner")
    assert refusal(worker.post(path, json={**body, "workerId": "other"})) == foreign
    assert refusal(worker.post(path, json={**body, "attempt": 2})) == foreign
    assert refusal(worker.post(path, json={**body, "attempt": -1})) == foreign
    long = refusal(worker.post(path, json={**body, "workerId": "w" * 257}))
    assert long == (400, "validation-error", "invalid workerId")
    malformed = refusal(worker.post(path, content=b"{"))
    assert malformed == (400, "validation-error", "invalid body")
    assert worker.post(path, json={**body, "attempt": 1}).status_code == 200


def test_lease_calls_without_a_body(
    producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    task_id = claimed(producer, worker, command)
    assert worker.post(f"/tasks/{task_id}/heartbeat").json() == {"ok": True}
    assert worker.post(f"/tasks/{task_id}/abandon").json() == {"status": "requeued"}
    assert claim(worker, command)["attempts"] == 1
    nacked = worker.post(f"/tasks/{task_id}/nack").json()
    assert nacked["status"] == "requeued" and 0 <= nacked["delaySeconds"] <= 900


def test_T55_nack_delays(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    task_id = claimed(producer, worker, command)
    answer = worker.post(f"/tasks/{task_id}/nack", json={"delaySeconds": 0, "reason": "again"})
    assert answer.json() == {"status": "requeued", "delaySeconds": 0}
    task = producer.get(f"/tasks/{task_id}").json()
    assert (task["lastKnownLocation"], task["error"]) == ("PENDING_LIST", "again")
    claim(worker, command)
    answer = worker.post(f"/tasks/{task_id}/nack", json={"delaySeconds": 10**12})
    assert answer.json() == {"status": "requeued", "delaySeconds": 86400}


def test_nack_of_the_last_attempt_is_a_dead_letter(
    producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    task_id = claimed(producer, worker, command, maxAttempts=1)
    answer = worker.post(f"/tasks/{task_id}/nack", json={"delaySeconds": 7})
    assert answer.json() == {"status": "dlq", "delaySeconds": 0}
    read = producer.get(f"/tasks/{task_id}/result").json()
    assert (read["task"]["lastKnownLocation"], read["result"]["status"]) == ("DLQ_SET", "FAILED")
    assert read["result"]["error"] == "MAX_ATTEMPTS"


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({}, "invalid status"),
        ({"status": "DONE"}, "invalid status"),
        ({"status": "completed"}, "invalid status"),
        ({"status": 1}, "invalid body"),
        ({"status": "FAILED"}, "error required when status=FAILED"),
        ({"status": "FAILED", "error": "  "}, "error required when status=FAILED"),
        ({"status": "COMPLETED", "artifacts": [{}]}, "invalid artifacts"),
        ({"status": "COMPLETED", "artifacts": [{"name": "a/b", "url": "x"}]}, "invalid artifacts"),
        ({"status": "COMPLETED", "artifacts": [{"name": "..", "url": "x"}]}, "invalid artifacts"),
        ({"status": "COMPLETED", "artifacts": [{"name": "a\0", "url": "x"}]}, "invalid artifacts"),
        ({"status": "COMPLETED", "artifacts": {}}, "invalid body"),
    ],
)
def test_T54_malformed_results_store_nothing(
    producer: httpx.Client,
    worker: httpx.Client,
    command: str,
    fields: dict[str, Any],
    answer: str,
) -> None:
    task_id = claimed(producer, worker, command)
    expected = (400, "validation-error", answer)
    assert refusal(worker.post(f"/tasks/{task_id}/result", json=fields)) == expected
    batch = worker.post("/tasks/batch/results", json={"results": [{"taskId": task_id, **fields}]})
    [item] = batch.json()["results"]
    assert (item["code"], item["message"]) == ("validation-error", answer)
    assert producer.get(f"/tasks/{task_id}").json()["status"] == "IN_PROGRESS"


def test_result_too_large(start_server: Callable[..., Server], command: str) -> None:
    server = start_server(LIMITS_RESULT_BYTES="100")
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    task_id = claimed(producer, worker, command)
    body = {"status": "COMPLETED", "result": "x" * 99}
    answer = refusal(worker.post(f"/tasks/{task_id}/result", json=body))
    assert answer == (413, "payload-too-large", "result too large")


def test_a_repeated_result_is_answered_as_the_first(
    producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    task_id = claimed(producer, worker, command)
    body = {"status": "COMPLETED", "result": {"a": 1}}
    first = worker.post(f"/tasks/{task_id}/result", json=body)
    assert worker.post(f"/tasks/{task_id}/result", json=body).json() == first.json()
    other = worker.post(f"/tasks/{task_id}/result", json={**body, "result": 2})
    assert refusal(other) == (409, "not-in-progress", "not-in-progress")


def test_T10_T60_batch_of_results(
    producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    ids = [claimed(producer, worker, command) for _ in range(3)]
    kept = [{"name": "a", "url": "u"}]
    sent = [
        {"taskId": ids[0], "status": "COMPLETED", "result": [1], "artifacts": kept},
        {"taskId": ids[0], "status": "COMPLETED", "result": [1]},
        {"taskId": ids[1], "status": "FAILED", "error": "no"},
        {"taskId": ABSENT_ID, "status": "COMPLETED"},
        7,
        {"taskId": ids[2], "status": "COMPLETED", "workerId": "other"},
        {"taskId": ids[2], "status": "COMPLETED", "attempt": 1},
        {"taskId": ids[2], "status": "COMPLETED", "attempt": 9},
    ]
    answers = worker.post("/tasks/batch/results", json={"results": sent}).json()["results"]
    assert answers[0]["result"]["artifacts"] == kept
    assert answers[2]["result"]["error"] == "no"
    outcomes = [answer.get("code", "ok") for answer in answers]
    assert outcomes == [
        *("ok", "not-in-progress", "ok", "not-found", "validation-error", "not-owner"),
        *("not-in-progress", "not-in-progress"),
    ]
    assert [answer["taskId"] for answer in answers[:4]] == [ids[0], ids[0], ids[1], ABSENT_ID]
    assert answers[3]["message"] == "task not found"


def test_batch_of_results_under_one_worker_id(
    producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    create(producer, command)
    task_id = claim(worker, command, workerId="w1")["id"]
    results = [{"taskId": task_id, "status": "COMPLETED", "attempt": 1}]
    foreign = worker.post("/tasks/batch/results", json={"workerId": "w2", "results": results})
    assert foreign.json()["results"][0]["code"] == "not-owner"
    own = worker.post("/tasks/batch/results", json={"workerId": "w1", "results": results})
    assert own.json()["results"][0]["result"]["status"] == "COMPLETED"


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"results":[]}', b'{"results":{}}'])
def test_malformed_batches_of_results(worker: httpx.Client, body: bytes) -> None:
    answer = refusal(worker.post("/tasks/batch/results", content=body))
    assert answer == (400, "validation-error", "invalid body")


# --- claims that are not delivered


async def _lost_claim(app: Any, *, at_send: bool) -> None:
    """A claim whose client goes away before it is decided, or when the answer is written."""
    messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        if at_send:
            await asyncio.get_running_loop().create_future()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if at_send:
            raise ConnectionResetError

    scope = {
        "type": "http",
        "method": "POST",
        "raw_path": f"{PREFIX}/tasks/claim".encode(),
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer shop/w")],
    }
    with contextlib.suppress(ConnectionResetError):
        await app(scope, receive, send)


@pytest.mark.parametrize("at_send", [False, True])
def test_T7_a_claim_that_cannot_be_delivered_goes_back(tmp_path: Path, at_send: bool) -> None:
    async def check() -> None:
        async with rest_node(tmp_path) as node:
            client = await node.client("shop/w")
            await client.post("/tasks", json={"command": "job", "payload": 1, "maxAttempts": 1})
            await _lost_claim(node.app, at_send=at_send)
            taken = (await client.post("/tasks/claim", json={"waitSeconds": 30})).json()
            assert taken["attempts"] == 1
            done = await client.post(f"/tasks/{taken['id']}/result", json={"status": "COMPLETED"})
            assert done.status_code == 200

    asyncio.run(check())
