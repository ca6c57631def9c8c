"""The parts of Producer and Worker that work on whole messages, against a plain model."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeq import CodeqError, Fail, NewTask, Task, Worker
from codeq.engine import _wire
from codeq.engine._client import (
    ITEM_BYTES_MAX,
    UNTRIED,
    Counts,
    Group,
    Results,
    item_of,
    producer_event,
    worker_event,
)

from .fake_streams import FakeStreams, ended, play, spawn, task_id
from .protos import workerpb
from .test_client_worker import a_worker, batch

BYTES_MAX = 1 << 20
FOR_EVER = float("inf")
NO_KEYS = iter(lambda: b"", None)


def tasks_of(*numbers: int) -> list[Task]:
    message = workerpb.ServerEvent(**batch(*numbers)).SerializeToString()
    kind, tasks = worker_event(message, Results(Counts(), merge=True))
    assert kind == _wire.TASKS and isinstance(tasks, list)
    return tasks


def acks_of(*numbers: int, refused: str = "") -> bytes:
    acks = [{"task_id": task_id(n), "ok": not refused, "error_message": refused} for n in numbers]
    return workerpb.ServerEvent(result_ack_batch={"acks": acks}).SerializeToString()


def told(results: Results) -> list[str]:
    ids = []
    for message in results.messages(BYTES_MAX):
        event = workerpb.WorkerEvent.FromString(message)
        sent = [event.result] if event.HasField("result") else event.result_batch.results
        ids += [result.task_id for result in sent]
    return ids


@given(st.lists(st.one_of(
    st.tuples(st.just("found"), st.lists(st.integers(0, 12), max_size=5)),
    st.tuples(st.just("answered"), st.lists(st.integers(0, 12), max_size=5)),
    st.tuples(st.just("told"), st.none()),
    st.tuples(st.just("broken"), st.none()),
)))  # fmt: skip
def test_T65_results_are_kept_until_they_are_acknowledged(steps: list[tuple[str, Any]]) -> None:
    """In whatever order acknowledgements come, unknown ones and those of a task that came twice
    among them: a break has exactly those told again that have no answer."""
    results = Results(Counts(), merge=True)
    unanswered: list[int] = []  # in order of the results
    for step, numbers in steps:
        if step == "found":
            numbers = [n for n in dict.fromkeys(numbers) if n not in unanswered]
            if numbers:
                results.work(tasks_of(*numbers), 0, lambda task: 1, set(), FOR_EVER)
            unanswered += numbers
        elif step == "answered":
            assert worker_event(acks_of(*numbers), results) == (_wire.RESULT_ACKS, [])
            unanswered = [n for n in unanswered if n not in numbers]
        elif step == "told":
            assert set(told(results)) <= {task_id(n) for n in unanswered}
            assert not results.waiting
        else:
            results.tell_again()
            assert told(results) == [task_id(n) for n in unanswered]
        assert results.count == len(unanswered)


def test_a_task_that_came_twice_needs_no_second_answer_once_order_is_lost() -> None:
    counts = Counts()
    results = Results(counts, merge=True)
    results.work(tasks_of(1, 2, 1, 3), 0, lambda task: task.json(), set(), FOR_EVER)
    assert told(results) == [task_id(n) for n in (1, 2, 1, 3)]
    worker_event(acks_of(3, 1), results)
    worker_event(acks_of(2, 1), results)
    assert results.count == 0
    assert counts.finished == 4


def test_refusals_are_told_apart() -> None:
    counts = Counts()
    results = Results(counts, merge=True)
    results.work(tasks_of(1, 2), 0, lambda task: 1, set(), FOR_EVER)
    _, refused = worker_event(acks_of(2, refused="not-owner"), results)
    assert refused == [(task_id(2), "not-owner")]
    assert (results.count, counts.acknowledged) == (1, 0)


def test_answered_results_do_not_pile_up() -> None:
    """Also when there is never a moment without an open one."""
    results = Results(Counts(), merge=True)
    for n in range(0, 20_000, 1000):
        results.work(tasks_of(*range(n, n + 1000)), 0, lambda task: 1, set(), FOR_EVER)
        results.messages(BYTES_MAX)
        worker_event(acks_of(*range(max(n - 1, 0), n + 999)), results)
    assert results.count == 1
    results.tell_again()
    assert told(results) == [task_id(19_999)]


def test_work_stops_where_python_has_to_decide() -> None:
    results = Results(Counts(), merge=True)
    tasks = tasks_of(0, 1, 2, 3)
    failure = Fail("no")

    def handle(task: Task) -> Any:
        return failure if task.json() == 1 else {"n": task.json()}

    assert results.work(tasks, 0, handle, set(), FOR_EVER) == (1, failure)
    assert results.work(tasks, 2, handle, {task_id(3)}, FOR_EVER) == (3, UNTRIED)
    assert results.work(tasks, 3, handle, set(), time.monotonic()) == (4, UNTRIED)
    results.abandoning = True
    assert results.work(tasks, 2, handle, set(), FOR_EVER) == (2, UNTRIED)
    assert told(results) == [task_id(n) for n in (0, 2, 3)]
    place, error = results.work(tasks_of(7), 0, lambda task: object(), set(), FOR_EVER)
    assert (place, error) == (0, UNTRIED)
    results.abandoning = False
    place, error = results.work(tasks_of(7), 0, lambda task: object(), set(), FOR_EVER)
    assert place == 0 and isinstance(error, TypeError)


def test_a_handler_may_stop_its_worker() -> None:
    async def scenario(fake: FakeStreams) -> None:
        def handle(task: Task) -> int:
            if task.json() == 2:
                worker.stop(abandon=True)
            return 1

        worker: Worker = a_worker(fake)
        running = spawn(worker.run(handle))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**batch(1, 2, 3, 4))
        event = await peer.heard()
        assert [result.task_id for result in event.result_batch.results] == [task_id(1), task_id(2)]
        for number in (3, 4):
            assert (await peer.heard()).abandon.task_id == task_id(number)
            await peer.say(abandon_ack={"task_id": task_id(number), "ok": True})
        acks = [{"task_id": task_id(n), "ok": True} for n in (1, 2)]
        await peer.say(result_ack_batch={"acks": acks})
        await ended(running, peer)

    play(scenario)


def test_a_group_takes_what_fits_and_hands_on_the_next() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        tasks = iter([("a", b"x" * 600_000), ("a", object()), ("a", b"y" * 600_000), ("a", 1)])
        first = Group(1, loop.create_future(), singles=False)
        assert first.fill(tasks, NO_KEYS, None) is False
        assert (len(first.results), first.left) == (2, 1)
        assert isinstance(first.results[1], CodeqError)
        second = Group(2, loop.create_future(), singles=False)
        assert second.fill(tasks, NO_KEYS, first.over) is True
        assert (len(second.results), second.left, second.over) == (2, 2, None)
        kind, creates = _wire.decode_producer_event(second.message())
        assert kind == _wire.CREATE_BATCH and isinstance(creates, _wire.Creates)
        assert second.sent and not first.sent
        for index in range(2):
            creates.replay(index, bytes(15) + bytes([index]))
        sent = {1: first, 2: second}
        (message,) = _wire.encode_create_acks([creates], BYTES_MAX)
        assert producer_event(message, sent, lambda text: CodeqError("internal", text)) == (
            _wire.CREATE_ACKS,
            [second],
        )
        assert sent == {1: first}
        assert second.done.done()
        assert second.results == [creates.task_id(0), creates.task_id(1)]

    asyncio.run(scenario())


def test_what_cannot_be_a_task_is_refused_here() -> None:
    for task in (("a",), ("a", 1, 2), (1, 1), NewTask("a", priority=1 << 31), 7):
        with pytest.raises(CodeqError, match="this cannot be a task"):
            item_of(task, b"")
    assert item_of(("ab", b"xyz"), b"").weight == 2 + 3 + 128
    with pytest.raises(CodeqError, match="payload too large"):
        item_of(("a", b"x" * ITEM_BYTES_MAX), b"")
