"""What came out of a bench: a table, a JSON file, a drawing; always with machine, versions, commit
and durability."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from codeq.bench.load import Measured, Times
from codeq.errors import CodeqError

#: The table is not squeezed into less when it goes to a file.
TABLE_CHARACTERS = 150
COLUMNS = (
    "surface", "per second", "spread", "CPU-s per 100,000\nserver / clients", "bytes\neach",
    "syncs\nper s", "ack ms\np50 / p99 / p99.9", "delivery ms\np50 / p99 / p99.9",
)  # fmt: skip


def surroundings(sync: bool | None) -> dict[str, str]:
    """Machine, versions, commit and durability (None: the server's own affair)."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    packages = ("codeq", "grpcio", "granian", "rocksdict", "msgspec")
    versions = [f"Python {platform.python_version()}", *map(installed, packages)]
    durability = {
        True: "synced to disk before each acknowledgement",
        False: "NOT synced",
        None: "as the server is set",
    }
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": ", ".join(versions),
        "commit": commit(),
        "durability": durability[sync],
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


def by_load(results: Sequence[Measured]) -> dict[tuple[str, float], list[Measured]]:
    """The runs of each surface and offered rate, in the order of the first."""
    groups: dict[tuple[str, float], list[Measured]] = {}
    for result in results:
        groups.setdefault((result.surface, result.offered_per_second), []).append(result)
    return groups


def print_table(results: Sequence[Measured], where: dict[str, str]) -> None:
    """One line for each surface and offered rate: medians over the runs."""
    console = Console(width=max(Console().width, TABLE_CHARACTERS))
    for name, value in where.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    table = Table()
    for name in COLUMNS:
        justify: Literal["left", "right"] = "left" if name == "surface" else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for (surface, offered), runs in by_load(results).items():
        table.add_row(surface + at_rate(offered), *cells(runs))
    console.print(table)
    for result in results:
        for fault in (*result.faults, *([f"{result.refused} refused"] if result.refused else ())):
            console.print(f"{result.surface}: {fault}", style="red", highlight=False)


def at_rate(offered_per_second: float) -> str:
    """What is said of a load behind its surface."""
    return f" at {offered_per_second:,.0f}/s" if offered_per_second else ""


def cells(runs: Sequence[Measured]) -> tuple[str, ...]:
    """The columns of COLUMNS behind the surface, of the runs of one load."""
    rates = [run.per_second for run in runs]
    return (
        f"{statistics.median(rates):,.0f} {runs[0].unit}",
        f"{min(rates):,.0f} to {max(rates):,.0f}" if len(runs) > 1 else "",
        figure(runs, lambda run: run.server_cpu_seconds_per_100000, 2)
        + " / "
        + figure(runs, lambda run: run.client_cpu_seconds_per_100000, 2),
        figure(runs, lambda run: run.written_bytes_each, 0),
        figure(runs, lambda run: run.syncs_per_second, 0),
        quantiles(runs, lambda run: run.acknowledgement),
        quantiles(runs, lambda run: run.delivery),
    )


class Spread(NamedTuple):
    """Of several runs."""

    median: float
    low: float
    high: float


def spread(runs: Sequence[Measured], pick: Callable[[Measured], float | None]) -> Spread | None:
    """One figure of the runs, None when it is unknown."""
    known = [value for value in map(pick, runs) if value is not None]
    return Spread(statistics.median(known), min(known), max(known)) if known else None


def figure(runs: Sequence[Measured], pick: Callable[[Measured], float | None], digits: int) -> str:
    """The median of one figure, empty when it is unknown."""
    known = spread(runs, pick)
    return f"{known.median:,.{digits}f}" if known else ""


def quantiles(runs: Sequence[Measured], pick: Callable[[Measured], Times]) -> str:
    """Medians of the quantiles, three digits each."""
    columns = zip(*(msgspec.structs.astuple(pick(run)) for run in runs), strict=True)
    p50, _, p99, p999 = (
        statistics.median(known) if (known := [v for v in values if v is not None]) else None
        for values in columns
    )
    if p50 is None or p99 is None or p999 is None:
        return ""
    return " / ".join(three_digits(value) for value in (p50, p99, p999))


def three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def print_ratios(results: Sequence[Measured], peer: str) -> None:
    """How many times the peer's figures those of codeq are."""
    groups = by_load(results)
    theirs = groups[peer, 0.0]
    table = Table(title=f"codeq in units of {peer}")
    for name in ("surface", "per second", "CPU of the server", "bytes written"):
        table.add_column(name, justify="left" if name == "surface" else "right")
    for (surface, _), ours in groups.items():
        if surface != peer:
            table.add_row(
                surface,
                ratio(ours, theirs, lambda run: run.per_second),
                ratio(ours, theirs, lambda run: run.server_cpu_seconds_per_100000),
                ratio(ours, theirs, lambda run: run.written_bytes_each),
            )
    Console(width=max(Console().width, TABLE_CHARACTERS)).print(table)


def ratio(
    ours: Sequence[Measured],
    theirs: Sequence[Measured],
    pick: Callable[[Measured], float | None],
) -> str:
    """Of the medians, empty when one of them is unknown."""
    sides = [[v for run in runs if (v := pick(run)) is not None] for runs in (ours, theirs)]
    if not all(sides) or not statistics.median(sides[1]):
        return ""
    return f"{statistics.median(sides[0]) / statistics.median(sides[1]):.2f}"


#: Figures of a run that are summed up over the runs
SUMMED_UP = (
    "per_second",
    "server_cpu_seconds_per_100000",
    "client_cpu_seconds_per_100000",
    "written_bytes_each",
)


def summary(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """Median, lowest and highest over the runs of each surface and offered rate."""
    lines = []
    for (surface, offered), runs in by_load(results).items():
        line = {"surface": surface, "offered_per_second": offered, "runs": len(runs)}
        for name in SUMMED_UP:
            if known := spread(runs, attrgetter(name)):
                line[name] = known._asdict()
        lines.append(line)
    return lines


def write_json(results: Sequence[Measured], where: dict[str, str], to: str) -> None:
    """Every run with all its figures, and their medians, into a file, ``-`` = standard output."""
    content = {**where, "summary": summary(results), "runs": results}
    text = msgspec.json.format(msgspec.json.encode(content)).decode()
    if to == "-":
        print(text)
    else:
        Path(to).write_text(text + "\n")


def check_plot() -> None:
    """Raises CodeqError when the drawing library is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CodeqError("validation-error", "--plot needs: pip install codeq[bench]") from None


def draw(results: Sequence[Measured], where: dict[str, str], to: Path) -> None:
    """Bars of the ceilings, and latency against load where rates were offered."""
    from matplotlib import pyplot

    groups = by_load(results)
    ceilings = {surface: runs for (surface, offered), runs in groups.items() if not offered}
    offered = {key: runs for key, runs in groups.items() if key[1]}
    panels = bool(ceilings) + bool(offered)
    drawing, axes = pyplot.subplots(
        panels, figsize=(9, 4 * panels), squeeze=False, layout="constrained"
    )
    if ceilings:
        _bars(axes[0, 0], ceilings)
    if offered:
        _curves(axes[-1, 0], offered)
    caption = f"{where['machine']}, {where['durability']}, commit {where['commit']}"
    drawing.suptitle(caption, fontsize=8)
    drawing.savefig(to)
    pyplot.close(drawing)


def _bars(place: Any, ceilings: dict[str, list[Measured]]) -> None:
    """Medians of the runs, with the lowest and the highest."""
    rates = [[run.per_second for run in runs] for runs in ceilings.values()]
    medians = [statistics.median(each) for each in rates]
    low = [median - min(each) for median, each in zip(medians, rates, strict=True)]
    high = [max(each) - median for median, each in zip(medians, rates, strict=True)]
    bars = place.barh(list(ceilings), medians, xerr=[low, high])
    place.bar_label(bars, [f"{median:,.0f}" for median in medians], padding=4)
    place.margins(x=0.12)  # room for the labels of the bars
    place.set_xlabel("lives or tasks per second")
    place.invert_yaxis()


def _curves(place: Any, offered: dict[tuple[str, float], list[Measured]]) -> None:
    """Create to delivery over the offered rate, for each surface."""
    for surface in sorted({surface for surface, _ in offered}):
        loads = sorted((rate, runs) for (name, rate), runs in offered.items() if name == surface)
        for name, style in (("p50_ms", "-"), ("p99_ms", "--")):
            values = [
                statistics.median(getattr(run.delivery, name) or 0 for run in runs)
                for _, runs in loads
            ]
            label = f"{surface} {name.removesuffix('_ms')}"
            place.plot([rate for rate, _ in loads], values, style, marker="o", label=label)
    place.set(xlabel="tasks per second offered", ylabel="create to delivery, ms")
    place.set_yscale("log")
    place.legend()
