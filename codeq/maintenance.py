"""What the command line says of a data folder and of backups."""

from __future__ import annotations

from pathlib import Path

import msgspec

from codeq.engine import backup as backups
from codeq.engine.check import Report
from codeq.engine.check import check as check_folder
from codeq.engine.clock import Clock

EXIT_LOST = 1


def check(data: Path, *, repair: bool, anyway: bool, as_json: bool) -> int:
    """Prints what a check of the folder finds; returns the exit code."""
    report = check_folder(data, Clock(), repair=repair, anyway=anyway)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print("\n".join(_lines(report)))
    kept = report.repaired and not report.given_up
    return 0 if report.sound or kept else EXIT_LOST


def _lines(report: Report) -> list[str]:
    records = ", ".join(f"{count:,} {kind}" for kind, count in report.records.items() if count)
    lines = [
        f"{report.folder}: {report.live_tasks:,} live tasks, {report.ended_tasks:,} ended, "
        f"{report.dead_letters:,} dead letters",
        f"{report.chunks:,} chunks ({records or 'no records'}), {report.directories:,} "
        f"directories, {report.keys:,} idempotency keys, {report.webhooks:,} pending webhooks",
        f"writes up to number {report.sequence}, synced up to {report.synced}",
    ]
    lines += [f"damaged: {line}" for line in report.damage]
    verb = "given up" if report.repaired else "would be given up"
    lines += [f"{verb}: {line}" for line in report.given_up]
    if report.repaired:
        lines.append(f"repaired; the old files are in {report.kept_aside}")
    else:
        lines.append("sound" if report.sound else "damaged: codeq check --repair keeps the rest")
    return lines


def restore(backup: Path, data: Path) -> int:
    """Makes ``data`` a copy of the backup. Raises StoreError."""
    live = backups.restore(backup, data, Clock())
    print(f"{data} holds {live:,} live tasks now")
    return 0
