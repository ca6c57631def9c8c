"""The process: start, ready line, refusals to start, signals, limits of time."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from codeq.engine.clock import Clock
from codeq.server import logs
from codeq.server import request as rest_request
from codeq.server.app import LoopRunner

from .conftest import (
    ANY_PORT,
    IDLE_CPU_MS_MAX,
    IDLE_SECONDS,
    PREFIX,
    STOP_SECONDS,
    Server,
    cpu_ms,
    dev_arguments,
    launch,
    refusal,
    rest_node,
    wait_for_claims,
)

WAITERS = 1000


def run(folder: Path, arguments: list[str], **environ: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a start that fails."""
    process = launch(arguments, environ, folder / "stderr.txt")
    try:
        output, _ = process.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the server started")
    return process.returncode, output, (folder / "stderr.txt").read_text()


def assert_one_line(outcome: tuple[int, str, str], *words: str) -> None:
    """A failed start says one clear line and nothing else."""
    code, output, errors = outcome
    assert code > 0
    assert output == ""
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("codeq: ")
    for word in words:
        assert word in errors


def serve(folder: Path, *arguments: str) -> list[str]:
    return ["serve", "--data", str(folder / "data"), "--http", ANY_PORT, *arguments]


# --- start


def test_ready_line(start_server: Callable[..., Server]) -> None:
    server = start_server()
    address = r"127\.0\.0\.1:[1-9]\d*"
    pattern = f"ready http={address} producer={address} worker={address} pid={server.process.pid}"
    assert re.fullmatch(pattern, server.ready_line)
    assert len({server.http, server.producer, server.worker}) == 3
    for each in (server.http, server.producer, server.worker):
        host, port = each.split(":")
        socket.create_connection((host, int(port))).close()
    assert server.terminate() == 0
    assert server.process.stdout is not None
    assert server.process.stdout.read() == ""


def test_listeners_without_address_are_off(tmp_path: Path) -> None:
    server = Server(tmp_path, serve(tmp_path), {"LIMITS_DISK_RESERVE_BYTES": "0"})
    try:
        assert (server.producer, server.worker) == ("off", "off")
        answer = server.client("x").post("/tasks", json={})
        assert refusal(answer) == (503, "unavailable", "producer validator not configured")
        assert answer.headers["retry-after"] == "1"
        answer = server.client("x").post("/tasks/claim", json={})
        assert refusal(answer) == (503, "unavailable", "worker validator not configured")
    finally:
        server.close()


def test_ipv6_and_localhost(tmp_path: Path) -> None:
    for number, host in enumerate(("[::1]", "localhost")):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            socket.create_server((host.strip("[]"), 0), family=_family(host)).close()
        except OSError:
            pytest.skip(f"no {host} here")
        server = Server(folder, [*serve(folder), "--http", f"{host}:0"], {})
        try:
            assert httpx.get(f"http://{server.http}/healthz").status_code == 200
        finally:
            server.close()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@pytest.mark.parametrize("listener", ["http", "producer-stream", "worker-stream"])
def test_a_port_in_use(tmp_path: Path, server: Server, listener: str) -> None:
    used = {
        "http": server.http,
        "producer-stream": server.producer,
        "worker-stream": server.worker,
    }[listener]
    outcome = run(tmp_path, [*dev_arguments(tmp_path), f"--{listener}", used])
    assert_one_line(outcome, used, "in use")
    assert not (tmp_path / "data").exists()


def test_an_address_that_is_not_ours(tmp_path: Path) -> None:
    outcome = run(tmp_path, [*serve(tmp_path), "--http", "192.0.2.1:8080"])
    assert_one_line(outcome, "192.0.2.1:8080")


