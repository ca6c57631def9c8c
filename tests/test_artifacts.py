"""Artifacts of results over REST: links, and files kept with the task."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from .conftest import PREFIX, Server, claimed, refusal, rest_node

TEXT = "grüße\n".encode()
BASE64 = base64.b64encode(TEXT).decode()


def finish(worker: httpx.Client, task_id: str, *artifacts: dict[str, Any]) -> httpx.Response:
    body = {"status": "COMPLETED", "result": 1, "artifacts": list(artifacts)}
    return worker.post(f"/tasks/{task_id}/result", json=body)


def test_links_and_files_are_shown_in_order_and_files_come_back(
    producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    task_id = claimed(producer, worker, command)
    name = 'a "b" ü?.txt'
    done = finish(
        worker,
        task_id,
        {"name": "link", "url": "https://elsewhere.example/x"},
        {"name": name, "contentBase64": BASE64, "contentType": "text/plain; charset=utf-8"},
        {"name": "neither"},
        {"name": "bare", "contentBase64": BASE64.rstrip("=")},
        {"name": "empty", "contentBase64": "", "contentType": "no type"},
    )
    path = f"{PREFIX}/tasks/{task_id}/artifacts/"
    links = [
        {"name": "link", "url": "https://elsewhere.example/x"},
        {"name": name, "url": path + quote(name, safe="")},
        {"name": "bare", "url": path + "bare"},
        {"name": "empty", "url": path + "empty"},
    ]
    assert done.json()["artifacts"] == links
    read = producer.get(f"/tasks/{task_id}/result").json()
    assert read["result"]["artifacts"] == links
    for link, content, kind in (
        (links[1], TEXT, "text/plain; charset=utf-8"),
        (links[2], TEXT, "application/octet-stream"),
        (links[3], b"", "application/octet-stream"),
    ):
        got = producer.get(link["url"].removeprefix(PREFIX))
        assert (got.status_code, got.content) == (200, content)
        assert got.headers["content-type"] == kind
        assert got.headers["content-disposition"] == "attachment"
        assert got.headers["x-content-type-options"] == "nosniff"
    for absent in ("link", "neither", "Bare", "bare%2F", "%2e%2e%2fbare"):
        gone = producer.get(f"/tasks/{task_id}/artifacts/{absent}")
        assert refusal(gone) == (404, "not-found", "not found")
    assert worker.get(f"/tasks/{task_id}/artifacts/bare").content == TEXT


@pytest.mark.parametrize(
    "artifact",
    [
        *({"name": name, "contentBase64": BASE64}
          for name in ("", "..", ".", "a/b", "a\\b", "/etc/passwd", "a\0", "a\n", "x" * 256)),
        {"name": "a", "contentBase64": "!!!"},
        {"name": "a", "contentBase64": "A"},
        {"name": "a", "contentBase64": "ü"},
        {"name": "a", "contentBase64": BASE64, "contentType": "text/plain\r\nX-Own: 1"},
        {"name": "a", "contentBase64": BASE64, "contentType": "x" * 256},
    ],
)  # fmt: skip
def test_T39_a_refused_artifact_stores_nothing(
    producer: httpx.Client, worker: httpx.Client, command: str, artifact: dict[str, Any]
) -> None:
    task_id = claimed(producer, worker, command)
    good = {"name": "good", "contentBase64": BASE64}
    answer = refusal(finish(worker, task_id, good, artifact))
    assert answer == (400, "validation-error", "invalid artifacts")
    assert producer.get(f"/tasks/{task_id}").json()["status"] == "IN_PROGRESS"
    gone = producer.get(f"/tasks/{task_id}/artifacts/good")
    assert refusal(gone) == (404, "not-found", "not found")


def test_two_files_of_one_name_are_refused(
    producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    task_id = claimed(producer, worker, command)
    twice = [{"name": "a", "contentBase64": BASE64}] * 2
    assert refusal(finish(worker, task_id, *twice))[2] == "invalid artifacts"


def test_artifacts_count_as_part_of_the_result(
    start_server: Callable[..., Server], command: str
) -> None:
    server = start_server(LIMITS_RESULT_BYTES="1000")
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    task_id = claimed(producer, worker, command)
    large = {"name": "a", "contentBase64": base64.b64encode(bytes(1000)).decode()}
    answer = refusal(finish(worker, task_id, large))
    assert answer == (413, "payload-too-large", "result too large")
    assert finish(worker, task_id, {"name": "a", "contentBase64": BASE64}).status_code == 200


def test_T32_T60_artifacts_of_a_batch_survive_a_restart_and_keep_to_their_tenant(
    tmp_path: Path,
) -> None:
    async def first() -> str:
        async with rest_node(tmp_path) as node:
            client = await node.client("shop/w")
            await client.post("/tasks", json={"command": "job", "payload": 1})
            task_id = str((await client.post("/tasks/claim", json={})).json()["id"])
            file = {"name": "a", "contentBase64": BASE64}
            item = {"taskId": task_id, "status": "COMPLETED", "artifacts": [file]}
            done = await client.post("/tasks/batch/results", json={"results": [item]})
            url = f"{PREFIX}/tasks/{task_id}/artifacts/a"
            [answer] = done.json()["results"]
            assert answer["result"]["artifacts"] == [{"name": "a", "url": url}]
            return task_id

    async def second(task_id: str) -> None:
        async with rest_node(tmp_path) as node:
            client = await node.client("shop/w")
            assert (await client.get(f"/tasks/{task_id}/artifacts/a")).content == TEXT
            other = await node.client("office/w")
            gone = await other.get(f"/tasks/{task_id}/artifacts/a")
            assert refusal(gone) == (404, "not-found", "not found")

    asyncio.run(second(asyncio.run(first())))
