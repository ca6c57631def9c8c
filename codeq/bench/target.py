"""The server that is measured: one of our own, or one that runs somewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import urllib.request
from pathlib import Path
from typing import NamedTuple, Protocol

from prometheus_client.parser import text_string_to_metric_families

from codeq.bench.plan import Role
from codeq.client.local import PRODUCER_TOKEN, WORKER_TOKEN
from codeq.errors import CodeqError

SCRAPE_SECONDS = 10.0


class Counters(NamedTuple):
    """What a server says it did with one command, or with all ("") since its start."""

    created: int
    claimed: int
    completed: int


class Target(Protocol):
    """A server to measure. None: it cannot be seen from here."""

    def address_of(self, role: Role) -> tuple[str, str]:
        """Address and token for a role."""

    async def syncs(self) -> int:
        """Syncs of its log since its start; 0 when it does not say."""

    async def counters(self, command: str) -> Counters:
        """Raises CodeqError when it has none to give."""

    def cpu_seconds(self) -> float | None: ...

    def written_bytes(self) -> int | None: ...


class Codeq(NamedTuple):
    """A codeq server; ``pid`` is 0 when its process is not ours to look at."""

    http: str
    producer: str
    worker: str
    producer_token: str = PRODUCER_TOKEN
    worker_token: str = WORKER_TOKEN
    pid: int = 0

    def address_of(self, role: Role) -> tuple[str, str]:
        token = self.worker_token if role.kind.endswith("work") else self.producer_token
        if role.kind.startswith("rest"):
            return self.http, token
        return (self.worker if role.kind == "work" else self.producer), token

    async def syncs(self) -> int:
        return int((await self._samples())["codeq_sync_seconds_count", "", ""])

    async def counters(self, command: str) -> Counters:
        samples = await self._samples()
        return Counters(*(
            int(sum(
                value
                for (name, of, status), value in samples.items()
                if name == wanted and status == ended and command in ("", of)
            ))
            for wanted, ended in (
                ("codeq_task_created_total", ""),
                ("codeq_task_claimed_total", ""),
                ("codeq_task_completed_total", "COMPLETED"),
            )
        ))  # fmt: skip

    def cpu_seconds(self) -> float | None:
        return processes_cpu_seconds(self.pid) if self.pid else None

    def written_bytes(self) -> int | None:
        return processes_written_bytes(self.pid) if self.pid else None

    async def _samples(self) -> dict[tuple[str, str, str], float]:
        """The server's metrics by name, command and status."""
        try:
            text = await asyncio.to_thread(_scrape, f"http://{self.http}/metrics")
        except OSError as error:
            raise CodeqError("unavailable", f"no metrics from {self.http}: {error}") from None
        return {
            (
                sample.name,
                sample.labels.get("command", ""),
                sample.labels.get("status", ""),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def _scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=SCRAPE_SECONDS) as answer:
        return str(answer.read(), "utf-8")


def processes_cpu_seconds(pid: int) -> float:
    """User and system time so far of a process with its threads and its children, those that have
    ended too."""
    ticks = 0
    for process in (pid, *children(pid)):
        with contextlib.suppress(FileNotFoundError):  # it ended this very moment
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15] if process == pid else fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def processes_written_bytes(pid: int) -> int | None:
    """Bytes that a process and its children have sent to the disk so far."""
    total = 0
    for process in (pid, *children(pid)):
        try:
            lines = Path(f"/proc/{process}/io").read_text().splitlines()
        except FileNotFoundError:
            continue
        except PermissionError:
            return None
        total += int(dict(line.split(": ") for line in lines)["write_bytes"])
    return total


def children(pid: int) -> list[int]:
    words: list[str] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):
            words += path.read_text().split()
    return [int(word) for word in words]