def test_a_folder_in_use(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    server = start_server()
    used = str(server.folder / "data")
    outcome = run(tmp_path, [*dev_arguments(tmp_path), "--data", used])
    assert_one_line(outcome, used)
    assert server.client("dev-producer").get("/raft/status").status_code == 200


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    outcome = run(tmp_path, [*serve(tmp_path), "--data", str(tmp_path / "file" / "data")])
    assert_one_line(outcome, str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"LIMITS_CREATE_BATCH": "many"}, "limits.createBatch"),
        ({"PRODUCER_AUTH_PROVIDER": "magic"}, "producerAuthProvider"),
        ({"PRODUCER_AUTH_PROVIDER": "static"}, "producerAuthConfig"),
        ({"WORKER_AUTH_PROVIDER": "jwks"}, "workerAuthConfig: jwks needs jwksUrl"),
        ({"WORKER_JWKS_URL": "https://login.example/jwks"}, "workerIssuer: is missing"),
        ({"IDENTITY_SERVICE_URL": "https://login.example"}, "identityIssuer: is missing"),
        ({"RATE_LIMIT_PRODUCER_BURST_SIZE": "-5"}, "rateLimit.producer.burstSize: bad value"),
        ({"RAFT_ENABLED": "true"}, "raft.enabled: not available"),
        ({"WORKER_STREAM_ADDR": ":0"}, "workerStreamAddr"),
    ],
)
def test_T62_bad_settings_stop_the_start(
    tmp_path: Path, environ: dict[str, str], word: str
) -> None:
    assert_one_line(run(tmp_path, serve(tmp_path), **environ), word)
    assert not (tmp_path / "data").exists()


def test_an_unknown_key_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("limits:\n  colour: red\n")
    outcome = run(tmp_path, [*serve(tmp_path), "--config", str(tmp_path / "c.yaml")])
    assert_one_line(outcome, "limits.colour", "unknown key")


def test_development_mode_refuses_other_addresses(tmp_path: Path) -> None:
    outcome = run(tmp_path, [*dev_arguments(tmp_path), "--http", "0.0.0.0:0"])
    assert_one_line(outcome, "httpAddr", "loopback")


def test_another_number_of_shards_stops_the_start(
    tmp_path: Path, start_server: Callable[..., Server]
) -> None:
    server = start_server()
    server.terminate()
    arguments = [*dev_arguments(tmp_path), "--data", str(server.folder / "data")]
    outcome = run(tmp_path, arguments, PERSISTENCE_CONFIG_NUM_SHARDS="2")
    assert_one_line(outcome, "shard")


# --- logs


TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (DEBUG|INFO|WARNING|ERROR) codeq\.\w+: .+")


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(
    ("level", "levels"), [("info", {"info", "warning"}), ("warn", {"warning"}), ("error", set())]
)
def test_T67_log_level_and_format(
    start_server: Callable[..., Server], form: str, level: str, levels: set[str]
) -> None:
    server = start_server(
        LOG_FORMAT=form, LOG_LEVEL=level, PERSISTENCE_CONFIG_FSYNC_ON_COMMIT="false"
    )
    assert server.terminate() == 0
    lines = server.stderr_path.read_text().splitlines()
    if form == "text":
        matches = [TEXT_LINE.fullmatch(line) for line in lines]
        assert {match[1].lower() for match in matches if match} == levels
        assert all(matches), lines
        return
    entries = [json.loads(line) for line in lines]
    assert {entry["level"] for entry in entries} == levels
    for entry in entries:
        assert entry.keys() == {"time", "level", "logger", "message"}
    assert any("fsyncOnCommit" in entry["message"] for entry in entries) == ("warning" in levels)


