"""Loads a server of its own and says how many lives it carries: ``codeq bench``.

A life is one task created, delivered to a handler, finished and acknowledged: 200 bytes of payload
built and decoded, about 40 bytes of result. Server and clients are processes of their own on this
machine. Each surface gets a fresh server.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from codeq.bench.clients import COLUMNS, Role, Tally
from codeq.client.local import PRODUCER_TOKEN, WORKER_TOKEN, LocalServer, until_told
from codeq.errors import CodeqError

READY_SECONDS = 30.0
LINE_BYTES_MAX = 64 << 20
LATENCY_PER_SECOND = 200.0
#: The table is not squeezed into less when it goes to a file.
TABLE_CHARACTERS = 150


class Surface(NamedTuple):
    """A way to use the server. ``window``: lives open at a time; 0 = only creates are counted."""

    name: str
    kind: str
    producers: Role
    workers: Role | None = None


def _surface(name: str, batch: int, calls: int, readys: int, **more: Any) -> Surface:
    """Stream surfaces: ``batch`` creates a call with ``calls`` in flight, as many tasks a Ready."""
    claim = more.pop("claim", batch)
    make = Role("produce", "", PRODUCER_TOKEN, "", "", 0, batch, calls, **more)
    take = Role("work", "", WORKER_TOKEN, "", "", 1, claim, readys, make.streams, make.merge)
    return Surface(name, "lives", make, take)


def _creates(name: str, batch: int, connections: int) -> Surface:
    return Surface(name, "tasks", Role("rest", "", PRODUCER_TOKEN, "", "", 0, batch, connections))


def _latency() -> Surface:
    made = _surface("latency", 1, 1, 4, window=100_000, per_second=LATENCY_PER_SECOND)
    assert made.workers is not None
    made.workers.per_second = LATENCY_PER_SECOND
    return made


SURFACES = {
    surface.name: surface
    for surface in (
        _surface("stream-batch-1000", 1000, 12, 12, window=48_000, streams=2),
        _surface("stream-batch-256", 256, 16, 16, window=24_000, streams=2),
        _surface("stream-single", 1, 2048, 8, window=8000, claim=256),
        _surface("stream-single-wire", 1, 1024, 1024, window=8000, streams=4, merge=False),
        _creates("rest-create", 1, 64),
        _creates("rest-create-batch", 100, 8),
        _latency(),
    )
}


class Measured(msgspec.Struct):
    """What one surface did between two looks. Counts are those of the time between."""

    surface: str
    unit: str
    seconds: float
    per_second: float
    created: int
    delivered: int
    finished: int
    acknowledged: int
    refused: int
    server_cpu_seconds_per_100000: float
    client_cpu_seconds: float
    written_bytes_each: float
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None


class Look(NamedTuple):
    """Counters at one moment."""

    at: float
    counts: list[int]
    cpu_seconds: float
    written_bytes: int


class ClientProcess:
    """A client process, as its parent sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, role: Role) -> ClientProcess:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "codeq.bench.clients"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(role) + b"\n")
        async with asyncio.timeout(READY_SECONDS):
            if await process.stdout.readline() != b"ready\n":
                raise CodeqError("internal", f"the {role.kind} client did not start")
        return cls(process)

    async def stop(self) -> dict[str, Any]:
        """Ends the client; returns its report."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        line = await self._process.stdout.readline()
        await self._process.wait()
        if not line:
            raise CodeqError("internal", "a client ended without a report")
        report: dict[str, Any] = msgspec.json.decode(line)
        return report

    async def ended(self) -> None:
        """Returns when the process has ended, for whatever reason."""
        await self._process.wait()

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


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


def look(tally: Tally, pid: int) -> Look:
    counts = [tally.total(column) for column in COLUMNS]
    return Look(time.monotonic(), counts, cpu_seconds(pid), written_bytes(pid))


async def measure(surface: Surface, seconds: float, *, sync: bool) -> Measured:
    """Runs one surface on a fresh server and looks at it for ``seconds`` after a warm-up."""
    with tempfile.TemporaryDirectory(prefix="codeq-bench-") as scratch:
        folder = Path(scratch)
        settings = {
            "PERSISTENCE_CONFIG_FSYNC_ON_COMMIT": str(sync).lower(),
            "LIMITS_DISK_RESERVE_BYTES": str(64 << 20),
            "LOG_LEVEL": "warn",
        }
        server = LocalServer(folder / "data", folder / "log", settings)
        tally = Tally(folder / "tally", 2)
        clients: list[ClientProcess] = []
        try:
            await server.start()
            for role in roles(surface, server, folder / "tally"):
                clients.append(await ClientProcess.start(role))
            await asyncio.sleep(min(1.0, seconds / 4))
            first = look(tally, server.pid)
            await asyncio.sleep(seconds)
            last = look(tally, server.pid)
            reports = [await client.stop() for client in reversed(clients)]
        finally:
            await asyncio.gather(*(client.kill() for client in clients))
            await server.kill()
    return measured(surface, first, last, reports)


def roles(surface: Surface, server: LocalServer, tally: Path) -> list[Role]:
    """The roles of a surface at this server, workers first."""
    at = {"produce": server.producer, "work": server.worker, "rest": server.http}
    both = [surface.workers, surface.producers]
    return [
        msgspec.structs.replace(role, address=at[role.kind], command="load", tally=str(tally))
        for role in both
        if role is not None
    ]


def measured(
    surface: Surface, first: Look, last: Look, reports: Sequence[dict[str, Any]]
) -> Measured:
    created, delivered, finished, acknowledged = (
        after - before for before, after in zip(first.counts, last.counts, strict=True)
    )
    seconds = last.at - first.at
    done = acknowledged if surface.workers is not None else created
    each = max(done, 1)
    latencies_ms = [
        ns / 1e6
        for report in reports
        for at_ns, ns in report["deliveries"]
        if first.at <= at_ns / 1e9 <= last.at
    ]
    quantiles = statistics.quantiles(latencies_ms, n=100) if len(latencies_ms) > 1 else []
    return Measured(
        surface=surface.name,
        unit=surface.kind,
        seconds=round(seconds, 3),
        per_second=round(done / seconds, 1),
        created=created,
        delivered=delivered,
        finished=finished,
        acknowledged=acknowledged,
        refused=sum(report["refused"] for report in reports),
        server_cpu_seconds_per_100000=round(
            (last.cpu_seconds - first.cpu_seconds) * 100_000 / each, 3
        ),
        client_cpu_seconds=round(sum(report["cpu_seconds"] for report in reports), 2),
        written_bytes_each=round((last.written_bytes - first.written_bytes) / each, 1),
        latency_p50_ms=round(quantiles[49], 3) if quantiles else None,
        latency_p99_ms=round(quantiles[98], 3) if quantiles else None,
    )


def surroundings(sync: bool) -> dict[str, str]:
    """Machine, versions, commit and durability."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    packages = ("codeq", "grpcio", "granian", "rocksdict", "msgspec")
    versions = [f"Python {platform.python_version()}", *map(installed, packages)]
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": ", ".join(versions),
        "commit": commit(),
        "durability": "synced to disk before each acknowledgement" if sync else "NOT synced",
    }


