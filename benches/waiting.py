"""What do millions of waiting tasks cost: memory, claims at depth, the time to start again?

The engine room alone (engine, journal, store; every group synced), in one process: fills one queue,
takes claims from it and from an empty one in turn, then opens the folder again in a new process.

    python -m benches.waiting --tasks 10000000
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from codeq.engine._wire import Creates
from codeq.engine.clock import Clock, FakeClock
from tests.node import Node

BATCH = 1000
CLAIM_BATCHES = 50
ROUNDS = 5
PAYLOAD = b'{"to": "somebody@example.com", "body": "' + b"x" * 159 + b'"}'
PAGE_BYTES = 4096


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def node_in(path: Path) -> Node:
    return Node(path, FakeClock(Clock().now_ms()), retention_seconds=1)


def fill(node: Node, tasks: int, command: str) -> None:
    for done in range(0, tasks, BATCH):
        creates = Creates()
        for _ in range(min(BATCH, tasks - done)):
            creates.add(command.encode(), PAYLOAD)
        node.shard.create(creates, "t", lambda _: None)
        node.settle()
        node.advance(1)
        if done and done % 1_000_000 == 0:
            print(f"{done:,} created", file=sys.stderr, flush=True)


def claims_per_s(node: Node, command: str) -> float:
    """Claims CLAIM_BATCHES batches and gives nothing back."""
    began = time.perf_counter()
    for _ in range(CLAIM_BATCHES):
        got: list[object] = []
        request = node.request(got.append, (command,), count=BATCH, bytes_max=4 << 20)
        node.shard.claim(request)
        node.settle()
        [delivery] = got
        delivery.encode(False)  # type: ignore[attr-defined]
        delivery.accepted()  # type: ignore[attr-defined]
    return CLAIM_BATCHES * BATCH / (time.perf_counter() - began)


def start_again(path: Path) -> None:
    """Opens the folder as a starting server does, and says how long it took."""
    began = time.perf_counter()
    node = node_in(path)
    took_s = time.perf_counter() - began
    print(f"start: {took_s:.1f} s to {node.shard.engine.live_tasks:,} live tasks")
    print(f"memory after the start: {resident_bytes() / 1e6:,.0f} MB")
    node.close()


def measure(path: Path, tasks: int) -> None:
    node = node_in(path)
    before = resident_bytes()
    fill(node, tasks, "deep")
    engine = node.shard.engine
    held = resident_bytes() - before
    print(f"{tasks:,} waiting tasks, payload {len(PAYLOAD)} B each")
    print(f"memory: {held / 1e6:,.0f} MB, of it bodies {engine.body_bytes / 1e6:,.0f} MB")
    print(f"memory per task without bodies: {(held - engine.body_bytes) / tasks:.0f} B")
    deep, empty = [], []
    for _ in range(ROUNDS):
        fill(node, CLAIM_BATCHES * BATCH, "empty")
        empty.append(claims_per_s(node, "empty"))
        deep.append(claims_per_s(node, "deep"))
    ratio = statistics.median(deep) / statistics.median(empty)
    print(f"claims/s: {statistics.median(deep):,.0f} at depth, {statistics.median(empty):,.0f} not")
    print(f"ratio: {ratio:.2f}")
    node.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=10_000_000)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open is not None:
        start_again(args.open)
        return
    with tempfile.TemporaryDirectory(prefix="codeq-waiting-") as scratch:
        path = Path(scratch) / "data"
        measure(path, args.tasks)
        again = [sys.executable, "-m", "benches.waiting", "--open", str(path)]
        subprocess.run(again, check=True)


if __name__ == "__main__":
    main()
