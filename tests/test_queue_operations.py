"""What operators do to queues, on a real store under a fake clock, with restarts in between."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from codeq import errors
from codeq.engine import queues
from codeq.engine._engine import COMPLETED, DEAD, DELAYED, FAILED, LEASED, READY
from codeq.engine._wire import parse_id
from codeq.engine.cleanup import REQUEST_LOOKS_MAX
from codeq.engine.listing import PAGE_LOOKS_MAX
from codeq.engine.store import Store
from codeq.engine.stored import Wanted

from .node import Node

EVERY = sum(1 << state for state in (READY, DELAYED, LEASED, COMPLETED, FAILED, DEAD))
YEAR_2099_MS = 4_070_908_800_000
BYTES_MAX = 4 << 20


def bury(node: Node, count: int = 1, **fields: Any) -> list[str]:
    """Dead letters: tasks whose one attempt was nacked."""
    tenant = fields.pop("tenant", "t")
    command = fields.get("command", "job")
    node.create_batch([{"max_attempts": 1, **fields}] * count, tenant)
    views = node.claim((command,), count=count, tenant=tenant)
    for view in views:
        node.shard.nack(view.id, tenant, "w", "s", 0, "broken", lambda *_: None)
    node.settle()
    return [view.id for view in views]


def end(
    node: Node, count: int, tenant: str = "t", command: str = "job", **fields: Any
) -> list[str]:
    """Completed tasks."""
    node.create_batch([{"command": command, **fields}] * count, tenant)
    views = node.claim((command,), count=count, tenant=tenant, bytes_max=1 << 30)
    ids = [view.id for view in views]
    assert len(ids) == count
    items = [{"task_id": task_id, "result": b"1"} for task_id in ids]
    assert not any(node.finish_batch(items, tenant).codes)
    return ids


def page(
    node: Node, states: int = EVERY, *, tenant: str | None = "t", command: str | None = None,
    begin: int = 0, count: int = 1000,
) -> tuple[list[Any], int | None]:  # fmt: skip
    wanted = Wanted(tenant and tenant.encode(), command and command.encode(), states)
    found: tuple[list[Any], int | None]
    found = node.ask(node.shard.listing.page, wanted, begin, count, BYTES_MAX)
    return found


def listed(node: Node, states: int = EVERY, count: int = 1000, **fields: Any) -> list[str]:
    """The ids of all pages."""
    ids: list[str] = []
    begin: int | None = 0
    while begin is not None:
        views, begin = page(node, states, begin=begin, count=count, **fields)
        assert len(views) <= count
        ids += [view.id for view in views]
    return ids


# --- cancel


def test_cancel_ends_a_waiting_task(node: Node, again: Callable[[], None]) -> None:
    ready, delayed = node.create(), node.create(delay_seconds=60)
    again()
    for task_id in (ready, delayed):
        code, view = node.ask(node.shard.cancel, task_id, "t")
        assert (code, view.state, view.error) == (errors.OK, FAILED, "CANCELLED")
        assert view.has_record and view.payload == b"{}"
    again()
    assert node.stats() == (0, 0, 0, 0) and node.claim() == []
    node.advance(60_000)
    assert node.claim() == []
    code, view = node.ask(node.shard.cancel, ready, "t")
    assert (code, view) == (errors.NOT_PENDING.number, None)


def test_cancel_refuses_what_does_not_wait(node: Node) -> None:
    leased = node.create()
    node.claim()
    [ended] = end(node, 1, command="other")
    [dead] = bury(node, command="third")
    end(node, 300, command="other")  # the bucket of the ended one is closed
    for task_id in (leased, ended, dead):
        code, _ = node.ask(node.shard.cancel, task_id, "t")
        assert code == errors.NOT_PENDING.number
    waiting = node.create(command="fourth")
    absent = "01900000-0000-7000-8000-000000000000"
    for task_id, tenant in ((waiting, "u"), (absent, "t"), ("nonsense", "t")):
        code, _ = node.ask(node.shard.cancel, task_id, tenant)
        assert code == errors.NOT_FOUND.number, "T32"


def test_T15_a_cancelled_or_purged_task_wakes_who_waits_for_its_result(node: Node) -> None:
    got: list[Any] = []
    ids = [node.create(), node.create(), node.create(command="other")]
    for task_id in ids:
        assert node.shard.result(task_id, "t", 60_000, got.append) is not None
    node.ask(node.shard.cancel, ids[0], "t")
    assert [view.id for view in got] == ids[:1]
    node.ask(node.shard.queues.purge_waiting, "t", "job", ready=True, delayed=False)
    assert [view.id for view in got] == ids[:2]
    assert {view.error for view in got} == {"CANCELLED"}
    assert all(row[1][3] == 2 for row in node.shard.engine.command_stats() if row[0] == "job")


def test_T15_a_cancelled_task_leaves_record_and_webhook_entry(node: Node) -> None:
    task_id = node.create(webhook="https://example.com/hook")
    code, view = node.ask(node.shard.cancel, task_id, "t")
    assert code == errors.OK and view.ended_ms == node.clock.now_ms()
    assert len(list(node.shard._store.scan(b"w", b"x"))) == 1


# --- dead letters


def test_T22_dead_letters_are_listed_requeued_and_purged(
    node: Node, again: Callable[[], None]
) -> None:
    ids = bury(node, 5)
    bury(node, 2, command="other")
    failed = node.create()
    node.claim()
    assert (
        node.finish_batch([{"task_id": failed, "status": "FAILED", "error": "no"}]).codes == b"\0"
    )
    again()
    assert listed(node, 1 << DEAD, command="job") == ids, "a FAILED result is no dead letter"
    assert listed(node, 1 << DEAD, command="job", count=2) == ids
    assert node.ask(node.shard.queues.requeue, "t", "job", None, 2) == 2
    again()
    views = node.claim(count=10)
    assert [view.id for view in views] == ids[:2], "the oldest first"
    assert [(view.attempts, view.error) for view in views] == [(1, "")] * 2
    assert node.get(ids[0]).has_record is False
    assert node.finish(*ids[:2]) == b"\0\0"
    assert node.ask(node.shard.queues.requeue, "t", "job", [ids[2], ids[0], failed, "x"], 1) == 1
    assert node.ask(node.shard.queues.purge_dead, "t", "job", [ids[3], failed], 1) == 1
    again()
    assert listed(node, 1 << DEAD, command="job") == ids[4:]
    assert node.get(ids[3]) is None
    assert node.ask(node.shard.queues.purge_dead, "t", "job", None, 100) == 1
    again()
    assert node.stats() == (1, 0, 0, 0)
    assert node.stats("other") == (0, 0, 0, 2), "of another queue"
    assert node.get(failed).state == FAILED


def test_T22_ids_of_other_queues_and_tenants_are_passed_over(node: Node) -> None:
    [mine], [other], [theirs] = bury(node), bury(node, command="other"), bury(node, tenant="u")
    for operation in (node.shard.queues.requeue, node.shard.queues.purge_dead):
        assert node.ask(operation, "t", "job", [other, theirs], 100) == 0, "T32"
    assert node.stats() == node.stats("other") == node.stats(tenant="u") == (0, 0, 0, 1)
    assert node.ask(node.shard.queues.requeue, "t", "job", [mine, mine], 100) == 1


def test_T22_many_dead_letters_go_in_small_steps(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "STEP_TASKS_MAX", 100)
    ids = bury(node, 450)
    before = node.shard.journal.groups
    assert node.ask(node.shard.queues.requeue, "t", "job", None, 420) == 420
    assert node.shard.journal.groups - before == 5
    assert node.stats() == (420, 0, 0, 30)
    views = node.claim(count=420)
    for view in views:
        node.shard.nack(view.id, "t", "w", "s", 0, "again", lambda *_: None)
    node.settle()
    assert node.ask(node.shard.queues.purge_dead, "t", "job", None, 10_000) == 450
    assert node.stats() == (0, 0, 0, 0)
    assert all(node.get(task_id) is None for task_id in ids)


def test_T31_a_key_is_free_once_its_dead_letter_is_purged(
    node: Node, again: Callable[[], None]
) -> None:
    [first] = bury(node, key="k", payload=b"1")
    assert node.create(key="k", payload=b"1", max_attempts=1) == first
    creates = node.create_batch([{"key": "k", "payload": b"2", "max_attempts": 1}])
    assert creates.codes[0] == errors.KEY_CONFLICT.number
    node.ask(node.shard.queues.purge_dead, "t", "job", [first], 1)
    again()
    second = node.create(key="k", payload=b"2")
    assert second != first and node.create(key="k", payload=b"2") == second
    again()
    assert node.create(key="k", payload=b"2") == second


def test_T31_a_key_binds_as_long_as_its_ended_task_is_on_disk(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", retention_seconds=1)
    [first] = end(node, 1, key="k", payload=b"1")
    end(node, 300, command="other")  # closes its bucket
    node.restart()
    assert node.shard.engine.holds(_engine_id(first)) is None, "it is on disk only"
    assert node.create(key="k", payload=b"1") == first
    node.advance(3_600_000)
    assert node.create(key="k", payload=b"1") == first, "the window holds it"
    assert node.ask(node.shard.cleanup.run, "t", YEAR_2099_MS, 10_000) == 301
    second = node.create(key="k", payload=b"1")
    assert second != first
    node.close()


def _engine_id(text: str) -> bytes:
    return bytes.fromhex(text.replace("-", ""))


# --- lists


def test_T36_tasks_are_listed_in_creation_order_from_memory_and_disk(
    node: Node, again: Callable[[], None]
) -> None:
    ids = []
    for turn in range(4):
        ids += end(node, 150, payload=b"%d" % turn)
        bury(node, 1, tenant="u")
        ids += bury(node, 1)
        ids.append(node.create(command="waits", delay_seconds=9))
        ids.append(node.create(command="ready"))
    again()
    assert listed(node) == ids
    assert listed(node, count=7) == ids
    assert listed(node, 1 << COMPLETED, command="job", count=100) == [
        task_id for turn in range(4) for task_id in ids[turn * 153 : turn * 153 + 150]
    ]
    assert listed(node, 1 << DELAYED) == ids[151::153]
    assert listed(node, 1 << READY, command="ready") == ids[152::153]
    assert listed(node, tenant="u") == listed(node, 1 << DEAD, tenant="u")
    assert listed(node, tenant="nobody") == []
    assert sorted(listed(node, tenant=None)) == sorted(ids + listed(node, tenant="u"))
    views, after = page(node, 1 << COMPLETED, count=3)
    assert [(view.payload, view.result, view.state) for view in views] == [
        (b"0", b"1", COMPLETED)
    ] * 3
    assert after == views[-1].number + 1


def test_T36_a_page_looks_at_a_bounded_number_of_tasks(node: Node) -> None:
    node.create_batch([{"payload": b"1"}] * 1000)
    for _ in range(11):
        node.create_batch([{"payload": b"1"}] * 1000, "u")
    end(node, 6000, tenant="v", command="quick")
    node.restart()
    listing, engine = node.shard.listing, node.shard.engine
    assert len(listed(node)) == 1000
    begin: int | None = 0
    pages = 0
    while begin is not None:
        before = engine.looked + listing.looked
        views, begin = page(node, tenant="none", begin=begin)
        assert views == []
        assert engine.looked + listing.looked - before <= PAGE_LOOKS_MAX
        pages += 1
    # The tenant has nothing in memory, so only the disk is looked at.
    assert pages >= 2
    begin, pages = 0, 0
    while begin is not None:
        before = engine.looked + listing.looked
        _, begin = page(node, 1 << FAILED, tenant=None, begin=begin)
        assert engine.looked + listing.looked - before <= PAGE_LOOKS_MAX
        pages += 1
    assert pages >= 4


def test_a_page_is_short_when_its_payloads_are_big(node: Node) -> None:
    ids = [node.create(payload=b'"%s"' % (b"x" * (3 << 20))) for _ in range(3)]
    ids += end(node, 1, payload=b'"%s"' % (b"y" * (3 << 20)), command="other")
    views, after = page(node)
    assert [view.id for view in views] == ids[:1] and after is not None
    assert listed(node) == ids


def test_a_task_that_leaves_memory_while_it_is_listed_counts_once(node: Node) -> None:
    ids = end(node, 255)
    last = node.create()
    node.claim()
    got: list[Any] = []
    wanted = Wanted(b"t", None, EVERY)
    node.shard.listing.page(wanted, 0, 1000, BYTES_MAX, lambda views, _: got.append(views))
    node.finish(last)  # closes the bucket
    assert [view.id for view in got[0]] == [*ids, last]


def test_tasks_go_from_lists_when_their_keeping_time_is_over(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", retention_seconds=5, dead_retention_seconds=9)
    ids = end(node, 300) + bury(node, 1)
    assert listed(node) == ids
    node.advance(4_999)
    assert listed(node) == ids
    node.advance(1)
    assert listed(node) == ids[300:]
    node.advance(4_000)
    assert listed(node) == []
    node.close()


def test_T2_stragglers_are_listed_in_their_place(tmp_path: Path) -> None:
    node = Node(
        tmp_path / "data", straggler_slack_bytes=0, retention_seconds=1, payload_memory_bytes=0
    )
    ids = []
    for turn in range(3):
        ids.append(node.create(command="waits", delay_seconds=10**6))
        end(node, 600, command=f"fill{turn}", payload=b'"%s"' % (b"x" * 8000))
        for _ in range(4):
            node.advance(1_000)
    assert node.shard.engine.tail > 512
    node.restart()
    ids.append(node.create(command="waits"))
    assert listed(node) == ids and listed(node, count=1) == ids
    assert listed(node, 1 << DELAYED) == ids[:3]
    assert node.ask(node.shard.queues.purge_waiting, "t", "waits", ready=True, delayed=True) == 4
    node.close()


# --- statistics


def test_T50_statistics_cost_the_same_at_10_and_at_100000_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No walk looks at a task, and the store is asked nothing, whatever the depth."""
    node = Node(tmp_path / "data")
    asked: list[Any] = []
    get, scan = Store.get, Store.scan
    monkeypatch.setattr(Store, "get", lambda *of: (asked.append(of), get(*of))[1])
    monkeypatch.setattr(Store, "scan", lambda *of: (asked.append(of), scan(*of))[1])
    for batches in (0, 100):
        for _ in range(batches):
            node.create_batch([{"payload": b"1"}] * 1000)
        if not batches:
            node.create_batch([{"payload": b"1"}] * 10)
        asked.clear()
        before = node.shard.engine.looked
        depth = 10 + 1000 * batches
        assert node.stats() == (depth, 0, 0, 0)
        assert node.ask(node.shard.queues.all, "t") == [("job", depth, 0, 0, 0, "t")]
        assert node.shard.engine.looked == before and asked == []
    node.close()


