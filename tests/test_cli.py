"""The command line: bad input is one clear line on standard error and a non-zero exit."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import codeq
from codeq import cli

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
