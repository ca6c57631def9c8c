"""The server that is measured: one of our own, or one that runs somewhere."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from pathlib import Path
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from codeq.bench.plan import Role
from codeq.client.local import PRODUCER_TOKEN, WORKER_TOKEN
from codeq.errors import CodeqError

SCRAPE_SECONDS = 10.0


class Target(NamedTuple):
    """Where the server is and which tokens it takes; ``pid`` is 0 when its process is not ours to
    look at."""

    http: str
    producer: str
    worker: str
    producer_token: str = PRODUCER_TOKEN
    worker_token: str = WORKER_TOKEN
    pid: int = 0

    def address_of(self, role: Role) -> tuple[str, str]:
        """Address and token for a role."""
        token = self.worker_token if role.kind.endswith("work") else self.producer_token
        if role.kind.startswith("rest"):
            return self.http, token
        return (self.worker if role.kind == "work" else self.producer), token


class Counters(NamedTuple):
    """What the server says it did with one command since its start, and how often it synced."""

    created: int
    claimed: int
    completed: int
    syncs: int


async def counters(target: Target, command: str) -> Counters:
    """Reads the server's metrics. Raises CodeqError when it has none to give."""
    try:
        text = await asyncio.to_thread(_scrape, f"http://{target.http}/metrics")
    except OSError as error:
        raise CodeqError("unavailable", f"no metrics from {target.http}: {error}") from None
    found = {
        sample.name: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("command", command) == command
        and sample.labels.get("status", "COMPLETED") == "COMPLETED"
    }
    names = ("codeq_task_created_total", "codeq_task_claimed_total", "codeq_task_completed_total")
    created, claimed, completed = (found.get(name, 0) for name in names)
    return Counters(created, claimed, completed, found["codeq_sync_seconds_count"])


def _scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=SCRAPE_SECONDS) as answer:
        return str(answer.read(), "utf-8")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def written_bytes(pid: int) -> int:
    """Bytes a process has sent to the disk so far."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except PermissionError:
        return 0
    return int(dict(line.split(": ") for line in lines)["write_bytes"])
