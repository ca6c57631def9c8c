"""The engine alone: every transition of a task, its traps, the log it writes and reads."""

from __future__ import annotations

import random
import threading
import time

import pytest

from codeq.engine._engine import (
    COMPLETED,
    DEAD,
    DELAYED,
    FAILED,
    LEASED,
    READY,
)
from codeq.engine._wire import CODES
from tests.engine_disk import (
    HOUR,
    MINE,
    NOW,
    SUBJECT,
    TENANT,
    WORKER,
    Disk,
    claim,
    claimed,
    creates,
    engine,
    finish,
    look,
    make,
    place,
    results,
)

OK, ENDED, ABSENT = CODES["OK"], CODES["ENDED"], CODES["ABSENT"]
NOT_IN_PROGRESS, NOT_OWNER = CODES["NOT_IN_PROGRESS"], CODES["NOT_OWNER"]
NOT_PENDING, NOT_FOUND = CODES["NOT_PENDING"], CODES["NOT_FOUND"]


# --- the rows of the table of states --------------------------------------------------------------


def test_create_makes_a_ready_task_with_its_fields() -> None:
    core = engine()
    (task,) = make(core, priority=3, webhook=b"http://h/x", trace_parent=b"tp", trace_state=b"ts")
    view = look(core, task)
    assert (view.state, view.attempts, view.max_attempts, view.priority) == (READY, 0, 5, 3)
    assert (view.created_ms, view.updated_ms, view.due_ms) == (NOW, NOW, 0)
    assert (view.command, view.payload, view.webhook) == ("mail", b'{"n":1}', "http://h/x")
    assert (view.tenant, view.trace_parent, view.trace_state) == ("acme", "tp", "ts")
    assert view.id_bytes == task and view.worker == view.error == "" and not view.has_record


def test_create_due_later_is_delayed_and_run_at_wins() -> None:
    core = engine()
    (delayed,) = make(core, delay_seconds=5)
    (run_at,) = make(core, delay_seconds=5, run_at_ms=NOW + 7)
    (past,) = make(core, delay_seconds=5, run_at_ms=NOW - 7)
    assert (look(core, delayed).state, look(core, delayed).due_ms) == (DELAYED, NOW + 5_000)
    assert look(core, run_at).due_ms == NOW + 7
    assert look(core, past).state == READY


def test_due_time_reached_makes_ready_and_changes_no_field() -> None:
    core = engine()
    (task,) = make(core, delay_seconds=1)
    assert core.next_due_ms() == NOW + 1_000
    assert core.tick(NOW + 1_000, 10) == 1
    assert core.next_due_ms() is None
    view = look(core, task)
    assert (view.state, view.updated_ms, view.due_ms) == (READY, NOW, 0)


def test_claim_leases_and_counts_an_attempt() -> None:
    core = engine()
    (task,) = make(core)
    got = claim(core, NOW + 5, lease_ms=1_000)
    assert got is not None and len(got) == 1 and got.lease_until_ms == NOW + 1_005
    view = look(core, task)
    assert (view.state, view.attempts, view.worker) == (LEASED, 1, "w1")
    assert (view.due_ms, view.updated_ms) == (NOW + 1_005, NOW + 5)
    assert core.stats(TENANT, b"mail") == (0, 0, 1, 0)


def test_heartbeat_moves_the_lease_end() -> None:
    core = engine()
    (task,) = make(core)
    claimed(core, lease_ms=1_000)
    assert core.heartbeat(task, *MINE, 5_000, NOW + 900) == OK
    assert core.tick(NOW + 1_000, 10) == 0
    view = look(core, task)
    assert (view.state, view.due_ms, view.attempts) == (LEASED, NOW + 5_900, 1)


def test_abandon_gives_task_and_attempt_back() -> None:
    core = engine()
    (task,) = make(core)
    claimed(core)
    assert core.abandon(task, *MINE, NOW + 1) == OK
    assert place(core, task) == (READY, 0, "")
    assert look(core, task).worker == ""


