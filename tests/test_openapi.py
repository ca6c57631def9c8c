"""The description of the API against the server it describes: every listed status of every route,
each reply against its schema; who is kept out of every route."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from codeq.config import load
from codeq.model import TopicBody
from codeq.server import openapi, pages, rest
from codeq.server.routes import ADMIN, JSON, OPEN, OPERATOR, TABLE, Route, refusals_of

from . import rest_table
from .conftest import Server
from .described import (
    APART,
    COMMAND,
    OTHER,
    ROUTES,
    TENANT,
    Document,
    World,
    had,
    one_shape,
    title,
    world,
)

DOCUMENT = Document()
EVERY_ROUTE = pytest.mark.parametrize("route", TABLE, ids=title)


# --- the document


@EVERY_ROUTE
def test_T54_each_listed_status_is_answered_and_each_reply_is_as_described(
    tmp_path: Path, route: Route
) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            for status in DOCUMENT.statuses(route):
                response = await had(route, status)(here, route)
                assert response.status_code == status, f"{status}: {response.text}"
                DOCUMENT.check(route, response)
                if status >= 400:
                    one_shape(response)

    asyncio.run(run())


@pytest.mark.parametrize("route", [one for one in TABLE if one.body_read], ids=title)
def test_T48_T54_a_body_that_is_cut_off_is_answered_as_listed(tmp_path: Path, route: Route) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            response = await here.cut(route)
            assert (response.status_code, response.json()["error"]) == (400, "invalid body")
            DOCUMENT.check(route, response)

    asyncio.run(run())


def test_T54_what_a_route_is_known_to_answer_is_listed() -> None:
    for (what, status), _ in APART.items():
        assert status in DOCUMENT.statuses(ROUTES[what]), f"{what}: list {status}"


def test_open_routes_answer_what_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            app = here.node.app
            listed = {route.path.encode() for route in OPEN}
            beside = {path for path in app.open if path.startswith((b"/docs/", b"/ui/"))}
            assert {*app.open, rest.METRICS} == listed | beside
            for route in OPEN:
                response = await here._client.get(route.path)
                assert response.status_code == 200
                [answer] = route.answers
                assert response.headers["content-type"].startswith(answer.media)
                if answer.media == JSON:
                    place = ("paths", route.path, "get", "responses", "200")
                    judge = DOCUMENT.judge(*place, "content", JSON, "schema")
                    judge.validate(response.json())
                long = await here._client.get(route.path, headers={"x-long": "x" * (33 << 10)})
                assert long.status_code == 431
                one_shape(long)
            monkeypatch.setattr(app._metrics, "prepare", lambda: 1 // 0)
            app.stop()
            for path, status in (("/metrics", 500), ("/readyz", 503)):
                response = await here._client.get(path)
                assert response.status_code == status
                one_shape(response)

    asyncio.run(run())


def test_every_example_is_as_its_schema_says() -> None:
    seen = 0
    for path, operations in DOCUMENT.whole["paths"].items():
        for method, operation in operations.items():
            at: tuple[str, ...] = ("paths", path, method)
            bodies = [((*at, "requestBody"), operation.get("requestBody", {}))]
            bodies += [
                ((*at, "responses", status), answer)
                for status, answer in operation["responses"].items()
            ]
            for place, body in bodies:
                content = body.get("content", {}).get(JSON, {})
                values = [content["example"]] if "example" in content else []
                values += [one["value"] for one in content.get("examples", {}).values()]
                for value in values:
                    DOCUMENT.judge(*place, "content", JSON, "schema").validate(value)
                    seen += 1
    assert seen > 300


def test_the_document_is_openapi_3_1_without_secrets() -> None:
    secret = "very-secret-" + "x" * 20
    flags = {"webhookHmacSecret": secret, "producerAuthProvider": "static"}
    config = load(flags={**flags, "producerAuthConfig": {"token": secret, "subject": "s"}})
    document = openapi.describe(config)
    text = json.dumps(document)
    assert document["openapi"] == "3.1.0" and secret not in text
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    ids = [one["operationId"] for ones in document["paths"].values() for one in ones.values()]
    assert len(ids) == len(set(ids)) == len(TABLE) + len(OPEN)


def test_bounds_and_statuses_are_those_of_the_settings() -> None:
    flags = {"limits.createBatch": 7, "limits.claimBatch": 8, "compat.createStatus": 202}
    document = openapi.describe(load(flags=flags))
    schemas = document["components"]["schemas"]
    assert schemas["RawCreateBatchBody"]["properties"]["tasks"]["maxItems"] == 7
    assert schemas["ClaimBatchBody"]["properties"]["count"]["maximum"] == 8
    statuses = document["paths"]["/v1/codeq/tasks"]["post"]["responses"]
    assert "202" in statuses and "201" not in statuses


def test_the_server_serves_its_description_and_a_page(server: Server) -> None:
    base = f"http://{server.http}"
    answer = httpx.get(f"{base}/openapi.json")
    assert answer.json()["paths"].keys() == DOCUMENT.whole["paths"].keys()
    page = httpx.get(f"{base}/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for route in (*TABLE, *OPEN):
        assert f"<code>{route.path}</code>" in page.text and route.summary in page.text
    served = [path for path in pages.replies(load()) if path.startswith((b"/docs", b"/ui"))]
    shipped = [path.name for path in Path(pages.__file__).with_name("ui").iterdir()]
    assert len(served) == len(shipped) >= 17, "what is shipped is served"
    for path in ("/docs/", "/ui/", *(path.decode() for path in served)):
        got = httpx.get(base + path)
        assert got.status_code == 200
        assert got.headers["x-content-type-options"] == "nosniff"
        policy = got.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        text = got.text.replace("http://www.w3.org/", "")  # the name of SVG, asked by nobody
        for word in ("http://", "https://", "style=", "onclick=", "innerHTML", "<script>"):
            assert word not in text, f"{path}: {word}"
    assert httpx.post(f"{base}/docs").status_code == 404


def names_a_tenant(route: Route) -> bool:
    return any(parameter.name == "tenant" for parameter in route.parameters)


@pytest.mark.parametrize("route", list(filter(names_a_tenant, TABLE)), ids=title)
def test_T36_what_can_be_no_tenant_is_refused_and_nothing_is_stored(
    tmp_path: Path, route: Route
) -> None:
    """Names stand in the keys of the store between NULs."""

    async def run() -> None:
        async with world(tmp_path) as here:
            before = list(here.node.shard._store.scan(b"", b"\xff"))
            for name in ("a", "Abc", "a%00b", f"{TENANT}%00", f"{TENANT}%0A", "a+b", "x" * 64):
                query = f"?deletionPolicy=Delete&tenant={name}"
                response = await here.send(route, query=query)
                assert (response.status_code, response.json()["error"]) == (400, "invalid tenant")
                DOCUMENT.check(route, response)
            assert list(here.node.shard._store.scan(b"", b"\xff")) == before
            empty = await here.send(route, query="?deletionPolicy=Delete&tenant=")
            assert empty.status_code != 400, empty.text

    asyncio.run(run())


# --- who is kept out


def of_class(*classes: Any) -> list[Route]:
    return [route for route in TABLE if route.access in classes]


@pytest.mark.parametrize("route", of_class(ADMIN, OPERATOR), ids=title)
def test_T34_no_header_makes_an_admin_on_any_route(tmp_path: Path, route: Route) -> None:
    claims = {
        "x-admin": "true",
        "x-role": "ADMIN",
        "role": "ADMIN",
        "x-codeq-role": "operator",
        "x-scopes": "codeq:admin codeq:operator",
        "x-forwarded-user": "admin",
        "x-tenant-id": TENANT,
        "x-env": "dev",
    }
    plain = ["plain", "scopeless", *(["admin"] if route.access is OPERATOR else [])]

    async def run() -> None:
        async with world(tmp_path) as here:
            for kind in plain:
                response = await here.send(route, token=f"{TENANT}/{kind}", headers=claims)
                assert response.status_code == 403
                assert response.json()["code"] == "permission-denied"
                DOCUMENT.check(route, response)

    asyncio.run(run())


async def shown(here: World) -> dict[str, Any]:
    """All that the first tenant can see of its things."""
    token = f"{TENANT}/admin"
    tasks = await here.ask("GET /admin/tasks", token=token)
    topic = await here.ask("GET /admin/topics/{topicName}", token=token)
    return {**tasks, **await here.ask("GET /admin/queues", token=token), "topic": topic}


@EVERY_ROUTE
def test_T32_T33_another_tenant_reaches_nothing_on_any_route(tmp_path: Path, route: Route) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            leased, waiting, ended = await here.leased(), await here.created(), await here.ended()
            ids = [leased, waiting, ended, await here.subscribed()]
            queues = [COMMAND, await here.dead()]
            await here.ask("PUT /admin/topics/{topicName}")
            before = await shown(here)
            for thing in ids:
                for queue in queues:
                    body = of_another(route, leased, queue)
                    response = await here.send(
                        *(route, body),
                        token=f"{OTHER}/admin",
                        query=f"?tenant={TENANT}&deletionPolicy=Delete",
                        id=thing,
                        command=queue,
                    )
                    DOCUMENT.check(route, response)
                    if "{id}" in route.path:
                        assert response.status_code == 404, response.text
                    elif route is ROUTES["POST /tasks/batch/results"]:
                        assert [one["code"] for one in response.json()["results"]] == ["not-found"]
                    else:
                        assert not any(one in response.text for one in (*ids, TENANT))
            assert await shown(here) == before

    asyncio.run(run())


def of_another(route: Route, task_id: str, queue: str) -> Any:
    """A body that would reach the tenant's things if only the tenant were not looked at."""
    if route.takes is TopicBody:
        return route.sample
    body = {**(route.sample or {}), "workerId": "worker-1", "waitSeconds": 0}
    if "results" in body:
        return {"results": [{"taskId": task_id, "status": "COMPLETED"}], "workerId": "worker-1"}
    if route.path.endswith("/cleanup"):
        body["before"] = "2099-01-01T00:00:00Z"
    if "commands" in body:
        body["commands"] = [queue]
    return body


def test_the_tables_in_the_docs_are_those_of_the_routes() -> None:
    text = rest_table.DOCUMENT.read_text()
    assert rest_table.with_tables(text) == text, "run python -m tests.rest_table"
    for route in (*TABLE, *OPEN):
        for row in refusals_of(route):
            assert f"`{openapi.text_of(row)}`" in text


def test_T43_only_white_space_is_trimmed_from_the_name_of_a_queue(tmp_path: Path) -> None:
    async def run() -> None:
        async with world(tmp_path) as here:
            await here.created()
            route = ROUTES["GET /admin/queues/{command}"]
            trimmed = await here.send(route, command="%0B%E3%80%80send%C2%85")
            assert trimmed.json()["ready"] == 1
            for separator in ("%1C", "%1D", "%1E", "%1F"):
                refused = await here.send(route, command=f"{separator}send")
                assert refused.status_code == 400
                DOCUMENT.check(route, refused)
            claim = {"commands": ["\x1csend"]}
            nothing = await here.send(ROUTES["POST /tasks/claim"], claim)
            assert nothing.status_code == 204

    asyncio.run(run())
