"""What the README and the examples show happens."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from codeq import config
from codeq.engine.clock import Clock
from codeq.server.auth import SCOPE_RESULT
from codeq.server.providers import build_auth
from tests.conftest import ROOT, Server

README = (ROOT / "README.md").read_text()
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
TASK_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def blocks(language: str, word: str) -> list[str]:
    """The code blocks in this language that hold the word."""
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return [str(text) for text in found if word in text]


def plain(text: str) -> str:
    return TASK_ID.sub("ID", TIME.sub("TIME", text)).strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("number", range(2))
def test_T57_the_curl_lines_answer_as_shown(
    start_server: Callable[..., Server], number: int
) -> None:
    server = start_server()
    task_id = ""
    lines = blocks("console", "curl")[number]
    shown = re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:[^$].*\n)*)", lines, re.MULTILINE)
    assert len(shown) >= 5
    for command, answer in shown:
        if command.startswith("id="):
            continue
        line = f"id={task_id}; {command.replace('localhost:8080', server.http)}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        assert plain(done.stdout) == plain(answer), command
        task_id = task_id or json.loads(done.stdout)["id"]


def test_T57_the_python_lines_do_what_they_say(start_server: Callable[..., Server]) -> None:
    server = start_server()
    [program] = blocks("python", "import")
    program = program.replace("localhost:9092", server.producer)
    program = program.replace("localhost:9091", server.worker)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert plain(done.stdout) == "created ID\nresizing cat.png"


def test_T56_T57_the_settings_shown_load_and_their_tokens_share_a_tenant() -> None:
    settings = config.load(str(ROOT / "examples/codeq.yaml"))
    auth = build_auth(settings, Clock())
    producer = auth.producer("change-me-producer")
    worker = auth.worker("change-me-worker", SCOPE_RESULT)
    assert producer.tenant == worker.tenant == "acme"
    assert worker.may_claim(b"anything")


def test_the_links_of_the_documents_lead_somewhere() -> None:
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (ROOT / target).exists(), f"{document.name}: {target}"
