"""The demo on a small folder, whole; and that it is honest when a result is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from codeq import cli, demo

from .conftest import Server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty files: empty, binary, deep, with names that are no text."""
    root = tmp_path / "files"
    (root / "deep" / "er").mkdir(parents=True)
    for number in range(26):
        (root / "deep" / f"file {number}.txt").write_text("line\n" * number)
    (root / "deep" / "er" / "größe%20#?.bin").write_bytes(os.urandom(3 << 20))
    (root / "empty").touch()
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe")).write_bytes(b"\n\n\n")
    (root / "link").symlink_to(root / "empty")
    (root / "dangling").symlink_to(root / "nowhere")
    return root


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LEASE_SECONDS", 2)
    monkeypatch.setitem(demo.SERVER_SETTINGS, "LEASE_GRACE_SECONDS", "1")
    monkeypatch.setitem(demo.SERVER_SETTINGS, "LIMITS_DISK_RESERVE_BYTES", "0")


def test_a_small_folder_is_done_and_what_could_not_be_shown_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run(["demo", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "30 files" in said
    assert "leases it held" in said and "100 or more could not be shown with 30 files" in said
    assert "1,000 or more could not be shown with 30 files" in said
    for word in ("tasks", "seconds", "tasks/s", "redelivered", "lost", "mismatched", "good"):
        assert word in said


def test_a_worker_that_is_not_let_in_ends_the_demo(
    folder: Path, start_server: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_server()
    arguments = ["--url", f"http://{server.http}", "--producer-stream", server.producer]
    arguments += ["--worker-stream", server.worker, "--worker-token", "not-it"]
    assert cli.run(["demo", str(folder), *arguments]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "auth failed: invalid token" in said


def test_a_wrong_result_is_found_and_the_exit_is_not_0(
    folder: Path,
    start_server: Callable[..., Server],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against a server that somebody else runs, which is therefore not killed."""
    server = start_server(BACKOFF_POLICY="fixed", BACKOFF_BASE_SECONDS="1")
    right = demo.answer_of

    def wrong(path: str) -> demo.Answer:
        return demo.Answer(0, 0, "") if "größe" in path else right(path)

    monkeypatch.setattr(demo, "answer_of", wrong)
    arguments = ["--url", f"http://{server.http}", "--producer-stream", server.producer]
    code = cli.run(["demo", str(folder), *arguments, "--worker-stream", server.worker])
    said = capsys.readouterr().out
    assert code == 1
    assert "the server was not killed" in said
    assert "NOT good" in said and "größe" in said
    assert server.process.poll() is None
