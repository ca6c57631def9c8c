"""The description of the API as a judge of replies, and a node on which every route can be brought
to each of its answers."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from jsonschema import Draft202012Validator, FormatChecker
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from codeq.config import load
from codeq.errors import SLUGS
from codeq.model import PREFIX
from codeq.server import openapi
from codeq.server.auth import SCOPE_ADMIN, SCOPE_OPERATOR, WORKER_SCOPES, AuthError, Principal
from codeq.server.routes import TABLE, Route

from .conftest import ABSENT_ID, RestNode, Tokens, rest_node

TENANT, OTHER = "tenant-a", "tenant-b"
COMMAND = "send"
#: The file of the task that ``World.ended`` ends
FILE = "report.txt"
#: The variable parts of a path, unless others are wanted
NAMES = {"id": ABSENT_ID, "command": COMMAND, "name": FILE, "topicName": COMMAND}
#: Statuses that the slug alone does not give
OF_THE_TRANSPORT = (408, 431)


def title(route: Route) -> str:
    return f"{route.method} {route.path.removeprefix(PREFIX)}"


class Document:
    """The description, and whether replies are as it says."""

    def __init__(self) -> None:
        self.whole = openapi.describe(load())
        resource = DRAFT202012.create_resource(self.whole)
        self._registry = Registry().with_resource("urn:api", resource)

    def statuses(self, route: Route) -> list[int]:
        operation = self.whole["paths"][route.path][route.method.lower()]
        return [int(status) for status in operation["responses"]]

    def judge(self, *place: str) -> Draft202012Validator:
        """What says whether a value is as the schema at this place."""
        pointer = "/".join(part.replace("~", "~0").replace("/", "~1") for part in place)
        return Draft202012Validator(
            {"$ref": f"urn:api#/{pointer}"},
            registry=self._registry,
            format_checker=FormatChecker(),
        )

    def check(self, route: Route, response: httpx.Response) -> None:
        """Fails when the reply is none that the route may give, or when its schema would also take
        another."""
        status = str(response.status_code)
        operation = self.whole["paths"][route.path][route.method.lower()]
        assert status in operation["responses"], f"{title(route)}: {status} is not listed"
        listed = operation["responses"][status]
        for name, header in listed["headers"].items():
            assert name in response.headers, f"{title(route)} {status}: no {name}"
            if header["schema"]["type"] == "integer":
                assert int(response.headers[name]) >= header["schema"]["minimum"]
        if "application/json" not in listed.get("content", {}):
            return
        assert response.headers["content-type"] == "application/json; charset=utf-8"
        place = ("paths", route.path, route.method.lower(), "responses", status)
        judge = self.judge(*place, "content", "application/json", "schema")
        reply = response.json()
        judge.validate(reply)
        for other in mutated(reply):
            assert not judge.is_valid(other), f"{title(route)} {status}: {other} passes too"


def mutated(value: Any) -> Iterator[Any]:
    """The reply with one member renamed, added, or of another type, at every depth. What is any
    JSON value by its nature has no members."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from ([*value[:index], other, *value[index + 1 :]] for other in mutated(item))
    if not isinstance(value, dict) or value == {"sent": True}:
        return
    yield {**value, "more": 1}
    for name, member in value.items():
        others = copy.copy(value)
        del others[name]
        yield {**others, f"{name}X": member}
        if member != {"sent": True}:
            yield {**others, name: "x" if isinstance(member, dict | list) else {}}
        yield from ({**others, name: other} for other in mutated(member))


class Provider(Tokens):
    """Tokens "tenant/kind": all, plain (a worker's scopes), admin, scopeless; and some that end
    badly."""

    def identify(self, token: str) -> Principal:
        if token == "fault":
            raise RuntimeError("a fault was injected")
        if token == "away":
            raise AuthError("unavailable", "token keys cannot be fetched")
        tenant, _, kind = token.partition("/")
        scopes = {
            "all": WORKER_SCOPES | {SCOPE_ADMIN, SCOPE_OPERATOR},
            "admin": WORKER_SCOPES | {SCOPE_ADMIN},
            "plain": WORKER_SCOPES,
            "scopeless": frozenset({"codeq:none"}),
        }
        return Principal("s", scopes[kind], ["*"], {"tid": tenant})


