"""Does removal keep up? Full rate with a short keeping time: lives, disk, memory and blocks of the
loop over time.

    python -m benches.steady --seconds 600 --retention 30 --plot docs/steady.svg

Starts a server of its own, drives it with one surface of the load bench and looks every few
seconds. Prints a table; ``--plot`` draws it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
from matplotlib import pyplot
from prometheus_client.parser import text_string_to_metric_families

from codeq.bench.load import Look, clients_of, look, roles
from codeq.bench.plan import SURFACES
from codeq.bench.report import surroundings
from codeq.bench.tally import ACKNOWLEDGED, Tally
from codeq.bench.target import Codeq
from codeq.client.local import LocalServer, until_told
from codeq.errors import CodeqError

SAMPLES = 60
BLOCKS = "codeq_loop_blocked_seconds_bucket"
HELD = "the loop was held for "


class Sample(NamedTuple):
    """One look. ``blocks``: probes of the loop up to each lateness in seconds."""

    look: Look
    disk_bytes: int
    memory_bytes: int
    blocks: dict[float, float]


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue  # removed meanwhile
    return total


def memory_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the server is gone")


def blocks_of(scrape: str) -> dict[float, float]:
    return {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(scrape)
        for sample in family.samples
        if sample.name == BLOCKS
    }


async def sample(target: Codeq, tally: Tally, folder: Path) -> Sample:
    scrape = httpx.get(f"http://{target.http}/metrics").text
    return Sample(
        await look(tally, target),
        folder_bytes(folder),
        memory_bytes(target.pid),
        blocks_of(scrape),
    )


async def steady(
    surface: str, seconds: float, retention: int, samples: list[Sample], held: list[str]
) -> int:
    """Fills ``samples``, and ``held`` with what the server's log says about blocks."""
    with tempfile.TemporaryDirectory(prefix="codeq-steady-") as scratch:
        folder = Path(scratch)
        settings = {
            "RETENTION_SECONDS": str(retention),
            "IDEMPOTENCY_WINDOW_SECONDS": str(retention),
            "LOG_FORMAT": "text",
        }
        server = LocalServer(folder / "data", folder / "log", settings)
        tally = Tally(folder / "tally", 2)
        try:
            await server.start()
            target = Codeq(server.http, server.producer, server.worker, pid=server.pid)
            parts = roles(SURFACES[surface], target, "steady", folder / "tally")
            async with clients_of(parts) as clients:
                ends = [asyncio.ensure_future(client.ended()) for client in clients]
                for _ in range(SAMPLES + 1):
                    samples.append(await sample(target, tally, folder / "data"))
                    print(line(samples), flush=True)
                    early, _ = await asyncio.wait(
                        ends, timeout=seconds / SAMPLES, return_when=asyncio.FIRST_COMPLETED
                    )
                    if early:
                        raise CodeqError("internal", f"a client ended: {server.last_words()}")
            held += [text for text in (folder / "log").read_text().splitlines() if HELD in text]
        finally:
            await server.kill()
    return 0


def figures(samples: Sequence[Sample]) -> tuple[float, float, float, float, float]:
    """Of the last stretch: seconds since the start, lives/s, MB on disk, MB of memory, bytes
    written per life."""
    before, after = samples[-2:]
    lives = after.look.counts[ACKNOWLEDGED] - before.look.counts[ACKNOWLEDGED]
    written = after.look.written_bytes - before.look.written_bytes
    return (
        after.look.at - samples[0].look.at,
        lives / (after.look.at - before.look.at),
        after.disk_bytes / 1e6,
        after.memory_bytes / 1e6,
        written / max(lives, 1),
    )


def line(samples: Sequence[Sample]) -> str:
    if len(samples) < 2:
        return "seconds    lives/s    disk MB  memory MB  written B a life"
    return "{:7.0f} {:10,.0f} {:10,.0f} {:10,.0f} {:17,.0f}".format(*figures(samples))


def quantile_bound(blocks: dict[float, float], quantile: float) -> float:
    """The bucket's upper bound, in seconds, below which that share of the probes stays."""
    total = blocks[math.inf]
    return next(bound for bound, count in sorted(blocks.items()) if count >= quantile * total)


def summary(samples: Sequence[Sample], held: Sequence[str]) -> None:
    first, last = samples[len(samples) // 6], samples[-1]
    lives = last.look.counts[ACKNOWLEDGED] - first.look.counts[ACKNOWLEDGED]
    seconds = last.look.at - first.look.at
    disk = [sample.disk_bytes / 1e6 for sample in samples[len(samples) // 2 :]]
    print(f"lives/s after the first sixth: {lives / seconds:,.0f}")
    print(f"disk in the second half: {min(disk):,.0f} to {max(disk):,.0f} MB")
    for quantile in (0.99, 0.999, 1.0):
        bound = quantile_bound(last.blocks, quantile)
        print(f"blocks of the loop, {quantile:.1%} of the probes: at most {bound * 1000:g} ms")
    longest = sorted(held, key=held_ms, reverse=True)[:5]
    print("\n".join(["longest blocks:", *longest]) if longest else "no block above 20 ms")


def held_ms(text: str) -> int:
    return int(text.partition(HELD)[2].split()[0])


def draw(samples: Sequence[Sample], path: Path, title: str) -> None:
    rows = [figures(samples[: n + 1]) for n in range(1, len(samples))]
    seconds, rates, disk, memory, _ = zip(*rows, strict=True)
    figure, (top, bottom) = pyplot.subplots(2, sharex=True, figsize=(9, 6))
    top.plot(seconds, [rate / 1000 for rate in rates])
    top.set_ylabel("1,000 lives/s")
    top.set_ylim(bottom=0)
    bottom.plot(seconds, disk, label="on disk")
    bottom.plot(seconds, memory, label="resident memory")
    bottom.set_ylabel("MB")
    bottom.set_xlabel("seconds")
    bottom.set_ylim(bottom=0)
    bottom.legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--seconds", type=float, default=600)
    options.add_argument("--retention", type=int, default=30, help="keeping time in seconds")
    options.add_argument("--surface", default="stream-batch", choices=list(SURFACES))
    options.add_argument("--plot", type=Path, help="draw it into this file (.svg, .png)")
    given = options.parse_args()
    samples: list[Sample] = []
    held: list[str] = []
    run = steady(given.surface, given.seconds, given.retention, samples, held)
    if told := asyncio.run(until_told(run)):
        return told
    where = surroundings(sync=True)
    for name, value in where.items():
        print(f"{name}: {value}")
    summary(samples, held)
    if given.plot:
        title = f"{given.surface}, keeping time {given.retention} s, {where['durability']}"
        draw(samples, given.plot, f"{title}\n{where['machine']}, commit {where['commit']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
