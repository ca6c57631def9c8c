"""What does the stream codec cost a task? Goal: at most 0.15 us each way.

Run with ``pytest --benchmark-enable benches/bench_wire.py``. A round is one batch, so divide its
time by the batch, or read ``us_per_task`` in the figures that ``--benchmark-json`` saves.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from codeq import errors
from codeq.engine import _wire

BATCHES = (256, 1000)
BYTES_MAX = 4 << 20
PAYLOAD = json.dumps({"to": "someone@example.org", "text": "x" * 148}).encode()
RESULT = b'{"sent":true,"at":"2026-01-02T03:04:05Z"}'
IDS = [str(uuid.UUID(int=n << 64 | 7 << 76 | 1 << 63)).encode() for n in range(1000)]

_wire.set_messages({number: row.stream_message for number, row in errors.BY_NUMBER.items()})


def measure(benchmark: Any, count: int, work: Callable[[], Any]) -> Any:
    answer = benchmark(work)
    if benchmark.stats:
        benchmark.extra_info["us_per_task"] = benchmark.stats.stats.median / count * 1e6
    return answer


def filled_creates(count: int) -> _wire.Creates:
    creates = _wire.Creates()
    for seq in range(1, count + 1):
        creates.add(b"send-email", PAYLOAD, priority=5, seq=seq)
    return creates


def filled_finishes(count: int) -> _wire.Finishes:
    finishes = _wire.Finishes()
    for task_id in IDS[:count]:
        finishes.add(task_id, b"COMPLETED", result=RESULT)
    return finishes


def task_batch(count: int) -> bytes:
    """workerpb.ServerEvent with tasks as the server sends them."""

    def run(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size >= 0x80:
            length += bytes([size & 0x7F | 0x80])
            size >>= 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    fixed = (
        run(2, b"send-email") + run(3, PAYLOAD) + b"\x20\x05\x30\x03" + run(7, b"IN_PROGRESS")
        + run(8, b"worker-1") + run(9, b"2026-01-02T03:04:05Z") + b"\x50\x01" + run(11, b"tenant")
        + run(12, b"\x08\xa5\x9c\xdd\xca\x06\x10\xc0\x84\x3d")
        + run(13, b"\x08\xa5\x9c\xdd\xca\x06")
    )  # fmt: skip
    return run(8, b"".join(run(1, run(1, task_id) + fixed) for task_id in IDS[:count]))


@pytest.mark.parametrize("count", BATCHES)
def test_server_reads_creates(benchmark: Any, count: int) -> None:
    (message,) = _wire.encode_creates(filled_creates(count), BYTES_MAX)

    def work() -> Any:
        _, creates = _wire.decode_producer_event(message)
        creates.check(1 << 20)  # type: ignore[attr-defined]
        return creates

    creates = measure(benchmark, count, work)
    assert creates.codes == bytes(count)


@pytest.mark.parametrize("count", BATCHES)
def test_server_acknowledges_creates(benchmark: Any, count: int) -> None:
    creates = filled_creates(count)
    for index in range(count):
        creates.replay(index, uuid.UUID(IDS[index].decode()).bytes)
    messages = measure(benchmark, count, lambda: _wire.encode_create_acks([creates], BYTES_MAX))
    _, acks = _wire.decode_producer_server_event(messages[0])
    wanted = [(seq, True, task_id.decode(), "") for seq, task_id in enumerate(IDS[:count], 1)]
    assert acks == wanted


@pytest.mark.parametrize("count", BATCHES)
def test_server_reads_results(benchmark: Any, count: int) -> None:
    (message,) = _wire.encode_results(filled_finishes(count), BYTES_MAX)

    def work() -> Any:
        _, finishes = _wire.decode_worker_event(message)
        finishes.check(1 << 20, lenient_error=True)  # type: ignore[attr-defined]
        return finishes

    finishes = measure(benchmark, count, work)
    assert finishes.codes == bytes(count)
    assert finishes.item(count - 1)[1] == RESULT


@pytest.mark.parametrize("count", BATCHES)
def test_server_acknowledges_results(benchmark: Any, count: int) -> None:
    finishes = filled_finishes(count)
    finishes.check(1 << 20, lenient_error=True)
    messages = measure(benchmark, count, lambda: _wire.encode_result_acks([finishes], BYTES_MAX))
    _, acks = _wire.decode_worker_server_event(messages[0])
    assert acks == [(task_id.decode(), True, "") for task_id in IDS[:count]]


@pytest.mark.parametrize("count", BATCHES)
def test_client_writes_creates(benchmark: Any, count: int) -> None:
    messages = measure(
        benchmark, count, lambda: _wire.encode_creates(filled_creates(count), BYTES_MAX)
    )
    assert len(_wire.decode_producer_event(messages[0])[1]) == count  # type: ignore[arg-type]


@pytest.mark.parametrize("count", BATCHES)
def test_client_reads_create_acks(benchmark: Any, count: int) -> None:
    creates = filled_creates(count)
    for index in range(count):
        creates.replay(index, bytes(16))
    (message,) = _wire.encode_create_acks([creates], BYTES_MAX)
    _, acks = measure(benchmark, count, lambda: _wire.decode_producer_server_event(message))
    assert len(acks) == count


@pytest.mark.parametrize("count", BATCHES)
def test_client_reads_tasks(benchmark: Any, count: int) -> None:
    """With the three fields that every handler asks for."""
    message = task_batch(count)

    def work() -> list[tuple[str, str, bytes]]:
        tasks: Any = _wire.decode_worker_server_event(message)[1]
        return [(task.id, task.command, task.payload) for task in tasks]

    tasks = measure(benchmark, count, work)
    assert tasks == [(task_id.decode(), "send-email", PAYLOAD) for task_id in IDS[:count]]


@pytest.mark.parametrize("count", BATCHES)
def test_client_writes_results(benchmark: Any, count: int) -> None:
    messages = measure(
        benchmark, count, lambda: _wire.encode_results(filled_finishes(count), BYTES_MAX)
    )
    assert len(_wire.decode_worker_event(messages[0])[1]) == count  # type: ignore[arg-type]