def test_nack_with_attempts_left_is_delayed_or_ready_at_once() -> None:
    core = engine()
    (task,) = make(core)
    claimed(core)
    assert core.nack(task, *MINE, 1_500, b"busy", NOW) == (OK, 1_500, False)
    assert place(core, task) == (DELAYED, 1, "busy")
    core.tick(NOW + 1_500, 10)
    claimed(core, NOW + 1_500)
    assert core.nack(task, *MINE, 0, b"again", NOW + 1_500) == (OK, 0, False)
    assert place(core, task) == (READY, 2, "again")


def test_nack_without_attempts_left_is_a_dead_letter() -> None:
    core = engine()
    named, blank = make(core, count=2, max_attempts=1)
    claimed(core, count=2)
    assert core.nack(named, *MINE, 9_000, b"why", NOW + 3) == (OK, 0, True)
    assert core.nack(blank, *MINE, -1, b" \t", NOW + 3) == (OK, 0, True)
    assert place(core, named) == (DEAD, 1, "why")
    assert place(core, blank) == (DEAD, 1, "MAX_ATTEMPTS")
    view = look(core, named)
    assert view.has_record and (view.ended_ms, view.worker) == (NOW + 3, "")
    assert core.stats(TENANT, b"mail") == (0, 0, 0, 2) and core.live_tasks == 0


def test_lease_over_backs_off_then_dies() -> None:
    core = engine(backoff_base_ms=4_000)
    (task,) = make(core, max_attempts=2)
    claimed(core, lease_ms=1_000)
    assert core.tick(NOW + 999, 10) == 0
    assert core.tick(NOW + 1_000, 10) == 1
    assert place(core, task) == (DELAYED, 1, "LEASE_EXPIRED")
    assert look(core, task).due_ms == NOW + 5_000
    core.tick(NOW + 5_000, 10)
    claimed(core, NOW + 5_000, lease_ms=1_000)
    core.tick(NOW + 6_000, 10)
    assert place(core, task) == (DEAD, 2, "LEASE_EXPIRED")


def test_lease_over_with_zero_backoff_is_ready_at_once() -> None:
    core = engine(backoff_base_ms=0)
    (task,) = make(core)
    claimed(core, lease_ms=1)
    core.tick(NOW + 1, 10)
    assert place(core, task) == (READY, 1, "LEASE_EXPIRED")


def test_result_completed_clears_the_error() -> None:
    disk = Disk(backoff_policy="fixed")
    core = disk.engine
    (task,) = make(core)
    claimed(core)
    core.nack(task, *MINE, 0, b"first", NOW)
    claimed(core)
    assert finish(core, [task], NOW + 9, result=b"[1]", error=b"x") == [OK]
    disk.commit()
    view = disk.look(task, TENANT, NOW + 9)
    assert view is not None
    assert (view.state, view.attempts, view.error, view.result) == (COMPLETED, 2, "", b"[1]")
    assert (view.ended_ms, view.ended_worker, view.ended_subject) == (NOW + 9, "w1", "sub1")


def test_result_failed_is_final_and_no_dead_letter() -> None:
    disk = Disk()
    core = disk.engine
    (task,) = make(core)
    claimed(core)
    assert finish(core, [task], status=b"FAILED", result=None, error=b"broken") == [OK]
    disk.commit()
    view = disk.look(task, TENANT, NOW)
    assert view is not None
    assert (view.state, view.error, view.result) == (FAILED, "broken", None)
    assert core.stats(TENANT, b"mail") == (0, 0, 0, 0) and core.next_due_ms() is None


def test_cancel_ends_waiting_tasks_only() -> None:
    disk = Disk()
    core = disk.engine
    ready, leased = make(core, count=2)
    (delayed,) = make(core, delay_seconds=9)
    assert core.cancel(ready, TENANT, NOW) == core.cancel(delayed, TENANT, NOW) == OK
    assert claimed(core, count=9) == [leased]
    assert core.cancel(leased, TENANT, NOW) == NOT_PENDING
    assert core.cancel(ready, TENANT, NOW) == NOT_PENDING
    assert core.cancel(leased, b"other", NOW) == ABSENT
    disk.commit()
    for task in (ready, delayed):
        view = disk.look(task, TENANT, NOW)
        assert view is not None
        assert (view.state, view.error, view.ended_worker) == (FAILED, "CANCELLED", "")
    assert core.next_due_ms() == look(core, leased).due_ms


