"""The commands that talk to a server, against a real one: for people, for programs, bad input."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from codeq import cli
from codeq.cli import profiles, top
from codeq.cli.status import duration, size
from codeq.model import DurationsBucket

from .conftest import ABSENT_ID, ROOT, START_SECONDS, Server, claim, create

Codeq = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's own profiles and variables."""
    monkeypatch.setenv("CODEQ_CONFIG_DIR", str(tmp_path / "config"))
    for name in (*profiles.ENVIRONMENT.values(), "CODEQ_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def codeq(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Codeq:
    """``codeq("task", "get", ID)`` -> (exit code, standard output, standard error)."""
    monkeypatch.setenv("CODEQ_BASE_URL", f"http://{server.http}")
    monkeypatch.setenv("CODEQ_PRODUCER_TOKEN", "dev-producer")
    monkeypatch.setenv("CODEQ_WORKER_TOKEN", "dev-worker")

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def body(codeq: Codeq, *arguments: str) -> Any:
    """What the command prints for programs."""
    code, out, err = codeq(*arguments, "--json")
    assert (code, err) == (0, ""), err
    return json.loads(out)


def test_a_task_from_create_to_result(
    codeq: Codeq, worker: httpx.Client, command: str, tmp_path: Path
) -> None:
    code, out, err = codeq("task", "create", "--event", command, "--payload", '{"a": 1}')
    assert (code, err) == (0, "") and re.fullmatch(r"[0-9a-f-]{36}\n", out)
    task_id = out.strip()
    assert body(codeq, "task", "get", task_id)["payload"] == '{"a": 1}'
    code, out, _ = codeq("task", "get", task_id)
    assert code == 0 and ["status", "PENDING"] in [line.split() for line in out.splitlines()]
    code, out, err = codeq("task", "result", task_id)
    assert (code, out) == (3, "") and "has not ended" in err
    claim(worker, command)
    sent = {"status": "COMPLETED", "result": {"ok": [1]}}
    sent["artifacts"] = [{"name": "f.txt", "contentBase64": "aGk="}]
    assert worker.post(f"/tasks/{task_id}/result", json=sent).status_code == 200
    shown = body(codeq, "task", "result", task_id, "--wait-seconds", "60")
    assert shown["result"]["result"] == {"ok": [1]} and shown["task"]["id"] == task_id
    code, out, _ = codeq("task", "result", task_id)
    assert code == 0 and '"ok"' in out and "f.txt" in out
    file = tmp_path / "out.txt"
    assert body(codeq, "task", "artifact", task_id, "f.txt", "--out", str(file))["bytes"] == 2
    assert file.read_bytes() == b"hi"


def test_every_option_of_a_create(
    codeq: Codeq, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "payload.json"
    file.write_text('{"from": "a file"}')
    more = ("--priority", "7", "--webhook", "http://example.org/h", "--max-attempts", "2")
    key = ("--idempotency-key", "k", "--run-at", "2099-01-01T00:00:00+01:00")
    made = body(codeq, "task", "create", "--event", command, "--payload", f"@{file}", *more, *key)
    assert made["payload"] == '{"from": "a file"}' and made["priority"] == 7
    assert (made["maxAttempts"], made["webhook"]) == (2, "http://example.org/h")
    assert made["lastKnownLocation"] == "DELAYED_ZSET"
    again = body(codeq, "task", "create", "--event", command, "--payload", f"@{file}", *more, *key)
    assert again["id"] == made["id"]
    assert body(codeq, "task", "cancel", made["id"])["error"] == "CANCELLED"
    delayed = ("--payload", "1", "--delay-seconds", "60")
    assert body(codeq, "task", "create", "--event", command, *delayed)["status"] == "PENDING"
    listed = body(codeq, "task", "list", "--event", command, "--status", "PENDING")
    assert [task["payload"] for task in listed["tasks"]] == ["1"]
    code, out, err = codeq("task", "list", "--event", command, "--limit", "1")
    assert code == 0 and made["id"] in out and "--cursor" in err
    cleaned = body(codeq, "task", "cleanup", "--limit", "5", "--before", "2000-01-01T00:00:00Z")
    assert (cleaned["deleted"], cleaned["limit"]) == (0, 5)


def test_a_list_is_as_long_as_asked_for_where_tasks_are_rare(
    codeq: Codeq, start_server: Callable[..., Server]
) -> None:
    """The server looks at 10,000 tasks a call."""
    server = start_server()
    producer = server.client("dev-producer")
    first = create(producer, command="rare")["id"]
    for _ in range(11):
        many = [{"command": "usual", "payload": 1}] * 1000
        assert producer.post("/tasks/batch", json=many).status_code == 200
    second = create(producer, command="rare")["id"]
    there = ("--base-url", f"http://{server.http}", "--event", "rare")
    found = body(codeq, "task", "list", *there, "--limit", "2")
    assert [task["id"] for task in found["tasks"]] == [first, second]
    assert len(body(codeq, "task", "list", *there, "--limit", "1")["tasks"]) == 1


def test_queues_and_dead_letters(
    codeq: Codeq, producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    ids = []
    for number in range(3):
        ids.append(create(producer, command, maxAttempts=1, payload=number)["id"])
        claim(worker, command)
        nacked = worker.post(f"/tasks/{ids[-1]}/nack", json={"reason": "mail \x1b[31m away"})
        assert nacked.json()["status"] == "dlq"
    create(producer, command)
    assert body(codeq, "queue", "inspect", command)["dlq"] == 3
    assert command in [queue["command"] for queue in body(codeq, "queue", "list")["queues"]]
    for arguments in (("queue", "list"), ("queue", "inspect", command)):
        code, out, _ = codeq(*arguments)
        assert code == 0 and command in out
    assert body(codeq, "queue", "pause", command) == {"command": command, "paused": True}
    assert codeq("queue", "resume", command)[:2] == (0, f"{command} goes on\n")
    page = body(codeq, "dead", "list", command, "--limit", "2")
    assert [task["id"] for task in page["tasks"]] == ids[:2] and page["nextCursor"]
    code, out, _ = codeq("dead", "list", command, "--cursor", page["nextCursor"])
    assert code == 0 and ids[2] in out and "\x1b" not in out and "mail \\x1b[31m away" in out
    assert body(codeq, "dead", "requeue", command, "--id", ids[0], "--id", ABSENT_ID) == {
        "requeued": 1
    }
    assert body(codeq, "dead", "requeue", command, "--limit", "1") == {"requeued": 1}
    assert codeq("dead", "purge", command)[:2] == (0, "1 removed\n")
    assert body(codeq, "queue", "purge", command, "--state", "all") == {"purged": 3}


def test_topics(codeq: Codeq, command: str) -> None:
    policy = ("--tiers", "5,0", "--max-attempts", "3", "--dead-letter-topic", "the-dead")
    made = body(codeq, "topic", "set", command, *policy, "--max-consumers", "2")
    assert made["policy"]["priorityTiers"] == [0, 5] and made["policy"]["maxConsumers"] == 2
    assert body(codeq, "topic", "get", command) == made
    code, out, _ = codeq("topic", "get", command)
    assert code == 0 and "0, 5" in out
    assert codeq("topic", "delete", command)[0] == 0
    assert codeq("topic", "get", command)[0] == 3


def test_status(codeq: Codeq, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = body(codeq, "status")
    assert shown["ready"] and shown["raft"] == {"enabled": False, "numGroups": 0}
    assert shown["overview"]["version"]
    code, out, _ = codeq("status")
    assert code == 0 and "live tasks" in out and "replication" in out
    monkeypatch.setenv("CODEQ_PRODUCER_TOKEN", "none")
    code, out, _ = codeq("status")
    assert code == 0 and "not shown: invalid token" in out
    assert (duration(59.9), duration(3661), duration(90_000)) == ("59s", "1h 1m", "1d 1h")
    assert (size(12), size(2048), size(3 << 40)) == ("12 B", "2.0 KiB", "3.0 TiB")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["task"], 2, "Missing command"),
        (["task", "create", "--event", "a"], 2, "--payload"),
        (["task", "create", "--event", "a", "--payload", "hello"], 2, "no JSON"),
        (["task", "create", "--event", "a", "--payload", "@none.json"], 2, "none.json"),
        (["task", "create", "--event", "a", "--payload", "1", "--run-at", "now"], 2, "--run-at"),
        (["task", "create", "--event", " ", "--payload", "1"], 1, "invalid command"),
        (["task", "create", "--event", "a", "--payload", "null"], 1, "invalid body"),
        (["task", "get", ABSENT_ID], 3, "not found"),
        (["task", "result", ABSENT_ID], 3, "task not found"),
        (["task", "cancel", ABSENT_ID], 3, "not found"),
        (["task", "artifact", ABSENT_ID, "a"], 3, "not found"),
        (["task", "list", "--status", "LOST"], 1, "invalid status"),
        (["queue", "inspect"], 2, "COMMAND"),
        (["queue", "purge", "a", "--state", "some"], 1, "invalid state"),
        (["dead", "list", "a", "--cursor", "zz"], 1, "invalid cursor"),
        (["topic", "set", "a", "--tiers", "x", "--max-attempts", "1",
          "--dead-letter-topic", "d"], 2, "--tiers"),
        (["topic", "set", "A", "--tiers", "1", "--max-attempts", "1",
          "--dead-letter-topic", "d"], 1, "topicName"),
        (["--base-url", "http://127.0.0.1:1", "status"], 4, "did not answer"),
        (["--base-url", "ftp://x", "status"], 2, "--base-url"),
        (["--producer-token", "none", "queue", "list"], 1, "invalid token"),
        (["queue", "list", "--producer-token", ""], 1, "missing Authorization"),
        (["queue", "list", "--ca-file", "none.pem", "--base-url", "https://x"], 2, "none.pem"),
        (["queue", "list", "--profile", "none"], 2, "no profile 'none'"),
        (["worker", "start", "--ack", "maybe"], 2, "--ack"),
        (["worker", "start", "--ack", "nack", "--", "cat"], 2, "exclude"),
        (["worker", "start", "--", "no-such-program"], 2, "no-such-program"),
        (["worker", "start", "--worker-token", "none", "--run", "cat"], 1, "invalid token"),
        (["top", "--once", "--producer-token", "none"], 1, "invalid token"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_its_exit_code(
    codeq: Codeq, arguments: list[str], exit_code: int, says: str
) -> None:
    code, out, err = codeq(*arguments)
    assert (code, out) == (exit_code, ""), err
    assert err.startswith("codeq: ") and err.count("\n") == 1 and says in err, err


# --- profiles ------------------------------------------------------------------------------------


def test_profiles_are_kept_masked_and_forgotten(
    codeq: Codeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "a-long-token-with-an-end-1234"
    assert codeq("auth", "set", "--producer-token", token, "--base-url", "http://one:1")[0] == 0
    assert codeq("auth", "set", "--profile", "two", "--worker-token", "short")[0] == 0
    file = tmp_path / "config" / "config.yaml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["config.yaml"]
    shown = body(codeq, "auth", "show")
    assert shown["profiles"] == {
        "default": {"baseUrl": "http://one:1", "producerToken": "***1234"},
        "two": {"workerToken": "***"},
    }
    for arguments in (("auth", "show"), ("auth", "show", "--profile", "two")):
        code, out, _ = codeq(*arguments)
        assert code == 0 and "***" in out and token not in out and "short" not in out
    assert codeq("auth", "set", "--worker-token", "w")[0] == 0
    assert profiles.read(file)["default"].producer_token == token
    assert codeq("auth", "show", "--profile", "none")[0] == 3
    assert codeq("auth", "set")[0] == 2
    assert codeq("auth", "clear")[0] == codeq("auth", "clear")[0] == 0
    assert list(profiles.read(file)) == ["two"]


@pytest.mark.parametrize(
    "text", ["profiles: 1\n", "[", "profiles: {a: {token: x}}\n", "profiles: {a: {baseUrl: 1}}\n"]
)
def test_a_bad_file_of_profiles_is_named(codeq: Codeq, tmp_path: Path, text: str) -> None:
    file = tmp_path / "config" / "config.yaml"
    file.parent.mkdir()
    file.write_text(text)
    code, out, err = codeq("auth", "show")
    assert (code, out) == (1, "") and str(file) in err and err.count("\n") == 1


def test_flag_before_environment_before_profile_before_default(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    environ = {"CODEQ_CONFIG_DIR": str(tmp_path)}
    kept = profiles.Server("http://p", "profile", "profile")
    profiles.write(file, {"default": kept, "other": profiles.Server(worker_token="other")})

    def tokens(flag: str | None, root: str | None, **more: str) -> str | None:
        given = profiles.Given(profiles.Server(producer_token=root), more.pop("profile", None))
        flags = profiles.Server(producer_token=flag)
        return profiles.resolve(flags, None, given, {**environ, **more}).producer_token

    assert tokens("flag", "root", CODEQ_PRODUCER_TOKEN="environment") == "flag"
    assert tokens(None, "root", CODEQ_PRODUCER_TOKEN="environment") == "root"
    assert tokens(None, None, CODEQ_PRODUCER_TOKEN="environment") == "environment"
    assert tokens(None, None) == "profile"
    assert tokens(None, None, profile="other") is None
    assert tokens(None, None, CODEQ_PROFILE="other") is None
    none = profiles.resolve(profiles.Server(), None, profiles.Given(), {"CODEQ_CONFIG_DIR": "/x"})
    assert none == profiles.Server()


# --- top -----------------------------------------------------------------------------------------


def test_top_prints_one_sample(codeq: Codeq, producer: httpx.Client, command: str) -> None:
    create(producer, command)
    sample = body(codeq, "top", "--interval", "0.1")
    assert command in [queue["command"] for queue in sample["overview"]["queues"]]
    assert command in [row["command"] for row in sample["rates"]] and sample["seconds"] > 0
    code, out, _ = codeq("top", "--once", "--interval", "0.1")
    assert code == 0 and command in out and "in/s" in out and "\x1b" not in out


def test_top_lives_through_a_restart_of_the_server(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server()
    server.arguments += ["--http", server.http]
    ours, theirs = os.openpty()
    more = ("--base-url", f"http://{server.http}", "--producer-token", "dev-producer")
    process = subprocess.Popen(
        [sys.executable, "-m", "codeq", "top", "--interval", "0.1", *more],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)

    def read_until(text: bytes) -> None:
        seen = b""
        while text not in seen:
            assert select.select([ours], [], [], START_SECONDS)[0], seen[-500:]
            seen += os.read(ours, 65_536)

    try:
        read_until(b"in/s")
        server.kill()
        read_until(b"no answer")
        server.start()
        while True:  # a whole picture without the line that says so
            read_until(b"live tasks")
            seen = b""
            while b"lost/s" not in seen:
                seen += os.read(ours, 65_536)
            if b"no answer" not in seen:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(START_SECONDS) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_top_draws_a_picture(codeq: Codeq, command: str, tmp_path: Path) -> None:
    file = tmp_path / "top.svg"
    code, out, _ = codeq("top", "--interval", "0.1", "--svg", str(file))
    drawn = file.read_text()
    assert (code, out) == (0, "") and drawn.startswith("<svg") and "@font-face" not in drawn


def test_rates_are_differences_and_begin_anew_with_the_process() -> None:
    from msgspec.structs import replace

    from codeq.server.samples import OVERVIEW

    [queue] = OVERVIEW.queues
    later = replace(
        OVERVIEW,
        uptime_seconds=OVERVIEW.uptime_seconds + 4,
        queues=[replace(queue, created=queue.created + 20, completed=queue.completed + 2)],
        commits=replace(
            OVERVIEW.commits,
            count=OVERVIEW.commits.count + 4,
            seconds=OVERVIEW.commits.seconds + 0.01,
            buckets=[DurationsBucket(None, 6)],
        ),
    )
    sample = top._sample(OVERVIEW, later)
    rates = sample.rates(later.queues[0])
    assert (rates["created"], rates["completed"], rates["dead"]) == (5, 0.5, 0)
    assert sample.mean_ms("commits") == 2.5 and sample.mean_ms("syncs") is None
    assert sample.per_second("commits") == 1
    ended = [*queue.latency_counts]
    ended[1] += 9
    ended[-1] += 1
    slower = replace(later, queues=[replace(queue, latency_counts=tuple(ended))])
    late = top._sample(OVERVIEW, slower)
    bounds = OVERVIEW.latency_bounds_seconds
    assert late.latency_seconds(slower.queues[0], 0.5) == bounds[1]
    assert late.latency_seconds(slower.queues[0], 0.99) is None
    assert sample.latency_seconds(later.queues[0], 0.5) is None
    fresh = top._sample(later, replace(OVERVIEW, uptime_seconds=2))
    assert fresh.rates(queue)["created"] == queue.created / 2 and fresh.seconds == 2


# --- completion, speed, terminals ----------------------------------------------------------------


@pytest.mark.parametrize(("typed", "offered"), [("codeq qu", "queue"), ("codeq task ca", "cancel")])
def test_the_shell_completes_a_command(typed: str, offered: str) -> None:
    environ = {
        **os.environ,
        "_CODEQ_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "codeq"], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert offered in done.stdout.split(), done.stderr


def test_the_command_loads_no_more_than_it_needs() -> None:
    wanted = ("rich", "httpx", "grpc", "asyncio", "yaml", "uvloop", "rocksdict")
    check = (
        "import sys; from codeq import cli; cli.run(['--version'])\n"
        f"print(*(m for m in {wanted} if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] in ([], [""])