def test_T36_queues_are_those_with_a_task_or_dead_letter_of_the_tenant(
    node: Node, again: Callable[[], None]
) -> None:
    node.create(command="a/b: c")
    node.create(command="late", delay_seconds=5)
    bury(node, command="dead")
    end(node, 1, command="ended")
    node.create(command="a/b: c", tenant="u")
    again()
    own = [("a/b: c", 1, 0, 0, 0, "t"), ("dead", 0, 0, 0, 1, "t"), ("late", 0, 1, 0, 0, "t")]
    assert node.ask(node.shard.queues.all, "t") == own
    assert node.ask(node.shard.queues.all, None) == [*own, ("a/b: c", 1, 0, 0, 0, "u")]


# --- purge of waiting tasks


@pytest.mark.parametrize(
    ("ready", "delayed", "left"),
    [(True, False, (0, 3, 1, 0)), (False, True, (4, 0, 1, 0)), (True, True, (0, 0, 1, 0))],
)
def test_purge_ends_waiting_tasks_of_one_queue(
    node: Node, again: Callable[[], None], ready: bool, delayed: bool, left: Any
) -> None:
    ids = [node.create(), *(node.create(priority=p) for p in (5, -5, 0, 5))]
    node.claim()
    ids += [node.create(delay_seconds=9) for _ in range(3)]
    node.create(command="other")
    node.create(tenant="u")
    again()
    count = node.ask(node.shard.queues.purge_waiting, "t", "job", ready=ready, delayed=delayed)
    assert count == 7 - left[0] - left[1]
    again()
    assert node.stats() == left
    assert node.stats("other") == node.stats(tenant="u") == (1, 0, 0, 0)
    views = [node.get(task_id) for task_id in ids]
    assert [view.error for view in views if view.state == FAILED] == ["CANCELLED"] * count