def test_requeue_brings_a_dead_letter_back_new() -> None:
    disk = Disk()
    core = disk.engine
    (task,) = make(core, max_attempts=1, payload=b'"body"')
    claimed(core)
    core.nack(task, *MINE, -1, b"why", NOW)
    disk.commit()
    assert core.requeue(task, TENANT, NOW + 4) == OK
    assert core.requeue(task, TENANT, NOW + 4) == NOT_FOUND
    assert place(core, task) == (READY, 0, "")
    view = look(core, task)
    assert (view.updated_ms, view.has_record, view.body_chunk) == (NOW + 4, False, 1)
    got = claim(core)
    assert got is not None and got.missing() == [1]
    assert core.claimed_views(got, disk.chunks)[0].payload == b'"body"'
    assert core.next_due_ms() == look(core, task).due_ms


def test_purge_and_retention_remove_dead_letters() -> None:
    core = engine(dead_retention_ms=1_000)
    first, second = make(core, count=2, max_attempts=1)
    claimed(core, count=2)
    for task in (first, second):
        core.nack(task, *MINE, -1, b"", NOW)
    assert core.purge(first, b"other", NOW) == ABSENT
    assert core.purge(first, TENANT, NOW) == OK
    assert core.view(first, TENANT) is None
    assert core.purge(first, TENANT, NOW) == ABSENT
    assert core.tick(NOW + 999, 10) == 0
    assert core.tick(NOW + 1_000, 10) == 1
    assert core.view(second, TENANT) is None
    assert core.stats(TENANT, b"mail") == (0, 0, 0, 0)


def test_ended_tasks_go_when_their_keeping_time_is_over() -> None:
    core = engine(retention_ms=1_000, key_window_ms=5_000)
    plain, keyed = make(core)[0], make(core, key=b"k")[0]
    claimed(core, count=2)
    finish(core, [plain, keyed])
    assert look(core, plain).expires_ms == NOW + 1_000
    assert look(core, keyed).expires_ms == NOW + 5_000
    core.tick(NOW + 1_000, 10)
    assert core.view(plain, TENANT) is None
    assert core.view(keyed, TENANT) is not None


# --- lost and doubled work ------------------------------------------------------------------------


def test_T6_claim_refused_before_its_write_leaves_tasks_claimable() -> None:
    core = engine()
    (task,) = make(core)
    got = claim(core)
    assert got is not None
    assert core.give_back(got, NOW) == 1
    assert claimed(core) == [task]


def test_T7_claim_not_delivered_returns_attempt_unused() -> None:
    core = engine()
    first, second = make(core, count=2, max_attempts=1)
    got = claim(core, count=2)
    assert got is not None
    core.assignment(got, False)
    assert core.heartbeat(second, *MINE, 1, NOW) == OK
    assert core.nack(second, *MINE, -1, b"", NOW) == (OK, 0, True)
    assert core.give_back(got, NOW) == 1, "what is no more under the claim stays where it is"
    assert place(core, first) == (READY, 0, "") and place(core, second)[0] == DEAD
    assert core.give_back(got, NOW) == 0


def test_T7_lease_over_before_delivery_returns_attempt_unused() -> None:
    core = engine()
    (task,) = make(core, max_attempts=1)
    got = claim(core, lease_ms=1_000)
    core.tick(NOW + 1_000, 10)
    assert place(core, task) == (READY, 0, "")
    again = claim(core, NOW + 1_000)
    assert got is not None and again is not None
    assert core.give_back(got, NOW + 1_000) == 0, "the new lease is another one"
    assert core.assignment(got, False) == b""
    assert core.command_stats()[0][1][4] == 0, "not an expired lease"


def test_T9_heartbeat_cannot_revive_and_of_two_results_one_wins() -> None:
    disk = Disk()
    core = disk.engine
    (task,) = make(core, webhook=b"http://h/x")
    claimed(core)
    assert finish(core, [task]) == [OK]
    assert core.heartbeat(task, *MINE, HOUR, NOW) == NOT_IN_PROGRESS
    assert finish(core, [task], status=b"FAILED", error=b"late") == [ENDED]
    assert core.next_due_ms() is None
    assert sum(key[:1] == b"w" for key, _ in disk.commit()) == 1


