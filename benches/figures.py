"""Measures everything that docs/performance.md claims, in one sitting, and writes it there; and the
table of the README.

    python -m benches.figures [--into docs/performance.md] [--readme README.md] [--parts loads ...]

Parts: ``loads`` (every surface as fast as it goes, and latency), ``rates`` (a fixed rate, half the
ceiling among them), ``growth``, ``blocks`` of the loop, ``depth`` (ten million waiting tasks), and
from all of these the ``targets``. Each table goes between its two marks; the page of a part that
was left out stays as it is, so with few parts the table of targets says what was not measured.
About 41 minutes with the defaults, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from benches import growth, scale, steady, targets
from benches.scale_node import waiting_tasks
from codeq.bench.load import Measured
from codeq.bench.plan import SURFACES
from codeq.bench.report import Spread, at_rate, by_load, cells, figure, surroundings
from codeq.bench.run import Options, measure_all, planned
from codeq.client.local import until_told

ROOT = Path(__file__).resolve().parent.parent
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
PARTS = ("loads", "rates", "growth", "blocks", "depth")
RATES = (20_000.0, 80_000.0)
OFFERED = "stream-batch-256"
LOADS_HEAD = (
    "| surface | per second | spread | CPU-s per 100,000, server / clients | bytes written each "
    "| syncs/s | ack ms, p50 / p99 / p99.9 | delivery ms, p50 / p99 / p99.9 |\n"
    "|---|---|---|---|---|---|---|---|"
)
#: Figures of ``depth`` that answer a goal
DEPTH = {
    "memory per further waiting task": targets.MEMORY,
    "restart: start of the process to ready": targets.RESTART,
}
#: What a reader of the README is told of each surface
IN_SHORT = {
    "stream-batch": "streams, batches of 1,000",
    "stream-batch-256": "streams, batches of 256",
    "stream": "streams, single tasks, client merges",
    "stream-wire": "streams, one task per message",
    "rest-batch": "REST, batches of 100",
    "rest": "REST, one by one",
    "rest-create": "POST /tasks alone, 64 connections",
    "rest-create-batch": "POST /tasks/batch of 100 alone",
}


class Found(msgspec.Struct):
    """All that was measured."""

    loads: list[Measured] = []
    rates: list[Measured] = []
    growth: list[growth.Point] = []
    blocks_p999_ms: float | None = None
    depth: dict[str, float] = {}


async def measure_loads(options: Options, found: list[Measured]) -> int:
    return await measure_all(planned(options), options, found)


def loads(args: argparse.Namespace, found: Found) -> int:
    options = Options(
        surfaces=list(SURFACES),
        seconds=args.seconds,
        runs=args.runs,
        retention_seconds=args.retention,
    )
    return asyncio.run(until_told(measure_loads(options, found.loads)))


def rates(args: argparse.Namespace, found: Found) -> int:
    """Latency under load; half of the ceiling that ``loads`` found is one of the rates."""
    ceilings = [run.per_second for run in found.loads if run.surface == OFFERED]
    half = [round(statistics.median(ceilings) / 2, -3) or 1000.0] if ceilings else []
    options = Options(
        surfaces=[OFFERED],
        seconds=args.seconds,
        rates=[*half, *RATES],
        retention_seconds=args.retention,
    )
    return asyncio.run(until_told(measure_loads(options, found.rates)))


def grown(args: argparse.Namespace, found: Found) -> int:
    work = growth.measure_all(args.axes, args.point_seconds, found.growth)
    return asyncio.run(until_told(work))


def blocks(args: argparse.Namespace, found: Found) -> int:
    samples: list[steady.Sample] = []
    seconds, retention = 5 * args.seconds, args.retention
    run = steady.steady("stream-batch", seconds, retention, samples, [])
    if told := asyncio.run(until_told(run)):
        return told
    found.blocks_p999_ms = steady.quantile_bound(samples[-1].blocks, 0.999) * 1000
    return 0


def depth(args: argparse.Namespace, found: Found) -> int:
    figures = scale.alone("depth", partial(waiting_tasks, count=args.tasks))
    found.depth = {figure.what: figure.value for figure in figures}
    return 0


def answers(found: Found) -> dict[str, Spread]:
    """What was found, by goal."""
    reached = targets.of_loads(found.loads)
    if found.loads and found.rates:
        half = found.rates[0]
        if half.acknowledgement.p99_ms is not None:
            reached[targets.HALF] = targets.once(half.acknowledgement.p99_ms)
    if found.blocks_p999_ms is not None:
        reached[targets.BLOCKS] = targets.once(found.blocks_p999_ms)
    for what, goal in DEPTH.items():
        if what in found.depth:
            reached[goal] = targets.once(found.depth[what])
    deep, short = (
        found.depth.get(f"claims from {queue}") for queue in ("the deep queue", "a short queue")
    )
    if deep and short:
        reached[targets.CLAIMS] = targets.once(deep / short * 100)
    return reached


def loads_table(runs: Sequence[Measured]) -> str:
    """A line for each surface and rate: medians over the runs."""
    lines = [LOADS_HEAD]
    for (surface, offered), group in by_load(runs).items():
        lines.append(f"| {' | '.join((f'`{surface}`{at_rate(offered)}', *cells(group)))} |")
    return "\n".join(lines)


def short_table(runs: Sequence[Measured], where: dict[str, str]) -> str:
    """The README's: a line for each surface, then where it was measured."""
    lines = [
        "| load (surface) | per second | server CPU-s per 100,000 | bytes written each |",
        "|---|---|---|---|",
    ]
    groups = {surface: group for (surface, _), group in by_load(runs).items()}
    for surface, told in IN_SHORT.items():
        if group := groups.get(surface):
            rate = figure(group, lambda run: run.per_second, 0)
            cpu = figure(group, lambda run: run.server_cpu_seconds_per_100000, 2)
            written = figure(group, lambda run: run.written_bytes_each, 0)
            lines.append(f"| {told} (`{surface}`) | {rate} {group[0].unit} | {cpu} | {written} |")
    if group := groups.get("latency"):
        p50 = figure(group, lambda run: run.delivery.p50_ms, 1)
        p99 = figure(group, lambda run: run.delivery.p99_ms, 1)
        lines.append(f"| 200 tasks/s, create to delivery | p50 {p50} ms, p99 {p99} ms | | |")
    return "\n".join(
        [*lines, "", f"{where['machine']}; commit {where['commit']}; {where['durability']}."]
    )


