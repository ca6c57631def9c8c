"""What does a life cost as things grow: tasks that wait, queues, payloads, streams, batches?

    python -m benches.growth [--axis waiting ...] [--seconds N] [--json FILE]

Each point is a fresh server and a closed loop over the streams, as ``codeq bench`` runs it, with
one thing changed. ``--waiting 0 1000000`` and the like choose the points of an axis.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from codeq.bench.load import Measured, measure, own_server
from codeq.bench.plan import SURFACES, WINDOW, Surface
from codeq.bench.report import surroundings
from codeq.bench.target import Codeq
from codeq.client import Producer
from codeq.client.local import until_told
from codeq.errors import CodeqError

AXES = {
    "waiting": [0, 1_000_000, 10_000_000],
    "queues": [1, 100, 10_000],
    "payload": [200, 2_000, 20_000, 200_000],
    "streams": [1, 10, 100, 1_000],
    "batch": [1, 10, 100, 1_000],
}
UNITS = {
    "waiting": "tasks waiting in another queue",
    "queues": "queues in turn, claims over all",
    "payload": "bytes of payload",
    "streams": "streams each way",
    "batch": "tasks a message",
}
BATCH, CALLS = 256, 16
MESSAGE_BYTES = 1 << 20
#: Tasks on their way to the server, whatever the batch
IN_FLIGHT_MAX = 2_048
FILL_CALLS = 8


class Point(NamedTuple):
    """One measurement: an axis, how far along it, and what came out."""

    axis: str
    value: int
    done: Measured


def surface(axis: str, value: int) -> Surface:
    """The load of one point: the batch surface with one thing changed."""
    batch, calls, streams = BATCH, CALLS, 2
    more: dict[str, int] = {}
    if axis == "queues":
        more["queues"] = value
    elif axis == "payload":
        batch = max(1, min(BATCH, MESSAGE_BYTES // value))
    elif axis == "streams":
        streams, calls = value, max(CALLS, value)
        batch = max(1, min(BATCH, BATCH * CALLS // calls))
    elif axis == "batch":
        batch, calls = value, max(CALLS, IN_FLIGHT_MAX // value)
    shape: dict[str, Any] = {"batch": batch, "calls": calls, "streams": streams, **more}
    make, take = SURFACES["stream-batch-256"].producers, SURFACES["stream-batch-256"].workers
    assert take is not None
    make = msgspec.structs.replace(
        make,
        **shape,
        window=WINDOW * batch * calls,
        payload_bytes=value if axis == "payload" else make.payload_bytes,
    )
    return Surface(f"{axis} {value:,}", make, msgspec.structs.replace(take, **shape))


async def fill(target: Codeq, count: int) -> None:
    """Makes so many tasks that nobody claims."""
    left = iter(range(0, count, 1000))

    async def some(producer: Producer) -> None:
        for begin in left:
            size = min(1000, count - begin)
            results = await producer.produce_batch([("waits", b"{}")] * size)
            if not all(isinstance(result, str) for result in results):
                raise CodeqError("internal", f"not created: {results[0]}")

    token = target.producer_token
    async with Producer(target.producer, token=token, make_keys=False) as producer:
        await asyncio.gather(*(some(producer) for _ in range(FILL_CALLS)))


@contextlib.asynccontextmanager
async def filled_server(folder: Path, *, sync: bool, waiting: int) -> AsyncIterator[Codeq]:
    async with own_server(folder, sync=sync) as server:
        await fill(server, waiting)
        yield server


def points(chosen: dict[str, list[int]]) -> Iterator[tuple[str, int]]:
    for axis, values in chosen.items():
        for value in values:
            yield axis, value


async def measure_all(chosen: dict[str, list[int]], seconds: float, found: list[Point]) -> int:
    """Fills ``found``; says each point on standard error."""
    for axis, value in points(chosen):
        opener = partial(filled_server, waiting=value if axis == "waiting" else 0)
        done = await measure(surface(axis, value), seconds, opener=opener)
        found.append(Point(axis, value, done))
        print(f"{done.surface}: {done.per_second:,.0f} lives/s", file=sys.stderr, flush=True)
    return 0


def table(found: Sequence[Point]) -> str:
    """The points as a table of Markdown."""
    lines = [
        "| what grows | | lives/s | CPU-s per 100,000, server / clients | bytes written a life "
        "| ack ms, p50 / p99 |",
        "|---|---|---|---|---|---|",
    ]
    last = ""
    for axis, value, done in found:
        times = done.acknowledgement
        lines.append(
            f"| {UNITS[axis] if axis != last else ''} | {value:,} | {done.per_second:,.0f} "
            f"| {done.server_cpu_seconds_per_100000 or 0:.2f} "
            f"/ {done.client_cpu_seconds_per_100000:.2f} "
            f"| {done.written_bytes_each or 0:,.0f} "
            f"| {times.p50_ms or 0:.1f} / {times.p99_ms or 0:.1f} |"
        )
        last = axis
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--axis", nargs="+", choices=list(AXES), default=list(AXES))
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", nargs="+", type=int, default=values, metavar="N")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each point")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    found: list[Point] = []
    chosen = {axis: getattr(args, axis) for axis in args.axis}
    if told := asyncio.run(until_told(measure_all(chosen, args.seconds, found))):
        return told
    where = surroundings(sync=True)
    print(table(found))
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode({**where, "points": found})))
    return 0 if all(not done.refused and not done.faults for _, _, done in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
