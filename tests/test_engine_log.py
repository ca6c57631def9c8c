"""Ids and the log: what the engine writes, what a restart makes of it, how it stays small."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from codeq.engine._engine import (
    COMPLETED,
    DEAD,
    DELAYED,
    LEASED,
    CorruptRecord,
    Engine,
)
from codeq.engine._wire import CODES
from tests.engine_disk import (
    HOUR,
    MINE,
    NOW,
    TENANT,
    Disk,
    claim,
    claimed,
    creates,
    engine,
    finish,
    look,
    make,
    place,
)
from tests.protos import workerpb

OK = CODES["OK"]


# --- lost work -----------------------------------------------------------------------------------


def test_T1_no_backlog_is_too_big_also_after_a_restart() -> None:
    disk = Disk(payload_memory_bytes=1 << 20)
    for _ in range(150):
        make(disk.engine, count=1_000)
        disk.commit()
    seen = claimed_from(disk, 75_000)
    disk.restart(NOW)
    assert disk.engine.stats(TENANT, b"mail") == (75_000, 0, 75_000, 0)
    seen += claimed_from(disk, 75_000)
    assert len(set(seen)) == 150_000 and seen == sorted(seen)
    assert claim(disk.engine) is None


def claimed_from(disk: Disk, count: int) -> list[bytes]:
    """Claims in batches, bodies from disk where they left memory."""
    ids: list[bytes] = []
    while len(ids) < count:
        got = claim(disk.engine, count=1_000)
        assert got is not None
        ids += [view.id_bytes for view in disk.engine.claimed_views(got, disk.chunks)]
        disk.engine.delivered(got)
        disk.commit()
    return ids


def test_T3_heartbeats_leave_no_trail_once_removed() -> None:
    disk = Disk(retention_ms=1_000, straggler_slack_bytes=0)
    (task,) = make(disk.engine)
    claimed(disk.engine)
    for step in range(3_000):
        assert disk.engine.heartbeat(task, *MINE, HOUR, NOW + step) == OK
        disk.commit()
    disk.carry(NOW + 3_000)
    disk.trim(NOW + 3_000)
    assert len(disk.chunks) < 600
    disk.restart(NOW + 3_000)
    assert look(disk.engine, task).due_ms == NOW + 2_999 + HOUR


def test_T8_end_record_webhook_and_head_are_one_commit() -> None:
    disk = Disk()
    hooked, plain = make(disk.engine, webhook=b"http://h/x")[0], make(disk.engine)[0]
    claimed(disk.engine, count=2)
    disk.commit()
    finish(disk.engine, [hooked, plain])
    puts = dict(disk.commit())
    assert sorted(key[:1] for key in puts) == [b"c", b"m", b"w"]
    ((key, entry),) = [put for put in puts.items() if put[0][:1] == b"w"]
    assert int.from_bytes(key[1:9], "big") == 2, "where its end stands"
    assert entry[:1] == b"\3" and entry[1:17] == hooked
    assert entry[25:] == len(TENANT).to_bytes(4, "little") + TENANT, "whose it is"
    assert int.from_bytes(entry[17:25], "big") == 1, "where its body stands"


def test_T14_every_lease_is_known_to_expiry_after_a_crash() -> None:
    disk = Disk(backoff_policy="fixed", backoff_base_ms=0)
    tasks = make(disk.engine, count=100)
    claim(disk.engine, count=60, lease_ms=5_000)
    disk.commit()  # the crash: the claim is on disk, nobody got it
    disk.restart(NOW + 1_000, 10_000)
    core = disk.engine
    assert core.next_due_ms() == NOW + 11_000, "no lease ends within the grace time"
    assert core.tick(NOW + 11_000, 1_000) == 60
    assert {place(core, task)[1] for task in tasks[:60]} == {1}, "it counts as delivered"
    assert len(claimed(core, NOW + 11_000, count=100)) == 100


# --- bodies ---------------------------------------------------------------------------------------


def test_T19_many_small_tasks_are_no_more_bytes_than_were_asked_for() -> None:
    core = Disk().engine
    make(core, count=3_000, payload=b"1")
    for bytes_max in (1_000, 100_000):
        got = claim(core, count=3_000, bytes_max=bytes_max)
        assert got is not None and len(got.ids()) < 1_000
        assert 0.6 * bytes_max < len(core.assignment(got, False)) <= bytes_max


def test_bodies_beyond_the_budget_leave_memory_with_their_group() -> None:
    disk = Disk(payload_memory_bytes=1_500)
    core = disk.engine
    tasks = make(core, count=50, payload=b'"0123456789"')
    assert core.body_bytes > 1_500
    got = claim(core, count=3)
    disk.commit()
    assert core.body_bytes <= 1_500
    assert got is not None and got.missing() == []
    core.assignment(got, False)
    core.delivered(got)
    more = claim(core, count=47)
    assert more is not None and more.missing()
    with pytest.raises(KeyError):
        core.assignment(more, False)
    views = core.claimed_views(more, disk.chunks)
    assert [view.id_bytes for view in views] == tasks[3:]
    assert {view.payload for view in views} == {b'"0123456789"'}
    assert core.body_bytes == 0


def test_assignment_equals_the_generated_classes_from_memory_and_from_disk() -> None:
    disk = Disk()
    core = disk.engine
    make(core, payload=b"\x00\xff", priority=-3, webhook=b"http://h/x", max_attempts=9)
    make(core, NOW + 1, payload=b"x" * 300, command="проба".encode(), trace_parent=b"t")
    make(core, 1_000)
    got = claim(core, NOW + 61_001, count=3, worker="wörker".encode())
    assert got is not None
    message = core.assignment(got, False)
    event = workerpb.ServerEvent.FromString(message)
    assert event.SerializeToString() == message
    second, third, first = event.task_batch.tasks  # by priority
    assert (first.payload, first.priority, first.webhook) == (b"\x00\xff", -3, "http://h/x")
    assert (first.max_attempts, first.attempts, first.status) == (9, 1, "IN_PROGRESS")
    assert (first.worker_id, first.lease_until) == ("wörker", "2023-11-14T22:15:21Z")
    assert (first.tenant_id, first.created_at.ToMilliseconds()) == ("acme", NOW)
    assert (second.command, second.priority) == ("проба", 0)
    assert second.created_at.nanos == 1_000_000
    assert third.created_at.seconds == 1 and third.updated_at.ToMilliseconds() == NOW + 61_001
    disk.commit()
    assert got.missing() == [1]
    assert core.assignment(got, False, disk.chunks) == message
    core.give_back(got, NOW)
    alone = claim(core, commands=["проба".encode()])
    assert alone is not None
    message = core.assignment(alone, True, disk.chunks)
    event = workerpb.ServerEvent.FromString(message)
    assert event.task.task.attempts == 1 and event.SerializeToString() == message


@pytest.mark.parametrize("until_ms", [0, -1, 951_782_399_999, 951_782_400_000, 4_107_542_399_000])
def test_lease_until_is_rfc_3339_in_whole_seconds_rounded_down(until_ms: int) -> None:
    core = engine()
    make(core, until_ms)
    got = claim(core, until_ms, lease_ms=0)
    assert got is not None
    text = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=until_ms // 1000)
    assert text.strftime("%Y-%m-%dT%H:%M:%SZ").encode() in core.assignment(got, True)


# --- the log --------------------------------------------------------------------------------------


def test_take_is_empty_when_nothing_changed() -> None:
    core = engine()
    assert core.take() == [] and core.pending_bytes == core.pending_records == 0
    make(core, count=3, delay_seconds=1)
    assert core.pending_records == 3 and core.pending_bytes > 0
    assert [key[:1] for key, _ in core.take()] == [b"c", b"m"]
    core.tick(NOW + 1_000, 10)
    assert core.take() == [], "a delayed task becomes ready without a record"


def test_chunks_hold_32_creates_or_8_kilobytes_and_a_larger_record_stands_alone() -> None:
    disk = Disk()
    make(disk.engine, count=65)
    make(disk.engine, payload=b"x" * 20_000)
    make(disk.engine, count=20, payload=b"y" * 1_000)
    disk.commit()
    lengths = [len(disk.chunks[seq]) for seq in disk.chunks]
    assert len(lengths) == 3 + 1 + 3
    assert [length for length in lengths if length > 8_192] == [lengths[3]]


def test_closed_bucket_leaves_memory_and_its_directory_finds_every_task() -> None:
    disk = Disk()
    core = disk.engine
    tasks = make(core, count=300)
    claimed(core, count=256)
    finish(core, tasks[:255])
    disk.commit()
    assert core.view(tasks[0], TENANT) is not None, "one task keeps the bucket open"
    finish(core, tasks[255:256])
    puts = disk.commit()
    assert [key[:1] for key, _ in puts] == [b"c", b"d", b"m"]
    assert core.view(tasks[0], TENANT) is None
    assert core.directory_keys(tasks[0])[0] == puts[1][0]
    for task in tasks[:256]:
        view = disk.look(task, TENANT, NOW)
        assert view is not None and (view.id_bytes, view.state) == (task, COMPLETED)
        assert view.result == b'{"ok":true}' and view.ended_worker == "w1"
    assert disk.look(tasks[0], b"other", NOW) is None
    assert disk.look(tasks[0][:15] + bytes([tasks[0][15] ^ 1]), TENANT, NOW) is None
    assert core.directory_keys(b"\xff" * 16) == []


def test_T2_straggler_is_carried_and_holds_no_log() -> None:
    disk = Disk(retention_ms=1_000, straggler_slack_bytes=0)
    core = disk.engine
    (late,) = make(core, delay_seconds=90_000, payload=b'"late"')
    (dead,) = make(core, max_attempts=1, command=b"dead")
    claimed(core, commands=[b"dead"])
    core.nack(dead, *MINE, -1, b"why", NOW)
    (held,) = make(core, command=b"held")
    claimed(core, commands=[b"held"], lease_ms=HOUR)
    for _ in range(2_000):
        (task,) = make(core, command=b"churn")
        claimed(core, commands=[b"churn"])
        finish(core, [task])
        disk.commit()
    now = NOW + 2_000
    core.tick(now, 10)
    assert disk.trim(now) is None, "the stragglers hold the oldest segment"
    assert disk.carry(now) == 3
    assert disk.trim(now) is not None
    assert disk.engine.tail > 1 and len(disk.chunks) < 600
    disk.engine.verify()
    old = disk.restart(now)
    assert old.digest() == disk.engine.digest()
    assert place(disk.engine, late) == (DELAYED, 0, "")
    assert place(disk.engine, dead) == (DEAD, 1, "why")
    assert finish(disk.engine, [held], now) == [OK]
    disk.commit()
    view = disk.look(held, TENANT, now)
    assert view is not None and view.state == COMPLETED, "found by an entry of its own"
    disk.engine.tick(NOW + 90_000_000, 10)
    assert claimed(disk.engine, NOW + 90_000_000) == [late]


def test_T44_everything_ended_goes_from_disk() -> None:
    disk = Disk(retention_ms=1_000, dead_retention_ms=2_000, straggler_slack_bytes=0)
    now = NOW
    sizes = []
    for step in range(60):
        now = NOW + step * 500
        tasks = make(disk.engine, now, count=2_000, max_attempts=1, webhook=b"http://h/x")
        claimed(disk.engine, now, count=2_000)
        assert set(finish(disk.engine, tasks[:1_990], now)) == {OK}
        for task in tasks[1_990:]:
            disk.engine.nack(task, *MINE, -1, b"", now)
        disk.commit()
        disk.engine.tick(now, 10_000)
        disk.carry(now)
        disk.trim(now)
        for key in [key for key in disk.values if key[:1] == b"w"]:
            del disk.values[key]  # delivered
        sizes.append(len(disk.values))
    assert max(sizes[40:]) <= max(sizes[10:30]) * 1.2, "disk use levels out"
    disk.engine.verify()
    old = disk.restart(now)
    assert old.digest() == disk.engine.digest()


def test_the_log_is_not_cut_where_it_is_to_be_kept() -> None:
    disk = Disk(retention_ms=1_000)
    for _ in range(1_600):
        done = make(disk.engine)
        claimed(disk.engine)
        finish(disk.engine, done)
        disk.commit()
    late = NOW + 2_000
    assert disk.engine.expired(NOW) <= 512 and disk.engine.expired(late) >= 3 * 512
    assert disk.engine.trim(late, 511) is None
    assert disk.engine.trim(late, 2 * 512 + 7) == (1, 1_024)
    assert disk.engine.trim(late, 0) is None
    assert disk.engine.trim(late) == (1_024, disk.engine.expired(late))


def test_half_filled_bucket_holds_no_log() -> None:
    disk = Disk(straggler_slack_bytes=0)
    done, kept = make(disk.engine, count=2)
    claimed(disk.engine, count=2, lease_ms=HOUR)
    finish(disk.engine, [done])
    for step in range(3_000):
        assert disk.engine.heartbeat(kept, *MINE, HOUR, NOW + step) == OK
        disk.commit()
    assert disk.carry(NOW + 3_000) == 1
    assert disk.engine.straggler_chunks() is None, "the bucket of the two gave its numbers up"
    old = disk.restart(NOW + 3_000)
    assert old.digest() == disk.engine.digest()
    assert disk.look(done, TENANT, NOW + 3_000) is not None
    (young,) = make(disk.engine, NOW + 3_000)
    assert young > kept and claimed(disk.engine, NOW + 3_000) == [young]
    late = NOW + 3 * 24 * HOUR
    assert disk.trim(late) is not None and len(disk.chunks) < 600
    assert disk.look(done, TENANT, late) is None
    assert look(disk.engine, kept).state == LEASED


def test_damaged_or_missing_records_are_noticed() -> None:
    disk = Disk()
    make(disk.engine, count=40)
    disk.commit()
    head = disk.values[b"mhead"]

    def load(change: dict[int, bytes], head: bytes = head, **settings: Any) -> None:
        core = Engine(seed=1, **settings)
        start = core.load_head(head)
        for seq in range(start, 3):
            if seq in change and not change[seq]:
                continue
            core.load_chunk(seq, change.get(seq, disk.chunks[seq]))
        core.load_done(NOW, 0)

    load({})
    for seq in (1, 2):
        chunk = bytearray(disk.chunks[seq])
        for at in random.Random(seq).sample(range(len(chunk)), 100):
            chunk[at] ^= 0x10
            with pytest.raises(CorruptRecord):
                load({seq: bytes(chunk)})
            chunk[at] ^= 0x10
        with pytest.raises(CorruptRecord):
            load({seq: b""})
    with pytest.raises(CorruptRecord, match="mhead"):
        load({}, head[:-1] + b"\0")
    with pytest.raises(ValueError, match="format"):
        load({}, b"\x09" + head[1:])
    with pytest.raises(ValueError, match="numShards"):
        load({}, shard_count=3)


@pytest.mark.parametrize("seed", range(8))
def test_I1_I8_tasks_stand_in_one_place_and_memory_equals_the_log(seed: int) -> None:
    dice = random.Random(seed)
    disk = Disk(
        backoff_policy="fixed",
        backoff_base_ms=300,
        retention_ms=2_000,
        dead_retention_ms=6_000,
        key_window_ms=3_000,
        payload_memory_bytes=4_000,
        straggler_slack_bytes=0,
    )
    now = NOW
    ids: list[bytes] = []
    for step in range(3_000):
        now += dice.choice([0, 1, 1, 20])
        do_something(disk.engine, dice, ids, now)
        disk.commit()
        if step % 500 == 499:
            check_places(disk, now)
            while disk.engine.tick(now, 1_000):
                pass
            if dice.random() < 0.8:
                disk.carry(now)
                disk.trim(now)
            disk.commit()
            old = disk.restart(now)
            assert old.digest() == disk.engine.digest()
            assert old.queues(None) == disk.engine.queues(None)
            assert claimed(old, now, count=10**6) == claimed(disk.engine, now, count=10**6)
            disk.commit()


def do_something(core: Engine, dice: random.Random, ids: list[bytes], now: int) -> None:
    what = dice.randrange(9)
    some = dice.sample(ids, min(len(ids), 9)) if ids else [bytes(16)]
    if what <= 2:
        ids += make(
            core,
            now,
            count=dice.randint(1, 9),
            command=b"c%d" % dice.randrange(5),
            priority=dice.randrange(3),
            delay_seconds=dice.choice([0, 0, 1, 1_000]),
            max_attempts=dice.choice([1, 3]),
            key=dice.choice([b"", b"k"]),
            webhook=dice.choice([b"", b"http://h/x"]),
        )
        del ids[:-400]
    elif what <= 4:
        claimed(core, now, count=dice.randint(1, 12), lease_ms=dice.choice([100, 5_000]))
    elif what == 5:
        finish(core, some, now)
    elif what == 6:
        core.nack(some[0], *MINE, dice.choice([-1, 0, 700]), b"r", now)
    elif what == 7:
        act = dice.choice([core.cancel, core.requeue, core.purge])
        act(some[0], TENANT, now)
    else:
        core.tick(now, 1_000)


def check_places(disk: Disk, now: int) -> None:
    """What the counters say is what the tasks say one by one."""
    core = disk.engine
    core.verify()
    rows = core.queues(TENANT)
    assert core.live_tasks == sum(sum(row[2:5]) for row in rows)
    got = claim(core, now, count=10**6)
    ready = sum(row[2] for row in rows)
    assert (len(got) if got else 0) == ready
    if got is not None:
        assert len(set(got.ids())) == ready
        assert {look(core, task).state for task in got.ids()} == {LEASED}
        assert core.give_back(got, now) == ready


# --- ids ------------------------------------------------------------------------------------------


def test_ids_are_version_7_and_sort_in_creation_order_whatever_the_clock_does() -> None:
    core = engine()
    ids = []
    for now in (NOW, NOW + 5, NOW - HOUR, NOW + 5, NOW + 6):
        ids += make(core, now, count=300)
    assert ids == sorted(ids) and len(set(ids)) == len(ids)
    assert {(task[6] >> 4, task[8] >> 6) for task in ids} == {(7, 2)}
    assert int.from_bytes(ids[0][:6], "big") == NOW
    assert look(core, ids[600]).created_ms == NOW - HOUR


def test_keyed_ids_land_on_the_shard_of_tenant_and_key() -> None:
    core = engine(shard_count=5)

    def fnv(data: bytes) -> int:
        value = 14695981039346656037
        for byte in data:
            value = (value ^ byte) * 1099511628211 % 2**64
        return value

    for index in range(50):
        key = b"key-%d" % index
        (task,) = make(core, key=key)
        assert fnv(task) % 5 == fnv(TENANT + b"\0" + key) % 5


def test_replays_and_aliases_make_no_task() -> None:
    core = engine()
    batch = creates(4)
    batch.replay(1, bytes(16))
    batch.refuse(2, CODES["KEY_CONFLICT"])
    batch.alias(3, 0)
    assert core.create(batch, TENANT, NOW) == 1
    assert batch.id_bytes(3) == batch.id_bytes(0) and core.live_tasks == 1
