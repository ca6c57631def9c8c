"""The shard on a real store under a fake clock: durability, order of answers, restart, removal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rocksdict import Options, Rdict

from codeq import errors
from codeq.engine import _engine
from codeq.engine._wire import Creates
from codeq.engine.recovery import FORMAT
from codeq.engine.store import Store
from codeq.errors import StoreError

from .node import Node

NOT_FOUND = errors.NOT_FOUND.number
TASK_NOT_FOUND = errors.TASK_NOT_FOUND.number
NOT_IN_PROGRESS = errors.NOT_IN_PROGRESS.number
NOT_OWNER = errors.NOT_OWNER.number
CONFLICT = errors.KEY_CONFLICT.number
UNAVAILABLE = errors.UNAVAILABLE.number


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "data")
    yield node
    node.close()


def test_life_of_a_task(node: Node) -> None:
    task_id = node.create(payload=b'{"n": 9007199254740993}', priority=3, max_attempts=2)
    [view] = node.claim()
    assert (view.id, view.payload, view.priority, view.attempts) == (
        task_id,
        b'{"n": 9007199254740993}',
        3,
        1,
    )
    finishes = node.finish_batch([{"task_id": task_id, "result": b'{"ok":  1}'}])
    assert finishes.codes == b"\0"
    view = node.get(task_id)
    assert (view.state, view.result, view.worker) == (_engine.COMPLETED, b'{"ok":  1}', "")


@pytest.mark.parametrize("count", [1, 300])
def test_ended_tasks_are_read_from_memory_and_from_disk(node: Node, count: int) -> None:
    ids = [node.create_batch([{"payload": b"%d" % i} for i in range(count)]) for _ in range(1)]
    texts = [ids[0].task_id(i) for i in range(count)]
    assert len(node.claim(count=1000)) == count
    assert node.finish(*texts) == bytes(count)
    for i in (0, count - 1):
        view = node.get(texts[i])
        assert (view.payload, view.state) == (b"%d" % i, _engine.COMPLETED)
    node.restart()
    for i in (0, count - 1):
        view = node.get(texts[i])
        assert (view.payload, view.state, view.attempts) == (b"%d" % i, _engine.COMPLETED, 1)
    assert node.get(texts[0], tenant="other") is None


def test_T17_no_answer_before_the_sync_of_its_group(node: Node) -> None:
    node.runner.hold_syncs = True
    answers: list[str] = []
    creates = Creates()
    creates.add(b"job", b"1")
    node.shard.create(creates, "t", lambda _: answers.append("create"))
    node.shard.claim(node.request(lambda d: answers.append(f"claim {len(d)}")))
    node.shard.get("no-such-task", "t", lambda view: answers.append(f"get {view}"))
    node.settle()
    assert answers == []
    node.runner.release()
    node.runner.hold_syncs = False
    node.settle()
    assert sorted(answers) == ["claim 1", "create", "get None"]


def test_one_sync_serves_a_create_and_the_parked_claim_that_takes_it(node: Node) -> None:
    deliveries: list[Any] = []
    node.park(deliveries)
    before = node.shard.journal.groups
    node.create()
    assert len(deliveries) == 1 and deliveries[0] is not None
    assert node.shard.journal.groups == before + 1


def test_T17_acknowledged_work_survives_a_kill(node: Node, tmp_path: Path) -> None:
    ids = node.create_batch([{"payload": b"%d" % i} for i in range(100)])
    done = [v.id for v in node.claim(count=30)]
    assert node.finish(*done[:20]) == bytes(20)
    shutil.copytree(node.path, tmp_path / "copy")  # the files as a killed process leaves them
    twin = Node(tmp_path / "copy", node.clock)
    assert twin.stats() == (70, 0, 10, 0)
    assert all(twin.get(ids.task_id(i)) is not None for i in range(100))
    twin.close()


def test_T6_a_failed_sync_stops_the_shard_and_acknowledges_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Store, sequence: int) -> None:
        raise OSError(5, "Input/output error")

    answers: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(Store, "sync", fail)
        creates = Creates()
        creates.add(b"job", b"1")
        node.shard.create(creates, "t", answers.append)
        node.settle()
    assert answers == []
    assert len(node.faults) == 1 and "Input/output error" in node.faults[0]
    node.shard.create(creates, "t", answers.append)
    node.settle()
    assert answers == []


def test_T7_a_claim_that_was_not_delivered_goes_back_with_its_attempt(node: Node) -> None:
    task_id = node.create()
    got: list[Any] = []
    node.shard.claim(node.request(got.append))
    node.settle()
    got[0].give_back()
    node.settle()
    [view] = node.claim()
    assert (view.id, view.attempts) == (task_id, 1)


def test_T7_a_cancelled_waiter_takes_nothing(node: Node) -> None:
    deliveries: list[Any] = []
    waiter = node.park(deliveries)
    waiter.cancel()
    node.create()
    assert deliveries == []
    assert node.stats() == (1, 0, 0, 0)
    assert node.shard.waiting_claims == 0


def test_T7_a_waiter_cancelled_between_claim_and_delivery_gives_back(node: Node) -> None:
    deliveries: list[Any] = []
    waiter = node.park(deliveries)
    node.runner.hold_syncs = True
    creates = Creates()
    creates.add(b"job", b"1")
    node.shard.create(creates, "t", lambda _: None)
    node.settle()
    waiter.cancel()
    node.runner.hold_syncs = False
    node.runner.release()
    assert deliveries == []
    assert node.stats() == (1, 0, 0, 0)


def test_a_claim_whose_lease_ended_before_delivery_is_served_again(node: Node) -> None:
    deliveries: list[Any] = []
    node.park(deliveries, lease_ms=1000)
    node.runner.hold_syncs = True
    creates = Creates()
    creates.add(b"job", b"1")
    node.shard.create(creates, "t", lambda _: None)
    node.settle()
    node.clock.advance(5000)
    node.runner.hold_syncs = False
    node.runner.release()
    assert len(deliveries) == 1
    [view] = deliveries[0].views()
    assert view.attempts == 1


def test_T4_a_parked_claim_is_answered_an_hour_later(node: Node) -> None:
    deliveries: list[Any] = []
    node.park(deliveries)
    node.advance(3_600_000)
    assert deliveries == []
    node.create()
    assert len(deliveries[0]) == 1


def test_T4_a_parked_claim_gets_a_delayed_task_when_it_is_due(node: Node) -> None:
    deliveries: list[Any] = []
    node.park(deliveries)
    node.create(delay_seconds=30)
    node.advance(29_999)
    assert deliveries == []
    node.advance(1)
    assert len(deliveries[0]) == 1


def test_T5_a_lost_workers_task_comes_back_without_any_poll(node: Node) -> None:
    task_id = node.create()
    node.claim(lease_ms=5_000)
    node.advance(5_000)
    view = node.get(task_id)
    assert view.state in (_engine.READY, _engine.DELAYED)
    assert view.error == "LEASE_EXPIRED"
    assert view.attempts == 1


def test_waiting_claims_are_served_in_order_of_arrival_over_queues(node: Node) -> None:
    order: list[str] = []
    for name, commands in [("a", ("x", "y")), ("b", ("y",)), ("c", None), ("d", ("x",))]:
        node.shard.claim(node.request(lambda d, name=name: order.append(name), commands, wait=True))
    node.settle()
    assert node.shard.waiting_claims == 4
    node.create_batch([{"command": "y"}, {"command": "y"}, {"command": "x"}, {"command": "x"}])
    assert order == ["a", "b", "c", "d"]
    assert node.shard.waiting_claims == 0


def test_a_claim_for_many_is_not_answered_with_the_first_task(node: Node) -> None:
    deliveries: list[Any] = []
    node.park(deliveries, count=1000)
    for _ in range(3):
        creates = Creates()
        for _ in range(10):
            creates.add(b"job", b"1")
        node.shard.create(creates, "t", lambda _: None)
    node.settle()
    assert len(deliveries[0]) == 30


def test_result_repeated_by_its_owner_is_answered_as_the_first(node: Node) -> None:
    task_id = node.create()
    node.claim()
    first = node.finish_batch([{"task_id": task_id, "result": b"1"}])
    node.advance(1000)
    again = node.finish_batch([{"task_id": task_id, "result": b"1"}])
    assert again.codes == b"\0"
    assert again.completed_ms(0) == first.completed_ms(0)
    more = {"task_id": task_id, "result": b"1", "artifacts": b'[{"name":"n","url":"u"}]'}
    assert node.finish_batch([more]).item(0)[3] == b"", "the stored artifacts, not those sent"
    other = node.finish_batch([{"task_id": task_id, "result": b"2"}])
    assert list(other.codes) == [NOT_IN_PROGRESS]
    stranger = node.finish_batch([{"task_id": task_id, "result": b"1"}], worker="v")
    assert list(stranger.codes) == [NOT_IN_PROGRESS]
    node.restart()
    assert node.finish_batch([{"task_id": task_id, "result": b"1"}]).codes == b"\0"


def test_T10_the_same_task_twice_in_one_batch_is_accepted_once(node: Node) -> None:
    task_id = node.create()
    node.claim()
    assert list(node.finish(task_id, task_id)) == [0, NOT_IN_PROGRESS]
    assert list(node.finish(task_id, task_id)) == [0, NOT_IN_PROGRESS]


def test_T32_another_tenants_task_is_not_found(node: Node) -> None:
    task_id = node.create(tenant="t")
    node.claim()
    assert node.get(task_id, tenant="u") is None
    assert node.heartbeat(task_id, tenant="u") == NOT_FOUND
    assert node.abandon(task_id, tenant="u") == NOT_FOUND
    assert node.nack(task_id, tenant="u")[0] == NOT_FOUND
    assert list(node.finish(task_id, tenant="u")) == [TASK_NOT_FOUND]


def test_lease_calls_on_ended_and_unknown_tasks(node: Node) -> None:
    batch = node.create_batch([{}] * 256)
    ids = [batch.task_id(i) for i in range(256)]
    node.claim(count=256)
    node.finish(*ids)
    assert node.heartbeat(ids[0]) == NOT_IN_PROGRESS
    assert node.abandon(ids[1]) == NOT_IN_PROGRESS
    assert node.nack(ids[2])[0] == NOT_IN_PROGRESS
    assert node.heartbeat("00000000-0000-7000-8000-000000000000") == NOT_FOUND
    assert node.heartbeat("no uuid") == NOT_FOUND


def test_nack_reports_the_applied_delay_and_cuts_it(node: Node) -> None:
    task_id = node.create()
    node.claim()
    assert node.nack(task_id, 7, "later") == (0, 7, False)
    view = node.get(task_id)
    assert (view.state, view.error) == (_engine.DELAYED, "later")
    node.advance(7000)
    node.claim()
    assert node.nack(task_id, 10**9) == (0, 86_400, False)


def test_T12_one_attempt_means_one_delivery(node: Node) -> None:
    task_id = node.create(max_attempts=1)
    node.claim()
    assert node.nack(task_id, 0, "broken") == (0, 0, True)
    assert node.stats() == (0, 0, 0, 1)
    node.restart()
    assert node.stats() == (0, 0, 0, 1)
    view = node.get(task_id)
    assert (view.state, view.error, view.has_record) == (_engine.DEAD, "broken", True)


def test_I7_T28_concurrent_creates_with_one_key_make_one_task(node: Node) -> None:
    batches = []
    for _ in range(32):
        creates = Creates()
        creates.add(b"job", b"1", key=b"k")
        node.shard.create(creates, "t", lambda _: None)
        batches.append(creates)
    node.settle()
    assert len({b.task_id(0) for b in batches}) == 1
    assert all(b.codes == b"\0" for b in batches)
    assert node.stats() == (1, 0, 0, 0)


def test_T28_a_key_twice_in_one_batch_acts_as_two_creates_in_a_row(node: Node) -> None:
    batch = node.create_batch([{"key": "k"}, {"key": "k"}, {"key": "k", "payload": b"2"}])
    assert list(batch.codes) == [0, 0, CONFLICT]
    assert batch.task_id(0) == batch.task_id(1)


def test_T29_two_tenants_may_use_one_key(node: Node) -> None:
    assert node.create(key="k", tenant="t") != node.create(key="k", tenant="u")


def test_T30_same_key_with_other_content_is_refused(node: Node) -> None:
    node.create(key="k")
    for change in (
        {"payload": b"1"},
        {"command": "other"},
        {"priority": 1},
        {"max_attempts": 9},
        {"delay_seconds": 5},
        {"run_at_ms": node.clock.now_ms() + 5},
        {"webhook": "https://example.com/"},
    ):
        assert list(node.create_batch([{"key": "k", **change}]).codes) == [CONFLICT], change


def test_T31_keys_survive_restart_and_end_with_their_window(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", idempotency_window_seconds=100, retention_seconds=1)
    for _ in range(3):  # at different moments of the windows in which keys are stored
        task_id = node.create(key="k")
        node.claim()
        node.finish(task_id)
        node.restart()
        node.advance(60_000)
        assert node.create(key="k") == task_id
        node.clock.advance(39_999)
        assert node.create(key="k") == task_id
        assert node.get(task_id) is not None, "kept until its window is over"
        node.clock.advance(1)
        assert node.create(key="k") != task_id
        node.clock.advance(133_000)
        node.advance(1_000)
    node.close()


def test_lenient_replay_returns_the_original(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", idempotency_lenient=True)
    assert node.create(key="k") == node.create(key="k", payload=b"other")
    node.close()


def test_T27_keyed_creates_land_on_the_shard_of_their_key(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", num_shards=4)
    first = [node.create(key=f"k{i}", tenant="a") for i in range(200)]
    again = [node.create(key=f"k{i}", tenant="a") for i in range(200)]
    assert first == again and len(set(first)) == 200
    shards = {_fnv1a(bytes.fromhex(i.replace("-", ""))) % 4 for i in first}
    assert shards == {0, 1, 2, 3}
    for i, task_id in enumerate(first):
        wanted = _fnv1a(b"a\0" + f"k{i}".encode()) % 4
        assert _fnv1a(bytes.fromhex(task_id.replace("-", ""))) % 4 == wanted
    node.close()


def _fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value


def test_result_wait_ends_with_the_task(node: Node) -> None:
    task_id = node.create()
    got: list[Any] = []
    assert node.shard.result(task_id, "t", 10_000, got.append) is not None
    node.settle()
    assert got == []
    node.claim()
    node.finish(task_id)
    assert [v.state for v in got] == [_engine.COMPLETED]


def test_result_wait_ends_with_its_time(node: Node) -> None:
    task_id = node.create()
    got: list[Any] = []
    node.shard.result(task_id, "t", 10_000, got.append)
    node.advance(10_000)
    assert [v.state for v in got] == [_engine.READY]


def test_overload_refuses_creates_and_nothing_else(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", live_tasks_max=2)
    ids = [node.create(), node.create()]
    assert list(node.create_batch([{}]).codes) == [UNAVAILABLE]
    node.claim(count=2)
    assert node.finish(*ids) == b"\0\0"
    node.create()
    node.close()


def test_T47_a_long_batch_takes_several_commits_and_keeps_its_order(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", commit_creates_max=100, commit_results_max=100)
    before = node.shard.journal.groups
    batch = node.create_batch([{"payload": b"%d" % i, "key": f"k{i % 200}"} for i in range(450)])
    assert node.shard.journal.groups == before + 2, "the other three parts hold only refusals"
    assert [batch.codes.count(0), batch.codes.count(CONFLICT)] == [200, 250]
    views = node.claim(count=1000)
    assert [v.payload for v in views] == [b"%d" % i for i in range(200)]
    assert node.finish(*[v.id for v in views]) == bytes(200)
    assert node.stats() == (0, 0, 0, 0)
    node.close()


def test_disk_reserve_refuses_creates(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", disk_reserve_bytes=1 << 62)
    assert list(node.create_batch([{}]).codes) == [UNAVAILABLE]
    node.close()


def test_bodies_over_the_budget_are_read_back_from_disk(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", payload_memory_bytes=10_000)
    batch = node.create_batch([{"payload": b'"%05d"' % i + b" " * 500} for i in range(200)])
    assert node.shard.engine.body_bytes <= 10_000
    seen = []
    while views := node.claim(count=7):
        seen += [v.payload[:7] for v in views]
    assert seen == [b'"%05d"' % i for i in range(200)]
    assert len(batch) == 200
    node.close()


def test_webhook_of_a_private_literal_address_is_refused(node: Node) -> None:
    for url in ("http://127.0.0.1/x", "http://10.1.2.3/", "http://[::1]/", "http://0x7f000001/"):
        assert list(node.create_batch([{"webhook": url}]).codes) == [3], url
    for url in ("ftp://example.com/", "http://", "example.com", "http://a b/"):
        assert list(node.create_batch([{"webhook": url}]).codes) == [3], url
    node.create(webhook="https://example.com/hook")


def test_T8_result_state_and_webhook_entry_are_one_commit(node: Node) -> None:
    task_id = node.create(webhook="https://example.com/hook")
    node.claim()
    before = node.shard.journal.groups
    node.finish(task_id)
    assert node.shard.journal.groups == before + 1
    node.close()
    store = Store(node.path)
    assert len(list(store.scan(b"w", b"x"))) == 1
    store.close()
    node._open()
    assert node.get(task_id).state == _engine.COMPLETED


def test_another_shard_count_is_refused(tmp_path: Path) -> None:
    Node(tmp_path / "data").close()
    with pytest.raises(StoreError, match="numShards 1, not 4"):
        Node(tmp_path / "data", num_shards=4)


@pytest.mark.parametrize("other", [FORMAT - 1, 99])
def test_another_format_is_refused_and_left_alone(tmp_path: Path, other: int) -> None:
    Node(tmp_path / "data").close()
    store = Store(tmp_path / "data")
    store.write([(b"mmeta", b'{"format":%d,"num_shards":1}' % other)])
    before = [*store.scan(b"\0", b"\xff")]
    store.close()
    with pytest.raises(StoreError, match=f"format {other}, this codeq reads format {FORMAT}"):
        Node(tmp_path / "data")
    store = Store(tmp_path / "data")
    assert [*store.scan(b"\0", b"\xff")] == before
    store.close()


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    store.write([(b"x", b"y")])
    store.close()
    with pytest.raises(StoreError, match="no codeq store"):
        Node(tmp_path / "data")


def test_a_folder_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = Rdict(str(tmp_path / "data"), Options(raw_mode=True))
    other[b"c"] = b"theirs"
    other.close()
    del other
    with pytest.raises(StoreError, match="no codeq store"):
        Node(tmp_path / "data")
    assert Rdict.list_cf(str(tmp_path / "data")) == ["default"]


def test_a_folder_whose_first_start_was_killed_is_taken_up(tmp_path: Path) -> None:
    Rdict(str(tmp_path / "data"), Options(raw_mode=True)).close()
    node = Node(tmp_path / "data")
    node.create()
    node.restart()
    assert node.stats() == (1, 0, 0, 0)
    node.close()


def test_a_folder_in_use_is_refused(node: Node) -> None:
    with pytest.raises(StoreError, match="in use by another process"):
        Node(node.path)


def test_a_lost_log_is_noticed(node: Node) -> None:
    node.create()
    store = node.shard._store
    store.note_synced(store.sequence() + 5)
    node.shard._store.sync = lambda sequence: None  # type: ignore[method-assign]
    node.shard.close()
    with pytest.raises(StoreError, match="lost a part of its log"):
        node._open()
    (node.path / "SYNCED").unlink()
    node._open()


def test_a_damaged_chunk_is_named(node: Node) -> None:
    node.create()
    node.shard.close()
    store = Store(node.path)
    key, value = next(store.scan(b"c", b"d"))
    store.write([(key, value[:-1] + bytes([value[-1] ^ 1]))])
    store.close()
    with pytest.raises(StoreError, match="damaged"):
        node._open()
    store = Store(node.path)
    store.write([(key, value)])
    store.close()
    node._open()


def test_T44_retention_removes_chunks_and_directories(tmp_path: Path) -> None:
    node = Node(
        tmp_path / "data",
        retention_seconds=10,
        idempotency_window_seconds=10,
        lease_grace_seconds=0,
    )
    ids: list[str] = []
    for _ in range(60):
        batch = node.create_batch([{"payload": b"x" * 4000} for _ in range(256)])
        ids = [v.id for v in node.claim(count=256, bytes_max=4 << 20)]
        node.finish(*ids)
        assert len(batch) == 256
    node.advance(30_000)
    assert node.get(ids[0]) is None
    node.advance(5_000)
    store = node.shard._store
    chunks = list(store.scan(b"c", b"d"))
    assert len(chunks) < 1200, "all but the newest segments are gone"
    assert len(list(store.scan(b"d", b"e"))) < 10
    node.restart()
    task_id = node.create()
    assert node.claim()[0].id == task_id
    node.close()


def test_stats_show_only_the_own_tenant(node: Node) -> None:
    node.create(tenant="t")
    assert node.stats(tenant="t") == (1, 0, 0, 0)
    assert node.stats(tenant="u") == (0, 0, 0, 0)


def test_T17_without_fsync_on_commit_no_answer_waits_for_a_sync(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", fsync_on_commit=False)
    node.runner.hold_syncs = True
    node.create()
    assert node.runner.held == []
    node.close()
    assert os.path.exists(tmp_path / "data")
