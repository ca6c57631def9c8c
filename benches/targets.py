"""What one node is to reach, and the line of the table that says what it did reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from codeq.bench.load import Measured
from codeq.bench.report import Spread, spread


class Goal(NamedTuple):
    """``value``: what is to be reached; ``least``: at least that much, otherwise at most."""

    name: str
    value: float
    unit: str
    least: bool


GOALS = (
    Goal("lives/s, streams, batch 1,000", 400_000, "", least=True),
    Goal("lives/s, streams, batch 256", 280_000, "", least=True),
    Goal("lives/s, streams, single tasks, client merges", 100_000, "", least=True),
    Goal("lives/s, streams, one task per message", 25_000, "", least=True),
    Goal("server CPU-s per 100,000 lives, batch 1,000", 0.3, "", least=False),
    Goal("POST /tasks, 64 connections", 15_000, "/s", least=True),
    Goal("POST /tasks/batch of 100", 200_000, "tasks/s", least=True),
    Goal("create to delivery at 200/s, p50", 0.6, "ms", least=False),
    Goal("create to delivery at 200/s, p99", 2, "ms", least=False),
    Goal("bytes written per life, batch 1,000", 900, "B", least=False),
    Goal("acknowledgement p99 at half the ceiling, batch 256", 15, "ms", least=False),
    Goal("memory per waiting task without payload", 120, "B", least=False),
    Goal("restart with 10 million waiting tasks", 15, "s", least=False),
    Goal("claims/s with 10 million waiting, of those against a short queue", 90, "%", least=True),
    Goal("blocks of the loop, p99.9", 5, "ms", least=False),
)

Pick = Callable[[Measured], float | None]

#: Goal -> surface and figure that answer it
LOADS: dict[str, tuple[str, Pick]] = {
    GOALS[0].name: ("stream-batch", lambda run: run.per_second),
    GOALS[1].name: ("stream-batch-256", lambda run: run.per_second),
    GOALS[2].name: ("stream", lambda run: run.per_second),
    GOALS[3].name: ("stream-wire", lambda run: run.per_second),
    GOALS[4].name: ("stream-batch", lambda run: run.server_cpu_seconds_per_100000),
    GOALS[5].name: ("rest-create", lambda run: run.per_second),
    GOALS[6].name: ("rest-create-batch", lambda run: run.per_second),
    GOALS[7].name: ("latency", lambda run: run.delivery.p50_ms),
    GOALS[8].name: ("latency", lambda run: run.delivery.p99_ms),
    GOALS[9].name: ("stream-batch", lambda run: run.written_bytes_each),
}
HALF, MEMORY, RESTART, CLAIMS, BLOCKS = (goal.name for goal in GOALS[10:])


def of_loads(runs: Sequence[Measured]) -> dict[str, Spread]:
    """What the runs as fast as it goes, and those of ``latency``, answer."""
    found = {}
    for goal, (surface, pick) in LOADS.items():
        reached = spread([run for run in runs if run.surface == surface], pick)
        if reached is not None:
            found[goal] = reached
    return found


def once(value: float) -> Spread:
    return Spread(value, value, value)


def table(found: dict[str, Spread]) -> str:
    """Every goal, whether it was looked at or not, as a table of Markdown."""
    lines = ["| | goal | reached | spread | |", "|---|---|---|---|---|"]
    for name, value, unit, least in GOALS:
        goal = f"{'≥' if least else '≤'} {shown(value)} {unit}".rstrip()
        reached = found.get(name)
        if reached is None:
            lines.append(f"| {name} | {goal} | not measured | | |")
            continue
        met = reached.median >= value if least else reached.median <= value
        between = ""
        if reached.low != reached.high:
            between = f"{shown(reached.low)} to {shown(reached.high)}"
        answer = "yes" if met else f"no, {reached.median / value:.0%} of it"
        lines.append(f"| {name} | {goal} | {shown(reached.median)} | {between} | {answer} |")
    return "\n".join(lines)


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
