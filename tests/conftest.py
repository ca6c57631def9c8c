"""A real server for the tests of the edges and of the clients.

``server`` is one development server for the whole run (tenant dev, tokens dev-producer and
dev-worker); tests keep apart by commands of their own (fixture ``command``). ``start_server``
starts servers with settings of their own. ``rest_node`` runs the REST application and a real shard
inside the test, with as many tokens as it wants. ``node`` is the engine room alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import settings

from codeq.config import Config, load
from codeq.engine.clock import Clock
from codeq.engine.shard import Shard
from codeq.server.app import LoopRunner, shard_settings
from codeq.server.auth import WORKER_SCOPES, Auth, AuthError, Principal, Provider
from codeq.server.limits import Limits
from codeq.server.metrics import Metrics
from codeq.server.rest import RestApp
from codeq.server.streams import InFlight

from .node import Node

# How long an example takes says nothing of what is tested.
settings.register_profile("codeq", deadline=None)
settings.load_profile("codeq")

ROOT = Path(__file__).resolve().parent.parent
#: A trap or an invariant as it is named on the command line: -k T1
NUMBERED = re.compile(r"\b([TI]\d+)\b")
START_SECONDS = 30
STOP_SECONDS = 30
PREFIX = "/v1/codeq"
ANY_PORT = "127.0.0.1:0"
#: So long a server is watched that has nothing to do, and what that may cost beyond the machine's
#: own price of waking up
IDLE_SECONDS, IDLE_CPU_MS_MAX = 5, 30
#: An id that no server makes
ABSENT_ID = "01900000-0000-7000-8000-000000000000"


def pytest_configure(config: pytest.Config) -> None:
    """``-k T1`` finds the tests of T1, not those of T17 too."""
    config.option.keyword = NUMBERED.sub(r"\1_", config.option.keyword)


class Server:
    """A running ``codeq serve``. Addresses are "host:port", or "off"."""

    def __init__(self, folder: Path, arguments: list[str], environ: dict[str, str]) -> None:
        self.folder = folder
        self.arguments = arguments
        self.environ = environ
        self.stderr_path = folder / "stderr.txt"
        self._clients: list[httpx.Client] = []
        self._launch()

    def start(self) -> None:
        """Starts once more after ``terminate`` or ``kill``, on the same folder."""
        self._close_output()
        self._launch()

    def _launch(self) -> None:
        self.process = launch(self.arguments, self.environ, self.stderr_path)
        line = read_line(self.process)
        if not line.startswith("ready "):
            self.process.wait(STOP_SECONDS)
            self._close_output()
            pytest.fail(f"no ready line: {line!r}\n{self.stderr_path.read_text()}")
        self.ready_line = line
        parts = dict(part.split("=", 1) for part in line.split()[1:])
        self.http, self.producer, self.worker = parts["http"], parts["producer"], parts["worker"]
        self.pid = int(parts["pid"])

    def client(self, token: str | None) -> httpx.Client:
        """An HTTP client below the prefix that sends this token."""
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        client = httpx.Client(
            base_url=f"http://{self.http}{PREFIX}", headers=headers, timeout=START_SECONDS
        )
        self._clients.append(client)
        return client

    def terminate(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal and waits for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """kill -9; ``start`` goes on with the same folder, on new ports where port 0 was asked."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.kill()
        self._close_output()

    def _close_output(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()


#: The last four are what the sanitizers of ci/sanitize want
INHERITED = ("PATH", "HOME", "LANG", "LD_PRELOAD", "PYTHONMALLOC", "ASAN_OPTIONS", "UBSAN_OPTIONS")


def launch(
    arguments: list[str],
    environ: dict[str, str],
    stderr_path: Path,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[str]:
    """Starts ``python -m codeq`` with only these settings in its environment."""
    base = {name: os.environ[name] for name in INHERITED if name in os.environ}
    with stderr_path.open("a") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "codeq", *arguments],
            cwd=ROOT,
            env={**base, **environ},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line of standard output; empty at its end. Fails the test when none comes."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(START_SECONDS):
            process.kill()
            pytest.fail("the server said nothing")
    return process.stdout.readline().strip()


def dev_arguments(folder: Path) -> list[str]:
    """``serve`` in development mode on free ports, data in ``folder``."""
    return [
        *("serve", "--dev", "--data", str(folder / "data"), "--http", ANY_PORT),
        *("--producer-stream", ANY_PORT, "--worker-stream", ANY_PORT),
    ]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One development server for all tests."""
    folder = tmp_path_factory.mktemp("server")
    running = Server(folder, dev_arguments(folder), {"LIMITS_DISK_RESERVE_BYTES": "0"})
    yield running
    running.close()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``start_server(LIMITS_CREATE_BATCH="10", ...)``: a development server of its own whose
    settings come from these environment names. All are ended after the test."""
    running: list[Server] = []

    def start(**environ: str) -> Server:
        folder = tmp_path / f"server{len(running)}"
        folder.mkdir()
        settings = {"LIMITS_DISK_RESERVE_BYTES": "0", **environ}
        running.append(Server(folder, dev_arguments(folder), settings))
        return running[-1]

    yield start
    for one in running:
        one.close()


@pytest.fixture
def producer(server: Server) -> httpx.Client:
    """REST with the producer's token of the shared server."""
    return server.client("dev-producer")


@pytest.fixture
def worker(server: Server) -> httpx.Client:
    """REST with the worker's token of the shared server."""
    return server.client("dev-worker")


@pytest.fixture
def command() -> str:
    """A command no other test uses."""
    return f"command-{uuid.uuid4()}"


class Tokens:
    """A provider of many tokens: "tenant/subject" with all rights of its role in that tenant."""

    def __init__(self, **more: Principal) -> None:
        self.known: dict[str, Principal] = dict(more)

    def identify(self, token: str) -> Principal:
        if token in self.known:
            return self.known[token]
        tenant, slash, subject = token.partition("/")
        if not slash:
            raise AuthError("unauthenticated", "invalid token")
        return Principal(subject, WORKER_SCOPES, ["*"], {"tid": tenant})


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """An engine, its store and a fake clock. A fault of it that no test expected is a failure."""
    node = Node(tmp_path / "data")
    yield node
    assert node.faults == []
    node.close()


@pytest.fixture(params=[False, True], ids=["running", "restarted"])
def again(request: pytest.FixtureRequest, node: Node) -> Callable[[], None]:
    """A restart in between, or none."""
    return node.restart if request.param else node.settle


class RestNode:
    """The REST application over a real shard, inside the test's loop."""

    def __init__(self, app: RestApp, shard: Shard, stack: AsyncExitStack) -> None:
        self.app = app
        self.shard = shard
        self._stack = stack

    async def client(self, token: str, **headers: str) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app),
            base_url=f"http://node{PREFIX}",
            headers={"authorization": f"Bearer {token}", **headers},
        )
        return await self._stack.enter_async_context(client)


