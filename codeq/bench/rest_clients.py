"""The REST roles of the load bench.

The clients share the machine with the server, so theirs must cost little: the HTTP clients that are
pleasant to use take several times the server's own CPU for a request. This one speaks just as much
HTTP as the bench needs, on connections that stay open.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from codeq.bench.client import Client

WAIT_SECONDS = 10
CREATED_STATUS = (200, 201, 202)


class Connection:
    """POST requests, one after the other, over one connection."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, token: str
    ) -> None:
        self._reader, self._writer = reader, writer
        self._head = f"HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n"

    @classmethod
    async def open(cls, address: str, token: str) -> Connection:
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host.strip("[]"), int(port)), address, token)

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        head = f"POST /v1/codeq{path} {self._head}Content-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        status = int(answer[9:12])
        if status == 204:
            return status, b""
        length = answer.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        return status, await self._reader.readexactly(int(length))

    def close(self) -> None:
        self._writer.close()


async def connections(client: Client) -> list[Connection]:
    role = client.role
    return [await Connection.open(role.address, role.token) for _ in range(role.calls)]


class RestCreates:
    """POST /tasks, or /tasks/batch."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def play(self, ready: Callable[[], None]) -> None:
        client = self._client
        opened = await connections(client)
        ready()
        if client.role.per_second:
            free: asyncio.Queue[Connection] = asyncio.Queue()
            for connection in opened:
                free.put_nowait(connection)
            await client.schedule(lambda due_ns: self._when_free(free, due_ns))
        else:
            await asyncio.gather(*(self._loop(connection) for connection in opened))
        for connection in opened:
            connection.close()

    async def _when_free(self, free: asyncio.Queue[Connection], due_ns: int) -> None:
        connection = await free.get()
        await self._call(connection, due_ns)
        free.put_nowait(connection)

    async def _loop(self, connection: Connection) -> None:
        async for due_ns in self._client.calls():
            await self._call(connection, due_ns)

    async def _call(self, connection: Connection, due_ns: int) -> None:
        client, role = self._client, self._client.role
        tasks = [
            {"command": role.command, "payload": client.payload(due_ns)} for _ in range(role.batch)
        ]
        if role.batch == 1:
            status, _ = await connection.post("/tasks", msgspec.json.encode(tasks[0]))
        else:
            status, _ = await connection.post("/tasks/batch", msgspec.json.encode(tasks))
        made = role.batch if status in CREATED_STATUS else 0
        client.acknowledged(due_ns, made, role.batch - made)


class RestClaims:
    """POST /tasks/claim and /tasks/{id}/result, or the batch routes of both."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._finished = 0
        self._acknowledged = 0
        role = client.role
        wish: dict[str, Any] = {"commands": [role.command], "waitSeconds": WAIT_SECONDS}
        if role.batch > 1:
            wish["count"] = role.batch
        self._wish = msgspec.json.encode(wish)

    async def play(self, ready: Callable[[], None]) -> None:
        client = self._client
        opened = await connections(client)
        one = self._single if client.role.batch == 1 else self._batch
        working = [asyncio.ensure_future(self._loop(one, connection)) for connection in opened]
        ready()
        await client.drained()
        for task in working:
            task.cancel()
        await asyncio.wait(working)
        for connection in opened:
            connection.close()

    async def _loop(self, one: Callable[[Connection], Any], connection: Connection) -> None:
        for _ in range(sys.maxsize):
            await one(connection)
            self._client.worked(self._finished, self._finished, self._acknowledged)

    async def _single(self, connection: Connection) -> None:
        status, answer = await connection.post("/tasks/claim", self._wish)
        if status != 200:
            self._client.refused += status != 204
            return
        task = msgspec.json.decode(answer)
        result = self._client.handle(msgspec.json.decode(task["payload"]))
        self._finished += 1
        body = msgspec.json.encode({"status": "COMPLETED", "result": result})
        status, _ = await connection.post(f"/tasks/{task['id']}/result", body)
        self._answered(1, 1 if status == 200 else 0)

    async def _batch(self, connection: Connection) -> None:
        status, answer = await connection.post("/tasks/claim/batch", self._wish)
        if status != 200:
            self._client.refused += status != 204
            return
        tasks = msgspec.json.decode(answer)["tasks"]
        results = [
            {
                "taskId": task["id"],
                "status": "COMPLETED",
                "result": self._client.handle(msgspec.json.decode(task["payload"])),
            }
            for task in tasks
        ]
        self._finished += len(tasks)
        body = msgspec.json.encode({"results": results})
        status, answer = await connection.post("/tasks/batch/results", body)
        items = msgspec.json.decode(answer)["results"] if status == 200 else []
        self._answered(len(tasks), sum("result" in item for item in items))

    def _answered(self, sent: int, accepted: int) -> None:
        self._acknowledged += accepted
        self._client.refused += sent - accepted