def test_purge_of_100000_tasks_holds_no_loop(node: Node) -> None:
    for _ in range(100):
        node.create_batch([{"payload": b"1"}] * 1000)
    answers: list[int] = []
    groups: list[int] = []
    node.shard.journal.observe = lambda *_: groups.append(node.shard.engine.live_tasks)
    node.shard.queues.purge_waiting("t", "job", ready=True, delayed=True, done=answers.append)
    late = node.create()
    node.settle()
    node.shard.journal.observe = None
    assert answers == [100_000]
    steps = [before - after for before, after in pairwise(groups)]
    assert max(steps) <= queues.STEP_TASKS_MAX and len(groups) >= 100
    assert node.get(late).state == READY, "what came after the call stays"


# --- pauses


def test_a_paused_queue_is_passed_over_until_it_is_resumed(
    node: Node, again: Callable[[], None]
) -> None:
    node.create(priority=9)
    node.ask_done(node.shard.queues.pause, "t", "job")
    again()
    late = node.create(priority=8)
    other = node.create(command="other")
    assert node.claim() == [] and node.stats() == (2, 0, 0, 0)
    assert [view.id for view in node.claim(None, count=9)] == [other], "every queue but that one"
    assert [view.id for view in node.claim(("job", "other"), count=9)] == []
    node.ask_done(node.shard.queues.pause, "t", "job")
    assert node.ask(node.shard.cancel, late, "t")[0] == errors.OK
    node.ask_done(node.shard.queues.resume, "t", "job")
    again()
    assert len(node.claim(None, count=9)) == 1
    node.ask_done(node.shard.queues.resume, "t", "job")