@pytest.mark.parametrize("form", ["json", "text"])
def test_T67_a_fault_is_logged_with_the_id_of_its_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    async def check() -> None:
        async with rest_node(tmp_path) as node:
            logs.configure("info", form)
            first, second = await node.client("shop/p"), await node.client("shop/p")

            def broken(*_: object, **__: object) -> None:
                raise RuntimeError("broken")

            node.shard.create = broken  # type: ignore[method-assign]
            body = {"command": "a", "payload": 1}
            named = await first.post("/tasks", json=body, headers={"x-request-id": "mine"})
            given = await second.post("/tasks", json=body)
            assert refusal(named) == refusal(given) == (500, "internal", "internal error")
            assert named.headers["x-request-id"] == "mine"
            request_ids.append(given.headers["x-request-id"])

    request_ids = ["mine"]
    kept = logging.getLogger().handlers[:]
    try:
        asyncio.run(check())
    finally:
        logging.getLogger().handlers[:] = kept
    said = capsys.readouterr().err
    if form == "json":
        entries = [json.loads(line) for line in said.splitlines()]
        faults = [entry for entry in entries if entry["level"] == "error"]
        assert [entry["requestId"] for entry in faults] == request_ids
        assert all("RuntimeError: broken" in entry["trace"] for entry in faults)
    else:
        assert re.findall(r"a fault in POST .* \[request (\w+)\]", said) == request_ids
        assert "RuntimeError: broken" in said


# --- life and end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_process(start_server: Callable[..., Server], number: int) -> None:
    server = start_server()
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    made = producer.post("/tasks", json={"command": "a", "payload": 1}).json()
    sent = threading.Event()

    def trace(event: str, _: object) -> None:
        if event == "http11.receive_response_headers.started":
            sent.set()

    with ThreadPoolExecutor(2) as pool:
        body = {"commands": ["other"], "waitSeconds": 30}
        claim = pool.submit(worker.post, "/tasks/claim", json=body)
        path = f"/tasks/{made['id']}/result?waitSeconds=60"
        read = pool.submit(producer.get, path, extensions={"trace": trace})
        assert sent.wait(STOP_SECONDS)
        wait_for_claims(server, 1)
        assert server.terminate(number) == 0
        for waiting in (claim, read):
            assert refusal(waiting.result(STOP_SECONDS)) == (503, "unavailable", "unavailable")
    server.start()
    again = server.client("dev-producer").get(f"/tasks/{made['id']}")
    assert again.json() == made


def test_T17_acknowledged_creates_survive_kill_9(start_server: Callable[..., Server]) -> None:
    server = start_server()
    producer = server.client("dev-producer")
    items = [{"command": "a", "payload": n} for n in range(50)]
    made = [item["task"] for item in producer.post("/tasks/batch", json=items).json()]
    server.kill()
    server.start()
    producer = server.client("dev-producer")
    assert [producer.get(f"/tasks/{task['id']}").json() for task in made] == made


def test_T49_idle_waits_cost_nothing(start_server: Callable[..., Server]) -> None:
    """Hardly more than one wait does: what it takes to wake up now and then is the machine's."""
    server = start_server()
    worker = server.client("dev-worker")

    def waited_ms() -> float:
        """CPU time while one claim waits."""
        before_ms = cpu_ms(server.pid)
        wish = {"commands": ["other"], "waitSeconds": IDLE_SECONDS}
        assert worker.post("/tasks/claim", json=wish).status_code == 204
        return cpu_ms(server.pid) - before_ms

    most_ms = 2 * waited_ms() + IDLE_CPU_MS_MAX
    host, port = server.http.split(":")
    body = json.dumps({"commands": ["none"], "waitSeconds": 30}).encode()
    head = f"POST {PREFIX}/tasks/claim HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer dev-worker\r\n"
    message = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with ExitStack() as connections:
        for _ in range(WAITERS):
            connection = socket.create_connection((host, int(port)))
            connections.enter_context(connection).sendall(message)
        wait_for_claims(server, WAITERS)
        assert any(waited_ms() < most_ms for _ in range(3)), "a stolen core is seldom"


# --- clients that do not behave


def _create_scope() -> dict[str, Any]:
    """What the HTTP server says of a POST /tasks with a body of 10 bytes."""
    return {
        "type": "http",
        "method": "POST",
        "raw_path": f"{PREFIX}/tasks".encode(),
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer shop/p"), (b"content-length", b"10")],
    }


