"""What does the engine cost a task? Goal: create, claim and finish with records, <= 1 us a life.

Run with ``pytest --benchmark-enable benches/bench_engine.py``. A round is one batch, so divide its
time by the batch, or read ``us_per_task`` in the figures that ``--benchmark-json`` saves.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from codeq.engine._engine import Claim, Engine
from codeq.engine._wire import Creates, Finishes

BATCHES = (256, 1000)
DEPTHS = (0, 100_000)
ROUNDS = 200
NOW = 1_700_000_000_000
HOUR = 3_600_000
TENANT, COMMAND, WORKER, SUBJECT = b"tenant", b"send-email", b"worker-1", b"token-1"
PAYLOAD = b'{"to":"someone@example.org","text":"' + b"x" * 160 + b'"}'
RESULT = b'{"sent":true,"at":"2026-01-02T03:04:05Z"}'
BYTES_MAX = 1 << 40


def filled_creates(count: int, command: bytes = COMMAND, priority: int = 0) -> Creates:
    creates = Creates()
    for _ in range(count):
        creates.add(command, PAYLOAD, priority=priority)
    creates.check(1 << 20)
    return creates


def filled_finishes(creates: Creates) -> Finishes:
    finishes = Finishes()
    for index in range(len(creates)):
        finishes.add(creates.task_id(index).encode(), b"COMPLETED", result=RESULT)
    finishes.check(1 << 20, lenient_error=True)
    return finishes


def claim(engine: Engine, count: int, commands: list[bytes] | None = None) -> Claim:
    got = engine.claim(TENANT, commands, True, WORKER, SUBJECT, count, HOUR, BYTES_MAX, NOW)
    assert got is not None and len(got) == count
    return got


def measure(
    benchmark: Any, count: int, work: Callable[..., Any], setup: Callable[[], tuple[Any, ...]]
) -> Any:
    rounds = 3 if benchmark.disabled else ROUNDS
    answer = benchmark.pedantic(work, setup=lambda: (setup(), {}), rounds=rounds)
    if benchmark.stats:
        benchmark.extra_info["us_per_task"] = benchmark.stats.stats.median / count * 1e6
    return answer


@pytest.mark.parametrize("count", BATCHES)
def test_create_claim_and_finish_with_their_records(benchmark: Any, count: int) -> None:
    """One life each; the results are filled beforehand from a twin that makes the same ids."""
    engine, twin = Engine(seed=1), Engine(seed=1)

    def setup() -> tuple[Creates, Finishes]:
        ahead = filled_creates(count)
        twin.create(ahead, TENANT, NOW)
        twin.take()
        return filled_creates(count), filled_finishes(ahead)

    def work(creates: Creates, finishes: Finishes) -> int:
        engine.create(creates, TENANT, NOW)
        engine.take()
        engine.delivered(claim(engine, count, [COMMAND]))
        engine.take()
        ended = engine.finish(finishes, TENANT, WORKER, SUBJECT, -1, NOW)
        engine.take()
        return ended

    assert measure(benchmark, count, work, setup) == count
    assert engine.live_tasks == engine.body_bytes == 0
    engine.verify()


@pytest.mark.parametrize("count", BATCHES)
def test_claim_and_assignment(benchmark: Any, count: int) -> None:
    engine = Engine(seed=1)

    def setup() -> tuple[()]:
        engine.create(filled_creates(count), TENANT, NOW)
        engine.take()
        return ()

    def work() -> bytes:
        got = claim(engine, count, [COMMAND])
        message = engine.assignment(got, False)
        engine.delivered(got)
        return message

    message = measure(benchmark, count, work, setup)
    assert message.count(PAYLOAD) == count
    assert engine.stats(TENANT, COMMAND)[0] == engine.body_bytes == 0


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("every_queue", [False, True])
def test_claims_at_depth(benchmark: Any, depth: int, every_queue: bool) -> None:
    """``depth`` tasks wait in 100 queues of 10 priorities; claims of 256 are given back."""
    engine, dice, count = Engine(seed=1), random.Random(1), 256
    depth = min(depth, 10_000) if benchmark.disabled else depth
    for _ in range(depth // 1_000):
        name = b"queue-%d" % dice.randrange(100)
        engine.create(filled_creates(1_000, name, dice.randrange(10)), TENANT, NOW)
        engine.take()
    engine.create(filled_creates(2 * count, priority=5), TENANT, NOW)
    waiting = engine.live_tasks
    commands = None if every_queue else [COMMAND]

    def work() -> Claim:
        return claim(engine, count, commands)

    def setup() -> tuple[()]:
        for got in held:
            engine.give_back(got, NOW)
        held.clear()
        engine.take()
        return ()

    held: list[Claim] = []
    measure(benchmark, count, lambda: held.append(work()), setup)
    setup()
    assert engine.live_tasks == waiting
    assert sum(row[2] for row in engine.queues(TENANT)) == waiting
    engine.verify()


@pytest.mark.parametrize("count", BATCHES)
def test_lease_expiry(benchmark: Any, count: int) -> None:
    engine = Engine(seed=1, backoff_policy="fixed", backoff_base_ms=0)
    creates = Creates()
    for _ in range(count):
        creates.add(COMMAND, PAYLOAD, max_attempts=1_000_000)
    engine.create(creates, TENANT, NOW)

    def setup() -> tuple[()]:
        engine.delivered(claim(engine, count))
        engine.take()
        return ()

    def work() -> int:
        return engine.tick(NOW + HOUR, count)

    assert measure(benchmark, count, work, setup) == count
    assert engine.stats(TENANT, COMMAND) == (count, 0, 0, 0)