def test_T10_same_task_twice_in_one_batch_is_accepted_once() -> None:
    core = engine()
    first, second = make(core, count=2)
    claimed(core, count=2)
    assert finish(core, [first, second, first]) == [OK, OK, NOT_IN_PROGRESS]
    assert finish(core, [first]) == [ENDED]
    assert core.command_stats()[0][1][2] == 2


def test_T11_I1_no_leftover_entry_moves_a_task_of_another_state() -> None:
    core = engine()
    tasks = make(core, count=4, delay_seconds=1)
    core.tick(NOW + 1_000, 10)
    now = NOW + 1_000
    claimed(core, now, count=4, lease_ms=1_000)
    finish(core, tasks[:1], now)
    core.abandon(tasks[1], *MINE, now)
    core.cancel(tasks[1], TENANT, now)
    core.heartbeat(tasks[2], *MINE, HOUR, now)
    core.nack(tasks[3], *MINE, 2 * HOUR, b"", now)
    assert core.tick(now + 1_000, 10) == 0
    assert [look(core, t).state for t in tasks] == [COMPLETED, FAILED, LEASED, DELAYED]
    assert claim(core, now + 1_000) is None
    core.verify()


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_T12_I5_max_attempts_is_the_number_of_deliveries(max_attempts: int) -> None:
    core = engine(backoff_base_ms=0)
    (task,) = make(core, max_attempts=max_attempts)
    deliveries = 0
    now = NOW
    while claimed(core, now, lease_ms=10):
        deliveries += 1
        now += 10
        core.tick(now, 10)
    assert deliveries == max_attempts and look(core, task).state == DEAD


def test_T13_completed_without_a_body_ends_completed() -> None:
    disk = Disk()
    absent, empty = make(disk.engine, count=2)
    claimed(disk.engine, count=2)
    assert finish(disk.engine, [absent], result=None) == [OK]
    assert finish(disk.engine, [empty], result=b"") == [OK]
    disk.commit()
    seen = [disk.look(task, TENANT, NOW) for task in (absent, empty)]
    assert [view and (view.state, view.result) for view in seen] == [
        (COMPLETED, None),
        (COMPLETED, b"null"),
    ]


def test_T15_every_end_writes_record_and_delivery() -> None:
    disk = Disk(backoff_policy="fixed")
    core = disk.engine
    by_result, by_nack, by_time, cancelled = make(
        core, count=4, max_attempts=1, webhook=b"http://h/x"
    )
    claimed(core, count=3, lease_ms=1_000)
    finish(core, [by_result])
    core.nack(by_nack, *MINE, -1, b"no", NOW)
    core.cancel(cancelled, TENANT, NOW)
    core.tick(NOW + 1_000, 10)
    puts = disk.commit()
    assert sum(key[:1] == b"w" for key, _ in puts) == 4
    errors = ["", "no", "LEASE_EXPIRED", "CANCELLED"]
    for task, error in zip((by_result, by_nack, by_time, cancelled), errors, strict=True):
        view = disk.look(task, TENANT, NOW + 1_000)
        assert view is not None and view.has_record and view.error == error
    assert core.command_stats()[0][1] == (4, 3, 1, 3, 1)


def test_T16_nack_reason_is_kept_shown_and_cut_at_a_character() -> None:
    disk = Disk()
    (task,) = make(disk.engine)
    claimed(disk.engine)
    disk.engine.nack(task, *MINE, HOUR, b"x" + "ü".encode() * 5_000, NOW)
    disk.commit()
    disk.restart(NOW)
    error = look(disk.engine, task).error
    assert error == "x" + "ü" * 4_095 and len(error.encode()) <= 8_192


