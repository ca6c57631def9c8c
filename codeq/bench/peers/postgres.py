"""A task queue in PostgreSQL as people write it: one table, FOR UPDATE SKIP LOCKED, a partial index
over what waits; priorities, leases, attempts and stored results, in batches of its own best size.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from codeq.bench.client import PUBLISH_SECONDS, Client
from codeq.bench.plan import WINDOW, Role, Surface
from codeq.bench.target import Counters, processes_cpu_seconds, processes_written_bytes
from codeq.errors import CodeqError

NAME = "postgres"
BATCH, CALLS = 1000, 4
LEASE_SECONDS = 60
START_SECONDS = 30
PORT = 5432  # only names the socket; nothing listens on the network

SCHEMA = """
CREATE TABLE tasks (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    command text NOT NULL,
    priority int NOT NULL DEFAULT 0,
    payload bytea NOT NULL,
    state smallint NOT NULL DEFAULT 0,
    attempts int NOT NULL DEFAULT 0,
    worker text,
    lease_until timestamptz,
    result bytea,
    created_at timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz
);
CREATE INDEX waiting ON tasks (command, priority DESC, id) WHERE state = 0;
CREATE INDEX leased ON tasks (lease_until) WHERE state = 1;
"""
CREATE = "INSERT INTO tasks (command, payload) SELECT $1, unnest($2::bytea[])"
CLAIM = """
UPDATE tasks SET state = 1, attempts = attempts + 1, worker = $2,
    lease_until = now() + make_interval(secs => $3)
WHERE id IN (
    SELECT id FROM tasks WHERE command = $1 AND state = 0
    ORDER BY priority DESC, id LIMIT $4 FOR UPDATE SKIP LOCKED
)
RETURNING id, payload
"""
FINISH = """
UPDATE tasks SET state = 2, result = done.result, completed_at = now(), lease_until = NULL
FROM unnest($1::bigint[], $2::bytea[]) AS done (id, result)
WHERE tasks.id = done.id AND state = 1 AND worker = $3
"""
SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "autovacuum_naptime": "5s",
}


def surface() -> Surface:
    """The best batching that was found for it."""
    make = Role("postgres-produce", BATCH, CALLS, window=WINDOW * BATCH * CALLS)
    return Surface(NAME, make, Role("postgres-work", BATCH, CALLS))


def program(name: str) -> str:
    """Where one of its programs is; raises CodeqError when it is not installed."""
    found = shutil.which(name)
    if found is None:
        raise CodeqError("validation-error", f"--peer {NAME} needs {name} on the PATH")
    return found


class Server:
    """A cluster of its own. ``pid``: its first process."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder = folder
        self.pid = pid

    def address_of(self, _: Role) -> tuple[str, str]:
        return str(self.folder), "postgres"

    async def syncs(self) -> int:
        return 0  # it does not say

    async def counters(self, command: str) -> Counters:
        connection = await connect(str(self.folder))
        counted = "SELECT count(*), count(*) FILTER (WHERE state = 2) FROM tasks WHERE command = $1"
        created, completed = await connection.fetchrow(counted, command)
        await connection.close()
        return Counters(created, completed, completed)

    def cpu_seconds(self) -> float | None:
        return processes_cpu_seconds(self.pid)

    def written_bytes(self) -> int | None:
        return processes_written_bytes(self.pid)


async def connect(folder: str) -> Any:
    return await asyncpg.connect(host=folder, port=PORT, user="postgres", database="postgres")


@contextlib.asynccontextmanager
async def serve(scratch: Path, *, sync: bool) -> AsyncIterator[Server]:
    """A fresh cluster for as long as it is needed; ``sync`` as the server's synchronous_commit."""
    # Its own short folder: a socket's path may have only about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="codeq-pg-") as name:
        folder = Path(name)
        user = owner(folder)
        data = folder / "data"
        make = (program("initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-N")
        made = subprocess.run(
            make, cwd=folder, user=user, capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise CodeqError("internal", f"initdb failed: {made.stderr.strip()}")
        settings = {**SETTINGS, "synchronous_commit": "on" if sync else "off"}
        words = [word for pair in settings.items() for word in ("-c", "{}={}".format(*pair))]
        process = await asyncio.create_subprocess_exec(
            *(program("postgres"), "-D", str(data), "-k", str(folder), *words),
            cwd=folder,
            user=user,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            await prepare(str(folder))
            yield Server(folder, process.pid)
        finally:
            process.terminate()
            await process.wait()


def owner(folder: Path) -> str | None:
    """The user it runs as: it refuses to be root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            os.chown(folder, pwd.getpwnam(name).pw_uid, -1)
            return name
    raise CodeqError("validation-error", f"--peer {NAME} cannot run as root")


async def prepare(folder: str) -> None:
    """Waits for the server and makes the table."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            try:
                connection = await connect(folder)
                break
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.05)
    await connection.execute(SCHEMA)
    await connection.close()


class Creates:
    """One transaction a batch."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def play(self, ready: Callable[[], None]) -> None:
        role = self._client.role
        connections = [await connect(role.address) for _ in range(role.calls)]
        ready()
        await asyncio.gather(*(self._loop(connection) for connection in connections))
        for connection in connections:
            await connection.close()

    async def _loop(self, connection: Any) -> None:
        client, role = self._client, self._client.role
        create = await connection.prepare(CREATE)
        async for due_ns in client.calls():
            payloads = [msgspec.json.encode(client.payload(due_ns)) for _ in range(role.batch)]
            await create.fetch(role.command, payloads)
            client.acknowledged(due_ns, role.batch, 0)


class Claims:
    """Claims a batch, handles it, stores the results: two transactions."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._delivered = self._acknowledged = 0

    async def play(self, ready: Callable[[], None]) -> None:
        role = self._client.role
        connections = [await connect(role.address) for _ in range(role.calls)]
        working = [
            asyncio.ensure_future(self._loop(connection, f"worker-{number}"))
            for number, connection in enumerate(connections)
        ]
        ready()
        await self._client.drained()
        for task in working:
            task.cancel()
        await asyncio.wait(working)
        for connection in connections:
            await connection.close()

    async def _loop(self, connection: Any, worker: str) -> None:
        client, role = self._client, self._client.role
        claim, finish = await connection.prepare(CLAIM), await connection.prepare(FINISH)
        for _ in range(sys.maxsize):
            tasks = await claim.fetch(role.command, worker, LEASE_SECONDS, role.batch)
            if not tasks:
                # It has no waiting claim; telling every worker of every commit would cost more.
                await asyncio.sleep(PUBLISH_SECONDS / 10)
                continue
            self._delivered += len(tasks)
            results = [
                msgspec.json.encode(client.handle(msgspec.json.decode(task["payload"])))
                for task in tasks
            ]
            await finish.fetch([task["id"] for task in tasks], results, worker)
            self._acknowledged += len(tasks)
            client.worked(self._delivered, self._delivered, self._acknowledged)
