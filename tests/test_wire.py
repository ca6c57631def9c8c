"""Stream messages against the generated classes, byte for byte, and the rules of batches."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeq import errors
from codeq.engine import _wire
from tests.protos import producerpb, workerpb
from tests.wire_oracle import BYTES_MAX, EVENTS, OURS, PROTOBUF, REFUSED, serialized

CODES = _wire.CODES
ID = uuid.UUID("01890a5d-ac96-774b-bcce-b302099a8057")
TASK_ID = str(ID)

texts = st.text(max_size=20)
blobs = st.binary(max_size=40)
int32s = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, -1, 127, 128])
uint64s = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 127, 128])
#: times that fit a Timestamp
moments_ms = st.integers(-62135596800000, 253402300799999)


@pytest.fixture(autouse=True)
def texts_of_refusals() -> None:
    _wire.set_messages({number: row.stream_message for number, row in errors.BY_NUMBER.items()})


def create_event(**fields: Any) -> bytes:
    return serialized(producerpb.ProducerEvent(create=producerpb.CreateTask(**fields)))


def create_batch(*tasks: dict[str, Any]) -> bytes:
    batch = producerpb.CreateTaskBatch(tasks=[producerpb.CreateTask(**task) for task in tasks])
    return serialized(producerpb.ProducerEvent(create_batch=batch))


def decoded_creates(message: bytes) -> _wire.Creates:
    _, creates = _wire.decode_producer_event(message)
    assert isinstance(creates, _wire.Creates)
    return creates


def result_batch(*results: dict[str, Any]) -> bytes:
    batch = workerpb.ResultBatch(results=[workerpb.Result(**result) for result in results])
    return serialized(workerpb.WorkerEvent(result_batch=batch))


def decoded_finishes(message: bytes) -> _wire.Finishes:
    _, finishes = _wire.decode_worker_event(message)
    assert isinstance(finishes, _wire.Finishes)
    return finishes


# --- the files in proto/ --------------------------------------------------------------------------

PRODUCER_FIELDS = {
    "Hello": "1 token string",
    "CreateTask": "1 seq uint64, 2 command string, 3 payload bytes, 4 priority int32,"
    " 5 webhook string, 6 max_attempts int32, 7 idempotency_key string,"
    " 8 run_at google.protobuf.Timestamp, 9 delay_seconds int32, 10 trace_parent string,"
    " 11 trace_state string",
    "CreateTaskBatch": "1 tasks repeated CreateTask",
    "ProducerEvent": "1 hello Hello, 2 create CreateTask, 3 create_batch CreateTaskBatch",
    "HelloAck": "1 tenant_id string, 2 subject string",
    "CreateAck": "1 seq uint64, 2 ok bool, 3 task_id string, 4 error_message string",
    "CreateAckBatch": "1 acks repeated CreateAck",
    "ServerError": "1 code string, 2 message string",
    "ServerEvent": "1 hello_ack HelloAck, 2 create_ack CreateAck, 3 error ServerError,"
    " 4 create_ack_batch CreateAckBatch",
}
WORKER_FIELDS = {
    "Task": "1 id string, 2 command string, 3 payload bytes, 4 priority int32, 5 webhook string,"
    " 6 max_attempts int32, 7 status string, 8 worker_id string, 9 lease_until string,"
    " 10 attempts int32, 11 tenant_id string, 12 created_at google.protobuf.Timestamp,"
    " 13 updated_at google.protobuf.Timestamp",
    "Hello": "1 token string, 2 worker_id string",
    "Ready": "1 commands repeated string, 2 lease_seconds int32, 3 count int32",
    "Result": "1 task_id string, 2 status string, 3 result_json bytes, 4 error string",
    "Nack": "1 task_id string, 2 delay_seconds int32, 3 reason string",
    "Heartbeat": "1 task_id string, 2 extend_seconds int32",
    "Abandon": "1 task_id string",
    "ResultBatch": "1 results repeated Result",
    "WorkerEvent": "1 hello Hello, 2 ready Ready, 3 result Result, 4 nack Nack,"
    " 5 heartbeat Heartbeat, 6 abandon Abandon, 7 result_batch ResultBatch",
    "HelloAck": "1 worker_id string, 2 tenant_id string",
    "TaskAssignment": "1 task Task",
    "TaskBatch": "1 tasks repeated Task",
    "ResultAck": "1 task_id string, 2 ok bool, 3 error_message string",
    "HeartbeatAck": "1 task_id string, 2 ok bool, 3 error_message string",
    "AbandonAck": "1 task_id string, 2 ok bool, 3 error_message string",
    "NackAck": "1 task_id string, 2 ok bool, 3 error_message string,"
    " 4 applied_delay_seconds int32, 5 dlq bool",
    "ResultAckBatch": "1 acks repeated ResultAck",
    "ServerError": "1 message string, 2 code string",
    "ServerEvent": "1 hello_ack HelloAck, 2 task TaskAssignment, 3 result_ack ResultAck,"
    " 4 heartbeat_ack HeartbeatAck, 5 nack_ack NackAck, 6 abandon_ack AbandonAck,"
    " 7 error ServerError, 8 task_batch TaskBatch, 9 result_ack_batch ResultAckBatch",
}
TYPES = {9: "string", 12: "bytes", 5: "int32", 4: "uint64", 8: "bool"}


def told_field(field: Any, package: str) -> str:
    kind = TYPES.get(field.type) or field.message_type.full_name.removeprefix(package + ".")
    return f"{field.number} {field.name} {'repeated ' if field.is_repeated else ''}{kind}"


@pytest.mark.parametrize(
    ("module", "package", "fields", "service"),
    [
        (producerpb, "producerpb", PRODUCER_FIELDS, ("ProducerStream", "ProducerEvent")),
        (workerpb, "workerpb", WORKER_FIELDS, ("WorkerStream", "WorkerEvent")),
    ],
)
def test_proto_files_are_the_contract(
    module: Any, package: str, fields: dict[str, str], service: tuple[str, str]
) -> None:
    file = module.DESCRIPTOR
    assert file.package == package
    assert {
        name: ", ".join(told_field(field, package) for field in message.fields)
        for name, message in file.message_types_by_name.items()
    } == fields
    for name in (service[1], "ServerEvent"):
        (oneof,) = file.message_types_by_name[name].oneofs
        assert oneof.name == "event"
        assert len(oneof.fields) == len(file.message_types_by_name[name].fields)
    (stream,) = file.services_by_name[service[0]].methods
    assert (stream.name, stream.client_streaming, stream.server_streaming) == ("Stream", True, True)
    assert (stream.input_type.name, stream.output_type.name) == (service[1], "ServerEvent")


# --- decoding: whatever a message holds -----------------------------------------------------------


def messages(kind: Any) -> st.SearchStrategy[Any]:
    """Messages of a generated class with any of their fields set."""
    optional = {
        field.name: st.lists(values(field), max_size=3) if field.is_repeated else values(field)
        for field in kind.DESCRIPTOR.fields
    }
    if kind.DESCRIPTOR.oneofs:
        return st.one_of([st.builds(kind, **{name: value}) for name, value in optional.items()])
    return st.fixed_dictionaries({}, optional=optional).map(lambda fields: kind(**fields))


def values(field: Any) -> st.SearchStrategy[Any]:
    if field.message_type:
        return messages(field.message_type._concrete_class)
    if field.containing_type.full_name == "google.protobuf.Timestamp":
        if field.name == "nanos":
            return st.sampled_from([0, 1, 999999, 1000000, 999999999, 10**9, -1]) | int32s
        edges = st.sampled_from([-62135596800, -62135596801, 253402300799, 253402300800])
        return edges | st.integers(-(2**63), 2**63 - 1) | st.integers(-(10**9), 10**9)
    return {
        "string": texts,
        "bytes": blobs,
        "int32": int32s,
        "uint64": uint64s,
        "bool": st.booleans(),
    }[TYPES[field.type]]


@pytest.mark.parametrize("stream", sorted(EVENTS))
def test_every_message_is_read_as_the_generated_classes_read_it(stream: str) -> None:
    @given(st.lists(messages(EVENTS[stream]), min_size=1, max_size=3))
    def reads(parts: list[Any]) -> None:
        message = b"".join(part.SerializeToString() for part in parts)
        assert OURS[stream](message) == PROTOBUF[stream](message) != REFUSED

    reads()


@pytest.mark.parametrize(
    ("seconds", "nanos", "ms"),
    [
        (0, 0, 0), (1, 1, 1001), (1, 999999, 1001), (1, 1000000, 1001), (1, 1000001, 1002),
        (1, 999999999, 2000), (-1, 0, -1000), (-1, 1, -999), (-62135596800, 0, -62135596800000),
        (253402300799, 999999999, 253402300800000),
    ],
)  # fmt: skip
def test_run_at_is_rounded_up_to_milliseconds(seconds: int, nanos: int, ms: int) -> None:
    sent = decoded_creates(
        create_event(command="c", idempotency_key="k", run_at={"seconds": seconds, "nanos": nanos})
    )
    same = _wire.Creates()
    same.add(b"c", b"", key=b"k", run_at_ms=ms)
    assert sent.codes == b"\0"
    assert sent.keyed() == same.keyed()


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [(-62135596801, 0), (253402300800, 0), (0, -1), (0, 10**9), (2**63 - 1, 0), (-(2**63), 0)],
)
def test_run_at_out_of_range_is_refused(seconds: int, nanos: int) -> None:
    creates = decoded_creates(
        create_event(command="c", run_at={"seconds": seconds, "nanos": nanos}, delay_seconds=-1)
    )
    creates.check(100)
    assert creates.codes == bytes([CODES["RUN_AT_INVALID"]])


def test_run_at_is_judged_when_all_of_it_is_there() -> None:
    wrong = create_event(command="c", run_at={"nanos": 10**9})
    right = create_event(run_at={"nanos": 5})
    assert decoded_creates(wrong + right).codes == b"\0"
    assert decoded_creates(right + wrong).codes == bytes([CODES["RUN_AT_INVALID"]])


def test_times_of_a_task_are_judged_when_all_of_them_is_there() -> None:
    def event(**updated_at: int) -> bytes:
        task = workerpb.Task(id="x", updated_at=updated_at)
        return serialized(workerpb.ServerEvent(task=workerpb.TaskAssignment(task=task)))

    _, tasks = _wire.decode_worker_server_event(event(seconds=7) + event(nanos=10**9))
    assert tasks[0].updated_ms == 0


def test_T46_ready_for_2147483647_is_only_a_number() -> None:
    ready = workerpb.WorkerEvent(ready=workerpb.Ready(count=2147483647, lease_seconds=-1))
    assert _wire.decode_worker_event(serialized(ready)) == (_wire.READY, ((), -1, 2147483647))


def test_T43_commands_are_handed_on_byte_for_byte() -> None:
    names = ["A", "a", " a ", "é", "e\u0301", "x/y:z", "\u0130"]
    ready = workerpb.WorkerEvent(ready=workerpb.Ready(commands=names))
    _, content = _wire.decode_worker_event(serialized(ready))
    assert content == (tuple(name.encode() for name in names), 0, 0)


@pytest.mark.parametrize("payload", [b"9007199254740993", b'{ "b": 1e400, "a":[ ] }', b"\xff\x00"])
def test_T59_payload_bytes_stay_as_they_are(payload: bytes) -> None:
    creates = decoded_creates(create_event(command="c", payload=payload))
    creates.check(100)
    assert _wire.encode_creates(creates, BYTES_MAX) == [create_event(command="c", payload=payload)]
    task = workerpb.Task(payload=payload)
    event = workerpb.ServerEvent(task_batch=workerpb.TaskBatch(tasks=[task]))
    _, tasks = _wire.decode_worker_server_event(serialized(event))
    assert isinstance(tasks, _wire.Tasks)
    assert tasks[0].payload == payload


def test_T13_completed_without_a_body_is_accepted() -> None:
    finishes = decoded_finishes(
        result_batch(
            {"task_id": TASK_ID, "status": "COMPLETED"},
            {"task_id": TASK_ID, "status": "COMPLETED", "result_json": b"null"},
        )
    )
    finishes.check(100, lenient_error=True)
    assert finishes.codes == b"\0\0"
    assert finishes.item(0)[1] is None
    assert finishes.item(1)[1] == b"null"
    assert finishes.id_bytes(0) == ID.bytes


def test_tasks_are_a_sequence_that_outlives_its_message() -> None:
    batch = workerpb.TaskBatch(tasks=[workerpb.Task(id=str(n), attempts=n) for n in range(3)])
    _, tasks = _wire.decode_worker_server_event(serialized(workerpb.ServerEvent(task_batch=batch)))
    assert isinstance(tasks, _wire.Tasks)
    last = tasks[-1]
    assert [tasks[index].id for index in range(len(tasks))] == ["0", "1", "2"]
    with pytest.raises(IndexError):
        tasks[3]
    with pytest.raises(IndexError):
        tasks[-4]
    del tasks
    assert (last.id, last.attempts) == ("2", 2)


# --- encoding: byte for byte ----------------------------------------------------------------------


@given(texts, texts, int32s, st.lists(texts, max_size=4), int32s)
def test_worker_calls_are_encoded_as_the_generated_classes_do(
    one: str, two: str, number: int, commands: list[str], other: int
) -> None:
    pb = workerpb
    event = pb.WorkerEvent
    ready = pb.Ready(commands=commands, lease_seconds=number, count=other)
    encoded = [name.encode() for name in commands]
    pairs: list[tuple[bytes, Any]] = [
        (_wire.encode_worker_hello(one, two), event(hello=pb.Hello(token=one, worker_id=two))),
        (_wire.encode_ready(encoded, number, other), event(ready=ready)),
        (
            _wire.encode_nack(one, number, two),
            event(nack=pb.Nack(task_id=one, delay_seconds=number, reason=two)),
        ),
        (
            _wire.encode_heartbeat(one, number),
            event(heartbeat=pb.Heartbeat(task_id=one, extend_seconds=number)),
        ),
        (_wire.encode_abandon(one), event(abandon=pb.Abandon(task_id=one))),
        (
            _wire.encode_producer_hello(one),
            producerpb.ProducerEvent(hello=producerpb.Hello(token=one)),
        ),
    ]
    for ours, theirs in pairs:
        assert ours == serialized(theirs)


@given(texts, texts, int32s, st.booleans(), st.sampled_from([0, *sorted(errors.BY_NUMBER)]))
def test_server_answers_are_encoded_as_the_generated_classes_do(
    one: str, two: str, number: int, dlq: bool, code: int
) -> None:
    event = workerpb.ServerEvent
    ack: dict[str, Any] = {"task_id": one, "ok": code == 0}
    if code:
        ack["error_message"] = errors.BY_NUMBER[code].stream_message
    nack = workerpb.NackAck(**ack, applied_delay_seconds=number, dlq=dlq)
    pairs: list[tuple[bytes, Any]] = [
        (
            _wire.encode_worker_hello_ack(one, two),
            event(hello_ack=workerpb.HelloAck(worker_id=one, tenant_id=two)),
        ),
        (
            _wire.encode_worker_error(one, two),
            event(error=workerpb.ServerError(code=one, message=two)),
        ),
        (
            _wire.encode_producer_hello_ack(one, two),
            producerpb.ServerEvent(hello_ack=producerpb.HelloAck(tenant_id=one, subject=two)),
        ),
        (
            _wire.encode_producer_error(one, two),
            producerpb.ServerEvent(error=producerpb.ServerError(code=one, message=two)),
        ),
        (
            _wire.encode_heartbeat_ack(one, code),
            event(heartbeat_ack=workerpb.HeartbeatAck(**ack)),
        ),
        (_wire.encode_abandon_ack(one, code), event(abandon_ack=workerpb.AbandonAck(**ack))),
        (_wire.encode_nack_ack(one, code, number, dlq), event(nack_ack=nack)),
    ]
    for ours, theirs in pairs:
        assert ours == serialized(theirs)


created = st.fixed_dictionaries(
    {
        "command": blobs.filter(lambda b: not b) | texts.map(str.encode),
        "payload": blobs,
        "priority": int32s,
        "webhook": texts.map(str.encode),
        "max_attempts": int32s,
        "key": texts.map(str.encode),
        "run_at_ms": st.none() | moments_ms,
        "delay_seconds": int32s,
        "trace_parent": texts.map(str.encode),
        "trace_state": texts.map(str.encode),
        "seq": uint64s,
    }
)


def create_task(fields: dict[str, Any]) -> Any:
    task = producerpb.CreateTask(
        **{
            {"key": "idempotency_key"}.get(name, name): value
            for name, value in fields.items()
            if name != "run_at_ms"
        }
    )
    if fields["run_at_ms"] is not None:
        task.run_at.seconds, rest = divmod(fields["run_at_ms"], 1000)
        task.run_at.nanos = rest * 1000000
    return task


@given(st.lists(created, max_size=4))
def test_creates_are_encoded_as_the_generated_classes_do(items: list[dict[str, Any]]) -> None:
    creates = _wire.Creates()
    for item in items:
        creates.add(**item)
    batch = producerpb.CreateTaskBatch(tasks=[create_task(item) for item in items])
    event = producerpb.ProducerEvent(create_batch=batch)
    if len(items) == 1:
        event = producerpb.ProducerEvent(create=batch.tasks[0])
    assert _wire.encode_creates(creates, BYTES_MAX) == ([serialized(event)] if items else [])


finished = st.fixed_dictionaries(
    {
        "task_id": texts,
        "status": st.sampled_from(["COMPLETED", "FAILED", ""]) | texts,
        "result_json": st.sampled_from([b"", b"{}", b"[", b'"\xff"']) | blobs,
        "error": texts,
    }
)


def filled_finishes(items: Sequence[dict[str, Any]]) -> _wire.Finishes:
    finishes = _wire.Finishes()
    for item in items:
        finishes.add(
            item["task_id"].encode(),
            item["status"].encode(),
            result=item["result_json"],
            error=item["error"].encode(),
        )
    return finishes


@given(st.lists(finished, max_size=4))
def test_results_are_encoded_as_the_generated_classes_do(items: list[dict[str, Any]]) -> None:
    batch = workerpb.ResultBatch(results=[workerpb.Result(**item) for item in items])
    event = workerpb.WorkerEvent(result_batch=batch)
    if len(items) == 1:
        event = workerpb.WorkerEvent(result=batch.results[0])
    ours = _wire.encode_results(filled_finishes(items), BYTES_MAX)
    assert ours == ([serialized(event)] if items else [])


# --- acknowledgements -----------------------------------------------------------------------------


def create_acks_of(messages: list[bytes]) -> list[Any]:
    acks: list[Any] = []
    for message in messages:
        event = producerpb.ServerEvent.FromString(message)
        single = event.WhichOneof("event") == "create_ack"
        acks += [event.create_ack] if single else event.create_ack_batch.acks
    return acks


def accepted(seq: int) -> _wire.Creates:
    creates = _wire.Creates()
    creates.add(b"c", b"", seq=seq)
    creates.replay(0, ID.bytes)
    return creates


def test_one_create_in_all_gets_the_single_form() -> None:
    ack = producerpb.CreateAck(seq=9, ok=True, task_id=TASK_ID)
    event = producerpb.ServerEvent(create_ack=ack)
    empty = _wire.Creates()
    assert _wire.encode_create_acks([empty, accepted(9), empty], 100) == [serialized(event)]
    assert _wire.encode_create_acks([], 100) == []
    assert _wire.encode_create_acks([empty, empty], 100) == []


def test_creates_of_several_batches_share_one_message() -> None:
    refused = _wire.Creates()
    refused.add(b"", b"", seq=2)
    refused.check(100)
    batch = producerpb.CreateAckBatch(
        acks=[
            producerpb.CreateAck(seq=1, ok=True, task_id=TASK_ID),
            producerpb.CreateAck(seq=2, error_message="command is required"),
            producerpb.CreateAck(seq=3, ok=True, task_id=TASK_ID),
        ]
    )
    event = producerpb.ServerEvent(create_ack_batch=batch)
    assert _wire.encode_create_acks([accepted(1), refused, accepted(3)], BYTES_MAX) == [
        serialized(event)
    ]


@given(
    st.lists(st.lists(st.sampled_from([0, 12, 11]), max_size=9), max_size=9),
    st.integers(0, 400),
)
def test_create_acks_are_split_by_size_and_keep_their_order(
    batches: list[list[int]], bytes_max: int
) -> None:
    filled = []
    wanted = []
    for codes in batches:
        creates = _wire.Creates()
        for code in codes:
            index = creates.add(b"c", b"", seq=len(wanted))
            if code:
                creates.refuse(index, code)
            else:
                creates.replay(index, ID.bytes)
            wanted.append(code)
        filled.append(creates)
    messages = _wire.encode_create_acks(filled, bytes_max)
    acks = create_acks_of(messages)
    assert [ack.seq for ack in acks] == list(range(len(wanted)))
    assert [ack.ok for ack in acks] == [code == 0 for code in wanted]
    for message in messages:
        count = len(create_acks_of([message]))
        assert count == 1 or (count > 1 and len(message) <= bytes_max)


def test_messages_are_filled_to_the_last_byte() -> None:
    creates = _wire.Creates()
    for seq in range(1, 101):
        creates.add(b"c", b"x" * 200, seq=seq)
    whole = len(_wire.encode_creates(creates, BYTES_MAX)[0])
    assert len(_wire.encode_creates(creates, whole)) == 1
    assert [len(m) <= whole - 1 for m in _wire.encode_creates(creates, whole - 1)] == [True, True]


def test_an_item_over_the_limit_stands_alone() -> None:
    creates = _wire.Creates()
    for size in (1, 500, 1):
        creates.add(b"c", b"x" * size)
    counts = [len(decoded_creates(m)) for m in _wire.encode_creates(creates, 100)]
    assert counts == [1, 1, 1]


@pytest.mark.parametrize("number", sorted(errors.BY_NUMBER))
def test_create_acks_carry_the_text_of_the_table(number: int) -> None:
    creates = _wire.Creates()
    creates.add_refused(number)
    (ack,) = create_acks_of(_wire.encode_create_acks([creates], BYTES_MAX))
    assert (ack.ok, ack.error_message) == (False, errors.BY_NUMBER[number].stream_message)


def test_result_acks_carry_the_texts_of_the_contract() -> None:
    finishes = decoded_finishes(
        result_batch(
            {"task_id": TASK_ID, "status": "COMPLETED", "result_json": b"{}"},
            {"task_id": TASK_ID, "status": 'DO"NE'},
            {"task_id": "x" * 9000},
            {"task_id": TASK_ID, "status": "COMPLETED", "result_json": b"{"},
            {"task_id": "nobody", "status": "COMPLETED"},
            {"task_id": TASK_ID, "status": "FAILED"},
            {"task_id": TASK_ID, "status": "FAILED"},
        )
    )
    finishes.check(100, lenient_error=True)
    finishes.refuse(5, CODES["NOT_IN_PROGRESS"])
    finishes.refuse(6, CODES["NOT_OWNER"])
    (message,) = _wire.encode_result_acks([finishes], BYTES_MAX)
    acks = workerpb.ServerEvent.FromString(message).result_ack_batch.acks
    assert [(ack.ok, ack.error_message) for ack in acks] == [
        (True, ""),
        (False, 'invalid status (must be COMPLETED or FAILED): "DO"NE"'),
        (False, 'invalid status (must be COMPLETED or FAILED): ""'),
        (False, "invalid result_json"),
        (False, "task not found"),
        (False, "not-in-progress"),
        (False, "not-owner"),
    ]
    assert [len(ack.task_id) for ack in acks] == [36, 36, 8192, 36, 6, 36, 36]


def test_one_result_in_all_gets_the_single_form() -> None:
    finishes = decoded_finishes(result_batch({"task_id": TASK_ID, "status": "FAILED"}))
    finishes.check(100, lenient_error=True)
    ack = workerpb.ResultAck(task_id=TASK_ID, ok=True)
    event = workerpb.ServerEvent(result_ack=ack)
    assert _wire.encode_result_acks([_wire.Finishes(), finishes], 10) == [serialized(event)]


@pytest.mark.parametrize(
    "encode",
    [
        lambda task_id: _wire.encode_heartbeat_ack(task_id, 13),
        lambda task_id: _wire.encode_abandon_ack(task_id, 13),
        lambda task_id: _wire.encode_nack_ack(task_id, 13, 0, False),
    ],
)
def test_T47_an_echoed_id_breaks_no_stream(encode: Callable[[str], bytes]) -> None:
    assert len(encode("é" * 3_000_000)) < 8300


def test_a_refusal_without_a_text_reveals_nothing() -> None:
    _wire.set_messages({})
    _, answer = _wire.decode_worker_server_event(_wire.encode_heartbeat_ack("t", 13))
    assert answer == ("t", False, "internal")


# --- batches --------------------------------------------------------------------------------------

ONE_REQUEST: dict[str, Any] = {
    "command": b"mail",
    "payload": b'{"to":1}',
    "priority": 3,
    "webhook": b"http://h",
    "max_attempts": 2,
    "run_at_ms": 1500,
    "delay_seconds": 4,
}


def request(**changes: Any) -> bytes:
    creates = _wire.Creates()
    creates.add(**{**ONE_REQUEST, "key": b"k", **changes})
    creates.check(1000)
    ((index, key, told),) = creates.keyed()
    assert (index, key) == (0, b"k")
    return told


@pytest.mark.parametrize(
    "changes",
    [
        {"command": b"maik"},
        {"payload": b'{"to":2}'},
        {"payload": b'{"to": 1}'},
        {"priority": 4},
        {"priority": -3},
        {"webhook": b""},
        {"max_attempts": 3},
        {"max_attempts": 0},
        {"run_at_ms": None},
        {"run_at_ms": 1501},
        {"delay_seconds": 5},
        {"command": b"mai", "webhook": b"lhttp://h"},
        {"command": b"mailh", "webhook": b"ttp://h"},
        {"webhook": b'http://h{"to"', "payload": b":1}"},
    ],
)
def test_T30_other_content_is_another_request(changes: dict[str, Any]) -> None:
    assert request(**changes) != request()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"seq": 5, "trace_parent": b"00-1", "trace_state": b"a=b"}),
        ({"command": b" mail\n"}, {}),
        ({"key": b" k "}, {}),
        ({"max_attempts": 0}, {"max_attempts": -7}),
        ({"payload": b""}, {"payload": b"null"}),
    ],
)
def test_T30_same_content_is_the_same_request(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert request(**one) == request(**other)


def test_T30_rest_and_stream_agree_on_what_is_the_same_request() -> None:
    creates = decoded_creates(
        create_batch(
            {"command": "other"},
            {
                "seq": 7, "command": "mail ", "payload": b'{"to":1}', "priority": 3,
                "webhook": "http://h", "max_attempts": 2, "idempotency_key": "k",
                "run_at": {"seconds": 1, "nanos": 499000001}, "delay_seconds": 4,
            },
        )
    )  # fmt: skip
    creates.check(1000)
    assert creates.keyed() == [(1, b"k", request())]


def test_refused_items_have_neither_key_nor_webhook() -> None:
    creates = _wire.Creates()
    creates.add(**ONE_REQUEST, key=b"k")
    creates.add(**ONE_REQUEST, key=b" ")
    creates.add(**{**ONE_REQUEST, "webhook": b""}, key=b"k")
    creates.check(1000)
    assert [index for index, _, _ in creates.keyed()] == [0, 2]
    assert creates.webhooks() == [(0, "http://h"), (1, "http://h")]
    creates.refuse(0, CODES["WEBHOOK_INVALID"])
    assert creates.webhooks() == [(1, "http://h")]
    creates.refuse(1, CODES["UNAVAILABLE"])
    assert creates.webhooks() == []
    assert list(creates.codes) == [3, 12, 0]


def test_a_trace_parent_for_those_without() -> None:
    creates = _wire.Creates()
    creates.add(**ONE_REQUEST, trace_parent=b"own", trace_state=b"state")
    creates.add(**ONE_REQUEST)
    assert creates.trace(b"") == [(b"own", b"state")]
    assert creates.trace(b"given") == [(b"own", b"state")]
    assert creates.trace(b"late") == [(b"own", b"state"), (b"given", b"")]


def test_repeats_share_id_and_code_of_the_first() -> None:
    creates = _wire.Creates()
    for seq in range(4):
        creates.add(b"c", b"", key=b"k", seq=seq)
    creates.replay(0, ID.bytes)
    creates.alias(2, 0)
    creates.alias(3, 2)
    assert [creates.replayed(index) for index in range(4)] == [True, False, True, True]
    assert creates.id_bytes(3) == ID.bytes
    assert creates.task_id(3) == TASK_ID
    acks = create_acks_of(_wire.encode_create_acks([creates], BYTES_MAX))
    assert [(ack.seq, ack.task_id) for ack in acks][2:] == [(2, TASK_ID), (3, TASK_ID)]
    creates.refuse(0, CODES["UNAVAILABLE"])
    assert list(creates.codes) == [12, 0, 12, 12]


@pytest.mark.parametrize(("index", "earlier"), [(0, 0), (0, 1), (1, 1), (1, -1), (2, 0)])
def test_a_repeat_must_come_after_its_first(index: int, earlier: int) -> None:
    creates = _wire.Creates()
    creates.add(b"c", b"")
    creates.add(b"c", b"")
    with pytest.raises(IndexError):
        creates.alias(index, earlier)


def test_positions_of_refused_items_are_kept() -> None:
    creates = _wire.Creates()
    assert creates.add_refused(CODES["BODY_INVALID"]) == 0
    assert creates.add(b"c", b"") == 1
    creates.check(100)
    assert list(creates.codes) == [CODES["BODY_INVALID"], 0]
    finishes = _wire.Finishes()
    assert finishes.add_refused(b"t", CODES["ARTIFACT_INVALID"]) == 0
    assert finishes.add(TASK_ID.encode(), b"COMPLETED", artifacts=b"[]", worker=b"w") == 1
    finishes.check(100, lenient_error=False)
    assert list(finishes.codes) == [CODES["ARTIFACT_INVALID"], 0]
    assert finishes.task_id(0) == "t"
    assert finishes.item(1) == ("COMPLETED", None, "", b"[]", b"w")


def test_a_repeated_result_is_accepted_as_the_first_was() -> None:
    finishes = filled_finishes(
        [{"task_id": TASK_ID, "status": "COMPLETED", "result_json": b"1", "error": ""}]
    )
    finishes.check(100, lenient_error=True)
    finishes.refuse(0, CODES["ENDED"])
    finishes.accept(0, 1234, b"")
    assert (finishes.codes, finishes.completed_ms(0)) == (b"\0", 1234)


def test_payload_bytes_tell_what_a_batch_holds() -> None:
    creates = _wire.Creates()
    assert creates.payload_bytes == 0
    creates.add(b"c", b"x" * 1000)
    assert 1001 < creates.payload_bytes < 1301
    message = result_batch(*[{"task_id": "t", "error": "e" * 1000}] * 3)
    finishes = decoded_finishes(message)
    assert len(message) < finishes.payload_bytes < len(message) + 900
    finishes.add(b"t", b"", result=b"x" * 1000)
    assert len(finishes) == 4


def test_wrong_types_and_places_are_errors_not_crashes() -> None:
    creates, finishes = _wire.Creates(), _wire.Finishes()
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (TypeError, lambda: creates.add(None, b"")),  # type: ignore[arg-type]
        (TypeError, lambda: creates.add(b"", "")),  # type: ignore[arg-type]
        (TypeError, lambda: creates.add(b"", b"", key=None)),  # type: ignore[arg-type]
        (OverflowError, lambda: creates.add(b"", b"", priority=2**31)),
        (OverflowError, lambda: creates.add(b"", b"", run_at_ms=2**63)),
        (OverflowError, lambda: creates.add(b"", b"", seq=-1)),
        (OverflowError, lambda: creates.add_refused(256)),
        (IndexError, lambda: creates.task_id(0)),
        (IndexError, lambda: creates.refuse(-1, 1)),
        (IndexError, lambda: finishes.item(0)),
        (IndexError, lambda: finishes.accept(5, 0, b"")),
        (TypeError, lambda: _wire.encode_create_acks([None], 9)),  # type: ignore[list-item]
        (TypeError, lambda: _wire.encode_create_acks([finishes], 9)),  # type: ignore[list-item]
        (TypeError, lambda: _wire.encode_creates(None, 9)),  # type: ignore[arg-type]
        (TypeError, lambda: _wire.encode_ready([None], 0, 0)),  # type: ignore[list-item]
        (TypeError, lambda: _wire.encode_abandon(None)),  # type: ignore[arg-type]
        (TypeError, lambda: _wire.parse_id(None)),  # type: ignore[arg-type]
        (TypeError, lambda: _wire.decode_worker_event("x")),  # type: ignore[arg-type]
        (TypeError, lambda: _wire.decode_producer_event(None)),  # type: ignore[arg-type]
    ]
    for expected, call in calls:
        with pytest.raises(expected):
            call()
    assert len(creates) == len(finishes) == len(_wire.Tasks()) == 0
    assert (_wire.ClientTask().id, _wire.ClientTask().payload) == ("", b"")