@asynccontextmanager
async def rest_node(
    folder: Path, tokens: Provider | None = None, flags: dict[str, Any] | None = None
) -> AsyncIterator[RestNode]:
    """A RestNode in which every "tenant/subject" is a token of both roles."""
    defaults = {"limits.diskReserveBytes": 0, "persistenceConfig.path": str(folder / "data")}
    config: Config = load(flags={**defaults, **(flags or {})})
    clock = Clock()
    runner = LoopRunner(clock)
    faults: list[str] = []
    shard = Shard.open(shard_settings(config), clock, runner, faults.append)
    known = tokens or Tokens()
    limits = Limits(config.rate_limit, clock)
    metrics = Metrics(shard, limits)
    in_flight = InFlight(config.limits.inflight_bytes)
    app = RestApp(shard, Auth(known, known), config, metrics, in_flight, limits)
    async with AsyncExitStack() as stack:
        yield RestNode(app, shard, stack)
    drained = asyncio.get_running_loop().create_future()
    shard.drain(lambda: drained.set_result(None))
    await drained
    runner.stop()
    shard.close()
    assert not faults


def refusal(response: httpx.Response) -> tuple[int, str, str]:
    """(status, code, message) of an error, after a look at its shape."""
    body = json.loads(response.content)
    assert body["error"] == body["message"]
    return response.status_code, body["code"], body["message"]


def create(producer: httpx.Client, command: str, **fields: Any) -> dict[str, Any]:
    response = producer.post("/tasks", json={"command": command, "payload": {}, **fields})
    assert response.status_code == 201, response.text
    task: dict[str, Any] = response.json()
    return task


def claim(worker: httpx.Client, command: str, **fields: Any) -> dict[str, Any]:
    response = worker.post("/tasks/claim", json={"commands": [command], **fields})
    assert response.status_code == 200, response.text
    task: dict[str, Any] = response.json()
    return task


def claimed(producer: httpx.Client, worker: httpx.Client, command: str, **fields: Any) -> str:
    """The id of a new task that the worker has claimed."""
    create(producer, command, **fields)
    return str(claim(worker, command)["id"])


def waiting_claims(server: Server) -> int:
    """Claims that are parked now, of both surfaces."""
    text = httpx.get(f"http://{server.http}/metrics").text
    return int(float(text.partition("\ncodeq_waiting_claims ")[2].split()[0]))


def cpu_ms(pid: int) -> float:
    """CPU time of all threads of a process."""
    total_ns = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it ended
            total_ns += int((thread / "schedstat").read_text().split()[0])
    return total_ns / 1e6


def wait_for_claims(server: Server, count: int) -> None:
    """Until so many claims are parked."""
    for _ in range(2000):
        if waiting_claims(server) == count:
            return
    pytest.fail(f"{waiting_claims(server)} claims wait, not {count}")