def test_T20_any_command_survives_restart_claim_and_statistics() -> None:
    disk = Disk()
    names = ["a/b", "a:b", "with blank", "проба", "日本", "*", "a\u00a0b", "x" * 256]
    for name in names:
        make(disk.engine, command=name.encode())
    disk.commit()
    disk.restart(NOW)
    core = disk.engine
    assert [row[1].decode() for row in core.queues(TENANT)] == sorted(
        names, key=lambda name: name.encode()
    )
    assert {row[0] for row in core.command_stats()} == set(names)
    for name in names:
        assert core.stats(TENANT, name.encode()) == (1, 0, 0, 0)
        got = claim(core, commands=[name.encode()])
        assert got is not None
        assert [view.command for view in core.claimed_views(got)] == [name]


@pytest.mark.parametrize(
    "policy", ["fixed", "linear", "exponential", "exp_equal_jitter", "exp_full_jitter"]
)
def test_T21_backoff_at_10000_attempts_neither_overflows_nor_fails(policy: str) -> None:
    longest, base, attempts = 2**62, 2**50, 10_048  # 157 * 64: a shift by it shifts by nothing
    core = engine(backoff_policy=policy, backoff_base_ms=base, backoff_max_ms=longest)
    (task,) = make(core, max_attempts=2**31 - 1)
    for _ in range(attempts - 1):
        claimed(core)
        code, delay_ms, dead = core.nack(task, *MINE, 0, b"", NOW)
        assert (code, delay_ms, dead) == (OK, 0, False)
    claimed(core)
    code, delay_ms, dead = core.nack(task, *MINE, -1, b"", NOW)
    least = {"fixed": base, "exp_equal_jitter": longest // 2, "exp_full_jitter": 0}
    assert (code, dead) == (OK, False)
    assert least.get(policy, longest) <= delay_ms <= (base if policy == "fixed" else longest)
    assert look(core, task).attempts == attempts
    assert look(core, task).due_ms == min(NOW + delay_ms, 2**63 - 1)


@pytest.mark.parametrize(
    ("policy", "least", "most"),
    [
        ("fixed", [100, 100, 100], [100, 100, 100]),
        ("linear", [100, 200, 300], [100, 200, 300]),
        ("exponential", [200, 400, 450], [200, 400, 450]),
        ("exp_equal_jitter", [100, 200, 225], [200, 400, 450]),
        ("exp_full_jitter", [0, 0, 0], [200, 400, 450]),
    ],
)
def test_backoff_follows_its_policy(policy: str, least: list[int], most: list[int]) -> None:
    core = engine(backoff_policy=policy, backoff_base_ms=100, backoff_max_ms=450)
    seen: list[list[int]] = [[], [], []]
    for _ in range(300):
        (task,) = make(core)
        for attempt in range(3):
            claimed(core)
            code, delay_ms, _ = core.nack(task, *MINE, -1, b"", NOW)
            assert code == OK and least[attempt] <= delay_ms <= most[attempt]
            seen[attempt].append(delay_ms)
            core.tick(NOW + delay_ms, 10)
        core.cancel(task, TENANT, NOW)
    for attempt in range(3):
        spread = most[attempt] - least[attempt]
        assert max(seen[attempt]) - min(seen[attempt]) >= spread * 0.8


def test_huge_lease_and_delay_values_are_cut_not_wrapped() -> None:
    core = engine()
    leased, delayed = make(core, count=2)
    got = claim(core, lease_ms=2**63 - 1)
    assert got is not None and got.lease_until_ms == 2**63 - 1
    assert b"9999-12-31T23:59:59Z" in core.assignment(got, True)
    claimed(core)
    assert core.nack(delayed, *MINE, 2**63 - 1, b"", NOW)[0] == OK
    assert core.heartbeat(leased, *MINE, 2**63 - 1, NOW) == OK
    assert core.next_due_ms() == 2**63 - 1
    core.verify()


# --- order ----------------------------------------------------------------------------------------


def test_T23_no_delivery_before_its_time_and_no_lease_too_short() -> None:
    core = engine()
    (task,) = make(core, run_at_ms=NOW + 1_000)
    assert core.tick(NOW + 999, 10) == 0
    assert claim(core, NOW + 999) is None
    core.tick(NOW + 1_000, 10)
    assert claimed(core, NOW + 1_000, lease_ms=500) == [task]
    assert core.tick(NOW + 1_499, 10) == 0
    assert finish(core, [task], NOW + 1_499) == [OK]


def test_T24_I6_claim_never_empty_and_never_of_lower_priority() -> None:
    core = engine()
    dice = random.Random(3)
    waiting: dict[bytes, tuple[int, bytes]] = {}
    for _ in range(3_000):
        if dice.random() < 0.5:
            priority = dice.choice([-5, 0, 9])
            for task in make(core, count=dice.randint(1, 4), priority=priority):
                waiting[task] = (-priority, task)
        elif waiting and dice.random() < 0.2:
            task = dice.choice(list(waiting))
            assert core.cancel(task, TENANT, NOW) == OK
            del waiting[task]
        else:
            expected = sorted(waiting, key=waiting.__getitem__)[: dice.randint(1, 6)]
            assert claimed(core, count=max(1, len(expected))) == expected
            for task in expected:
                if dice.random() < 0.3:
                    core.abandon(task, *MINE, NOW)
                else:
                    del waiting[task]
                    assert finish(core, [task]) == [OK]
    core.verify()


def test_T25_task_given_back_has_its_old_place() -> None:
    core = engine(backoff_base_ms=0)
    tasks = make(core, count=5)
    assert claimed(core, count=4, lease_ms=1_000) == tasks[:4]
    core.abandon(tasks[2], *MINE, NOW)
    core.nack(tasks[1], *MINE, 1_000, b"", NOW)
    core.tick(NOW + 1_000, 10)  # the leases of 0 and 3 end too
    assert claimed(core, NOW + 1_000, count=9) == tasks
    (late,) = make(core, delay_seconds=1)
    rest = make(core, count=3)
    core.tick(NOW + 1_000, 10)
    assert claimed(core, NOW + 1_000, count=9) == [late, *rest]


def test_T26_without_commands_all_queues_by_priority_then_age() -> None:
    core = engine()
    low = make(core, command=b"a")[0]
    high = make(core, command=b"b", priority=5)[0]
    old = make(core, command=b"c", priority=1)[0]
    young = make(core, command=b"a", priority=1)[0]
    make(core, command=b"a", tenant=b"other", priority=99)
    assert claimed(core, count=9) == [high, old, young, low]


def test_named_queues_are_taken_in_their_order_or_by_priority() -> None:
    core = engine()
    a, b = make(core, command=b"a")[0], make(core, command=b"b", priority=5)[0]
    c = make(core, command=b"c", priority=9)[0]
    got = claim(core, commands=[b"a", b"none", b"b", b"a"], count=9)
    assert got is not None
    assert got.ids() == [a, b]
    core.give_back(got, NOW)
    assert claimed(core, commands=[b"a", b"b"], in_order=False, count=9) == [b, a]
    assert claimed(core, commands=[], count=9) == []
    assert claimed(core, count=9) == [c]


def test_claims_cost_the_same_with_100000_priorities_in_one_queue() -> None:
    core = engine()
    order = list(range(100_000))
    random.Random(1).shuffle(order)
    for start in range(0, 100_000, 1_000):
        batch = creates(0)
        for priority in order[start : start + 1_000]:
            batch.add(b"mail", b"1", priority=priority - 50_000)
        batch.check(100)
        assert core.create(batch, TENANT, NOW) == 1_000
    began = time.perf_counter()
    seen = []
    for _ in range(100):
        got = claim(core, count=1_000)
        assert got is not None
        seen += [view.priority for view in core.claimed_views(got)]
    assert seen == sorted(seen, reverse=True) and len(seen) == 100_000
    assert time.perf_counter() - began < 10, "a linear search would take minutes"


# --- ownership and tenants ------------------------------------------------------------------------


def test_T32_another_tenants_task_is_absent_even_with_the_right_worker() -> None:
    core = engine()
    (task,) = make(core)
    claimed(core)
    theirs = (b"other", WORKER, SUBJECT, -1)
    assert core.heartbeat(task, *theirs, 1, NOW) == ABSENT
    assert core.abandon(task, *theirs, NOW) == ABSENT
    assert core.nack(task, *theirs, 0, b"", NOW)[0] == ABSENT
    assert finish(core, [task], tenant=b"other") == [ABSENT]
    assert core.view(task, b"other") is None
    make(core, tenant=b"other")
    assert finish(core, [task], tenant=b"other") == [ABSENT]


def test_T33_I3_worker_id_opens_only_leases_of_its_own_tenant_and_name() -> None:
    core = engine()
    (mine,) = make(core)
    (theirs,) = make(core, tenant=b"other")
    claimed(core)
    claimed(core, tenant=b"other")
    assert core.abandon(theirs, *MINE, NOW) == ABSENT
    assert core.abandon(mine, TENANT, b"w2", SUBJECT, -1, NOW) == NOT_OWNER
    assert core.abandon(mine, TENANT, b"", b"sub2", -1, NOW) == NOT_OWNER
    assert core.abandon(mine, TENANT, b"", b"", -1, NOW) == NOT_OWNER
    assert core.abandon(mine, TENANT, b"w2", WORKER, -1, NOW) == NOT_OWNER
    assert core.heartbeat(mine, TENANT, b"", b"w1", -1, HOUR, NOW) == OK
    assert core.abandon(mine, TENANT, b"", SUBJECT, -1, NOW) == OK


def test_lease_calls_with_another_attempt_are_refused() -> None:
    core = engine()
    (task,) = make(core)
    claimed(core)
    core.nack(task, *MINE, 0, b"", NOW)
    claimed(core)
    old, new = (TENANT, WORKER, SUBJECT, 1), (TENANT, WORKER, SUBJECT, 2)
    assert core.heartbeat(task, *old, 1, NOW) == NOT_OWNER
    assert finish(core, [task], attempt=1) == [NOT_OWNER]
    assert core.heartbeat(task, *new, 1, NOW) == OK
    assert finish(core, [task], attempt=2) == [OK]


def test_an_items_own_worker_wins_over_the_calls() -> None:
    core = engine()
    (task,) = make(core)
    claimed(core)
    batch = results([])
    for name in (b"w9", b"w1"):
        batch.add(look(core, task).id.encode(), b"COMPLETED", worker=name)
    batch.check(100, lenient_error=False)
    core.finish(batch, TENANT, b"w9", SUBJECT, -1, NOW)
    assert list(batch.codes) == [NOT_OWNER, OK]


def test_lease_calls_need_a_leased_task() -> None:
    core = engine()
    (task,) = make(core)
    assert core.heartbeat(task, *MINE, 1, NOW) == NOT_IN_PROGRESS
    assert finish(core, [task]) == [NOT_IN_PROGRESS]
    assert core.abandon(bytes(16), *MINE, NOW) == ABSENT
    forged = task[:15] + bytes([task[15] ^ 1])
    assert core.view(forged, TENANT) is None, "the number alone is no proof"
    assert finish(core, [forged]) == [ABSENT]


# --- bounds ---------------------------------------------------------------------------------------


def test_T45_unknown_commands_and_empty_queues_leave_nothing_behind() -> None:
    core = engine()
    for index in range(10_000):
        assert claim(core, commands=[b"none-%d" % index]) is None
        assert core.stats(TENANT, b"none-%d" % index) == (0, 0, 0, 0)
    assert core.queues(None) == [] and core.take() == []
    tasks = [make(core, command=b"q%d" % index)[0] for index in range(10_000)]
    assert len(core.queues(TENANT)) == 10_000 and len(core.touched()) == 10_000
    assert claimed(core, count=10_000) == tasks
    assert set(finish(core, tasks)) == {OK}
    core.take()
    core.verify()
    assert core.queues(None) == [] and core.touched() == []
    assert len(core.command_stats()) == 1_001, "labels are bounded"


def test_T46_count_of_2147483647_is_harmless() -> None:
    core = engine()
    assert claim(core, count=2**31 - 1) is None
    tasks = make(core, count=3)
    assert claimed(core, count=2**31 - 1) == tasks
    (task,) = make(core)
    assert claimed(core, count=2**62) == [task]
    (task,) = make(core)
    assert claimed(core, count=-5) == [task]


def test_T19_a_batch_takes_only_what_fits_its_bytes() -> None:
    core = engine()
    tasks = make(core, count=32, payload=b'"' + b"x" * 200_000 + b'"')
    got = claim(core, count=32, bytes_max=4 << 20)
    assert got is not None and len(got) == 20
    assert len(core.assignment(got, False)) <= 4 << 20
    assert core.ready_count(TENANT, b"mail") == 12
    assert len(claimed(core, bytes_max=1)) == 1, "one always fits"
    assert look(core, tasks[-1]).state == READY


def test_cancelled_tasks_leave_no_heap_of_numbers() -> None:
    core = engine()
    (first,) = make(core, priority=1)
    for _ in range(200):
        for task in make(core, count=100):
            assert core.cancel(task, TENANT, NOW) == OK
        core.take()
    core.verify()
    (last,) = make(core)
    assert claimed(core, count=9) == [first, last]


def test_command_labels_are_bounded() -> None:
    core = engine(command_labels_max=2)
    for name in (b"a", b"b", b"c", b"d"):
        make(core, command=name)
    rows = {row[0]: row[1] for row in core.command_stats()}
    assert {name: counts[0] for name, counts in rows.items()} == {"a": 1, "b": 1, "_other": 2}


def test_latency_counts_from_create_to_end() -> None:
    core = engine()
    done, failed = make(core, count=2)
    claimed(core, count=2)
    finish(core, [done], NOW + 100)
    finish(core, [failed], NOW + 4_000_000, status=b"FAILED", error=b"x")
    ((_, _, completed, completed_s, ended_badly, ended_badly_s),) = core.command_stats()
    assert completed == (1,) + (0,) * 14 and completed_s == pytest.approx(0.1)
    assert ended_badly == (0,) * 14 + (1,) and ended_badly_s == pytest.approx(4_000)


# --- waiting and watching -------------------------------------------------------------------------


def test_touched_names_queues_that_got_a_ready_task() -> None:
    core = engine(backoff_base_ms=0)
    (task,) = make(core, command=b"a")
    make(core, command=b"b", delay_seconds=1)
    assert core.touched() == [(TENANT, b"a")]
    assert core.touched() == []
    claimed(core)
    core.abandon(task, *MINE, NOW)
    assert core.touched() == [(TENANT, b"a")]
    core.tick(NOW + 1_000, 10)
    assert core.touched() == [(TENANT, b"b")]
    got = claim(core, NOW, count=2)
    assert got is not None
    core.give_back(got, NOW)
    assert sorted(core.touched()) == [(TENANT, b"a"), (TENANT, b"b")]


def test_watched_tasks_are_reported_once_when_they_end() -> None:
    core = engine()
    tasks = make(core, count=3)
    claimed(core, count=2)
    assert all(core.watch(task) for task in tasks)
    finish(core, tasks[:1])
    core.cancel(tasks[2], TENANT, NOW)
    assert core.ended() == [tasks[0], tasks[2]]
    assert core.ended() == [] and not core.watch(tasks[0]) and not core.watch(bytes(16))
    core.nack(tasks[1], *MINE, 0, b"", NOW)
    assert core.ended() == []


# --- the object -----------------------------------------------------------------------------------


def test_engine_belongs_to_its_thread() -> None:
    core = engine()
    raised: list[BaseException] = []

    def use() -> None:
        try:
            core.take()
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(raised) == 1


def test_bad_arguments_are_refused() -> None:
    core = engine()
    with pytest.raises(ValueError, match="policy"):
        engine(backoff_policy="none")
    with pytest.raises(ValueError):
        engine(shard_count=0)
    with pytest.raises(ValueError, match="16 bytes"):
        core.view(b"short", TENANT)
    with pytest.raises(OverflowError):
        core.tick(2**63, 1)
    with pytest.raises(TypeError):
        core.claim(TENANT, ["text"], True, WORKER, SUBJECT, 1, 1, 1, NOW)  # type: ignore[list-item]
    make(core)
    with pytest.raises(RuntimeError):
        core.load_head(None)


def test_claim_outlives_its_engine() -> None:
    core = engine()
    make(core)
    got = claim(core)
    del core
    assert got is not None and len(got) == 1 and got.missing() == []