def _app_answer(receive: Callable[[], Any], tmp_path: Path) -> dict[str, Any]:
    """The first message of the application's answer to a request whose body comes from
    ``receive``."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def talk() -> None:
        async with rest_node(tmp_path) as node:
            await node.app(_create_scope(), receive, send)

    asyncio.run(talk())
    return sent[0]


def test_T48_a_stalled_body_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_request, "STALL_SECONDS", 0)
    parts = [{"type": "http.request", "body": b'{"a":', "more_body": True}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    answer = _app_answer(receive, tmp_path)
    assert answer["status"] == 408
    assert (b"connection", b"close") in answer["headers"]


def test_T48_a_client_that_leaves_in_its_body(tmp_path: Path) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert _app_answer(receive, tmp_path)["status"] == 400


def test_T48_a_body_with_bad_chunks_is_malformed(server: Server) -> None:
    """And not ``unavailable``, which would ask for it again."""
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=STOP_SECONDS) as connection:
        connection.sendall(
            b"POST /v1/codeq/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer dev-producer\r\n"
            b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"com\r\nzz\r\n'
        )
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"invalid body" in answer


def test_T48_bytes_that_are_no_http(server: Server) -> None:
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=STOP_SECONDS) as connection:
        connection.sendall(b"hello\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"http://{server.http}/healthz").status_code == 200


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [(1, 100, 200), (1, 101, 431), (65_534, 1, 404), (65_535, 1, 414)],
)
def test_T48_long_uris_and_many_headers_are_the_librarys_to_refuse(
    server: Server, path: int, headers: int, status: int
) -> None:
    target = b"/healthz" if path == 1 else b"/" + b"a" * (path - 1)
    more = b"".join(b"x-%d: 1\r\n" % number for number in range(1, headers))
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=STOP_SECONDS) as connection:
        connection.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (target, more))
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert (b"x-request-id: " in answer) == (status in (200, 404)), "bare"


def test_T48_more_connections_than_the_default_of_the_library(server: Server) -> None:
    host, port = server.http.split(":")
    with ExitStack() as idle:
        for _ in range(300):
            idle.enter_context(socket.create_connection((host, int(port))))
        assert httpx.get(f"http://{server.http}/healthz").status_code == 200


def test_T48_a_body_that_never_comes_does_not_hold_the_end(tmp_path: Path) -> None:
    async def check() -> None:
        asked = asyncio.Event()
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            asked.set()
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        async def send(message: Any) -> None:
            sent.append(message)

        async with rest_node(tmp_path) as node:
            request = asyncio.create_task(node.app(_create_scope(), receive, send))
            await asked.wait()
            node.app.stop()
            node.app.cut()
            await request
        assert sent[0]["status"] == 408

    asyncio.run(check())


@contextmanager
def loop_runner() -> Iterator[LoopRunner]:
    runner = LoopRunner(Clock())
    try:
        yield runner
    finally:
        runner.stop()


def test_the_loop_hands_pythons_lock_to_the_thread_that_syncs() -> None:
    """However long a busy loop may keep it otherwise."""

    async def sync() -> None:
        began: list[str] = []
        told: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        with loop_runner() as runner:
            runner.run(lambda: began.append("sync"), told.set_result)
            assert began == ["sync"]
            assert await asyncio.wait_for(told, STOP_SECONDS) is None

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(STOP_SECONDS)
    try:
        asyncio.run(sync())
    finally:
        sys.setswitchinterval(interval_s)


def test_a_sync_that_fails_is_told_on_the_loop() -> None:
    fault = OSError("Input/output error")

    def fail() -> None:
        raise fault

    async def sync() -> None:
        told: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        with loop_runner() as runner:
            runner.run(fail, told.set_result)
            assert await asyncio.wait_for(told, STOP_SECONDS) is fault

    asyncio.run(sync())