def installed(package: str) -> str:
    """Name and version; codeq itself may run from a source tree, which ``commit`` names."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} from source"


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def print_table(results: Sequence[Measured], where: dict[str, str]) -> None:
    console = Console(width=max(Console().width, TABLE_CHARACTERS))
    for name, value in where.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    table = Table()
    for name in ("surface", "per second", "created", "delivered", "finished", "acknowledged",
                 "refused",
                 "server CPU-s\nper 100,000", "bytes each", "p50 ms", "p99 ms"):  # fmt: skip
        justify: Literal["left", "right"] = "left" if name == "surface" else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for result in results:
        counts = (result.created, result.delivered, result.finished, result.acknowledged)
        table.add_row(
            result.surface,
            f"{result.per_second:,.0f} {result.unit}",
            *(f"{count:,}" for count in counts),
            f"{result.refused:,}",
            f"{result.server_cpu_seconds_per_100000:.2f}",
            f"{result.written_bytes_each:,.0f}",
            *(f"{p:.2f}" if p is not None else "" for p in
              (result.latency_p50_ms, result.latency_p99_ms)),
        )  # fmt: skip
    console.print(table)


async def measure_all(
    names: Sequence[str], seconds: float, sync: bool, results: list[Measured]
) -> int:
    for name in names:
        results.append(await measure(SURFACES[name], seconds, sync=sync))
    return 0


def run(seconds: float, names: Sequence[str], *, sync: bool, as_json: bool) -> int:
    """Measures the named surfaces (none = all) for ``seconds`` each and prints what came out.
    Returns 0 when every surface made progress and nothing was refused."""
    for name in names:
        if name not in SURFACES:
            known = ", ".join(SURFACES)
            raise CodeqError("validation-error", f"no surface {name!r}; there are {known}")
    results: list[Measured] = []
    told = asyncio.run(until_told(measure_all(names or list(SURFACES), seconds, sync, results)))
    if told:
        return told
    where = surroundings(sync)
    if as_json:
        report = {**where, "surfaces": results}
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print_table(results, where)
    good = all(result.per_second > 0 and not result.refused for result in results)
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m codeq.bench.load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each surface")
    parser.add_argument("--surface", action="append", choices=list(SURFACES))
    parser.add_argument("--sync", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    return run(given.seconds, given.surface or [], sync=given.sync, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
