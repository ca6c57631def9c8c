"""Stream sessions without a transport: every rule of the two streams, on a shard a test answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeq import errors
from codeq.server.auth import WORKER_SCOPES, AuthError
from codeq.server.readys import PARKED_MAX
from codeq.server.streams import Status
from tests.fake_shard import FakeShard
from tests.lines import FakePrincipal, House, refused
from tests.protos import producerpb, workerpb


def make_house(**settings: Any) -> House:
    return House(FakeShard(), **settings)


# --- Hello


def test_hello_ack_names_tenant_and_subject() -> None:
    line = make_house().producer(token=None)
    line.send(hello=producerpb.Hello(token="token"))
    assert line.read() == producerpb.ServerEvent(
        hello_ack=producerpb.HelloAck(tenant_id="acme", subject="sub")
    )
    assert line.read() is None
    assert line.session.status is None


@pytest.mark.parametrize(
    ("sent", "used"),
    [("  w7 ", "w7"), ("\u3000w7\x85", "w7"), ("", "sub"), ("   ", "sub"), ("\x1cw7", "\x1cw7")],
)
def test_worker_id_is_that_of_hello_else_the_subject(sent: str, used: str) -> None:
    line = make_house().worker(token=None)
    line.send(hello=workerpb.Hello(token="token", worker_id=sent))
    assert line.read() == workerpb.ServerEvent(
        hello_ack=workerpb.HelloAck(worker_id=used, tenant_id="acme")
    )


def test_lease_calls_name_no_worker_when_hello_named_none() -> None:
    house = make_house()
    for worker_id, named, holder in (("w1", "w1", "w1"), ("", "", "sub")):
        line = house.worker(worker_id=worker_id)
        line.send(abandon=workerpb.Abandon(task_id="x"))
        assert house.shard.calls.pop() == ("abandon", "x", "acme", named, "sub")
        line.ready()
        assert house.shard.waiters[-1].request.worker == holder


def test_the_first_event_must_be_hello() -> None:
    house = make_house()
    producer = house.producer(token=None)
    producer.create(1)
    worker = house.worker(token=None)
    worker.ready()
    for line in (producer, worker):
        assert line.session.status == Status("FAILED_PRECONDITION", "first event must be Hello")
        assert line.read() is None
        assert line.session.over
    assert not house.shard.creates
    assert not house.shard.waiters


@pytest.mark.parametrize(
    ("kind", "token", "status"),
    [
        ("producer", " ", Status("UNAUTHENTICATED", "missing token")),
        ("worker", " ", Status("UNAUTHENTICATED", "auth failed: missing token")),
        ("producer", "bad", Status("UNAUTHENTICATED", "auth failed: invalid token")),
        ("worker", "bad", Status("UNAUTHENTICATED", "auth failed: invalid token")),
        ("worker", "stray", Status("PERMISSION_DENIED", "invalid tenant claims")),
        ("worker", "off", Status("UNAVAILABLE", "worker validator not configured")),
    ],
)
def test_a_refused_token_ends_the_stream(kind: str, token: str, status: Status) -> None:
    house = make_house()
    house.auth.tokens["stray"] = AuthError("permission-denied", "invalid tenant claims")
    house.auth.tokens["off"] = AuthError("unavailable", "worker validator not configured")
    line = house.producer(token=None) if kind == "producer" else house.worker(token=None)
    line.send(hello={"token": token})
    assert line.session.status == status
    assert line.read() is None
    assert line.session.over


def test_a_worker_id_that_is_too_long_ends_the_stream() -> None:
    line = make_house().worker(token=None)
    line.send(hello=workerpb.Hello(token="token", worker_id="w" * 257))
    assert line.session.status == Status("INVALID_ARGUMENT", "invalid workerId")


def test_hello_must_come_in_time() -> None:
    house = make_house(hello_timeout_seconds=3)
    line = house.producer(token=None)
    (timer,) = house.timers
    assert timer.seconds == 3
    timer.callback()
    assert line.session.status is not None
    assert line.session.status.code == "DEADLINE_EXCEEDED"
    assert line.session.over
    in_time = house.producer()
    assert house.timers[1].cancelled
    assert in_time.session.status is None


def test_a_second_hello_and_an_unknown_event_leave_the_stream_open() -> None:
    house = make_house()
    for line in (house.producer(), house.worker()):
        line.send(hello={"token": "token"})
        assert refused(line.read()) == ("FailedPrecondition", "already-authenticated")
        line.session.receive(b"")
        assert refused(line.read()) == ("InvalidArgument", "unknown-event")
        line.session.receive(b"\xfa\x01\x00")
        assert refused(line.read()) == ("InvalidArgument", "unknown-event")
        assert line.session.status is None


@pytest.mark.parametrize("message", [b"\x12\xff", b"\x0a", b"\xff" * 11, b"\x0a\x03\x0a\x01\xff"])
def test_T47_malformed_bytes_end_only_their_stream(message: bytes) -> None:
    house = make_house()
    for line in (house.producer(), house.worker()):
        other = house.producer()
        line.session.receive(message)
        status = line.session.status
        assert status is not None and status.code == "INVALID_ARGUMENT"
        assert status.text == "malformed message"
        assert line.session.over
        assert other.session.status is None


EVENTS = [
    producerpb.ProducerEvent(create={"seq": 1, "command": "job", "payload": b"x" * 20}),
    producerpb.ProducerEvent(create_batch={"tasks": [{"seq": 1}, {"seq": 2, "webhook": "x"}]}),
    workerpb.WorkerEvent(hello={"token": "token", "worker_id": "w"}),
    workerpb.WorkerEvent(ready={"commands": ["a", "b"], "count": 9, "lease_seconds": 5}),
    workerpb.WorkerEvent(result={"task_id": "a", "status": "FAILED", "error": "b"}),
    workerpb.WorkerEvent(result_batch={"results": [{"task_id": "a", "result_json": b"{}"}]}),
    workerpb.WorkerEvent(nack={"task_id": "a", "delay_seconds": 3, "reason": "b"}),
    workerpb.WorkerEvent(heartbeat={"task_id": "a", "extend_seconds": 3}),
    workerpb.WorkerEvent(abandon={"task_id": "a"}),
]


@settings(max_examples=300)
@given(
    seed=st.sampled_from([event.SerializeToString() for event in EVENTS]),
    at=st.integers(0, 80),
    cut=st.integers(0, 4),
    put=st.binary(max_size=4),
    greeted=st.booleans(),
)
def test_T47_no_message_breaks_a_session(
    seed: bytes, at: int, cut: int, put: bytes, greeted: bool
) -> None:
    house = make_house()
    token = "token" if greeted else None
    for line in (house.producer(token=token), house.worker(token=token)):
        line.session.receive(seed[:at] + put + seed[at + cut :])
        house.shard.commit()
        line.read_all()
        line.session.half_close()
        assert line.session.over
    assert house.in_flight.total == 0


def test_a_stream_ends_with_its_token_when_so_set() -> None:
    house = make_house(end_at_token_expiry=True)
    now_ms = house.shard.clock.now_ms()
    house.auth.tokens["token"] = FakePrincipal(expires_ms=now_ms + 5_000)
    line = house.producer()
    assert house.timers[-1].seconds == 5
    house.shard.clock.advance(5_000)
    house.timers[-1].callback()
    assert line.session.status == Status("UNAUTHENTICATED", "auth failed: token expired")
    house.auth.tokens["token"] = FakePrincipal(expires_ms=house.shard.clock.now_ms() + 10**12)
    far = house.producer()
    house.timers[-1].callback()
    assert far.session.status is None
    assert not house.timers[-1].cancelled


# --- creates


def test_acknowledgements_of_one_commit_group_share_a_message() -> None:
    house = make_house()
    line = house.producer()
    for seq in (1, 2, 3):
        line.create(seq)
    batch = producerpb.CreateTaskBatch(
        tasks=[producerpb.CreateTask(seq=4, command="job"), producerpb.CreateTask(seq=5)]
    )
    line.send(create_batch=batch)
    assert line.read() is None
    house.shard.commit()
    (event,) = line.read_all()
    acks = event.create_ack_batch.acks
    assert [(ack.seq, ack.ok) for ack in acks] == [
        (1, True), (2, True), (3, True), (4, True), (5, False),
    ]  # fmt: skip
    assert len({ack.task_id for ack in acks[:4]}) == 4
    assert acks[4].error_message == "command is required"
    assert [tenant for _, tenant in house.shard.creates] == ["acme"] * 4


def test_one_create_is_acknowledged_singly_and_an_empty_batch_not_at_all() -> None:
    house = make_house()
    line = house.producer()
    line.send(create_batch=producerpb.CreateTaskBatch())
    house.shard.commit()
    assert line.read() is None
    line.create(9)
    house.shard.commit()
    ack = line.read().create_ack
    assert (ack.seq, ack.ok, len(ack.task_id)) == (9, True, 36)


def test_what_finishes_while_a_message_is_written_shares_the_next() -> None:
    house = make_house()
    line = house.producer()
    line.create(1)
    house.shard.commit()
    first = line.session.take()
    assert first is not None
    for seq in (2, 3):
        line.create(seq)
        house.shard.commit()
    line.session.sent()
    (event,) = line.read_all()
    assert [ack.seq for ack in event.create_ack_batch.acks] == [2, 3]


def test_the_writer_is_woken_when_there_is_something_to_write() -> None:
    house = make_house()
    producer, worker = house.producer(), house.worker()
    producer.create(1)
    worker.send(result=workerpb.Result(task_id="a", status="COMPLETED"))
    worker.ready()
    woken = (producer.writer_woken, worker.writer_woken)
    house.shard.commit()
    assert (producer.writer_woken, worker.writer_woken) == (woken[0] + 1, woken[1] + 1)
    house.shard.deliver(b"")
    assert worker.writer_woken == woken[1] + 2
    worker.session.receive(b"")
    assert worker.writer_woken == woken[1] + 3


def test_acknowledgements_too_big_for_one_message_are_split() -> None:
    house = make_house(send_bytes=131_072)
    line = house.producer()
    tasks = [producerpb.CreateTask(seq=seq, command="job") for seq in range(5_000)]
    line.send(create_batch=producerpb.CreateTaskBatch(tasks=tasks))
    house.shard.commit()
    seqs: list[int] = []
    while (message := line.session.take()) is not None:
        assert len(message) <= 131_072
        assert not line.session.may_read() or house.in_flight.total > 0
        line.session.sent()
        event = producerpb.ServerEvent.FromString(message)
        seqs += [ack.seq for ack in event.create_ack_batch.acks]
    assert seqs == list(range(5_000))
    assert house.in_flight.total == 0


# --- results and lease calls


def test_T13_completed_without_a_body_is_acknowledged() -> None:
    house = make_house()
    line = house.worker()
    task_id = "0190b5a0-0000-7000-8000-000000000001"
    line.send(result=workerpb.Result(task_id=task_id, status="COMPLETED"))
    line.send(
        result_batch=workerpb.ResultBatch(
            results=[
                workerpb.Result(task_id=task_id, status="FAILED"),
                workerpb.Result(task_id=task_id, status="DONE"),
                workerpb.Result(task_id=task_id, status="COMPLETED", result_json=b"{"),
                workerpb.Result(task_id="nonsense", status="COMPLETED"),
            ]
        )
    )
    line.send(result_batch=workerpb.ResultBatch())
    house.shard.commit()
    (event,) = line.read_all()
    acks = event.result_ack_batch.acks
    assert [ack.ok for ack in acks] == [True, True, False, False, False]
    assert [ack.error_message for ack in acks[2:]] == [
        'invalid status (must be COMPLETED or FAILED): "DONE"',
        "invalid result_json",
        "task not found",
    ]
    assert house.shard.calls == [
        ("finish", 1, "acme", "w1", "sub"),
        ("finish", 4, "acme", "w1", "sub"),
    ]


def test_lease_calls_are_passed_on_and_answered() -> None:
    house = make_house()
    line = house.worker()
    line.send(heartbeat=workerpb.Heartbeat(task_id="a", extend_seconds=5))
    line.send(heartbeat=workerpb.Heartbeat(task_id="a"))
    line.send(heartbeat=workerpb.Heartbeat(task_id="a", extend_seconds=2**31 - 1))
    line.send(nack=workerpb.Nack(task_id="b", delay_seconds=3, reason="why"))
    line.send(nack=workerpb.Nack(task_id="b", delay_seconds=0))
    line.send(abandon=workerpb.Abandon(task_id="c"))
    assert house.shard.calls == [
        ("heartbeat", "a", "acme", "w1", "sub", 5_000),
        ("heartbeat", "a", "acme", "w1", "sub", 300_000),
        ("heartbeat", "a", "acme", "w1", "sub", 86_400_000),
        ("nack", "b", "acme", "w1", "sub", 3, "why"),
        ("nack", "b", "acme", "w1", "sub", None, ""),
        ("abandon", "c", "acme", "w1", "sub"),
    ]
    assert line.read() is None
    house.shard.commit()
    events = line.read_all()
    assert [event.WhichOneof("event") for event in events] == [
        *["heartbeat_ack"] * 3, "nack_ack", "nack_ack", "abandon_ack",
    ]  # fmt: skip
    assert events[3].nack_ack == workerpb.NackAck(task_id="b", ok=True, applied_delay_seconds=7)


def test_refusals_carry_the_text_of_the_table() -> None:
    house = make_house()
    line = house.worker()
    for row in (errors.NOT_FOUND, errors.NOT_IN_PROGRESS, errors.NOT_OWNER):
        house.shard.number = row.number or 0
        line.send(heartbeat=workerpb.Heartbeat(task_id="a"))
        house.shard.commit()
        ack = line.read().heartbeat_ack
        assert (ack.ok, ack.task_id, ack.error_message) == (False, "a", row.message)


@pytest.mark.parametrize(
    ("scope", "event"),
    [
        ("codeq:claim", {"ready": workerpb.Ready()}),
        ("codeq:result", {"result": workerpb.Result(task_id="a", status="COMPLETED")}),
        ("codeq:result", {"result_batch": workerpb.ResultBatch()}),
        ("codeq:nack", {"nack": workerpb.Nack(task_id="a")}),
        ("codeq:heartbeat", {"heartbeat": workerpb.Heartbeat(task_id="a")}),
        ("codeq:abandon", {"abandon": workerpb.Abandon(task_id="a")}),
    ],
)
def test_each_event_needs_its_scope(scope: str, event: dict[str, Any]) -> None:
    house = make_house()
    house.auth.tokens["token"] = FakePrincipal(scopes=WORKER_SCOPES - {scope})
    line = house.worker()
    line.send(**event)
    assert refused(line.read()) == ("PermissionDenied", "missing scope")
    assert not house.shard.calls
    assert not house.shard.waiters
    assert line.session.status is None


# --- Readys


def test_commands_of_a_ready() -> None:
    house = make_house()
    house.auth.tokens["some"] = FakePrincipal(any_command=False, event_types=(b"b", b"a"))
    every, some = house.worker(), house.worker(token="some")
    for line, named, expected in (
        (every, [], (None, False)),
        (every, [" b ", "a", "", "b"], ((b"b", b"a"), True)),
        (every, ["*"], ((b"*",), True)),
        (some, [], ((b"b", b"a"), False)),
        (some, ["a"], ((b"a",), True)),
    ):
        line.ready(*named)
        request = house.shard.waiters[-1].request
        assert (request.commands, request.in_order) == expected
        house.shard.deliver(b"", waiter=house.shard.waiters[-1])
        assert line.read().WhichOneof("event") == "task"
    for line, named in ((some, ["a", "c"]), (some, ["*"]), (every, ["", "  "]), (some, [""])):
        line.ready(*named)
        assert refused(line.read()) == ("PermissionDenied", "event type not allowed")
    every.ready(*(f"c{i}" for i in range(101)))
    assert refused(every.read())[0] == "InvalidArgument"
    every.ready("c" * 257)
    assert refused(every.read()) == ("InvalidArgument", "invalid command")
    assert not house.shard.waiters


def test_T46_count_and_lease_of_a_ready_are_cut() -> None:
    house = make_house(ready_count_max=50)
    line = house.worker()
    for count, lease_seconds, expected in (
        (2**31 - 1, 2**31 - 1, (50, 86_400_000)),
        (-5, -5, (1, 300_000)),
        (0, 0, (1, 300_000)),
        (2, 10, (2, 10_000)),
    ):
        line.ready(count=count, lease_seconds=lease_seconds)
        request = house.shard.waiters[-1].request
        assert (request.count, request.lease_ms) == expected
        assert request.wait
        house.shard.deliver(b"")
        kind = "task_batch" if count > 1 else "task"
        assert line.read().WhichOneof("event") == kind


def test_a_batch_leaves_room_for_what_an_assignment_adds() -> None:
    house = make_house()
    line = house.worker(worker_id="w" * 256)
    line.ready(count=1000)
    request = house.shard.waiters[0].request
    assert request.bytes_max + 1000 * (256 + 60) < 4_194_304


def test_a_ready_gets_exactly_one_message() -> None:
    house = make_house()
    line = house.worker()
    line.ready(count=3)
    delivery = house.shard.deliver(b"1", b"2")
    (event,) = line.read_all()
    assert [task.payload for task in event.task_batch.tasks] == [b"1", b"2"]
    assert (delivery.accepted_count, delivery.given_back_count) == (1, 0)
    assert not house.shard.waiters


def test_T47_further_readys_wait_while_an_assignment_is_unwritten() -> None:
    house = make_house()
    line = house.worker()
    for _ in range(5):
        line.ready()
    assert len(house.shard.waiters) == 1
    house.shard.deliver(bytes(1_000_000))
    assert not house.shard.waiters
    line.ready("other")
    assert line.session.take() is not None
    line.ready("third")
    assert not house.shard.waiters
    line.session.sent()
    # The message was large, so of the same commands again only one goes on.
    assert [waiter.request.commands for waiter in house.shard.waiters] == [
        None, (b"other",), (b"third",),
    ]  # fmt: skip


def test_small_tasks_are_claimed_for_many_readys_in_one_group() -> None:
    house = make_house()
    line = house.worker()
    for _ in range(200):
        line.ready()
    house.shard.deliver(b"small")
    assert len(line.read_all()) == 1
    assert len(house.shard.waiters) == PARKED_MAX
    first = list(house.shard.waiters)
    for waiter in first:
        house.shard.deliver(b"small", waiter=waiter)
    assert not house.shard.waiters
    assert len(line.read_all()) == PARKED_MAX
    assert len(house.shard.waiters) == PARKED_MAX


@pytest.mark.parametrize(("size", "before"), [(0, 4), (3_000, 3), (100_000, 1)])
def test_acknowledgements_wait_for_few_assignments(size: int, before: int) -> None:
    house = make_house()
    line = house.worker()
    for command in ("a", "b", "c", "d"):
        line.ready(command)
        line.send(result=workerpb.Result(task_id=command, status="COMPLETED"))
    house.shard.commit()
    for _ in range(4):
        house.shard.deliver(bytes(size))
    kinds = [event.WhichOneof("event") for event in line.read_all()]
    assert kinds == [*["task"] * before, "result_ack_batch", *["task"] * (4 - before)]


def test_T24_readys_for_other_commands_do_not_wait_behind_an_empty_queue() -> None:
    house = make_house()
    line = house.worker()
    line.ready("empty")
    line.ready("empty")
    line.ready("full")
    assert [waiter.request.commands for waiter in house.shard.waiters] == [(b"empty",), (b"full",)]


def test_T7_an_assignment_whose_lease_is_over_goes_back_and_the_ready_waits_on() -> None:
    house = make_house()
    line = house.worker()
    line.ready(lease_seconds=5)
    late = house.shard.deliver(b"late")
    house.shard.clock.advance(5_000)
    assert line.read() is None
    assert (late.accepted_count, late.given_back_count) == (0, 1)
    assert len(house.shard.waiters) == 1
    house.shard.deliver(b"again")
    assert line.read().task.task.payload == b"again"


@pytest.mark.parametrize("end", ["close", "half_close", "stop"])
def test_T7_claims_not_handed_over_go_back_when_the_stream_ends(end: str) -> None:
    house = make_house()
    line = house.worker()
    line.ready()
    house.shard.deliver(b"small")
    line.read()
    for command in ("a", "b", "c", "d"):
        line.ready(command)
    first, second, third = (house.shard.deliver(b"small") for _ in range(3))
    assert line.read() is not None
    assert line.session.take() is not None
    if end == "stop":
        house.edge.stop()
    else:
        getattr(line.session, end)()
    assert not house.shard.waiters
    assert (first.accepted_count, first.given_back_count) == (1, 0)
    assert (third.accepted_count, third.given_back_count) == (0, 1)
    if end == "close":
        assert (second.accepted_count, second.given_back_count) == (0, 1)
    else:
        assert not line.session.over
        line.session.sent()
        assert (second.accepted_count, second.given_back_count) == (1, 0)
    assert line.session.over
    line.session.close()
    line.session.close()
    assert second.accepted_count + second.given_back_count == 1


def test_T47_waiting_readys_are_bounded() -> None:
    house = make_house(readys_max=3)
    line = house.worker()
    for _ in range(3):
        line.ready()
    assert line.session.status is None
    house.shard.deliver(b"")
    line.read()
    line.ready()
    assert line.session.status is None
    line.ready()
    assert line.session.status == Status("RESOURCE_EXHAUSTED", "too many waiting Readys")
    assert not house.shard.waiters


def test_T47_the_commands_of_waiting_readys_are_bounded() -> None:
    house = make_house(inflight_bytes=10_000)
    line = house.worker()
    for number in range(40):
        line.ready(f"{number:0250}")
    assert line.session.status is None
    for _ in range(20):
        house.shard.deliver(b"")
        line.read()
    for number in range(40, 60):
        line.ready(f"{number:0250}")
    assert line.session.status is None
    line.ready("one more")
    assert line.session.status == Status("RESOURCE_EXHAUSTED", "too many waiting Readys")


# --- bounds


def test_T47_events_in_hand_are_bounded_by_number() -> None:
    house = make_house(inflight_max=3)
    line = house.producer()
    for seq in range(3):
        line.create(seq)
    assert not line.session.may_read()
    house.shard.commit()
    assert not line.session.may_read()
    assert line.session.take() is not None
    assert not line.session.may_read()
    woken = line.reader_woken
    line.session.sent()
    assert line.reader_woken > woken
    assert line.session.may_read()


def test_T47_events_in_hand_are_bounded_by_bytes() -> None:
    house = make_house(inflight_bytes=1000)
    line = house.producer()
    line.create(1, payload=bytes(990))
    assert not line.session.may_read()
    house.shard.commit()
    line.read()
    assert line.session.may_read()


def test_T47_errors_are_events_in_hand_too() -> None:
    house = make_house(inflight_max=2)
    line = house.worker()
    for _ in range(2):
        line.session.receive(b"")
    assert not line.session.may_read()
    line.read_all()
    assert line.session.may_read()


def test_a_parked_ready_is_not_in_hand() -> None:
    house = make_house(inflight_max=1)
    line = house.worker()
    for _ in range(10):
        line.ready()
    assert line.session.may_read()
    assert house.in_flight.total == 0


def test_T47_events_in_hand_are_bounded_over_all_streams_by_fair_shares() -> None:
    house = make_house(bytes_in_all=10_000)
    house.auth.tokens["other"] = FakePrincipal(tenant="other")
    greedy, second = house.producer(), house.producer()
    modest, worker = house.producer(token="other"), house.worker()
    for seq in range(10):
        greedy.create(seq, payload=bytes(1000))
    assert house.in_flight.total > 10_000
    assert not greedy.session.may_read()
    assert not second.session.may_read()
    assert modest.session.may_read()
    assert worker.session.may_read()
    modest.create(1, payload=bytes(6000))
    assert not modest.session.may_read()
    waiting = (greedy, modest, second)
    before = [line.reader_woken for line in waiting]
    house.shard.commit()
    greedy.read_all()
    for turn, line in enumerate(waiting):  # each that looks wakes the next, tenants in turn
        woken = [line.reader_woken > was for line, was in zip(waiting, before, strict=True)]
        assert woken == [True] * (turn + 1) + [False] * (2 - turn)
        assert line.session.may_read()
    modest.read_all()
    assert house.in_flight.total == 0
    assert all(line.session.may_read() for line in (greedy, second, modest, worker))


def test_a_closed_stream_gives_its_room_back() -> None:
    house = make_house()
    line = house.producer()
    line.create(1)
    assert house.in_flight.total > 0
    line.session.close()
    assert house.in_flight.total == 0
    house.shard.commit()
    assert house.in_flight.total == 0
    assert line.session.take() is None
    assert not house.edge.sessions


def test_while_creates_are_refused_a_producer_is_read_one_event_at_a_time() -> None:
    house = make_house()
    line = house.producer()
    house.shard.refuses_creates = "full"
    line.create(1)
    assert not line.session.may_read()
    house.shard.commit()
    line.read_all()
    assert line.session.may_read()


# --- the end


@pytest.mark.parametrize("end", ["half_close", "stop"])
def test_work_in_hand_is_acknowledged_before_the_end(end: str) -> None:
    house = make_house()
    producer, worker = house.producer(), house.worker()
    producer.create(1)
    worker.send(result=workerpb.Result(task_id="a", status="COMPLETED"))
    for line in (producer, worker):
        line.session.half_close() if end == "half_close" else house.edge.stop()
        assert not line.session.over
        assert line.read() is None
    house.shard.commit()
    assert producer.read().create_ack.seq == 1
    assert worker.read().result_ack.task_id == "a"
    for line in (producer, worker):
        status = line.session.status
        assert status is not None
        assert status.code == ("OK" if end == "half_close" else "UNAVAILABLE")
        assert line.session.over


def test_nothing_is_taken_after_the_end() -> None:
    house = make_house()
    line = house.producer()
    house.edge.stop()
    line.session.receive(producerpb.ProducerEvent(create={"seq": 1}).SerializeToString())
    assert not house.shard.creates
    assert line.session.over


def test_a_stream_that_opens_while_the_server_stops_ends_at_once() -> None:
    house = make_house()
    house.edge.stop()
    for line in (house.producer(token=None), house.worker(token=None)):
        assert line.session.status == Status("UNAVAILABLE", "server is stopping")
        assert line.session.over


def test_a_fault_ends_the_stream_at_once() -> None:
    house = make_house()
    line = house.producer()
    line.create(1)
    line.session.fail()
    assert line.session.status == Status("INTERNAL", "internal error")
    assert line.session.over
