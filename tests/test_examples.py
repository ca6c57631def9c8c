"""The programs of examples/ run against a real server, as they stand but at its addresses."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import codeq

from .conftest import INHERITED, ROOT, Server

SECONDS = 60
PACKAGE = Path(codeq.__file__).resolve().parent.parent
LINES_MAX = 80
PROGRAMS = sorted((*ROOT.glob("examples/*.py"), *ROOT.glob("examples/*.sh")))


def written(name: str, server: Server, folder: Path) -> Path:
    """The example with the addresses of this server."""
    text = (ROOT / "examples" / name).read_text()
    for shown, real in ((8080, server.http), (9092, server.producer), (9091, server.worker)):
        text = re.sub(rf"\b(localhost|127\.0\.0\.1):{shown}\b", real, text)
    path = folder / name
    path.write_text(text)
    return path


def environment() -> dict[str, str]:
    base = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {**base, "PYTHONPATH": str(PACKAGE), "PYTHONUNBUFFERED": "1"}


def said(command: list[str | Path]) -> list[str]:
    """The lines of a program that ends by itself, and well."""
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class Program:
    """A program that goes on until it is told to stop."""

    def __init__(self, command: list[str | Path], folder: Path) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def line_with(self, pattern: str) -> re.Match[str]:
        """The next line in which this is found; queue.Empty when none comes."""
        while True:
            if found := re.search(pattern, self._lines.get(timeout=SECONDS)):
                return found

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(SECONDS)
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def running(command: list[str | Path], folder: Path) -> Iterator[Program]:
    program = Program(command, folder)
    try:
        yield program
    finally:
        program.stop()


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_an_example_is_short_and_says_what_it_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= LINES_MAX
    assert lines[1 if path.suffix == ".sh" else 0].startswith(("# ", '"""'))


def test_request_and_response(server: Server, tmp_path: Path) -> None:
    assert said([sys.executable, written("request_response.py", server, tmp_path)]) == [
        "7 / 2 = 3.5",
        "halves: [0.0, 0.5, 1.0, 1.5, 2.0]",
        "1 / 0: division by zero",
    ]


def test_a_fleet_with_retries_and_dead_letters(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server(BACKOFF_BASE_SECONDS="0")  # retries at once, to save time
    lines = said([sys.executable, written("fleet.py", server, tmp_path)])
    assert lines[:4] == [
        "delivered 11 of 12",
        "dead letter: LookupError: no house 11 after 3 attempts",
        "requeued 1",
        "delivered 12 of 12",
    ]
    counts = re.fullmatch(r"the workers did (\d+) and (\d+)", lines[4])
    assert counts and sum(map(int, counts.groups())) == 12


def test_scheduled_work_comes_when_it_is_due(server: Server, tmp_path: Path) -> None:
    lines = said([sys.executable, written("scheduled.py", server, tmp_path), "0.2"])
    assert lines == [f"report {number} came when it was due" for number in (1, 2, 3)]


def test_a_web_application_waits_for_results(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server()
    app = written("webapp.py", server, tmp_path)
    app.write_text(app.read_text().replace("PATIENCE_SECONDS = 5", f"PATIENCE_SECONDS = {SECONDS}"))
    command = [sys.executable, "-m", "uvicorn", "webapp:app", "--port", "0"]
    worker = written("worker.py", server, tmp_path)
    with running(command, tmp_path) as web:
        address = web.line_with(r"http://127\.0\.0\.1:\d+")[0]
        with httpx.Client(base_url=address, timeout=SECONDS) as client:
            body = {"command": "greet", "payload": {"name": "Ada"}}
            ada = server.client("dev-producer").post("/tasks", json=body).json()["id"]
            late = client.get(f"/greetings/{ada}")
            assert (late.status_code, late.headers["location"]) == (202, f"/greetings/{ada}")
            with running([sys.executable, worker], tmp_path):
                answers = [
                    client.post("/greetings", json={"name": name}, headers={"idempotency-key": key})
                    for name, key in (("Ben", "1"), ("Ben", "1"), ("Eve", "1"), ("", "2"))
                ]
                assert [answer.status_code for answer in answers] == [200, 200, 409, 502]
                assert answers[0].json() == answers[1].json()
                assert answers[0].json()["result"] == {"greeting": "Hello, Ben!"}
                assert answers[3].json()["error"] == "a greeting needs a name"
            shown = client.get(f"/greetings/{ada}").json()
            assert shown["result"] == {"greeting": "Hello, Ada!"}
            assert client.get("/greetings/nonsense").status_code == 404


def test_a_receiver_believes_only_signed_webhooks(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    secret = "s3cret"
    server = start_server(WEBHOOKS_ALLOW_PRIVATE_NETWORKS="true", WEBHOOK_HMAC_SECRET=secret)
    producer, worker = server.client("dev-producer"), server.client("dev-worker")
    receiver = ROOT / "examples/webhook_receiver.py"
    with running([sys.executable, receiver, secret, "0"], tmp_path) as program:
        port = program.line_with(r"port (\d+)")[1]
        url = f"http://127.0.0.1:{port}/done"

        def forged(key: str, age_seconds: int) -> int:
            now = str(int(time.time()) - age_seconds)
            body = json.dumps({"taskId": "x", "eventType": "y", "status": "z", "result": 1})
            text = f"{now}.{body}".encode()
            sign = hmac.new(key.encode(), text, hashlib.sha256).hexdigest()
            headers = {"X-CodeQ-Timestamp": now, "X-CodeQ-Signature": sign}
            return httpx.post(url, content=body, headers=headers).status_code

        assert forged("another", 0) == 401
        assert forged(secret, 3600) == 401
        assert httpx.post(url, content=b"{}").status_code == 401
        task = producer.post(
            "/tasks", json={"command": "resize", "payload": {}, "webhook": url}
        ).json()
        assert worker.post("/tasks/claim", json={"commands": ["resize"]}).status_code == 200
        end = {"status": "COMPLETED", "result": {"width": 64}}
        assert worker.post(f"/tasks/{task['id']}/result", json=end).status_code == 200
        assert program.line_with(r"^resize (.*)$")[1] == "COMPLETED {'width': 64}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_a_script_with_curl_only(server: Server) -> None:
    lines = said(["bash", ROOT / "examples/curl.sh", f"http://{server.http}"])
    created, claimed = lines[0].split()[1], lines[1].split()[1]
    assert lines[1:] == [f"claimed {created}, attempt 1", "result: Hello!"]
    assert claimed.rstrip(",") == created
