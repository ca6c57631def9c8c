"""The command ``codeq bench``: which surfaces, how often, and what to do with the figures."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from codeq.bench import report
from codeq.bench.load import WARM_UP_SECONDS, Measured, Opener, measure, own_server
from codeq.bench.plan import Surface, Wishes, chosen, wished
from codeq.bench.target import Codeq
from codeq.client.local import until_told
from codeq.errors import CodeqError

#: Other queues, and where they are measured
PEERS = {
    "postgres": "codeq.bench.peers.postgres",
    "redis-streams": "codeq.bench.peers.redis_streams",
}
#: What is compared with a peer unless other surfaces are named
BATCHES = "stream-batch"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. ``rates``: tasks per second to offer, one measurement each; empty = as
    fast as it goes. ``retention_seconds``: fresh servers keep ended tasks and idempotency keys for
    so long, 0 = as by default. ``target``: a running server instead of fresh ones."""

    surfaces: list[str] = []
    seconds: float = 10.0
    runs: int = 1
    rates: list[float] = []
    batch: int | None = None
    calls: int | None = None
    streams: int | None = None
    payload_bytes: int = 200
    make_keys: bool = False
    sync: bool = True
    retention_seconds: int = 0
    target: Codeq | None = None
    peer: str = ""
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
    if options.retention_seconds:
        where["keeping time"] = f"{options.retention_seconds} s"
    if options.json != "-":
        report.print_table(results, where)
        if options.peer:
            report.print_ratios(results, options.peer)
    if options.json:
        report.write_json(results, where, options.json)
    if options.plot:
        report.draw(results, where, options.plot)
    good = all(done.per_second > 0 and not done.refused and not done.faults for done in results)
    return 0 if good else 1


class Step(NamedTuple):
    """One measurement, and who opens the fresh server it needs."""

    surface: Surface
    opener: Opener = own_server


def planned(options: Options) -> list[Step]:
    """Every measurement, in order: run after run, so that a slow hour of the machine hits all
    surfaces alike."""
    if options.retention_seconds and options.target:
        raise CodeqError("validation-error", "--retention is for servers of the bench's own")
    opener = partial(own_server, retention_seconds=options.retention_seconds)
    names = options.surfaces or ([BATCHES] if options.peer else [])
    one_run = [
        Step(
            wished(
                surface,
                Wishes(
                    options.batch,
                    options.calls,
                    options.streams,
                    options.payload_bytes,
                    rate,
                    options.make_keys,
                ),
            ),
            opener,
        )
        for surface in chosen(names)
        for rate in options.rates or [0.0]
    ]
    if options.peer:
        peer = peer_named(options.peer)
        wishes = Wishes(options.batch, options.calls, None, options.payload_bytes)
        one_run.append(Step(wished(peer.surface(), wishes), peer.serve))
    return one_run * options.runs


def peer_named(name: str) -> Any:
    """The module of a peer; raises CodeqError for an unknown one or when its client is missing."""
    if name not in PEERS:
        raise CodeqError("validation-error", f"no peer {name!r}; there are {', '.join(PEERS)}")
    try:
        return importlib.import_module(PEERS[name])
    except ModuleNotFoundError as error:
        wanted = f"--peer {name} needs {error.name}: pip install codeq[peers]"
        raise CodeqError("validation-error", wanted) from None


async def measure_all(plan: Sequence[Step], options: Options, results: list[Measured]) -> int:
    """Fills ``results``, with a progress bar on standard error when that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        warm_up = min(WARM_UP_SECONDS, options.seconds / 4)
        bar = progress.add_task("", total=len(plan) * (options.seconds + warm_up))

        def tick() -> None:
            progress.advance(bar)

        for number, (surface, opener) in enumerate(plan, 1):
            progress.update(bar, description=f"{number}/{len(plan)} {surface.name}")
            results.append(
                await measure(
                    surface,
                    options.seconds,
                    sync=options.sync,
                    target=options.target,
                    opener=opener,
                    tick=tick,
                )
            )
    return 0
