"""Loads a server and says how many lives it carries: ``codeq bench``.

A life is one task created, delivered to a handler, finished and acknowledged: 200 bytes of payload
built and decoded, about 40 bytes of result. Server and clients are processes of their own on this
machine, and each measurement gets a fresh server, unless one is named. After each measurement the
clients finish what is open, and their counts are compared with the server's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from hdrh.histogram import HdrHistogram

from codeq.bench.plan import Role, Surface
from codeq.bench.tally import ACKNOWLEDGED, COLUMNS, CREATED, Tally
from codeq.bench.target import Codeq, Counters, Target
from codeq.client.local import LocalServer
from codeq.errors import CodeqError

READY_SECONDS = 30.0
LINE_BYTES_MAX = 64 << 20
WARM_UP_SECONDS = 2.0
#: So much longer than asked for it may take until there is one whole life to count
STILL_SECONDS = 20.0
QUANTILES = (50.0, 90.0, 99.0, 99.9)


class Times(msgspec.Struct):
    """Quantiles of times in ms; None without any time."""

    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    p999_ms: float | None = None

    @classmethod
    def of(cls, histogram: HdrHistogram) -> Times:
        if histogram.get_total_count() == 0:
            return cls()
        return cls(*(round(histogram.get_value_at_percentile(q) / 1e6, 3) for q in QUANTILES))


class Measured(msgspec.Struct):
    """One measurement. The counts are those between two looks; None: it cannot be seen from here.

    ``acknowledgement``: times from the moment a create call was due to its answer; ``delivery``:
    from there to the handler. ``offered_per_second``: 0 = as fast as it goes. ``faults``: what the
    clients and the server did not agree on.
    """

    surface: str
    unit: str
    batch: int
    calls: int
    streams: int
    payload_bytes: int
    offered_per_second: float
    seconds: float
    per_second: float
    created: int
    delivered: int
    finished: int
    acknowledged: int
    refused: int
    syncs_per_second: float
    server_cpu_seconds_per_100000: float | None
    client_cpu_seconds_per_100000: float
    written_bytes_each: float | None
    acknowledgement: Times
    delivery: Times
    faults: list[str]


class Look(NamedTuple):
    """Counters at one moment."""

    at: float
    counts: list[int]
    syncs: int
    cpu_seconds: float | None
    written_bytes: int | None


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

    def tell_to_stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def report(self) -> dict[str, Any]:
        """Waits for the end of the client; returns what it saw."""
        assert self._process.stdout is not None
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


@contextlib.asynccontextmanager
async def own_server(
    folder: Path, *, sync: bool, retention_seconds: int = 0
) -> AsyncIterator[Codeq]:
    """A fresh server in the folder, for as long as it is needed. ``retention_seconds``: how long
    it keeps ended tasks and idempotency keys, 0 = as by default."""
    settings = {
        "PERSISTENCE_CONFIG_FSYNC_ON_COMMIT": str(sync).lower(),
        "LIMITS_DISK_RESERVE_BYTES": str(64 << 20),
        "LOG_LEVEL": "warn",
    }
    if retention_seconds:
        settings["RETENTION_SECONDS"] = str(retention_seconds)
        settings["IDEMPOTENCY_WINDOW_SECONDS"] = str(retention_seconds)
    server = LocalServer(folder / "data", folder / "log", settings)
    try:
        await server.start()
        yield Codeq(server.http, server.producer, server.worker, pid=server.pid)
    finally:
        await server.kill()


@contextlib.asynccontextmanager
async def clients_of(roles: Sequence[Role]) -> AsyncIterator[list[ClientProcess]]:
    """A process for each role, for as long as they are needed."""
    clients: list[ClientProcess] = []
    try:
        for role in roles:
            clients.append(await ClientProcess.start(role))
        yield clients
    finally:
        await asyncio.gather(*(client.kill() for client in clients))


#: Opens a fresh server in a folder
Opener = Callable[..., contextlib.AbstractAsyncContextManager[Target]]


async def measure(
    surface: Surface,
    seconds: float,
    *,
    sync: bool = True,
    target: Target | None = None,
    opener: Opener = own_server,
    tick: Callable[[], None] = lambda: None,
) -> Measured:
    """Runs one surface and looks at it for ``seconds`` after a warm-up, at the ``target`` or at a
    fresh server of the ``opener``. ``tick`` is called about once a second."""
    with tempfile.TemporaryDirectory(prefix="codeq-bench-") as scratch:
        folder = Path(scratch)
        if target is not None:
            return await _measure(surface, seconds, target, folder, tick)
        async with opener(folder, sync=sync) as own:
            return await _measure(surface, seconds, own, folder, tick)


async def _measure(
    surface: Surface, seconds: float, target: Target, folder: Path, tick: Callable[[], None]
) -> Measured:
    command = f"bench-{uuid.uuid4().hex[:12]}"
    tally = Tally(folder / "tally", 2)
    counted = "" if surface.producers.queues > 1 else command
    before = await target.counters(counted)
    async with clients_of(roles(surface, target, command, folder / "tally")) as clients:
        await _pause(min(WARM_UP_SECONDS, seconds / 4), tick)
        tally.note(True)
        first = await look(tally, target)
        await _pause(seconds, tick)
        last = await look(tally, target)
        while stands_still(surface, first, last) and last.at - first.at < seconds + STILL_SECONDS:
            await asyncio.sleep(0.1)
            last = await look(tally, target)
        tally.note(False)
        reports = []
        for client in reversed(clients):  # the producers end first, the workers drain
            client.tell_to_stop()
            reports.append(await client.report())
    after = await target.counters(counted)
    return measured(surface, first, last, reports, disagreements(surface, tally, before, after))


async def _pause(seconds: float, tick: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(1.0, left))
        tick()


def roles(surface: Surface, target: Target, command: str, tally: Path) -> list[Role]:
    """The roles of a surface at this server, workers first."""
    found = []
    for slot, role in enumerate((surface.producers, surface.workers)):
        if role is not None:
            address, token = target.address_of(role)
            found.append(
                msgspec.structs.replace(
                    role, address=address, token=token, command=command,
                    tally=str(tally), slot=slot,
                )
            )  # fmt: skip
    return found[::-1]


async def look(tally: Tally, target: Target) -> Look:
    syncs = await target.syncs()
    counts = [tally.total(column) for column in COLUMNS]
    return Look(time.monotonic(), counts, syncs, target.cpu_seconds(), target.written_bytes())


def stands_still(surface: Surface, first: Look, last: Look) -> bool:
    """Whether not one whole life went by: a short run on a machine that is busy with other things
    would have no figures."""
    columns = (CREATED,) if surface.workers is None else COLUMNS
    return any(last.counts[column] == first.counts[column] for column in columns)


def disagreements(surface: Surface, tally: Tally, before: Counters, after: Counters) -> list[str]:
    """What does not add up after everything was drained."""
    created, acknowledged = tally.total(CREATED), tally.total(ACKNOWLEDGED)
    faults = []
    if after.created - before.created != created:
        faults.append(f"{created} creates acknowledged, {after.created - before.created} counted")
    if surface.workers is not None:
        completed = after.completed - before.completed
        if acknowledged != created:
            faults.append(f"{created} tasks created, {acknowledged} results acknowledged")
        if completed != created:
            faults.append(f"{created} tasks created, {completed} counted as completed")
    return faults


def measured(
    surface: Surface,
    first: Look,
    last: Look,
    reports: Sequence[dict[str, Any]],
    faults: list[str],
) -> Measured:
    """The figures between two looks."""
    created, delivered, finished, acknowledged = (
        after - before for before, after in zip(first.counts, last.counts, strict=True)
    )
    seconds = last.at - first.at
    done = acknowledged if surface.workers is not None else created
    each = max(done, 1)
    make = surface.producers
    return Measured(
        surface=surface.name,
        unit=surface.unit,
        batch=make.batch,
        calls=make.calls,
        streams=make.streams,
        payload_bytes=make.payload_bytes,
        offered_per_second=make.per_second,
        seconds=round(seconds, 3),
        per_second=round(done / seconds, 1),
        created=created,
        delivered=delivered,
        finished=finished,
        acknowledged=acknowledged,
        refused=sum(report["refused"] for report in reports),
        syncs_per_second=round((last.syncs - first.syncs) / seconds, 1),
        server_cpu_seconds_per_100000=part(first.cpu_seconds, last.cpu_seconds, each / 100_000, 3),
        client_cpu_seconds_per_100000=round(
            sum(report["cpu_seconds"] for report in reports) * 100_000 / max(last.counts[0], 1), 3
        ),
        written_bytes_each=part(first.written_bytes, last.written_bytes, each, 1),
        acknowledgement=Times.of(merged(reports, "acknowledgements")),
        delivery=Times.of(merged(reports, "deliveries")),
        faults=faults,
    )


def part(first: float | None, last: float | None, number: float, digits: int) -> float | None:
    """What one of so many took, None when it could not be seen."""
    return None if first is None or last is None else round((last - first) / number, digits)


def merged(reports: Sequence[dict[str, Any]], name: str) -> HdrHistogram:
    """One histogram of what all clients noted."""
    all_of_them = HdrHistogram.decode(reports[0][name])
    for report in reports[1:]:
        all_of_them.add(HdrHistogram.decode(report[name]))
    return all_of_them