def test_a_pause_is_of_one_tenant_and_one_command(node: Node) -> None:
    node.ask_done(node.shard.queues.pause, "t", "job")
    node.create(tenant="u")
    node.create(command="job2")
    assert len(node.claim(tenant="u")) == 1
    assert len(node.claim(("job2",))) == 1


def test_resume_serves_the_claims_that_wait(node: Node) -> None:
    named: list[Any] = []
    every: list[Any] = []
    node.ask_done(node.shard.queues.pause, "t", "job")
    node.park(named)
    node.park(every, None)
    ids = [node.create(), node.create()]
    assert named == every == []
    node.ask_done(node.shard.queues.resume, "t", "job")
    assert [delivery.views()[0].id for delivery in (*named, *every)] == ids
    for delivery in (*named, *every):
        delivery.accepted()


def test_a_task_that_becomes_ready_in_a_paused_queue_waits_there(node: Node) -> None:
    deliveries: list[Any] = []
    task_id = node.create()
    node.claim(lease_ms=1_000)
    node.create(delay_seconds=1)
    node.ask_done(node.shard.queues.pause, "t", "job")
    node.park(deliveries, None)
    assert node.abandon(task_id) == errors.OK
    node.advance(5_000)
    assert deliveries == [] and node.stats() == (2, 0, 0, 0)


