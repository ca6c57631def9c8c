"""Tasks through both streams on a real shard under a fake clock, without a transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from codeq.engine import _engine
from codeq.server.auth import WORKER_SCOPES
from tests.lines import FakePrincipal, House, Line
from tests.node import Node
from tests.protos import producerpb, workerpb

HOUR_MS = 3_600_000
Open = Callable[..., "Streams"]


class Streams:
    """A node and the streams to it; ``flush`` carries messages until nothing moves any more."""

    def __init__(self, node: Node, **settings: Any) -> None:
        self.node = node
        self.house = House(node.shard, **settings)
        self.house.auth.tokens["token"] = FakePrincipal(tenant="t")

    def tenant(self, name: str, **rights: Any) -> str:
        """A token of another tenant, or of other rights."""
        self.house.auth.tokens[name] = FakePrincipal(**{"tenant": name, **rights})
        return name

    def flush(self, line: Line) -> list[Any]:
        """What the client of a line gets to read once everything decided is on disk."""
        found: list[Any] = []
        while True:
            self.node.settle()
            new = line.read_all()
            if not new:
                return found
            found += new

    def tasks(self, line: Line) -> list[Any]:
        """The tasks of the assignments to a line."""
        found = []
        for event in self.flush(line):
            if event.WhichOneof("event") == "task":
                found.append(event.task.task)
            elif event.WhichOneof("event") == "task_batch":
                found.extend(event.task_batch.tasks)
        return found

    def creates(self, line: Line, *tasks: Any) -> list[str]:
        """Ids of new tasks, made with one batch."""
        numbered = [
            producerpb.CreateTask(seq=seq, **{"command": "job", **task})
            for seq, task in enumerate(tasks)
        ]
        line.send(create_batch=producerpb.CreateTaskBatch(tasks=numbered))
        (event,) = self.flush(line)
        acks = event.create_ack_batch.acks or [event.create_ack]
        assert [(ack.seq, ack.ok) for ack in acks] == [(seq, True) for seq in range(len(tasks))]
        return [ack.task_id for ack in acks]


@pytest.fixture
def open_streams(tmp_path: Path) -> Iterator[Open]:
    nodes: list[Node] = []

    def start(streams: dict[str, Any] | None = None, **settings: Any) -> Streams:
        nodes.append(Node(tmp_path / str(len(nodes)), **settings))
        return Streams(nodes[-1], **(streams or {}))

    yield start
    for node in nodes:
        node.close()
        assert not node.faults


def test_life_of_a_task_over_both_streams(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker(worker_id="w9")
    worker.ready("mail", lease_seconds=60)
    now_ms = streams.node.clock.now_ms()
    made = {"command": "mail", "payload": b'{"to":1}', "priority": 7, "max_attempts": 3}
    (task_id,) = streams.creates(producer, made)
    (task,) = streams.tasks(worker)
    assert task.lease_until == "2023-11-14T22:14:20Z"
    assert task.created_at.ToMilliseconds() == task.updated_at.ToMilliseconds() == now_ms
    task.ClearField("lease_until")
    task.ClearField("created_at")
    task.ClearField("updated_at")
    assert task == workerpb.Task(
        id=task_id,
        status="IN_PROGRESS",
        worker_id="w9",
        attempts=1,
        tenant_id="t",
        **made,
    )
    worker.send(result=workerpb.Result(task_id=task_id, status="COMPLETED", result_json=b'{"n":1}'))
    (event,) = streams.flush(worker)
    assert event.result_ack == workerpb.ResultAck(task_id=task_id, ok=True)
    view = streams.node.get(task_id)
    assert (view.state, view.result) == (_engine.COMPLETED, b'{"n":1}')


def test_I2_no_task_is_assigned_or_acknowledged_before_its_create_is_synced(
    open_streams: Open,
) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    worker.ready("job")
    streams.node.settle()
    streams.node.runner.hold_syncs = True
    producer.create(1)
    assert streams.flush(producer) == []
    assert streams.flush(worker) == []
    streams.node.runner.hold_syncs = False
    streams.node.runner.release()
    assert streams.flush(producer)[0].create_ack.ok
    assert len(streams.tasks(worker)) == 1


def test_I4_no_task_is_assigned_before_its_claim_is_synced(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    streams.creates(producer, {})
    streams.node.runner.hold_syncs = True
    worker.ready("job")
    assert streams.flush(worker) == []
    streams.node.runner.hold_syncs = False
    streams.node.runner.release()
    (task,) = streams.tasks(worker)
    streams.node.runner.hold_syncs = True
    worker.send(result=workerpb.Result(task_id=task.id, status="COMPLETED"))
    assert streams.flush(worker) == []
    streams.node.runner.hold_syncs = False
    streams.node.runner.release()
    assert streams.flush(worker)[0].result_ack.ok


def test_T4_a_ready_is_answered_even_if_the_task_comes_an_hour_later(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    worker.ready("late", lease_seconds=5)
    assert streams.flush(worker) == []
    streams.node.advance(HOUR_MS)
    assert streams.flush(worker) == []
    (task_id,) = streams.creates(producer, {"command": "late"})
    assert [task.id for task in streams.tasks(worker)] == [task_id]


def test_T4_a_ready_waits_for_a_delayed_task(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    (task_id,) = streams.creates(producer, {"delay_seconds": 3600})
    worker.ready("job")
    streams.node.advance(HOUR_MS - 1)
    assert streams.flush(worker) == []
    streams.node.advance(1)
    assert [task.id for task in streams.tasks(worker)] == [task_id]


@pytest.mark.parametrize("end", ["close", "half_close"])
def test_T7_a_claim_that_is_not_delivered_returns_at_once_attempt_unused(
    open_streams: Open, end: str
) -> None:
    streams = open_streams()
    producer, lost, other = streams.house.producer(), streams.house.worker(), None
    lost.ready("job", lease_seconds=3600)
    (task_id,) = streams.creates(producer, {"max_attempts": 1})
    streams.node.settle()
    getattr(lost.session, end)()
    other = streams.house.worker(worker_id="w2")
    other.ready("job")
    (task,) = streams.tasks(other)
    assert (task.id, task.attempts, task.worker_id) == (task_id, 1, "w2")


def test_T7_a_message_the_transport_did_not_take_was_not_delivered(open_streams: Open) -> None:
    streams = open_streams()
    producer, lost = streams.house.producer(), streams.house.worker()
    lost.ready("job", count=10, lease_seconds=3600)
    ids = streams.creates(producer, {}, {}, {})
    streams.node.settle()
    assert lost.session.take() is not None
    lost.session.close()
    streams.node.settle()
    assert streams.node.stats() == (3, 0, 0, 0)
    other = streams.house.worker()
    other.ready("job", count=10)
    assert [(task.id, task.attempts) for task in streams.tasks(other)] == [(i, 1) for i in ids]


@pytest.mark.parametrize("end", ["close", "half_close"])
def test_T7_a_claim_whose_sync_still_runs_goes_back_when_its_stream_ends(
    open_streams: Open, end: str
) -> None:
    streams = open_streams()
    producer, lost = streams.house.producer(), streams.house.worker()
    lost.ready("job", lease_seconds=3600)
    streams.node.settle()
    streams.node.runner.hold_syncs = True
    producer.create(1)
    streams.node.settle()
    assert streams.node.runner.held
    getattr(lost.session, end)()
    streams.node.runner.hold_syncs = False
    streams.node.runner.release()
    assert streams.node.stats() == (1, 0, 0, 0)
    other = streams.house.worker(worker_id="w2")
    other.ready("job")
    assert [task.attempts for task in streams.tasks(other)] == [1]


def test_delivered_tasks_keep_their_lease_when_the_stream_ends(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker(worker_id="w1")
    worker.ready("job", lease_seconds=60)
    (task_id,) = streams.creates(producer, {})
    assert len(streams.tasks(worker)) == 1
    worker.session.close()
    streams.node.settle()
    assert streams.node.stats() == (0, 0, 1, 0)
    again = streams.house.worker(worker_id="w1")
    again.send(result=workerpb.Result(task_id=task_id, status="COMPLETED"))
    (event,) = streams.flush(again)
    assert event.result_ack.ok


def test_T7_a_stalled_reader_loses_its_claim_with_the_lease(open_streams: Open) -> None:
    streams = open_streams()
    producer, slow = streams.house.producer(), streams.house.worker()
    slow.ready("job", lease_seconds=5)
    (task_id,) = streams.creates(producer, {"max_attempts": 1})
    streams.node.settle()
    streams.node.advance(4_000)
    other = streams.house.worker(worker_id="w2")
    other.ready("job")
    assert streams.tasks(other) == []
    streams.node.advance(2_000)
    (task,) = streams.tasks(other)
    assert (task.id, task.attempts) == (task_id, 1)
    # The Ready is not used up: the next task comes to it.
    assert streams.flush(slow) == []
    (second,) = streams.creates(producer, {})
    assert [task.id for task in streams.tasks(slow)] == [second]


def test_T12_three_attempts_are_three_deliveries(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    streams.creates(producer, {"max_attempts": 3}, {"command": "once", "max_attempts": 1})
    for command, deliveries in (("job", 3), ("once", 1)):
        for attempt in range(1, deliveries + 1):
            worker.ready(command)
            (task,) = streams.tasks(worker)
            assert task.attempts == attempt
            worker.send(nack=workerpb.Nack(task_id=task.id, delay_seconds=1, reason="no luck"))
            (event,) = streams.flush(worker)
            last = attempt == deliveries
            assert event.nack_ack == workerpb.NackAck(
                task_id=task.id, ok=True, dlq=last, applied_delay_seconds=0 if last else 1
            )
            streams.node.advance(1_000)
        worker.ready(command)
        assert streams.tasks(worker) == []
        assert streams.node.stats(command) == (0, 0, 0, 1)


def test_T13_completed_without_a_body_ends_completed(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    ids = streams.creates(producer, {}, {})
    worker.ready("job", count=2)
    assert len(streams.tasks(worker)) == 2
    results = [workerpb.Result(task_id=task_id, status="COMPLETED") for task_id in ids]
    worker.send(result=results[0])
    worker.send(result_batch=workerpb.ResultBatch(results=[results[1]]))
    (event,) = streams.flush(worker)
    assert [ack.ok for ack in event.result_ack_batch.acks] == [True, True]
    assert [streams.node.get(task_id).state for task_id in ids] == [_engine.COMPLETED] * 2


def test_failed_without_a_text_ends_failed(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    (task_id,) = streams.creates(producer, {})
    worker.ready()
    assert len(streams.tasks(worker)) == 1
    for _ in range(2):  # a repeated result is answered as the first was
        worker.send(result=workerpb.Result(task_id=task_id, status="FAILED", error="  "))
        (event,) = streams.flush(worker)
        assert event.result_ack.ok
    view = streams.node.get(task_id)
    assert (view.state, view.error) == (_engine.FAILED, "unspecified failure")
    worker.send(result=workerpb.Result(task_id=task_id, status="COMPLETED"))
    (event,) = streams.flush(worker)
    assert event.result_ack.error_message == "not-in-progress"


def test_T16_the_reason_of_a_nack_is_kept(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    (task_id,) = streams.creates(producer, {})
    worker.ready()
    assert len(streams.tasks(worker)) == 1
    worker.send(nack=workerpb.Nack(task_id=task_id, delay_seconds=60, reason="disk is füll"))
    (event,) = streams.flush(worker)
    assert event.nack_ack.ok
    view = streams.node.get(task_id)
    assert (view.state, view.error) == (_engine.DELAYED, "disk is füll")


def test_T19_a_ready_for_32_tasks_of_200_kb_gets_what_fits_one_message(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker(worker_id="w" * 256)
    ids: list[str] = []
    for _ in range(4):
        ids += streams.creates(producer, *({"payload": bytes(200_000)} for _ in range(8)))
    seen: list[str] = []
    while len(seen) < 32:
        worker.ready("job", count=32)
        streams.node.settle()
        message = worker.session.take()
        assert message is not None
        assert 3_000_000 < len(message) <= 4_194_304 or len(seen) + 20 > 32
        worker.session.sent()
        tasks = workerpb.ServerEvent.FromString(message).task_batch.tasks
        assert len(tasks) > 0
        assert all(task.attempts == 1 for task in tasks)
        seen += [task.id for task in tasks]
        results = [workerpb.Result(task_id=task.id, status="COMPLETED") for task in tasks]
        worker.send(result_batch=workerpb.ResultBatch(results=results))
        assert len(streams.flush(worker)) == 1
    assert seen == ids
    assert streams.node.stats() == (0, 0, 0, 0)


def test_a_batch_of_small_tasks_stays_below_the_limit_of_a_message(open_streams: Open) -> None:
    streams = open_streams(streams={"send_bytes": 131_072})
    producer, worker = streams.house.producer(), streams.house.worker(worker_id="w" * 256)
    for _ in range(4):
        streams.creates(producer, *({"payload": b"{}"} for _ in range(250)))
    seen = 0
    while seen < 1000:
        worker.ready("job", count=1000)
        streams.node.settle()
        message = worker.session.take()
        assert message is not None
        assert len(message) <= 131_072
        worker.session.sent()
        seen += len(workerpb.ServerEvent.FromString(message).task_batch.tasks)
    assert seen == 1000


def test_T24_no_ready_stays_empty_while_a_task_of_its_queues_is_there(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    for command in ("a", "b", "a", "c"):
        worker.ready(command)
    for command in ("c", "b", "a", "a"):
        (task_id,) = streams.creates(producer, {"command": command})
        assert [task.id for task in streams.tasks(worker)] == [task_id]
    streams.creates(producer, *({"command": "a", "priority": n} for n in (1, 5, 3)))
    for expected in (5, 3, 1):
        worker.ready("b", "a")
        assert [task.priority for task in streams.tasks(worker)] == [expected]


def test_T24_many_readys_share_a_commit_group(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    for _ in range(100):
        worker.ready("job")
    ids = streams.creates(producer, *({} for _ in range(100)))
    assert [task.id for task in streams.tasks(worker)] == ids


def test_T26_a_worker_without_commands_serves_its_queues_by_priority_then_age(
    open_streams: Open,
) -> None:
    streams = open_streams()
    some = streams.tenant("some", tenant="t", any_command=False, event_types=(b"x", b"y"))
    producer = streams.house.producer()
    made = [
        {"command": "x", "priority": 1}, {"command": "y", "priority": 9},
        {"command": "z", "priority": 5}, {"command": "x", "priority": 9},
        {"command": "y", "priority": 1}, {"command": "z", "priority": 9},
    ]  # fmt: skip
    ids = streams.creates(producer, *made)
    order = [1, 3, 5, 2, 0, 4]
    for token, expected in (
        (some, [i for i in order if made[i]["command"] != "z"]),
        ("token", [i for i in order if made[i]["command"] == "z"]),
    ):
        worker = streams.house.worker(token=token)
        worker.ready(count=10)
        assert [task.id for task in streams.tasks(worker)] == [ids[i] for i in expected]


def test_T32_another_tenants_task_is_not_found_by_any_event(open_streams: Open) -> None:
    streams = open_streams()
    producer, owner = streams.house.producer(), streams.house.worker(worker_id="w1")
    owner.ready("job", lease_seconds=60)
    (task_id,) = streams.creates(producer, {})
    assert len(streams.tasks(owner)) == 1
    thief = streams.house.worker(token=streams.tenant("thief"), worker_id="w1")
    thief.ready("job")
    thief.send(heartbeat=workerpb.Heartbeat(task_id=task_id))
    thief.send(nack=workerpb.Nack(task_id=task_id))
    thief.send(abandon=workerpb.Abandon(task_id=task_id))
    thief.send(result=workerpb.Result(task_id=task_id, status="COMPLETED"))
    acks = {event.WhichOneof("event"): event for event in streams.flush(thief)}
    assert acks["heartbeat_ack"].heartbeat_ack.error_message == "not-found"
    assert acks["nack_ack"].nack_ack.error_message == "not-found"
    assert acks["abandon_ack"].abandon_ack.error_message == "not-found"
    assert acks["result_ack"].result_ack.error_message == "task not found"
    assert len(acks) == 4
    owner.send(result=workerpb.Result(task_id=task_id, status="COMPLETED"))
    (event,) = streams.flush(owner)
    assert event.result_ack.ok


def test_T33_a_freely_chosen_worker_id_opens_no_other_lease(open_streams: Open) -> None:
    streams = open_streams()
    second = streams.tenant("second", tenant="t", subject="second")
    producer = streams.house.producer()
    (task_id,) = streams.creates(producer, {})
    owner = streams.house.worker(worker_id="")
    owner.ready("job", lease_seconds=60)
    assert [task.worker_id for task in streams.tasks(owner)] == ["sub"]
    result = workerpb.Result(task_id=task_id, status="COMPLETED")
    for stranger in (
        streams.house.worker(token=second, worker_id="w2"),
        streams.house.worker(token=second, worker_id=""),
        streams.house.worker(worker_id="w2"),
    ):
        stranger.send(result=result)
        (event,) = streams.flush(stranger)
        assert event.result_ack.error_message == "not-owner"
    named = streams.house.worker(worker_id="sub")
    named.send(heartbeat=workerpb.Heartbeat(task_id=task_id))
    (event,) = streams.flush(named)
    assert event.heartbeat_ack.ok


def test_T46_a_ready_for_two_billion_tasks_is_harmless(open_streams: Open) -> None:
    streams = open_streams()
    producer, worker = streams.house.producer(), streams.house.worker()
    streams.creates(producer, {}, {})
    worker.ready("job", count=2**31 - 1, lease_seconds=2**31 - 1)
    assert len(streams.tasks(worker)) == 2
    worker.ready("job", count=-(2**31), lease_seconds=-(2**31))
    (task_id,) = streams.creates(producer, {})
    (event,) = streams.flush(worker)
    assert event.task.task.id == task_id


def test_waiting_readys_of_ended_streams_leave_nothing_behind(open_streams: Open) -> None:
    streams = open_streams()
    for end in ("close", "half_close"):
        worker = streams.house.worker()
        for number in range(50):
            worker.ready(f"command-{number}")
        streams.node.settle()
        assert streams.node.shard.waiting_claims == 50
        getattr(worker.session, end)()
        streams.node.settle()
        assert streams.node.shard.waiting_claims == 0


def test_refused_creates_are_acknowledged_with_their_reason(open_streams: Open) -> None:
    streams = open_streams()
    producer = streams.house.producer()
    key = {"idempotency_key": "k", "command": "job"}
    refused = [
        ({"command": "  "}, "command is required"),
        ({"command": "job", "delay_seconds": -1}, "delaySeconds must be >= 0"),
        ({"command": "job", "webhook": "ftp://host/"}, "invalid webhook url"),
        ({"command": "job", "webhook": "http://127.0.0.1/"}, "invalid webhook url"),
        ({"command": "job", "payload": bytes(4_128_769)}, "payload too large"),
        (key, ""),
        ({**key, "priority": 1}, "idempotency key used with a different request"),
    ]
    tasks = [producerpb.CreateTask(seq=seq, **task) for seq, (task, _) in enumerate(refused)]
    producer.send(create_batch=producerpb.CreateTaskBatch(tasks=tasks))
    (event,) = streams.flush(producer)
    acks = event.create_ack_batch.acks
    assert [ack.error_message for ack in acks] == [text for _, text in refused]
    assert [ack.ok for ack in acks] == [not text for _, text in refused]
    assert [ack.seq for ack in acks] == list(range(len(refused)))
    producer.send(create=producerpb.CreateTask(seq=99, **key))
    (event,) = streams.flush(producer)
    assert event.create_ack == producerpb.CreateAck(seq=99, ok=True, task_id=acks[5].task_id)


def test_scopes_of_a_token_bound_its_streams(open_streams: Open) -> None:
    streams = open_streams()
    token = streams.tenant("limited", tenant="t", scopes=WORKER_SCOPES - {"codeq:result"})
    producer, worker = streams.house.producer(), streams.house.worker(token=token)
    (task_id,) = streams.creates(producer, {})
    worker.ready()
    assert len(streams.tasks(worker)) == 1
    worker.send(result=workerpb.Result(task_id=task_id, status="COMPLETED"))
    (event,) = streams.flush(worker)
    assert (event.error.code, event.error.message) == ("PermissionDenied", "missing scope")
    assert streams.node.stats() == (0, 0, 1, 0)
