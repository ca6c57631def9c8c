"""``codeq top``: what a server does, live. Rates are differences of two overviews."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codeq.cli.connection import PASSING, Call, Tenant, remote
from codeq.cli.output import clean, console, print_json, table
from codeq.cli.status import duration, open_streams, size
from codeq.errors import CodeqError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from codeq.model import Durations, Overview, OverviewQueue

#: Counts of a queue that are shown as rates
RATES = ("created", "claimed", "completed", "failed", "dead", "expired_leases")
WORKERS_SHOWN = 10


class Sample:
    """Two overviews of the same process, so many seconds apart."""

    def __init__(self, before: Overview, after: Overview) -> None:
        self.before = before
        self.after = after
        self.seconds = after.uptime_seconds - before.uptime_seconds
        self._earlier = {(queue.command, queue.tenant_id): queue for queue in before.queues}

    def _was(self, queue: OverviewQueue) -> OverviewQueue | None:
        """The same queue in the earlier overview."""
        return self._earlier.get((queue.command, queue.tenant_id))

    def latency_seconds(self, queue: OverviewQueue, share: float) -> float | None:
        """From create to end: so much at most for this share of the tasks that ended in between,
        as the bounds of the server have it. None when none ended, or it was more than the last."""
        was = self._was(queue)
        earlier = (was.latency_counts if was else ()) or (0,) * len(queue.latency_counts)
        counts = [
            max(0, now - then) for now, then in zip(queue.latency_counts, earlier, strict=True)
        ]
        left = share * sum(counts)
        bounds = [*self.after.latency_bounds_seconds, None]
        for bound, count in zip(bounds, counts, strict=False):
            left -= count
            if count and left <= 0:
                return bound
        return None

    def rates(self, queue: OverviewQueue) -> dict[str, float]:
        """Per second, by the name of the count."""
        was = self._was(queue)
        return {
            name: self._rate(getattr(queue, name) - (getattr(was, name) if was else 0))
            for name in RATES
        }

    def _rate(self, count: int) -> float:
        return round(max(0, count) / self.seconds, 1) if self.seconds > 0 else 0.0

    def mean_ms(self, name: str) -> float | None:
        """Mean of the durations ``name`` (commits or syncs) in between, None when there was
        none."""
        was: Durations = getattr(self.before, name)
        now: Durations = getattr(self.after, name)
        count = now.count - was.count
        return None if count <= 0 else round((now.seconds - was.seconds) / count * 1000, 2)

    def per_second(self, name: str) -> float:
        return self._rate(getattr(self.after, name).count - getattr(self.before, name).count)


@remote
async def top(
    call: Call,
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="one sample of two looks, then end")] = False,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="draw one sample as a picture")
    ] = None,
    tenant: Tenant = "",
) -> None:
    """Shows depths, rates, leases, streams and commit times as they change; for admins.

    --once, --json and an output that is no terminal get one sample. A server that is away is
    waited for.
    """
    import asyncio

    before = await call.client.overview(tenant=tenant)
    if once or call.as_json or svg is not None or not sys.stdout.isatty():
        await asyncio.sleep(interval)
        sample = _sample(before, await call.client.overview(tenant=tenant))
        if call.as_json:
            print_json(_body(sample))
        elif svg is not None:
            _draw(call, sample, svg)
        else:
            console().print(_view(call, sample, ""))
        return
    await _watch(call, before, interval, tenant)


def _sample(before: Overview, after: Overview) -> Sample:
    """A process that was started in between has counted from its own start."""
    if after.uptime_seconds >= before.uptime_seconds:
        return Sample(before, after)
    import msgspec

    zero = msgspec.structs.replace
    none = zero(after.commits, count=0, seconds=0.0)
    fresh = zero(after, uptime_seconds=0.0, queues=[], commits=none, syncs=none)
    return Sample(fresh, after)


async def _watch(call: Call, before: Overview, interval: float, tenant: str) -> None:
    """Until it is interrupted."""
    import asyncio

    from rich.live import Live

    sample, away = Sample(before, before), ""
    with Live(_view(call, sample, ""), console=console(), auto_refresh=False, screen=True) as live:
        while True:
            await asyncio.sleep(interval)
            try:
                after = await call.client.overview(tenant=tenant)
                sample, away = _sample(sample.after, after), ""
            except CodeqError as error:
                if error.slug not in PASSING:
                    raise
                away = error.message
            live.update(_view(call, sample, away), refresh=True)


def _body(sample: Sample) -> dict[str, Any]:
    """The sample for a program: the overview as REST has it, and what two of them tell."""
    return {
        "overview": sample.after,
        "seconds": round(sample.seconds, 3),
        "rates": [
            {
                "command": queue.command,
                **({"tenantId": queue.tenant_id} if queue.tenant_id else {}),
                **{_camel(name): rate for name, rate in sample.rates(queue).items()},
                "latencyP50Seconds": sample.latency_seconds(queue, 0.5),
                "latencyP99Seconds": sample.latency_seconds(queue, 0.99),
            }
            for queue in sample.after.queues
        ],
        "commitsPerSecond": sample.per_second("commits"),
        "commitMeanMs": sample.mean_ms("commits"),
        "syncMeanMs": sample.mean_ms("syncs"),
    }


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(str.capitalize, rest))


def _draw(call: Call, sample: Sample, file: Path) -> None:
    import io
    import re

    recorder = console(record=True, width=110, color_system="truecolor", file=io.StringIO())
    recorder.print(_view(call, sample, ""))
    drawn = recorder.export_svg(title="codeq top", unique_id="codeq-top")
    try:
        # Without the fonts of somebody else's host: every system has a monospaced one.
        file.write_text(re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL))
    except OSError as error:
        raise CodeqError("validation-error", f"{file}: {error.strerror}") from None


def _view(call: Call, sample: Sample, away: str) -> RenderableType:
    from rich.console import Group

    return Group(_head(call, sample, away), "", _queues(sample), "", _leases(sample.after))


def _head(call: Call, sample: Sample, away: str) -> RenderableType:
    from rich.text import Text

    now = sample.after
    commit, sync = sample.mean_ms("commits"), sample.mean_ms("syncs")
    lines = [
        f"up {duration(now.uptime_seconds)}   {now.live_tasks:,} live tasks   "
        f"{now.waiting_claims:,} waiting claims   streams: {open_streams(now) or 'none'}   "
        f"{now.webhooks.pending:,} webhooks pending",
        f"commits {sample.per_second('commits'):,.0f}/s"
        f" of {'-' if commit is None else commit} ms, sync {'-' if sync is None else sync} ms   "
        f"memory {size(now.memory.resident_bytes)}   disk free {size(now.disk_free_bytes)}",
    ]
    text = Text(f"codeq {now.version}", style="bold")
    text.append(f"  {clean(call.client.base_url)}  {now.at}", style="not bold cyan")
    if away:
        text.append(f"\nno answer: {clean(away)}", style="bold red")
    for line in lines:
        text.append(f"\n{line}", style="not bold")
    return text


def _queues(sample: Sample) -> RenderableType:
    from rich.text import Text

    head = ["queue", "ready", "delayed", "leased", "dead", "oldest s"]
    head += ["in/s", "out/s", "failed/s", "lost/s", "p50 s", "p99 s"]
    rows = []
    for queue in sorted(sample.after.queues, key=lambda one: (-one.ready, one.command)):
        rate = sample.rates(queue)
        name = Text(clean(queue.command), style="bold")
        if queue.tenant_id:
            name.append(f" {clean(queue.tenant_id)}", style="not bold cyan")
        if queue.paused:
            name.append(" paused", style="yellow")
        dead = Text(f"{queue.dlq:,}", style="red" if queue.dlq else "")
        rows.append(
            (
                *(name, queue.ready, queue.delayed, queue.in_progress, dead),
                *(round(queue.oldest_ready_seconds, 1), rate["created"], rate["completed"]),
                *(round(rate["failed"] + rate["dead"], 1), rate["expired_leases"]),
                *(_bound(sample.latency_seconds(queue, share)) for share in (0.5, 0.99)),
            )
        )
    made = table(head, rows)
    for place in range(1, len(head)):
        made.columns[place].justify = "right"
    return made


def _bound(seconds: float | None) -> str:
    return "" if seconds is None else f"≤{seconds:g}"


def _leases(now: Overview) -> RenderableType:
    most = sorted(now.leases, key=lambda one: (-one.leases, one.worker_id))
    made = table(
        ("worker", "leases"), [(one.worker_id, one.leases) for one in most[:WORKERS_SHOWN]]
    )
    left = len(most) - WORKERS_SHOWN + now.leases_left_out
    if left > 0:
        made.add_row(f"and {left:,} more", "")
    return made
