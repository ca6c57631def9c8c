"""Requests that Schemathesis makes up from the server's own description: nothing that fails, no
status, header or body that is not described, nothing valid refused, nothing invalid taken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from codeq.server.routes import OPEN, TABLE

from .conftest import ANY_PORT, ROOT, Server

#: Each contradicts what this API says: another method on a path is 404 and not 405, and a result
#: that is not there yet is 404 although its task is there
CONTRADICTING = ("unsupported_method", "ensure_resource_availability")
PHASES = ("examples", "coverage", "fuzzing", "stateful")
SEED = 1
EXAMPLES_MAX = 8
SECONDS_MAX = 110


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A server in which one token passes for everything."""
    token = {
        "token": "t",
        "subject": "s",
        "scopes": ["codeq:operator"],
        "raw": {"tenantId": "acme"},
    }
    environ = {
        "PRODUCER_AUTH_PROVIDER": "static",
        "PRODUCER_AUTH_CONFIG": json.dumps(token),
        "ALLOW_PRODUCER_AS_WORKER": "true",
        "BACKUP_DIR": str(tmp_path / "backups"),
        "LIMITS_DISK_RESERVE_BYTES": "0",
    }
    arguments = ["serve", "--data", str(tmp_path / "data"), "--http", ANY_PORT]
    running = Server(tmp_path, arguments, environ)
    yield f"http://{running.http}/openapi.json"
    running.close()


def test_schemathesis_finds_nothing(url: str, tmp_path: Path) -> None:
    entry = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
    arguments = [
        *("run", url, "--header", "Authorization: Bearer t"),
        *("--checks", "all", "--exclude-checks", ",".join(CONTRADICTING)),
        *("--phases", ",".join(PHASES), "--max-examples", str(EXAMPLES_MAX)),
        *("--seed", str(SEED), "--continue-on-failure", "--no-shrink", "--warnings", "off"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", entry, *arguments],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks",
        },
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # All but the route of the description itself
    tested = re.search(r"Tested: (\d+)", done.stdout)
    assert tested and int(tested[1]) == len(TABLE) + len(OPEN) - 1, done.stdout
    assert "a fault" not in (tmp_path / "stderr.txt").read_text()