class World:
    """A node with something of every kind."""

    def __init__(self, node: RestNode, client: httpx.AsyncClient) -> None:
        self.node = node
        self._client = client
        self._made = 0

    async def send(
        self,
        route: Route,
        body: Any = None,
        *,
        token: str | None = f"{TENANT}/all",
        query: str = "",
        headers: dict[str, str] | None = None,
        **variables: str,
    ) -> httpx.Response:
        """One request; without a body the sample of the route, bytes as they are."""
        given = {**NAMES, **variables}
        if body is None:
            body = unhurried(route.sample)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {} if token is None else {"authorization": f"Bearer {token}"}
        return await self._client.request(
            route.method,
            route.path.format(**given) + query,
            content=content if route.body_read else None,
            headers={**sent, **(headers or {})},
        )

    async def ask(self, what: str, body: Any = None, **more: Any) -> dict[str, Any]:
        """The reply of a route by its title, which must be well."""
        response = await self.send(ROUTES[what], body, **more)
        assert response.is_success, response.text
        reply: dict[str, Any] = response.json()
        return reply

    async def created(self, **fields: Any) -> str:
        """The id of a new task."""
        body = {"command": COMMAND, "payload": {}, **fields}
        return str((await self.ask("POST /tasks", body))["id"])

    async def leased(self, **fields: Any) -> str:
        """The id of a task that worker-1 holds; of a queue of its own, so that it is this one."""
        self._made += 1
        command = f"{COMMAND}-{self._made}"
        await self.created(command=command, **fields)
        body = {"commands": [command], "workerId": "worker-1"}
        return str((await self.ask("POST /tasks/claim", body))["id"])

    async def ended(self) -> str:
        """The id of a task that has ended with a file."""
        task_id = await self.leased()
        files = [{"name": FILE, "contentBase64": "aGVsbG8"}]
        body = {"status": "COMPLETED", "result": {"sent": True}, "artifacts": files}
        await self.ask("POST /tasks/{id}/result", body, id=task_id)
        return task_id

    async def dead(self) -> str:
        """The command of a queue with a dead letter."""
        task_id = await self.leased(maxAttempts=1)
        await self.ask("POST /tasks/{id}/nack", {"reason": "broken"}, id=task_id)
        return f"{COMMAND}-{self._made}"

    async def subscribed(self) -> str:
        body = {"eventTypes": [COMMAND]}
        return str((await self.ask("POST /workers/subscriptions", body))["subscriptionId"])

    async def stalled(self, route: Route) -> httpx.Response:
        """The answer to a request whose body does not come."""
        waits = asyncio.Event()

        async def receive() -> Any:
            waits.set()
            await asyncio.Event().wait()

        call = asyncio.create_task(self._answer(route, receive))
        await waits.wait()
        self.node.app.cut()
        return await call

    async def cut(self, route: Route) -> httpx.Response:
        """The answer to a request whose body ends early, or has malformed chunks."""

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        return await self._answer(route, receive)

    async def _answer(self, route: Route, receive: Callable[[], Awaitable[Any]]) -> httpx.Response:
        path = route.path.format(**NAMES)
        scope = {
            "type": "http",
            "method": route.method,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {TENANT}/all".encode())],
        }
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await self.node.app(scope, receive, send)
        return httpx.Response(
            sent[0]["status"], headers=sent[0]["headers"], content=sent[1]["body"]
        )


def unhurried(sample: Any) -> Any:
    """The sample of a route, without its wait."""
    return {**sample, "waitSeconds": 0} if "waitSeconds" in (sample or {}) else sample or {}


