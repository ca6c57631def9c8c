"""The command line: bad input is one clear line on standard error and a non-zero exit."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import codeq
from codeq import cli, config
from codeq.cli import app, output, profiles, runner

from .conftest import ROOT, Server, dev_arguments, launch


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"codeq {codeq.__version__}\n"
    assert f'version = "{codeq.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["demo", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 0
    assert "Usage: codeq" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing command"),
        (["check", "--anyway"], "--anyway goes with --repair"),
        (["sevre"], "No such command"),
        (["serve", "--prot", "1"], "No such option"),
        (["serve", "--http"], "requires an argument"),
        (["serve", "--http", "nowhere"], "httpAddr"),
        (["serve", "--http", "127.0.0.1:70000"], "httpAddr"),
        (["serve", "--http", "a..b:80"], "httpAddr"),
        (["serve", "--data", ""], "persistenceConfig.path"),
        (["serve", "--config", "no-such-file.yaml"], "no-such-file.yaml"),
        (["serve", "--dev", "--http", "0.0.0.0:0"], "loopback"),
        (["serve", "--dev", "--worker-stream", "192.0.2.1:9091"], "loopback"),
        (["demo", "no-such-folder"], "no-such-folder is not a folder"),
        (["demo", "--workers", "0"], "--workers"),
        (["demo", ".", "--url", "ftp://x"], "--url must be http://HOST:PORT"),
        (["demo", ".", "--url", "http://127.0.0.1:1"], "did not answer"),
        (["bench", "--seconds", "zero"], "--seconds"),
        (["bench", "--surface", "carrier-pigeon"], "carrier-pigeon"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_an_error(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) != 0
    said = capsys.readouterr()
    assert said.err.startswith("codeq: ") and said.err.count("\n") == 1, said.err
    assert says in said.err
    assert "Traceback" not in said.out


def test_an_unknown_setting_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "codeq.yaml"
    file.write_text("prot: 8080\n")
    assert cli.run(["serve", "--config", str(file), "--data", str(tmp_path / "data")]) != 0
    said = capsys.readouterr().err
    assert "prot" in said and said.count("\n") == 1
    assert not (tmp_path / "data").exists()


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, object]]:
    """What ``codeq config show`` says, by key."""
    assert cli.run(["config", "show", *arguments, "--json"]) == 0
    said: dict[str, dict[str, object]] = json.loads(capsys.readouterr().out)
    return said


def test_config_show_says_what_each_key_has_and_from_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "codeq.yaml"
    file.write_text("port: 1\nlimits: {createBatch: 7, claimBatch: 7}\n")
    monkeypatch.setenv("LIMITS_CREATE_BATCH", "8")
    rows = shown(capsys, str(file), "--http", "127.0.0.1:1")
    assert list(rows) == list(config.KEYS)
    assert rows["port"] == {"value": 1, "source": "file"}
    assert rows["limits.claimBatch"] == {"value": 7, "source": "file"}
    assert rows["limits.createBatch"] == {"value": 8, "source": "environment"}
    assert rows["httpAddr"] == {"value": "127.0.0.1:1", "source": "flag"}
    assert rows["limits.resultBatch"] == {"value": 1000, "source": "default"}
    assert shown(capsys, "--dev")["producerStreamAddr"]["source"] == "development"
    monkeypatch.setenv("CODEQ_CONFIG_PATH", str(file))
    assert cli.run(["config", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(config.KEYS)
    assert ["port", "file", "1"] in [line.split() for line in lines]


def test_config_show_masks_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        {"type": "static", "config": "hush-text"},
        {"type": "static", "config": {"token": "hush-token", "subject": "shop"}},
        {"type": "jwks", "config": {"jwksUrl": "https://me:hush-word@host/keys", "odd": "hush"}},
    ]
    monkeypatch.setenv("PRODUCER_AUTH_PROVIDER", "multi")
    monkeypatch.setenv("PRODUCER_AUTH_CONFIG", json.dumps({"providers": parts}))
    monkeypatch.setenv("WORKER_AUTH_PROVIDER", "static")
    monkeypatch.setenv("WORKER_AUTH_CONFIG", "hush-text")
    monkeypatch.setenv("WEBHOOK_HMAC_SECRET", "hush-key")
    monkeypatch.setenv("IDENTITY_JWKS_URL", "https://hush@host/keys")
    rows = shown(capsys)
    assert "hush" not in json.dumps(rows)
    assert rows["workerAuthConfig"]["value"] == rows["webhookHmacSecret"]["value"] == "***"
    assert rows["identityJwksUrl"]["value"] == "https://***@host/keys"
    assert rows["producerAuthConfig"]["value"] == {
        "providers": [
            {"type": "static", "config": "***"},
            {"type": "static", "config": {"token": "***", "subject": "shop"}},
            {"type": "jwks", "config": {"jwksUrl": "https://***@host/keys", "odd": "***"}},
        ]
    }
    assert cli.run(["config", "show"]) == 0
    assert "hush" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("port: 1\nprot: 1\n", "prot: unknown key"),
        ("raft: {enabled: true}\n", "raft.enabled: not available"),
        ("tls: {http: {certFile: none.pem, keyFile: none.pem}}\n", "tls.http.certFile: none.pem"),
        ("workerAuthProvider: static\n", "workerAuthConfig"),
    ],
)
def test_config_check_finds_what_would_stop_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    file = tmp_path / "codeq.yaml"
    file.write_text(text)
    assert cli.run(["config", "check", str(file)]) == cli.EXIT_USAGE
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"codeq: {says}")
    assert said.err.count("\n") == 1


def test_config_check_of_good_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unsigned = "warning: webhookHmacSecret is empty: webhooks are sent without a signature"
    assert cli.run(["config", "check", str(ROOT / "examples/codeq.yaml")]) == 0
    assert capsys.readouterr().out.splitlines() == [unsigned, "good"]
    file = tmp_path / "codeq.yaml"
    secret = "webhookHmacSecret: s"
    file.write_text(f"redisAddr: x\npersistenceConfig: {{fsyncOnCommit: false}}\n{secret}\n")
    assert cli.run(["config", "check", str(file), "--dev"]) == 0
    warnings = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in warnings[:-1]] == ["redisAddr:", "fsyncOnCommit"]
    assert warnings[-1] == "good"


def test_serve_says_one_line_and_ends_in_order(start_server: Callable[[], Server]) -> None:
    server = start_server()
    address = r"127\.0\.0\.1:[1-9]\d*"
    pattern = rf"ready http={address} producer={address} worker={address} pid={server.process.pid}"
    assert re.fullmatch(pattern, server.ready_line)
    assert server.terminate(signal.SIGTERM) == 0
    assert server.process.stdout is not None and server.process.stdout.read() == ""


def test_a_port_or_a_folder_in_use_stops_the_start(
    start_server: Callable[[], Server], tmp_path: Path
) -> None:
    server = start_server()
    port_taken = [*dev_arguments(tmp_path / "other"), "--http", server.http]
    for arguments in (port_taken, dev_arguments(server.folder)):
        errors = tmp_path / "errors.txt"
        errors.unlink(missing_ok=True)
        second = launch(arguments, {"LIMITS_DISK_RESERVE_BYTES": "0"}, errors)
        said, _ = second.communicate(timeout=60)
        assert second.returncode != 0 and said == ""
        assert "Traceback" not in errors.read_text()
    assert server.client("dev-producer").post("/tasks", json={"command": "a", "payload": 1})


@pytest.mark.parametrize("name", ["codeq", "codeq.cli"])
def test_importing_codeq_is_light(name: str) -> None:
    """And the server says how the gRPC library is to log before it is imported."""
    check = f"import sys, {name}; print(*(m for m in ('grpc', 'codeq.client') if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
    assert set(codeq.__all__) >= {"Producer", "Worker", "Task", "CodeqError", "__version__"}
    for name in codeq.__all__:
        assert getattr(codeq, name) is not None
    with pytest.raises(AttributeError):
        _ = codeq.NoSuchThing


def commands(group: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command of the application, as the words that call it."""
    for name, one in getattr(group, "commands", {}).items():
        yield from commands(one, *path, name) if hasattr(one, "commands") else [(*path, name)]


def test_the_page_of_the_command_line_has_every_command_and_its_examples_parse() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    examples = [shlex.split(line) for line in re.findall(r"^\$ codeq (.*)$", text, re.MULTILINE)]
    root = typer.main.get_command(app.app)
    every = set(commands(root))
    shown = set()
    for words in examples:
        group: Any = root
        path: tuple[str, ...] = ()
        while hasattr(group, "commands"):
            path = (*path, words[len(path)])
            group = group.commands[path[-1]]
        group.make_context(path[-1], words[len(path) :], resilient_parsing=False)
        shown.add(path)
    assert shown == every
    for code in ("EXIT_FAILED", "EXIT_USAGE", "EXIT_NOT_FOUND", "EXIT_UNREACHABLE"):
        assert f"| {getattr(output, code)} |" in text
        assert f"{getattr(output, code)} " in output.EXIT_CODES
    assert f"| {runner.EXIT_FAIL} |" in text
    for variable in profiles.ENVIRONMENT.values():
        assert variable in text