def pieces(args: argparse.Namespace, found: Found, where: dict[str, str]) -> dict[str, str]:
    """The text for each pair of marks of the page."""
    runs = f"{args.runs} run{'s' * (args.runs > 1)}"
    texts = {
        "where": f"{where['machine']};\n{where['versions']};\ncommit {where['commit']}; "
        f"{where['durability']};\n{runs} of {args.seconds:g} s of each surface; "
        f"ended tasks go after {args.retention} s.",
        "targets": targets.table(answers(found)),
    }
    if found.loads:
        texts["loads"] = loads_table(found.loads)
    if found.rates:
        texts["rates"] = loads_table(found.rates)
    if found.growth:
        texts["growth"] = growth.table(found.growth)
    return texts


def filled(page: str, texts: dict[str, str]) -> str:
    """The page with each text between its marks. Raises ValueError when marks are missing."""
    for name, text in texts.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        head, mark, rest = page.partition(begin)
        _, tail_mark, tail = rest.partition(end)
        if not mark or not tail_mark:
            raise ValueError(f"the page has no marks for {name}")
        page = f"{head}{begin}{text}\n{end}{tail}"
    return page


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--into", type=Path, default=PAGE, help="a page with the marks")
    parser.add_argument("--readme", type=Path, default=README, help="another one")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=3, help="of each surface")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a run")
    parser.add_argument("--retention", type=int, default=30, help="keeping time in seconds")
    parser.add_argument("--point-seconds", type=float, default=4.0, help="of a point of growth")
    parser.add_argument("--axes", type=msgspec.json.decode, default=growth.AXES, metavar="JSON")
    parser.add_argument("--tasks", type=int, default=10_000_000, help="of depth")
    parser.add_argument("--json", type=Path, help="everything that was measured, also there")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    args = arguments(words)
    found, where = Found(), surroundings(sync=True)  # before the pages change
    work = {"loads": loads, "rates": rates, "growth": grown, "blocks": blocks, "depth": depth}
    for name in PARTS:
        if name in args.parts:
            print(f"figures: {name}", file=sys.stderr, flush=True)
            if told := work[name](args, found):
                return told
            args.into.write_text(filled(args.into.read_text(), pieces(args, found, where)))
    if found.loads:
        table = short_table(found.loads, where)
        args.readme.write_text(filled(args.readme.read_text(), {"bench table": table}))
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    print(targets.table(answers(found)))
    runs = [*found.loads, *found.rates, *(point.done for point in found.growth)]
    return 1 if any(run.refused or run.faults for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
