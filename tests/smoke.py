"""Does an installed codeq work? One task over HTTP, one over the streams, one by the command line,
on a server of its own; and its pages.

    python -I tests/smoke.py

Needs nothing of this folder: run it with the Python of the environment codeq is installed in.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import codeq
from codeq import Producer, Task, Worker

COMMAND = str(Path(sys.executable).with_name("codeq"))
SECONDS = 60


def call(address: str, token: str, path: str, body: dict[str, Any]) -> Any:
    """The answer to a POST, as curl would do it."""
    request = urllib.request.Request(
        f"http://{address}/v1/codeq{path}",
        data=json.dumps(body).encode(),
        headers={"authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


def over_http(address: str) -> None:
    made = call(address, "dev-producer", "/tasks", {"command": "resize", "payload": {"n": 1}})
    got = call(address, "dev-worker", "/tasks/claim", {"commands": ["resize"]})
    assert got["id"] == made["id"] and json.loads(got["payload"]) == {"n": 1}
    result = {"status": "COMPLETED", "result": {"width": 64}}
    done = call(address, "dev-worker", f"/tasks/{made['id']}/result", result)
    assert done["status"] == "COMPLETED" and done["result"] == {"width": 64}


async def over_streams(producer_address: str, worker_address: str) -> None:
    async with Producer(producer_address, token="dev-producer") as producer:
        await producer.produce("greet", {"name": "Ada"})
    worker = Worker(worker_address, token="dev-worker", commands=["greet"])
    seen = []

    async def greet(task: Task) -> str:
        seen.append(task.json()["name"])
        worker.stop()
        return "hello"

    await asyncio.wait_for(worker.run(greet), SECONDS)
    assert seen == ["Ada"] and worker.counts.finished == 1


def by_command(address: str) -> None:
    """``codeq task create``, ``worker start``, ``task result`` and ``top``."""
    where = {
        "CODEQ_BASE_URL": f"http://{address}",
        "CODEQ_PRODUCER_TOKEN": "dev-producer",
        "CODEQ_WORKER_TOKEN": "dev-worker",
    }

    def said(*words: str) -> str:
        done = subprocess.run(
            [COMMAND, *words],
            env={**os.environ, **where},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=SECONDS,
        )
        return done.stdout.strip()

    made = said("task", "create", "--event", "shout", "--payload", '"hi"')
    said("worker", "start", "--events", "shout", "--max-tasks", "1", "--run", "tr a-z A-Z")
    ended = json.loads(said("task", "result", made, "--json"))
    assert ended["result"]["result"] == "HI", ended
    assert "shout" in said("top", "--once")


def pages(address: str) -> None:
    for path in ("/ui", "/docs"):
        with urllib.request.urlopen(f"http://{address}{path}", timeout=SECONDS) as page:
            assert b"<!doctype html>" in page.read(100).lower(), path


def main() -> None:
    home = Path(codeq.__file__).resolve()
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"{home} is not the installed codeq"
    said = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"codeq {codeq.__version__}\n"
    any_port = "127.0.0.1:0"
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [
                *(COMMAND, "serve", "--dev", "--http", any_port),
                *("--producer-stream", any_port, "--worker-stream", any_port),
            ],
            cwd=folder,
            env={**os.environ, "LOG_LEVEL": "warning"},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            ready = server.stdout.readline().split()
            assert ready[:1] == ["ready"], "the server did not start"
            addresses = dict(word.split("=", 1) for word in ready[1:])
            over_http(addresses["http"])
            by_command(addresses["http"])
            pages(addresses["http"])
            asyncio.run(over_streams(addresses["producer"], addresses["worker"]))
            server.send_signal(signal.SIGTERM)
            assert server.wait(SECONDS) == 0
        finally:
            server.kill()
            server.wait()
    print(f"{said.stdout.strip()} works with Python {sys.version.split()[0]} in {sys.prefix}")


main()
