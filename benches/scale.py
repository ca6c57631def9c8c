"""How far does one node go: millions of waiting tasks, thousands of queues and streams, a hundred
thousand parked claims, leases that end together?

    python -m benches.scale [--tasks N] [--queues N] [--claims N] [--streams N] [--leases N]
                            [--idle-seconds N] [--json FILE]

Every write is synced. Tasks, queues, parked claims and leases are measured in the engine room
(engine, journal, store) of this process; restart and streams with the real server. 0 leaves a part
out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from benches.scale_node import (
    Figure,
    leases_together,
    many_queues,
    parked_claims,
    say,
    waiting_tasks,
)
from benches.scale_streams import idle_streams

ROOT = Path(__file__).resolve().parent.parent
READYS = 20

Part = Callable[[Path], list[Figure]]


def measure(args: argparse.Namespace) -> dict[str, list[Figure]]:
    """The figures of every part that is wanted."""
    parts: dict[str, tuple[int, Part]] = {
        f"{args.tasks:,} waiting tasks": (args.tasks, partial(waiting_tasks, count=args.tasks)),
        f"{args.queues:,} queues": (args.queues, partial(many_queues, count=args.queues)),
        f"{args.claims:,} parked claims": (
            args.claims,
            partial(parked_claims, count=args.claims, queues=max(1, args.claims // 10)),
        ),
        f"{args.streams:,} worker streams, {READYS} Readys each": (
            args.streams,
            partial(idle_streams, streams=args.streams, readys=READYS, seconds=args.idle_seconds),
        ),
        f"{args.leases:,} leases": (args.leases, partial(leases_together, count=args.leases)),
    }
    return {name: alone(name, part) for name, (wanted, part) in parts.items() if wanted}


def alone(name: str, part: Part) -> list[Figure]:
    """The figures of one part, from a process and a folder of its own."""
    say(name)
    with tempfile.TemporaryDirectory(prefix="codeq-scale-") as scratch:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            return process.submit(part, Path(scratch)).result()


def table(found: dict[str, list[Figure]]) -> str:
    """The figures as a table of Markdown."""
    lines = ["| with | figure | |", "|---|---|---|"]
    for name, figures in found.items():
        for what, value, unit in figures:
            shown = f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
            lines.append(f"| {name} | {what} | {shown} {unit}".rstrip() + " |")
            name = ""
    return "\n".join(lines)


def surroundings() -> dict[str, str]:
    """What the figures depend on."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": described.stdout.strip(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {len(_cpus())} cores",
        "durability": "a sync before every answer",
    }


def _cpus() -> list[str]:
    text = Path("/proc/cpuinfo").read_text()
    return [line for line in text.splitlines() if line.startswith("processor")]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tasks", type=int, default=10_000_000)
    parser.add_argument("--queues", type=int, default=10_000)
    parser.add_argument("--claims", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=5_000)
    parser.add_argument("--leases", type=int, default=50_000)
    parser.add_argument("--idle-seconds", type=float, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    found = measure(args)
    around = surroundings()
    print(table(found))
    print(", ".join(f"{name} {value}" for name, value in around.items()))
    if args.json is not None:
        figures = {name: [figure._asdict() for figure in part] for name, part in found.items()}
        args.json.write_text(json.dumps({**around, "figures": figures}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