def test_pause_and_resume_in_one_commit_group_leave_the_last_word(node: Node) -> None:
    for words in (("pause", "resume"), ("resume", "pause"), ("pause", "resume", "pause", "resume")):
        groups = node.shard.journal.groups
        for word in words:
            getattr(node.shard.queues, word)("t", "job", lambda: None)
        node.settle()
        assert node.shard.journal.groups == groups + 1
        expected = words[-1] == "pause"
        assert node.shard.queues.paused("t", "job") is expected
        node.restart()
        assert node.shard.queues.paused("t", "job") is expected


def test_T45_a_paused_queue_without_tasks_stays_paused_and_claims_leave_nothing(
    node: Node,
) -> None:
    node.ask_done(node.shard.queues.pause, "t", "job")
    for number in range(100):
        assert node.claim((f"unknown{number}", "job")) == []
    assert node.ask(node.shard.queues.all, None) == []
    assert node.shard.waiting_claims == 0
    end(node, 300, command="other")
    node.restart()
    node.create()
    assert node.claim() == []
    assert list(node.shard._store.scan(b"p", b"q")) != []
    node.ask_done(node.shard.queues.resume, "t", "job")
    assert list(node.shard._store.scan(b"p", b"q")) == []


def test_T17_a_pause_is_answered_after_its_sync(node: Node) -> None:
    answers: list[str] = []
    waiting = node.create(command="x")
    node.runner.hold_syncs = True
    node.shard.queues.pause("t", "job", lambda: answers.append("pause"))
    node.shard.queues.purge_waiting(
        "t", "x", ready=True, delayed=True, done=lambda n: answers.append(f"purged {n}")
    )
    node.settle()
    assert answers == []
    node.runner.hold_syncs = False
    node.runner.release()
    assert answers == ["pause", "purged 1"]
    assert node.get(waiting).error == "CANCELLED"


# --- cleanup


