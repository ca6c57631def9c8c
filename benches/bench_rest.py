"""What does the REST layer cost a task, without sockets, tokens and disk?

Run with ``pytest --benchmark-enable benches/bench_rest.py``. A round is one body, so divide the
time of a batch by its hundred tasks, or read ``us_per_task`` in what ``--benchmark-json`` saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from codeq.engine._views import TaskView
from codeq.engine._wire import Creates, format_id
from codeq.model import CreatedItem
from codeq.server import rest_tasks
from codeq.server.request import encode
from codeq.server.views import READY, task_of

ITEM = {"command": "send-email", "payload": {"to": "someone@example.org", "text": "x" * 148}}
KEYED = {**ITEM, "priority": 5, "idempotencyKey": "order-4711"}
BATCH = 100
NO_TRACE = (b"", b"")


def measure(benchmark: Any, count: int, work: Callable[[], Any]) -> Any:
    answer = benchmark(work)
    if benchmark.stats:
        benchmark.extra_info["us_per_task"] = benchmark.stats.stats.median / count * 1e6
    return answer


def ready_view(number: int) -> TaskView:
    view = TaskView()
    view.id_bytes = number.to_bytes(16, "big")
    view.id = format_id(view.id_bytes)
    view.command, view.tenant = ITEM["command"], "acme"
    view.payload = msgspec.json.encode(ITEM["payload"])
    view.state, view.max_attempts = READY, 5
    view.created_ms = view.updated_ms = 1_767_323_045_000
    return view


def creates_of(body: bytes) -> Creates:
    creates = Creates()
    rest_tasks._add(creates, rest_tasks._batch_items(body, bare=True), NO_TRACE)
    return creates


@pytest.mark.parametrize("item", [ITEM, KEYED], ids=["plain", "keyed"])
@pytest.mark.parametrize("count", [1, BATCH])
def test_creates_are_decoded(benchmark: Any, count: int, item: dict[str, Any]) -> None:
    body = msgspec.json.encode([item] * count)
    creates = measure(benchmark, count, lambda: creates_of(body))
    assert creates.codes == bytes(count)


def test_a_batch_with_a_bad_item_is_decoded_item_by_item(benchmark: Any) -> None:
    body = msgspec.json.encode([ITEM] * (BATCH - 1) + [7])
    items = measure(benchmark, BATCH, lambda: rest_tasks._batch_items(body, bare=True))
    assert items[-1] is None and None not in items[:-1]


def test_a_task_is_encoded(benchmark: Any) -> None:
    view = ready_view(1)
    answer = measure(benchmark, 1, lambda: encode(task_of(view)))
    assert msgspec.json.decode(answer)["payload"] == view.payload.decode()


def test_the_answer_to_a_batch_is_encoded(benchmark: Any) -> None:
    views = [ready_view(number) for number in range(BATCH)]
    answer = measure(
        benchmark, BATCH, lambda: encode([CreatedItem(task_of(view)) for view in views])
    )
    assert len(msgspec.json.decode(answer)) == BATCH
