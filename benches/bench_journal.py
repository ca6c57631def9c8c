"""What does one life cost below the edges: engine, journal and store together, every group synced?

Measured in CPU time of the whole process (RocksDB's own threads included), a batch of creates, one
of claims and one of results per round, each its own commit group, removal on; with and without an
idempotency key per task.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from codeq.engine._wire import Creates, Finishes
from tests.node import Node

PAYLOAD = b'{"to": "somebody@example.com", "body": "' + b"x" * 159 + b'"}'
RESULT = b'{"sent": true, "at": "2026-01-02T03:04"}'
ROUNDS = 40


def life(node: Node, batch: int, keys: Iterator[bytes]) -> None:
    """Creates, claims and finishes ``batch`` tasks, and asserts that it did."""
    creates = Creates()
    for _ in range(batch):
        creates.add(b"job", PAYLOAD, key=next(keys))
    node.shard.create(creates, "t", lambda _: None)
    node.settle()
    got: list[object] = []
    node.shard.claim(node.request(got.append, count=batch, bytes_max=4 << 20))
    node.settle()
    [delivery] = got
    encoded = delivery.encode(False)  # type: ignore[attr-defined]
    delivery.accepted()  # type: ignore[attr-defined]
    assert len(encoded) > batch * len(PAYLOAD)
    finishes = Finishes()
    for i in range(batch):
        finishes.add(creates.task_id(i).encode(), b"COMPLETED", result=RESULT)
    finishes.check(1 << 20, lenient_error=True)
    node.shard.finish(finishes, "t", "w", "s", lambda: None)
    node.settle()
    assert finishes.codes == bytes(batch)


@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "keyed"])
@pytest.mark.parametrize("batch", [256, 1024])
@pytest.mark.benchmark(timer=time.process_time)
def test_bench_journal_life(
    benchmark: BenchmarkFixture, tmp_path: Path, batch: int, keyed: bool
) -> None:
    node = Node(tmp_path / "data", retention_seconds=2, idempotency_window_seconds=2)

    keys = (b"%032d" % n if keyed else b"" for n in itertools.count())

    def round_() -> None:
        life(node, batch, keys)
        node.advance(50)

    benchmark.pedantic(round_, rounds=ROUNDS, warmup_rounds=5)
    if benchmark.stats is not None:
        mean_s = benchmark.stats.stats.mean
        benchmark.extra_info["cpu_us_per_life"] = round(mean_s / batch * 1e6, 2)
    node.close()
