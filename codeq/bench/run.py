"""The command ``codeq bench``: which surfaces, how often, and what to do with the figures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from codeq.bench import report
from codeq.bench.load import WARM_UP_SECONDS, Measured, measure
from codeq.bench.plan import Surface, Wishes, chosen, wished
from codeq.bench.target import Target
from codeq.client.local import until_told


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. ``rates``: tasks per second to offer, one measurement each; empty = as
    fast as it goes. ``target``: a running server instead of fresh ones."""

    surfaces: list[str] = []
    seconds: float = 10.0
    runs: int = 1
    rates: list[float] = []
    batch: int | None = None
    calls: int | None = None
    streams: int | None = None
    payload_bytes: int = 200
    sync: bool = True
    target: Target | None = None
    json: str = ""
    plot: Path | None = None


def run(options: Options) -> int:
    """Measures, prints, writes. Returns 0 when every run made progress, nothing was refused, and
    clients and server agree on what was done."""
    if options.plot:
        report.check_plot()
    plan = planned(options)
    results: list[Measured] = []
    told = asyncio.run(until_told(measure_all(plan, options, results)))
    if told:
        return told
    where = report.surroundings(None if options.target else options.sync)
    if options.json != "-":
        report.print_table(results, where)
    if options.json:
        report.write_json(results, where, options.json)
    if options.plot:
        report.draw(results, where, options.plot)
    good = all(done.per_second > 0 and not done.refused and not done.faults for done in results)
    return 0 if good else 1


def planned(options: Options) -> list[Surface]:
    """Every measurement, in order: run after run, so that a slow hour of the machine hits all
    surfaces alike."""
    one_run = [
        wished(
            surface,
            Wishes(
                options.batch, options.calls, options.streams, options.payload_bytes, per_second
            ),
        )
        for surface in chosen(options.surfaces)
        for per_second in options.rates or [0.0]
    ]
    return one_run * options.runs


async def measure_all(plan: Sequence[Surface], options: Options, results: list[Measured]) -> int:
    """Fills ``results``, with a progress bar on standard error when that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        warm_up = min(WARM_UP_SECONDS, options.seconds / 4)
        bar = progress.add_task("", total=len(plan) * (options.seconds + warm_up))

        def tick() -> None:
            progress.advance(bar)

        for number, surface in enumerate(plan, 1):
            progress.update(bar, description=f"{number}/{len(plan)} {surface.name}")
            results.append(
                await measure(
                    surface, options.seconds, sync=options.sync, target=options.target, tick=tick
                )
            )
    return 0
