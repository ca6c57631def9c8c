"""``codeq worker start`` as a process against a real server: results, failures, crashes of the
command, lost leases, signals."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from codeq.cli import runner
from codeq.model import Task

from .conftest import INHERITED, ROOT, START_SECONDS, Server, create

START = (sys.executable, "-m", "codeq", "worker", "start")


class Started:
    """A running worker and what it says."""

    def __init__(self, server: Server, *arguments: str) -> None:
        environ = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environ |= {"CODEQ_BASE_URL": f"http://{server.http}", "CODEQ_WORKER_TOKEN": "dev-worker"}
        self.process = subprocess.Popen(
            [*START, *arguments],
            cwd=ROOT,
            env={**environ, "CODEQ_CONFIG_DIR": str(server.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self, *, of_errors: bool = False) -> str:
        stream = self.process.stderr if of_errors else self.process.stdout
        assert stream is not None
        assert select.select([stream], [], [], START_SECONDS)[0], "the worker said nothing"
        return stream.readline()

    def done(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.line())
        return found

    def end(self) -> tuple[int, str]:
        """Exit code and what was on standard error."""
        _, errors = self.process.communicate(timeout=START_SECONDS)
        return self.process.returncode, errors


@pytest.fixture
def start(server: Server, command: str) -> Iterator[Callable[..., Started]]:
    """``start("--run", "cat")``: a worker of the test's queue that speaks JSON."""
    running: list[Started] = []

    def begin(*arguments: str) -> Started:
        running.append(Started(server, "--json", "--events", command, *arguments))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def result(producer: httpx.Client, task_id: str) -> dict[str, Any]:
    response = producer.get(f"/tasks/{task_id}/result", params={"waitSeconds": 60})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["result"]
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat", {"n": 1}),
        ("echo hello there", "hello there"),
        ("true", None),
        ('echo "[\\"$CODEQ_TASK_ID\\", \\"$CODEQ_COMMAND\\", $CODEQ_ATTEMPTS]"', "names"),
        ("printf '\\377'", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_what_the_command_writes_is_the_result(
    producer: httpx.Client,
    command: str,
    start: Callable[..., Started],
    text: str,
    expected: Any,
) -> None:
    task_id = create(producer, command, payload={"n": 1})["id"]
    worker = start("--max-tasks", "1", "--run", text)
    assert worker.done() == {
        "taskId": task_id,
        "command": command,
        "attempts": 1,
        "outcome": "completed",
    }
    wanted = [task_id, command, 1] if expected == "names" else expected
    assert result(producer, task_id)["result"] == wanted
    assert worker.end() == (0, "")


def test_a_command_with_arguments(
    producer: httpx.Client, command: str, start: Callable[..., Started]
) -> None:
    task_id = create(producer, command)["id"]
    worker = start("--max-tasks", "1", "--", "printf", "%s-%s", "a b", "c")
    assert worker.done()["outcome"] == "completed"
    assert result(producer, task_id)["result"] == "a b-c"


def test_exit_codes_and_last_words(
    producer: httpx.Client, command: str, start: Callable[..., Started]
) -> None:
    ends = "case $x in 1) exit 100;; 2) exit 3;; *) kill -9 $$; esac"
    script = f"read x; echo one >&2; echo $x >&2; {ends}"
    ids = [create(producer, command, payload=n, maxAttempts=n)["id"] for n in (1, 2, 3)]
    dead = create(producer, command, payload=4, maxAttempts=1)["id"]
    worker = start("--max-tasks", "4", "--nack-delay", "600", "--run", script)
    said = [worker.done() for _ in range(4)]
    assert [one["outcome"] for one in said] == ["failed", "requeued", "requeued", "dlq"]
    assert [one["reason"] for one in said] == ["1", "2", "3", "4"]
    code, errors = worker.end()
    assert code == 0 and errors.splitlines() == ["one", "1", "one", "2", "one", "3", "one", "4"]
    assert result(producer, ids[0])["error"] == "1"
    task = producer.get(f"/tasks/{ids[1]}").json()
    assert (task["lastKnownLocation"], task["error"]) == ("DELAYED_ZSET", "2")
    assert producer.get(f"/tasks/{dead}").json()["lastKnownLocation"] == "DLQ_SET"


def test_a_command_that_reads_nothing_and_one_that_is_killed(
    producer: httpx.Client, command: str, start: Callable[..., Started]
) -> None:
    create(producer, command, payload="x" * 1_000_000)
    worker = start("--max-tasks", "1", "--nack-delay", "600", "--run", "kill -9 $$")
    assert worker.done()["reason"] == "signal 9"


def test_a_lost_lease_kills_the_command(
    producer: httpx.Client,
    worker: httpx.Client,
    command: str,
    start: Callable[..., Started],
    tmp_path: Path,
) -> None:
    task_id = create(producer, command)["id"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    run = f"echo up > {pipe}; sleep 600 & wait"
    mine = start("--lease-seconds", "6", "--worker-id", "me", "--max-tasks", "1", "--run", run)
    assert pipe.read_text() == "up\n"
    given_back = worker.post(f"/tasks/{task_id}/abandon", json={"workerId": "me"})
    assert given_back.status_code == 200
    assert producer.post(f"/tasks/{task_id}/cancel").status_code == 200
    done = mine.done()
    assert (done["outcome"], done["reason"]) == ("lost", "not-in-progress")
    assert mine.end()[0] == 0


def test_heartbeats_keep_a_task_longer_than_its_lease(
    producer: httpx.Client,
    worker: httpx.Client,
    command: str,
    start: Callable[..., Started],
    tmp_path: Path,
) -> None:
    task_id = create(producer, command)["id"]
    up, go = tmp_path / "up", tmp_path / "go"
    os.mkfifo(up)
    os.mkfifo(go)
    run = f"echo up > {up}; cat {go}"
    mine = start("--lease-seconds", "3", "--max-tasks", "1", "--run", run)
    assert up.read_text() == "up\n"
    first = producer.get(f"/tasks/{task_id}").json()
    # Another worker waits for longer than the lease, in vain.
    waits = worker.post("/tasks/claim", json={"commands": [command], "waitSeconds": 5})
    assert waits.status_code == 204
    assert producer.get(f"/tasks/{task_id}").json()["leaseUntil"] > first["leaseUntil"]
    go.write_text("[1]")
    assert mine.done()["outcome"] == "completed"
    assert result(producer, task_id)["result"] == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_task_in_hand_end_and_a_second_one_gives_it_back(
    producer: httpx.Client,
    command: str,
    start: Callable[..., Started],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    up, go = tmp_path / "up", tmp_path / "go"
    os.mkfifo(up)
    os.mkfifo(go)
    first = create(producer, command)["id"]
    mine = start("--run", f"echo up > {up}; cat {go}")
    assert up.read_text() == "up\n"
    later = create(producer, command)["id"]
    mine.process.send_signal(number)
    assert "tasks in hand: 1" in mine.line(of_errors=True)
    go.write_text("1")
    assert mine.done()["outcome"] == "completed"
    assert mine.end() == (0, "")
    assert result(producer, first)["result"] == 1
    assert producer.get(f"/tasks/{later}").json()["attempts"] == 0

    trap = f"trap 'echo down > {go}; exit 0' TERM; echo up > {up}; sleep 600 & wait"
    mine = start("--run", trap)
    assert up.read_text() == "up\n"
    mine.process.send_signal(number)
    assert "tasks in hand: 1" in mine.line(of_errors=True)
    mine.process.send_signal(number)
    assert go.read_text() == "down\n"
    done = mine.done()
    assert (done["taskId"], done["outcome"]) == (later, "abandoned")
    assert mine.end()[0] == 130
    task = producer.get(f"/tasks/{later}").json()
    assert (task["status"], task["attempts"]) == ("PENDING", 0)


def test_what_a_command_started_is_killed_though_the_command_has_ended(
    producer: httpx.Client, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that does not hear SIGTERM holds the output open: killed, or it would be for ever."""
    monkeypatch.setattr(runner, "KILL_SECONDS", 0.5)
    up = tmp_path / "up"
    os.mkfifo(up)
    child = f"trap '' TERM; echo up > {up}; exec sleep 600"
    task = msgspec.convert(create(producer, command), Task)
    argv = ("/bin/sh", "-c", f"trap 'exit 7' TERM; ({child}) & wait")

    async def scenario() -> None:
        run = runner.Run(task, until=0)
        output = asyncio.create_task(run.output(argv))
        assert await asyncio.to_thread(up.read_text) == "up\n"
        run.kill()
        async with asyncio.timeout(START_SECONDS):
            code, out, _ = await output
        assert code in (7, -signal.SIGKILL)  # the latter if the shell was slow to end
        assert out == b""

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("ack", "outcome", "place"),
    [
        ("complete", "completed", "NONE"),
        ("abandon", "abandoned", "PENDING_LIST"),
        ("nack", "requeued", "DELAYED_ZSET"),
        ("none", "left", "INPROG_SET"),
    ],
)
def test_without_a_command_each_task_is_shown(
    server: Server, producer: httpx.Client, command: str, ack: str, outcome: str, place: str
) -> None:
    task_id = create(producer, command, payload={"a": 1})["id"]
    options = ("--events", command, "--max-tasks", "1", "--ack", ack, "--nack-delay", "600")
    mine = Started(server, *options)
    out, errors = mine.process.communicate(timeout=START_SECONDS)
    assert (mine.process.returncode, errors) == (0, "")
    shown, ended = out.splitlines()
    assert task_id in shown and '{"a":1}' in shown and ended.endswith(outcome)
    assert producer.get(f"/tasks/{task_id}").json()["lastKnownLocation"] == place


def test_a_worker_for_programs_prints_the_tasks_alone(
    producer: httpx.Client, command: str, start: Callable[..., Started]
) -> None:
    task_id = create(producer, command)["id"]
    mine = start("--max-tasks", "1")
    assert mine.done()["id"] == task_id
    out, _ = mine.process.communicate(timeout=START_SECONDS)
    assert out == ""


def test_a_worker_goes_on_after_a_restart_of_the_server(
    start_server: Callable[..., Server], command: str
) -> None:
    server = start_server()
    mine = Started(server, "--json", "--events", command, "--run", "cat")
    server.arguments += ["--http", server.http]
    try:
        create(server.client("dev-producer"), command, payload=1)
        assert mine.done()["outcome"] == "completed"
        server.kill()
        assert "did not answer" in mine.line(of_errors=True)
        server.start()
        create(server.client("dev-producer"), command, payload=2)
        assert mine.done()["outcome"] == "completed"
        mine.process.send_signal(signal.SIGTERM)
        assert mine.end()[0] == 0
    finally:
        if mine.process.poll() is None:
            mine.process.kill()
        mine.process.communicate()
