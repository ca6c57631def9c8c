"""Keeps the figures of a run of the benches, and says what changed since the one before.

    python -m benches.changes PARTS.json SERVER.json [--keep FILE]

PARTS.json is pytest-benchmark's, SERVER.json that of ``codeq bench``; ``ci/bench`` calls this.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEPT = Path(".benchmarks/last.json")
#: Of a run of the server: name in its JSON, name here
SERVER = (
    ("per_second", "per second"),
    ("server_cpu_seconds_per_100000", "server CPU-s per 100,000"),
    ("client_cpu_seconds_per_100000", "client CPU-s per 100,000"),
    ("written_bytes_each", "bytes written each"),
)


def figures(parts: dict[str, Any], server: dict[str, Any]) -> dict[str, float]:
    """Every figure under a name of its own. Of several runs of a surface the last one counts."""
    found = {}
    for bench in parts["benchmarks"]:
        more = bench.get("extra_info", {})
        found |= {f"{bench['name']}, {name}": float(more[name]) for name in more}
        if not more:
            found[f"{bench['name']}, us"] = bench["stats"]["median"] * 1e6
    for run in server["runs"]:
        offered = run["offered_per_second"]
        name = run["surface"] + (f" at {offered:g}/s" if offered else "")
        found |= {f"{name}, {words}": run[key] for key, words in SERVER if run[key] is not None}
        if run["delivery"]["p50_ms"] is not None:
            found[f"{name}, delivery p50 ms"] = run["delivery"]["p50_ms"]
    return found


def table(before: dict[str, float], now: dict[str, float]) -> str:
    """A line for each figure, with its change where there was one before."""
    width = max(map(len, now), default=0)
    lines = []
    for name, value in now.items():
        earlier = before.get(name)
        change = f"{value / earlier - 1:+8.1%} of {earlier:,.4g}" if earlier else "     new"
        lines.append(f"{name:{width}}  {value:14,.4g}  {change}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", type=Path)
    parser.add_argument("server", type=Path)
    parser.add_argument("--keep", type=Path, default=KEPT, help=f"[default: {KEPT}]")
    args = parser.parse_args(arguments)
    server = json.loads(args.server.read_text())
    now = figures(json.loads(args.parts.read_text()), server)
    last = json.loads(args.keep.read_text()) if args.keep.exists() else {}
    print(table(last.get("figures", {}), now))
    print(f"commit {server['commit']}, before: {last.get('commit', 'nothing was kept')}")
    args.keep.parent.mkdir(parents=True, exist_ok=True)
    args.keep.write_text(json.dumps({"commit": server["commit"], "figures": now}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