def test_T35_cleanup_removes_only_the_own_ended_tasks(
    node: Node, again: Callable[[], None]
) -> None:
    gone, theirs = [], []
    for _ in range(30):  # buckets with tasks of both
        gone += end(node, 10)
        theirs += end(node, 10, tenant="u")
    gone += bury(node, 2) + end(node, 3)
    cancelled = node.create()
    node.ask(node.shard.cancel, cancelled, "t")
    theirs += bury(node, 2, tenant="u")
    live = [node.create(), node.create(delay_seconds=10**6)]
    leased = node.create(command="leased")
    node.claim(("leased",), lease_ms=10**9)
    again()
    now_ms = node.clock.now_ms()
    assert node.ask(node.shard.cleanup.run, "t", now_ms, 10_000) == 0, "they are kept longer"
    assert node.ask(node.shard.cleanup.run, "t", YEAR_2099_MS, 10_000) == 306
    again()
    assert listed(node) == [*live, leased]
    assert all(node.get(task_id) is None for task_id in (*gone, cancelled))
    assert listed(node, tenant="u") == theirs
    assert all(node.get(task_id, "u") is not None for task_id in theirs)
    assert node.stats() == (1, 1, 0, 0) and node.stats("leased") == (0, 0, 1, 0)
    assert node.ask(node.shard.cleanup.run, "t", YEAR_2099_MS, 10_000) == 0
    node.shard.engine.verify()


def test_T35_cleanup_keeps_to_its_time_limit_and_count(node: Node) -> None:
    early = end(node, 300)
    node.advance(10_000)
    late = end(node, 300)
    before_ms = node.get(early[0]).expires_ms
    assert node.ask(node.shard.cleanup.run, "t", before_ms - 1, 10_000) == 0
    assert node.ask(node.shard.cleanup.run, "t", before_ms, 7) == 7
    assert node.ask(node.shard.cleanup.run, "t", before_ms, 10_000) == 293
    assert listed(node) == late


def test_T17_that_a_task_was_taken_away_is_said_after_that_is_synced(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to a reader that began before the cleanup and looks at the disk in its middle."""
    task_id = end(node, 300)[0]
    assert node.shard.engine.view(parse_id(task_id), b"t") is None, "it is on disk only"
    reads: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
    monkeypatch.setattr(node.runner, "read", lambda work, done: reads.append((work, done)))
    counts: list[int] = []
    views: list[Any] = []
    node.shard.cleanup.run("t", YEAR_2099_MS, 10_000, counts.append)
    node.shard.get(task_id, "t", views.append)
    node.settle()
    (read, got), (look, found) = reads
    node.runner.hold_syncs = True
    found(look())
    node.settle()
    assert node.runner.held, "what the cleanup did is written and not synced"
    got(read())
    node.settle()
    assert views == []
    node.runner.hold_syncs = False
    node.runner.release()
    assert views == [None]


def test_T35_a_request_looks_at_a_bounded_part_and_the_next_goes_on(node: Node) -> None:
    for _ in range(4):
        node.create_batch([{"payload": b"1"}] * 3000, "u")
        end(node, 3000)
    node.restart()
    cleanup = node.shard.cleanup
    counts = []
    while sum(counts) < 12_000:
        before = cleanup.looked
        counts.append(node.ask(cleanup.run, "t", YEAR_2099_MS, 10_000))
        assert cleanup.looked - before <= REQUEST_LOOKS_MAX
        assert len(counts) < 20
    assert len(counts) > 2
    assert node.stats(tenant="u") == (12_000, 0, 0, 0)


def test_T35_cleanups_at_once_take_nothing_twice_and_bring_nothing_back(node: Node) -> None:
    mine = [end(node, 100), end(node, 100, tenant="u"), end(node, 100)]
    got: list[int] = []
    for tenant in ("t", "u", "t"):
        node.shard.cleanup.run(tenant, YEAR_2099_MS, 10_000, got.append)
    node.settle()
    assert got == [200, 100, 0]
    node.restart()
    assert listed(node) == listed(node, tenant="u") == []
    assert all(node.get(task_id) is None for task_id in mine[0] + mine[2])


def test_T35_a_bucket_without_tasks_leaves_no_directory(node: Node) -> None:
    end(node, 600)
    assert len(list(node.shard._store.scan(b"d", b"e"))) == 2
    node.ask(node.shard.cleanup.run, "t", YEAR_2099_MS, 10_000)
    assert list(node.shard._store.scan(b"d", b"e")) == []
    assert listed(node) == []
