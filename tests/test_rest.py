"""REST against a real server: objects, creates, reads, routing, with every exact text."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from codeq.engine import _engine
from codeq.server import views

from .conftest import ABSENT_ID, RestNode, Server, claim, claimed, create, refusal, rest_node

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


# --- objects


def test_states_are_those_of_the_engine() -> None:
    for name in ("READY", "DELAYED", "LEASED", "COMPLETED", "FAILED", "DEAD"):
        assert getattr(views, name) == getattr(_engine, name)


def test_life_of_a_task(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    made = create(producer, command, payload={"to": "a@b.com"}, priority=10, maxAttempts=3)
    assert RFC3339.fullmatch(made["createdAt"])
    assert made == {
        "id": made["id"],
        "command": command,
        "payload": '{"to":"a@b.com"}',
        "priority": 10,
        "status": "PENDING",
        "lastKnownLocation": "PENDING_LIST",
        "attempts": 0,
        "maxAttempts": 3,
        "tenantId": "dev",
        "createdAt": made["createdAt"],
        "updatedAt": made["createdAt"],
    }
    assert uuid.UUID(made["id"]).version == 7
    taken = claim(worker, command, leaseSeconds=60, workerId="worker-1")
    assert (taken["status"], taken["lastKnownLocation"]) == ("IN_PROGRESS", "INPROG_SET")
    assert (taken["workerId"], taken["attempts"]) == ("worker-1", 1)
    assert RFC3339.fullmatch(taken["leaseUntil"])
    sent = {"status": "COMPLETED", "workerId": "worker-1", "result": {"sentAt": "now"}}
    record = worker.post(f"/tasks/{made['id']}/result", json=sent).json()
    assert record == {
        "taskId": made["id"],
        "status": "COMPLETED",
        "completedAt": record["completedAt"],
        "result": {"sentAt": "now"},
    }
    read = producer.get(f"/tasks/{made['id']}/result").json()
    assert read["result"] == record
    assert read["task"]["status"] == "COMPLETED"
    assert read["task"]["resultKey"] == "codeq:results"
    assert read["task"]["lastKnownLocation"] == "NONE"
    assert "workerId" not in read["task"] and "leaseUntil" not in read["task"]
    assert worker.get(f"/tasks/{made['id']}").json() == read["task"]


def test_every_reply_has_headers(producer: httpx.Client, command: str) -> None:
    response = producer.post("/tasks", json={"command": command, "payload": 1})
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    named = producer.get(f"/tasks/{ABSENT_ID}", headers={"x-request-id": "my-id"})
    assert named.headers["x-request-id"] == "my-id"
    long = producer.get(f"/tasks/{ABSENT_ID}", headers={"x-request-id": "x" * 129})
    assert re.fullmatch("[0-9a-f]{32}", long.headers["x-request-id"])


@pytest.mark.parametrize(
    "payload",
    [
        b'{ "b" : 1,\t"a": [1 , 2] }',
        b"9007199254740993",
        b'{"n":12345678901234567890123}',
        b'"\\u00e9\\/"',
        '"é 💡"'.encode(),
        b"[]",
        b"false",
        b'""',
        b"1e999",
        b"[" * 200 + b"]" * 200,
    ],
)
def test_T59_payload_bytes_are_kept(
    producer: httpx.Client, worker: httpx.Client, command: str, payload: bytes
) -> None:
    body = b'{"payload": ' + payload + b' , "command":"' + command.encode() + b'"}'
    made = producer.post("/tasks", content=body)
    assert made.status_code == 201
    assert made.json()["payload"].encode() == payload
    assert claim(worker, command)["payload"].encode() == payload


@pytest.mark.parametrize("result", [b"[1, 2 ]", b"9007199254740993", b'"x"', b"true", b"{}", b"0"])
def test_T60_any_json_result(
    producer: httpx.Client, worker: httpx.Client, command: str, result: bytes
) -> None:
    task_id = claimed(producer, worker, command)
    body = b'{"status":"COMPLETED","result":' + result + b"}"
    answer = worker.post(f"/tasks/{task_id}/result", content=body)
    assert b'"result":' + result + b"}" in answer.content
    read = producer.get(f"/tasks/{task_id}/result")
    assert b'"result":' + result + b"}" in read.content


@pytest.mark.parametrize(("left", "right"), [(b"[", b"]"), (b'{"a":[', b"]}")])
def test_how_deep_values_may_be_nested(
    producer: httpx.Client, worker: httpx.Client, command: str, left: bytes, right: bytes
) -> None:
    def nested(levels: int) -> bytes:
        count = levels // len(right)
        return left * count + right * count

    item = b'{"command":"' + command.encode() + b'","more":%b,"payload":%b}'
    deepest, bottomless = nested(512), nested(100_000)
    made = producer.post("/tasks", content=item % (deepest, deepest))
    assert made.json()["payload"].encode() == deepest
    batch = producer.post("/tasks/batch", content=b"[" + item % (deepest, deepest) + b"]")
    assert batch.json()[0]["task"]["payload"].encode() == deepest
    for path, form in (("", b"%b"), ("/batch", b"[%b]")):
        for values in ((bottomless, b"1"), (b"1", bottomless)):
            refused = producer.post(f"/tasks{path}", content=form % (item % values))
            assert refusal(refused) == (400, "validation-error", "invalid body")
    task_id = claim(worker, command)["id"]
    result = b'{"status":"COMPLETED","result":%b}'
    path = f"/tasks/{task_id}/result"
    refused = worker.post(path, content=result % nested(514))
    assert refusal(refused) == (400, "validation-error", "invalid result")
    assert worker.post(path, content=result % deepest).status_code == 200
    assert b'"result":' + deepest + b"}" in producer.get(path).content


def test_completed_without_result_is_null(
    producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    task_id = claimed(producer, worker, command)
    record = worker.post(f"/tasks/{task_id}/result", json={"status": "COMPLETED"}).json()
    assert record["result"] is None
    assert producer.get(f"/tasks/{task_id}/result").json()["result"] == record


def test_failed_result(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    task_id = claimed(producer, worker, command)
    sent = {"status": "FAILED", "error": "broken"}
    record = worker.post(f"/tasks/{task_id}/result", json=sent).json()
    assert "result" not in record and record["error"] == "broken"
    read = producer.get(f"/tasks/{task_id}/result").json()
    assert read["result"] == record
    assert (read["task"]["status"], read["task"]["error"]) == ("FAILED", "broken")


def test_artifacts_are_kept(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    task_id = claimed(producer, worker, command)
    sent = [
        {"name": "b.txt", "url": "https://host/b"},
        {"name": "nothing.txt"},
        {"name": "a.txt", "url": "s3://x/a", "contentType": "text/plain"},
    ]
    body = {"status": "COMPLETED", "artifacts": sent}
    record = worker.post(f"/tasks/{task_id}/result", json=body).json()
    kept = [{"name": "b.txt", "url": "https://host/b"}, {"name": "a.txt", "url": "s3://x/a"}]
    assert record["artifacts"] == kept
    assert producer.get(f"/tasks/{task_id}/result").json()["result"]["artifacts"] == kept


def test_trace_headers_are_kept(producer: httpx.Client, command: str) -> None:
    headers = {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01", "tracestate": "a=b"}
    made = producer.post("/tasks", json={"command": command, "payload": 1}, headers=headers).json()
    assert made["traceParent"] == headers["traceparent"]
    assert made["traceState"] == "a=b"


# --- creates


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"command": None}, "invalid command"),
        ({"command": ""}, "invalid command"),
        ({"command": "  "}, "invalid command"),
        ({"command": "x" * 257}, "invalid command"),
        ({"command": "a\u0001b"}, "invalid command"),
        ({"command": 7}, "invalid body"),
        ({"payload": None}, "invalid body"),
        ({"webhook": "ftp://host/x"}, "invalid webhook url"),
        ({"webhook": "no url"}, "invalid webhook url"),
        ({"webhook": "http://"}, "invalid webhook url"),
        ({"webhook": "http://10.0.0.1/"}, "invalid webhook url"),
        ({"webhook": "https://host/" + "x" * 2048}, "invalid webhook url"),
        ({"runAt": "tomorrow"}, "invalid 'runAt' (use RFC3339)"),
        ({"runAt": ""}, "invalid 'runAt' (use RFC3339)"),
        ({"runAt": 5}, "invalid body"),
        ({"delaySeconds": -1}, "invalid 'delaySeconds' (must be >= 0)"),
        ({"delaySeconds": 2147483648}, "invalid 'delaySeconds' (must be >= 0)"),
        ({"delaySeconds": 1.5}, "invalid body"),
        ({"delaySeconds": "1"}, "invalid body"),
        ({"priority": 2147483648}, "invalid priority"),
        ({"priority": -2147483649}, "invalid priority"),
        ({"priority": 1.5}, "invalid body"),
        ({"priority": True}, "invalid body"),
        ({"maxAttempts": 2147483648}, "invalid body"),
        ({"idempotencyKey": "k" * 513}, "invalid idempotencyKey"),
    ],
)
def test_create_refusals(
    producer: httpx.Client, command: str, fields: dict[str, Any], answer: str
) -> None:
    body = {"command": command, "payload": 1, **fields}
    expected = (400, "validation-error", answer)
    assert refusal(producer.post("/tasks", json=body)) == expected
    batch = producer.post("/tasks/batch", json=[body, {"command": command, "payload": 1}]).json()
    if fields == {"payload": None}:
        assert batch[0]["task"]["payload"] == "null"
    else:
        assert batch[0] == {"code": expected[1], "message": answer, "error": answer}
    assert batch[1]["task"]["command"] == command


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[]",
        b"null",
        b'"text"',
        b'{"command":"a"}',
        b'{"command":"a","payload":1} x',
        b'{"command":"a","payload":1}{}',
        b'{"command":"a","payload":01}',
        b'{"command":"a","payload":[1,]}',
        b'{"command":"a","payload":"\xff"}',
        b'{"command":"a","payload":1,"other":"\xff"}',
        b'{"command":"\xff","payload":1}',
        b'{"command":"a","payload":"\xed\xa0\x80"}',
        b'{"command":"a","payload":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"command":"a","payload":NaN}',
        b'{"command":"a","payload":1,"priority":1.0}',
        b'{"Command":"a","payload":1}',
    ],
)
def test_malformed_creates(producer: httpx.Client, body: bytes) -> None:
    status, code, message = refusal(producer.post("/tasks", content=body))
    assert (status, code) == (400, "validation-error")
    assert message == ("invalid command" if b"Command" in body else "invalid body")


def test_null_is_absent_and_unknown_members_pass(producer: httpx.Client, command: str) -> None:
    body = {
        "command": f"  {command} ",
        "payload": 1,
        "priority": None,
        "webhook": None,
        "maxAttempts": 0,
        "idempotencyKey": None,
        "runAt": None,
        "delaySeconds": None,
        "unknown": [1],
    }
    made = producer.post("/tasks", json=body).json()
    assert (made["command"], made["priority"], made["maxAttempts"]) == (command, 0, 5)


def test_payload_too_large(start_server: Callable[..., Server], command: str) -> None:
    server = start_server(LIMITS_PAYLOAD_BYTES="1000", LIMITS_BODY_BYTES="10000")
    producer = server.client("dev-producer")
    large = {"command": command, "payload": "x" * 999}
    expected = (413, "payload-too-large", "payload too large")
    assert refusal(producer.post("/tasks", json=large)) == expected
    assert producer.post("/tasks/batch", json=[large]).json()[0]["code"] == "payload-too-large"
    assert producer.post("/tasks", json={**large, "payload": "x" * 998}).status_code == 201
    over = producer.post("/tasks", content=b" " * 10_001)
    assert refusal(over) == (413, "payload-too-large", "request body too large")
    chunks = producer.post("/tasks", content=iter([b" " * 6000, b" " * 6000]))
    assert refusal(chunks)[0] == 413


def test_run_at_and_delay(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    later = create(producer, command, runAt="2099-01-02T03:04:05+01:00", delaySeconds=0)
    assert (later["status"], later["lastKnownLocation"]) == ("PENDING", "DELAYED_ZSET")
    assert create(producer, command, delaySeconds=50)["lastKnownLocation"] == "DELAYED_ZSET"
    past = create(producer, command, runAt="2001-01-01T00:00:00Z", delaySeconds=50)
    assert past["lastKnownLocation"] == "PENDING_LIST"
    assert claim(worker, command)["id"] == past["id"]
    assert worker.post("/tasks/claim", json={"commands": [command]}).status_code == 204


def test_idempotent_creates(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    key = str(uuid.uuid4())
    first = create(producer, command, idempotencyKey=key, priority=4)
    assert create(producer, command, idempotencyKey=key, priority=4) == first
    claim(worker, command)
    again = create(producer, command, idempotencyKey=key, priority=4)
    assert (again["id"], again["status"]) == (first["id"], "IN_PROGRESS")


@pytest.mark.parametrize(
    "change",
    [
        {"command": "other"},
        {"payload": {"a": 1}},
        {"priority": 1},
        {"maxAttempts": 9},
        {"delaySeconds": 1},
        {"runAt": "2030-01-01T00:00:00Z"},
        {"webhook": "https://example.com/other"},
    ],
)
def test_T30_same_key_with_other_content_is_refused(
    producer: httpx.Client, command: str, change: dict[str, Any]
) -> None:
    body = {"command": command, "payload": {}, "idempotencyKey": str(uuid.uuid4())}
    assert producer.post("/tasks", json=body).status_code == 201
    text = "idempotency key used with a different request"
    assert refusal(producer.post("/tasks", json={**body, **change})) == (409, "conflict", text)
    [item] = producer.post("/tasks/batch", json=[{**body, **change}]).json()
    assert item == {"code": "conflict", "message": text, "error": text}


def test_T28_concurrent_creates_with_one_key(server: Server, command: str) -> None:
    body = {"command": command, "payload": {}, "idempotencyKey": str(uuid.uuid4())}
    clients = [server.client("dev-producer") for _ in range(32)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda client: client.post("/tasks", json=body), clients))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    stats = clients[0].get(f"/admin/queues/{command}").json()
    assert stats["ready"] == 1


def test_batch_answers_in_the_shape_of_the_request(producer: httpx.Client, command: str) -> None:
    items = [{"command": command, "payload": n} for n in range(3)]
    bare = producer.post("/tasks/batch", json=items).json()
    assert [item["task"]["payload"] for item in bare] == ["0", "1", "2"]
    wrapped = producer.post("/tasks/batch", json={"tasks": items}).json()
    assert [item["task"]["payload"] for item in wrapped["results"]] == ["0", "1", "2"]
    ids = [item["task"]["id"] for item in (*bare, *wrapped["results"])]
    assert ids == sorted(ids)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_bad_item_is_refused_in_its_place(
    producer: httpx.Client, command: str, wrapped: bool
) -> None:
    good = {"command": command, "payload": 1}
    items = [good, 5, None, {"command": command, "payload": 2, "priority": "high"}, good]
    body = {"tasks": items} if wrapped else items
    answer = producer.post("/tasks/batch", json=body).json()
    results = answer["results"] if wrapped else answer
    assert ["task" in result for result in results] == [True, False, False, False, True]
    for result in results[1:4]:
        assert result["message"] == "invalid body"


@pytest.mark.parametrize(
    "body", [b"[]", b'{"tasks":[]}', b"{}", b"", b"7", b'[{"command":"a"}', b'{"tasks":{}}']
)
def test_malformed_batches(producer: httpx.Client, body: bytes) -> None:
    answer = refusal(producer.post("/tasks/batch", content=body))
    assert answer == (400, "validation-error", "invalid body")


def test_batch_limits(start_server: Callable[..., Server], command: str) -> None:
    server = start_server(LIMITS_CREATE_BATCH="2", LIMITS_CLAIM_BATCH="2", LIMITS_RESULT_BATCH="2")
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    items = [{"command": command, "payload": 1}] * 3
    text = "batch size exceeds maximum of 2"
    assert refusal(producer.post("/tasks/batch", json=items)) == (400, "validation-error", text)
    answer = worker.post("/tasks/claim/batch", json={"count": 3})
    assert refusal(answer) == (400, "validation-error", "count exceeds maximum of 2")
    answer = worker.post("/tasks/batch/results", json={"results": [{}] * 3})
    assert refusal(answer) == (400, "validation-error", text)


def test_key_twice_in_one_batch(producer: httpx.Client, command: str) -> None:
    item = {"command": command, "payload": 1, "idempotencyKey": str(uuid.uuid4())}
    first, second, other = producer.post(
        "/tasks/batch", json=[item, item, {**item, "payload": 2}]
    ).json()
    assert first["task"]["id"] == second["task"]["id"]
    assert other["code"] == "conflict"


def test_compat_create_status_and_lenient_replay(
    start_server: Callable[..., Server], command: str
) -> None:
    server = start_server(COMPAT_CREATE_STATUS="202", COMPAT_IDEMPOTENCY_REPLAY="lenient")
    producer = server.client("dev-producer")
    body = {"command": command, "payload": 1, "idempotencyKey": "k"}
    first = producer.post("/tasks", json=body)
    second = producer.post("/tasks", json={**body, "payload": 2})
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]


# --- reads


def test_T54_absent_tasks_are_404(producer: httpx.Client, command: str) -> None:
    for task_id in (ABSENT_ID, "nonsense", "%00", "%ff%fe", ABSENT_ID.upper() + "x"):
        assert refusal(producer.get(f"/tasks/{task_id}")) == (404, "not-found", "not found")
        answer = refusal(producer.get(f"/tasks/{task_id}/result?waitSeconds=30"))
        assert answer == (404, "not-found", "task not found")


@pytest.mark.parametrize("wait", ["", "?waitSeconds=0", "?waitSeconds=-1", "?waitSeconds=soon"])
def test_result_of_a_live_task(producer: httpx.Client, command: str, wait: str) -> None:
    task_id = create(producer, command)["id"]
    answer = producer.get(f"/tasks/{task_id}/result{wait}")
    assert refusal(answer) == (404, "not-found", "result not found")
    assert answer.json()["status"] == "PENDING"


def test_waiting_for_a_result(
    producer: httpx.Client, worker: httpx.Client, command: str, server: Server
) -> None:
    task_id = claimed(producer, worker, command)
    reader = server.client("dev-producer")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.get, f"/tasks/{task_id}/result?waitSeconds=60")
        worker.post(f"/tasks/{task_id}/result", json={"status": "COMPLETED", "result": 5})
        assert waiting.result(30).json()["result"]["result"] == 5


def test_the_wait_for_a_result_that_comes_during_the_stop_ends_at_once(tmp_path: Path) -> None:
    async def check(node: RestNode, client: httpx.AsyncClient) -> None:
        made = await client.post("/tasks", json={"command": "job", "payload": 1})
        node.app.stop()
        result = f"/tasks/{made.json()['id']}/result"
        answer = await client.get(f"{result}?waitSeconds=1")
        assert refusal(answer) == (503, "unavailable", "unavailable")
        assert refusal(await client.get(result)) == (404, "not-found", "result not found")

    in_node(tmp_path, check)


def test_the_wait_for_a_result_ends(producer: httpx.Client, command: str) -> None:
    task_id = create(producer, command)["id"]
    answer = producer.get(f"/tasks/{task_id}/result?waitSeconds=1")
    assert refusal(answer) == (404, "not-found", "result not found")
    assert answer.elapsed.total_seconds() >= 0.99  # its end is counted in whole milliseconds


@pytest.mark.parametrize("name", ["a/b", "mit Leerzeichen", "名前:x", "a%2Fb"])
def test_T20_T36_queue_statistics(
    producer: httpx.Client, worker: httpx.Client, command: str, name: str
) -> None:
    queue = f"{command} {name}"
    path = "/admin/queues/" + "".join(f"%{byte:02X}" for byte in queue.encode())
    zeros = {"command": queue, "ready": 0, "delayed": 0, "inProgress": 0, "dlq": 0}
    assert producer.get(path).json() == zeros
    for fields in ({}, {}, {"delaySeconds": 99}, {"maxAttempts": 1, "priority": 9}):
        create(producer, queue, **fields)
    dead = claim(worker, queue)["id"]
    worker.post(f"/tasks/{dead}/nack")
    claim(worker, queue)
    full = {"command": queue, "ready": 1, "delayed": 1, "inProgress": 1, "dlq": 1}
    assert producer.get(path).json() == full


def test_raft_status(producer: httpx.Client, worker: httpx.Client) -> None:
    for client in (producer, worker):
        assert client.get("/raft/status").content == b'{"enabled":false,"numGroups":0}'


# --- routing and transport


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/tasks"),
        ("PUT", "/tasks"),
        ("POST", "/nothing"),
        ("GET", "/tasks//result"),
        ("POST", f"/tasks/{ABSENT_ID}"),
        ("GET", f"/tasks/{ABSENT_ID}/heartbeat"),
        ("POST", f"/tasks/{ABSENT_ID}/result/x"),
        ("POST", f"/tasks/{ABSENT_ID}%2Fresult"),
        ("GET", "/admin/queues//"),
        ("GET", "/admin"),
        ("GET", ""),
        ("DELETE", "/raft/status"),
    ],
)
def test_unknown_routes(server: Server, method: str, path: str) -> None:
    answer = server.client(None).request(method, path)
    assert refusal(answer) == (404, "not-found", "not found")


def test_a_trailing_slash_changes_nothing(
    producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    made = producer.post("/tasks/", json={"command": command, "payload": 1})
    assert made.status_code == 201
    assert producer.get(f"/tasks/{made.json()['id']}/").json() == made.json()
    assert worker.post("/tasks/claim/", json={"commands": [command]}).status_code == 200
    assert producer.get("/raft/status/").status_code == 200
    assert httpx.get(str(producer.base_url.copy_with(path="/healthz/"))).status_code == 200


def test_open_routes(server: Server) -> None:
    base = f"http://{server.http}"
    assert httpx.get(f"{base}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{base}/readyz").json() == {"status": "ok"}
    scrape = httpx.get(f"{base}/metrics")
    assert scrape.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert httpx.get(f"{base}/v1/codeq/healthz").status_code == 404


def test_headers_over_32_kib(server: Server) -> None:
    client = server.client(None)
    answer = client.get("/raft/status", headers={"x-long": "x" * 33_000})
    assert answer.status_code == 431
    assert set(answer.json()) == {"code", "message", "error"}


def test_T66_metrics_count(producer: httpx.Client, worker: httpx.Client, command: str) -> None:
    ids = [create(producer, command)["id"] for _ in range(3)]
    create(producer, command, idempotencyKey=command)
    create(producer, command, idempotencyKey=command)
    claim(worker, command)
    claim(worker, command)
    worker.post(f"/tasks/{ids[0]}/result", json={"status": "COMPLETED"})
    worker.post(f"/tasks/{ids[1]}/result", json={"status": "FAILED", "error": "x"})
    text = httpx.get(str(producer.base_url.copy_with(path="/metrics"))).text
    label = f'command="{command}"'
    latency = "codeq_task_processing_latency_seconds"
    for line in (
        f"codeq_task_created_total{{{label}}} 4.0",
        f"codeq_task_claimed_total{{{label}}} 2.0",
        f'codeq_task_completed_total{{{label},status="COMPLETED"}} 1.0',
        f'codeq_task_completed_total{{{label},status="FAILED"}} 1.0',
        f'codeq_queue_depth{{{label},queue="ready"}} 2.0',
        f'codeq_queue_depth{{{label},queue="in_progress"}} 0.0',
        f"codeq_dlq_depth{{{label}}} 0.0",
        f'{latency}_bucket{{{label},le="+Inf",status="COMPLETED"}} 1.0',
        f'{latency}_count{{{label},status="COMPLETED"}} 1.0',
    ):
        assert line in text, line
    for name in ("codeq_commit_seconds_count", "codeq_live_tasks", "process_cpu_seconds_total"):
        assert f"\n{name} " in text, name
    assert "dev" not in re.findall(r'tenant\w*="(\w+)"', text)


# --- faults and overload


def in_node(tmp_path: Path, check: Callable[[RestNode, httpx.AsyncClient], Any]) -> None:
    """Runs ``check(node, client of a producer and worker)`` against a node of its own."""

    async def run() -> None:
        async with rest_node(tmp_path) as node:
            await check(node, await node.client("shop/p"))

    asyncio.run(run())


def test_T54_a_fault_reveals_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def check(node: RestNode, client: httpx.AsyncClient) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("the secret of the house")

        monkeypatch.setattr(node.shard, "get", fail)
        answer = await client.get(f"/tasks/{ABSENT_ID}")
        assert refusal(answer) == (500, "internal", "internal error")

    in_node(tmp_path, check)
    assert "the secret of the house" in caplog.text


def test_creates_are_refused_while_claims_go_on(tmp_path: Path) -> None:
    async def check(node: RestNode, client: httpx.AsyncClient) -> None:
        body = {"command": "job", "payload": 1}
        await client.post("/tasks", json=body)
        full = "the free space of the disk is down to its reserve"
        node.shard._free_bytes = -1
        node.shard._store.free_bytes = lambda: -1  # type: ignore[method-assign]
        for path, sent in (("/tasks", body), ("/tasks/batch", [body])):
            answer = await client.post(path, json=sent)
            assert refusal(answer) == (503, "unavailable", full)
            assert answer.headers["retry-after"] == "1"
        ready = await client.get("http://node/readyz")
        assert refusal(ready) == (503, "unavailable", "unavailable")
        assert (await client.get("http://node/healthz")).status_code == 200
        taken = await client.post("/tasks/claim", json={})
        done = await client.post(
            f"/tasks/{taken.json()['id']}/result", json={"status": "COMPLETED"}
        )
        assert done.status_code == 200

    in_node(tmp_path, check)


def test_T54_an_early_refusal_reaches_a_client_that_is_still_sending(server: Server) -> None:
    host, _, port = server.http.rpartition(":")
    connection = HTTPConnection(host, int(port))
    body = b" " * 2_000_000
    for path, status in (("/tasks", 401), ("/nowhere", 404), ("/tasks", 401)):
        connection.request("POST", f"/v1/codeq{path}", body, {"Authorization": "Bearer wrong"})
        answer = connection.getresponse()
        assert answer.status == status
        assert b'"code"' in answer.read()
    connection.close()


def test_bytes_in_hand_are_bounded_by_tenant(tmp_path: Path) -> None:
    async def check(node: RestNode, client: httpx.AsyncClient) -> None:
        in_flight = node.app.edge.in_flight
        body = {"command": "job", "payload": 1}
        in_flight.take("shop", 512 << 20)
        answer = await client.post("/tasks", json=body)
        assert refusal(answer) == (503, "unavailable", "too many bytes in hand")
        other = await node.client("other/p")
        assert (await other.post("/tasks", json=body)).status_code == 201
        in_flight.release("shop", 512 << 20)
        assert (await client.post("/tasks", json=body)).status_code == 201
        assert in_flight.total == 0

    in_node(tmp_path, check)


def test_a_stopping_node_is_unavailable(tmp_path: Path) -> None:
    async def check(node: RestNode, client: httpx.AsyncClient) -> None:
        node.app.stop()
        for path in ("/tasks", "/tasks/claim", f"/tasks/{ABSENT_ID}/heartbeat"):
            answer = await client.post(path, json={"command": "job", "payload": 1})
            assert refusal(answer) == (503, "unavailable", "unavailable")
        assert (await client.get("http://node/readyz")).status_code == 503

    in_node(tmp_path, check)