ROUTES = {title(route): route for route in TABLE}


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    limits = {
        f"rateLimit.{scope}.{key}": value
        for scope in ("producer", "worker", "admin")
        for key, value in (("requestsPerMinute", 1), ("burstSize", 30))
    }
    flags = {"backupDir": str(folder / "backups"), **limits}
    async with rest_node(folder, Provider(), flags) as node:
        transport = httpx.ASGITransport(app=node.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
            yield World(node, client)


# --- how each answer is had ----------------------------------------------------------------------

Had = Callable[[World, Route], Awaitable[httpx.Response]]


async def bad_request(world: World, route: Route) -> httpx.Response:
    if route.takes is not None:
        return await world.send(route, b"{")
    if route.body_read:
        return await world.cut(route)
    if "{command}" in route.path:
        return await world.send(route, command="%20")
    if any(parameter.name == "limit" for parameter in route.parameters):
        return await world.send(route, query="?limit=0")
    return await world.send(route, query="?tenant=NOT-ONE")


async def until_limited(world: World, route: Route) -> httpx.Response:
    for _ in range(40):
        response = await world.send(route)
        if response.status_code == 429:
            break
    return response


#: Those that are had alike on every route
ALIKE: dict[int, Had] = {
    200: lambda world, route: world.send(route),
    201: lambda world, route: world.send(route),
    400: bad_request,
    401: lambda world, route: world.send(route, token=None),
    403: lambda world, route: world.send(route, token="NO TENANT/all".replace(" ", "-")),
    404: lambda world, route: world.send(route),
    408: lambda world, route: world.stalled(route),
    422: lambda world, route: world.send(route, topicName="-"),
    413: lambda world, route: world.send(route, headers={"content-length": "99999999"}),
    429: until_limited,
    431: lambda world, route: world.send(route, headers={"x-long": "x" * (33 << 10)}),
    500: lambda world, route: world.send(route, token="fault"),
    503: lambda world, route: world.send(route, token="away"),
}


async def key_conflict(world: World, route: Route) -> httpx.Response:
    await world.created(idempotencyKey="k")
    return await world.send(route, {"command": COMMAND, "payload": 2, "idempotencyKey": "k"})


async def some_created(world: World, route: Route) -> httpx.Response:
    return await world.send(route, {"tasks": [{"command": COMMAND, "payload": 1}, 3]})


async def something_claimed(world: World, route: Route) -> httpx.Response:
    await world.created()
    return await world.send(route)


async def of_created(world: World, route: Route) -> httpx.Response:
    return await world.send(route, id=await world.created())


async def of_leased(world: World, route: Route) -> httpx.Response:
    return await world.send(route, id=await world.leased())


async def of_ended(world: World, route: Route) -> httpx.Response:
    return await world.send(route, id=await world.ended())


async def some_results(world: World, route: Route) -> httpx.Response:
    known = {"taskId": await world.leased(), "status": "COMPLETED", "result": {"sent": True}}
    return await world.send(route, {"results": [known, {**known, "taskId": ABSENT_ID}]})


async def work_told(world: World, route: Route) -> httpx.Response:
    await world.created()
    return await world.send(route, id=await world.subscribed())


async def some_dead(world: World, route: Route) -> httpx.Response:
    return await world.send(route, command=await world.dead())


async def twice(world: World, route: Route) -> httpx.Response:
    await world.send(route)
    return await world.send(route)


async def topic_read(world: World, route: Route) -> httpx.Response:
    await world.ask("PUT /admin/topics/{topicName}")
    return await world.send(route)


async def of_new_topic(world: World, route: Route) -> httpx.Response:
    return await world.send(route, topicName="new")


async def topic_gone(world: World, route: Route, **variables: str) -> httpx.Response:
    return await world.send(route, query="?deletionPolicy=Delete", **variables)


async def with_result(world: World, route: Route) -> httpx.Response:
    body = {
        "status": "COMPLETED",
        "workerId": "worker-1",
        "result": {"sent": True},
        "artifacts": [{"name": FILE, "contentBase64": "aGVsbG8"}],
    }
    return await world.send(route, body, id=await world.leased())


#: The others, by route and status
APART: dict[tuple[str, int], Had] = {
    ("POST /tasks", 409): key_conflict,
    ("POST /tasks/batch", 200): some_created,
    ("POST /tasks/{id}/cancel", 200): of_created,
    ("POST /tasks/{id}/cancel", 409): of_leased,
    ("POST /tasks/claim", 200): something_claimed,
    ("POST /tasks/claim", 204): lambda world, route: world.send(route),
    ("POST /tasks/claim/batch", 200): something_claimed,
    ("POST /tasks/claim/batch", 204): lambda world, route: world.send(route),
    **{(f"POST /tasks/{{id}}/{call}", 200): of_leased for call in ("heartbeat", "abandon", "nack")},
    **{
        (f"POST /tasks/{{id}}/{call}", 409): of_created
        for call in ("heartbeat", "abandon", "nack", "result")
    },
    ("POST /tasks/{id}/result", 200): with_result,
    ("POST /tasks/batch/results", 200): some_results,
    ("POST /workers/subscriptions/{id}/heartbeat", 200): work_told,
    ("GET /tasks/{id}", 200): of_leased,
    ("GET /tasks/{id}/result", 200): of_ended,
    ("GET /tasks/{id}/artifacts/{name}", 200): of_ended,
    ("GET /admin/queues", 200): something_claimed,
    ("GET /admin/tasks", 200): something_claimed,
    **{
        (f"{what}", 200): some_dead
        for what in ("GET /admin/queues/{command}/dead", "GET /admin/queues/{command}")
    },
    ("POST /admin/backup", 409): twice,
    ("PUT /admin/topics/{topicName}", 200): twice,
    ("PUT /admin/topics/{topicName}", 201): of_new_topic,
    ("GET /admin/topics/{topicName}", 200): topic_read,
    ("GET /admin/topics/{topicName}", 404): of_new_topic,
    ("DELETE /admin/topics/{topicName}", 204): topic_gone,
    ("DELETE /admin/topics/{topicName}", 400): lambda world, route: world.send(route),
    ("DELETE /admin/topics/{topicName}", 422): lambda world, route: topic_gone(
        world, route, topicName="-"
    ),
}


def had(route: Route, status: int) -> Had:
    found = APART.get((title(route), status)) or ALIKE.get(status)
    assert found, f"say in APART how {title(route)} answers {status}"
    return found


def one_shape(response: httpx.Response) -> None:
    """Fails unless the reply is an error in the one shape, with the status of its slug."""
    body = response.json()
    assert body["error"] == body["message"]
    known, _ = SLUGS[body["code"]]
    assert response.status_code == known or response.status_code in OF_THE_TRANSPORT, body
