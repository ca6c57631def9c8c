"""Damaged folders: the start or the read names what is damaged, a check tells all of it and changes
nothing, a repair keeps what can be kept and lists the rest."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codeq.engine import folder
from codeq.engine import store as store_module
from codeq.engine._engine import COMPLETED, LEASED, READY
from codeq.engine._salvage import (
    EMPTY_CHUNK,
    Salvage,
    chunk_sound,
    created_in,
    read_directory,
    read_head,
)
from codeq.engine._wire import format_id
from codeq.engine.check import Report, check
from codeq.engine.clock import FakeClock
from codeq.engine.deliveries import rests_on
from codeq.engine.policies import Policy
from codeq.engine.store import Store, synced_sequence, write_synced
from codeq.errors import StoreError
from tests.engine_disk import MINE, NOW, TENANT, Disk, claimed, finish, make
from tests.node import Node

BIG = b"x" * 3000


def snapshot(path: Path) -> dict[str, tuple[str, int]]:
    """Every byte and time of the files below a folder."""
    return {
        str(file.relative_to(path)): (
            hashlib.sha256(file.read_bytes()).hexdigest(),
            file.stat().st_mtime_ns,
        )
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def filled(path: Path, **settings: Any) -> tuple[Node, dict[str, list[str]]]:
    """A node with tasks in every state; ids by state. ``closed`` ended in a bucket of its own."""
    node = Node(path, max_attempts_default=1, **settings)
    made = node.create_batch([{"payload": b'"%d"' % i} for i in range(256)])
    closed = [made.task_id(i) for i in range(256)]
    assert node.finish(*[view.id for view in node.claim(count=256)]) == bytes(256)
    node.create_batch([{"key": f"key-{i}", "payload": b"%d" % i} for i in range(40)])
    node.create_batch([{"command": "later", "delay_seconds": 3600} for _ in range(3)])
    ended = [view.id for view in node.claim(count=10)]
    node.finish(*ended)
    [dead] = [view.id for view in node.claim()]
    node.nack(dead, 0, "broken")
    leased = [view.id for view in node.claim(count=5, lease_ms=3_600_000)]
    ready = [view.id for view in node.claim(count=4)]
    for task_id in ready:
        node.abandon(task_id)
    return node, {
        "closed": closed, "ended": ended, "dead": [dead], "leased": leased, "ready": ready,
    }  # fmt: skip


def states(node: Node, ids: list[str]) -> set[int | None]:
    views = [node.get(task_id) for task_id in ids]
    return {None if view is None else view.state for view in views}


def created_by_chunk(path: Path) -> dict[int, set[str]]:
    """The tasks that each chunk creates or carries."""
    store = Store(path)
    found = {
        int.from_bytes(key[1:], "big"): {format_id(i) for i in created_in(chunk)}
        for key, chunk in store.scan(b"c", b"d")
    }
    store.close()
    return found


def change(path: Path, key: bytes, new: Callable[[bytes], bytes] | None = None) -> None:
    """Flips the last bit of an entry, as a disk might; or makes it what ``new`` says."""
    store = Store(path)
    [value] = store.get([key])
    assert value is not None
    store.write([(key, new(value) if new else value[:-1] + bytes([value[-1] ^ 1]))])
    store.sync(store.sequence())
    store.close()


def chunk_key(sequence: int) -> bytes:
    return b"c" + sequence.to_bytes(8, "big")


def repair(path: Path, clock: FakeClock) -> Report:
    """Checks, which changes nothing, then repairs; afterwards the folder is sound."""
    before = snapshot(path)
    found = check(path, clock)
    assert snapshot(path) == before, "a check changes nothing"
    assert not found.sound
    report = check(path, clock, repair=True)
    assert report.repaired and report.given_up == found.given_up
    assert check(path, clock).sound
    return report


def test_a_check_counts_what_is_sound_and_changes_nothing(tmp_path: Path) -> None:
    node, ids = filled(tmp_path / "data")
    shutil.copytree(node.path, tmp_path / "killed")
    live = node.shard.engine.live_tasks
    node.close()
    for path in (node.path, tmp_path / "killed"):
        before = snapshot(path)
        report = check(path, node.clock)
        assert snapshot(path) == before
        assert report.sound and not report.damage and not report.given_up
        assert (report.live_tasks, report.dead_letters) == (live, 1)
        assert report.ended_tasks == len(ids["closed"] + ids["ended"])
        assert (report.keys, report.directories) == (40, 1)
        assert report.sequence >= report.synced > 0
        assert report.records["created"] == 256 + 43
        assert check(path, node.clock, repair=True) == report, "a sound folder is left alone"
        assert snapshot(path) == before


def test_a_store_that_never_had_a_task_is_sound(tmp_path: Path) -> None:
    node = Node(tmp_path / "data")
    node.close()
    report = check(tmp_path / "data", node.clock)
    assert report.sound and report.live_tasks == 0


def test_a_folder_in_use_is_not_checked(start_server: Callable[[], Any]) -> None:
    server = start_server()
    with pytest.raises(StoreError, match="in use by another process"):
        check(server.folder / "data", FakeClock(), repair=True)


# --- records and entries --------------------------------------------------------------------------


def test_a_damaged_chunk_is_named_and_its_tasks_listed(tmp_path: Path) -> None:
    node, ids = filled(tmp_path / "data")
    node.close()
    created = created_by_chunk(node.path)
    damaged = next(n for n, tasks in created.items() if ids["leased"][0] in tasks)
    lost = created[damaged]
    change(node.path, chunk_key(damaged))
    with pytest.raises(StoreError, match=f"chunk {damaged} is damaged"):
        node._open()
    report = repair(node.path, node.clock)
    assert f"chunk {damaged} is damaged" in report.damage
    node._open()
    for group in ids.values():
        for task_id in group:
            assert (node.get(task_id) is None) == (task_id in lost)
    listed = " ".join(report.given_up)
    assert lost and all(task_id in listed for task_id in lost)
    keyed = [node.create(key=f"key-{i}", payload=b"%d" % i) for i in range(40)]
    assert not lost & set(keyed), "the key of a task that is gone is free"
    kept = {i for tasks in created.values() for i in tasks} - lost
    assert len(kept & set(keyed)) == 40 - len(lost), "those of the others still bind"
    assert Path(report.kept_aside).is_dir() and (Path(report.kept_aside) / "CURRENT").exists()
    node.close()


def test_T11_a_task_known_to_have_ended_never_runs_again(tmp_path: Path) -> None:
    """Its ended record is lost, but the directory of its bucket knows."""
    node, ids = filled(tmp_path / "data")
    node.close()
    store = Store(node.path)
    [(key, value)] = store.scan(b"d", b"e")
    store.close()
    ended = (read_directory(key, value) or [])[100][2]
    change(node.path, chunk_key(ended))
    report = repair(node.path, node.clock)
    node._open()
    live = {v.id for v in node.claim(count=1000, bytes_max=1 << 30)}
    assert not live & set(ids["closed"])
    for task_id in ids["closed"]:
        assert node.get(task_id) is not None or task_id in " ".join(report.given_up)
    assert any(node.get(task_id) is None for task_id in ids["closed"])
    node.close()


def test_a_lost_end_brings_the_task_back(tmp_path: Path) -> None:
    """At least once: nothing that is left says that it has ended."""
    node = Node(tmp_path / "data")
    task_id = node.create()
    node.claim()
    node.finish(task_id)
    node.close()
    store = Store(node.path)
    last = [int.from_bytes(key[1:], "big") for key, _ in store.scan(b"c", b"d")][-1]
    store.close()
    change(node.path, chunk_key(last))
    report = repair(node.path, node.clock)
    assert any(f"chunk {last}" in line for line in report.given_up)
    node._open()
    assert node.get(task_id).state == LEASED
    assert node.finish(task_id) == b"\0"
    node.close()


@pytest.mark.parametrize("gone", [False, True])
def test_a_lost_head_is_made_again_and_no_number_is_used_twice(tmp_path: Path, gone: bool) -> None:
    node, ids = filled(tmp_path / "data")
    before = node.shard.engine.digest()
    used = node.create()
    node.close()
    if gone:
        store = Store(node.path)
        store.write([], [b"mhead"])
        store.sync(store.sequence())
        store.close()
        says = "the head \\(key mhead\\) is missing"
    else:
        change(node.path, b"mhead")
        says = "the head \\(key mhead\\) is damaged"
    with pytest.raises(StoreError, match=says):
        node._open()
    report = repair(node.path, node.clock)
    assert report.given_up == []
    node._open()
    assert before != 0 and states(node, ids["leased"]) == {LEASED}
    assert states(node, ids["closed"]) == {COMPLETED}
    fresh = node.create()
    assert fresh > used and number_of(fresh) > number_of(used)
    node.close()


def number_of(task_id: str) -> int:
    raw = int(task_id.replace("-", ""), 16)
    return (raw >> 64 & 0xFFF) << 36 | raw >> 26 & (1 << 36) - 1


@pytest.mark.parametrize("prefix", [b"d", b"k", b"s", b"e"])
def test_entries_that_are_damaged_or_missing_are_made_again(tmp_path: Path, prefix: bytes) -> None:
    node, ids = filled(tmp_path / "data", straggler_slack_bytes=0)
    for _ in range(30):  # the log goes on until segments are over and stragglers are carried
        node.create_batch([{"payload": BIG, "command": "more"} for _ in range(256)])
        node.finish(*[v.id for v in node.claim(("more",), count=256, bytes_max=1 << 30)])
        node.advance(1100)
    replayed = node.create(key="key-7", payload=b"7")
    node.finish(*ids["leased"])
    everything = {task_id: node.get(task_id).state for group in ids.values() for task_id in group}
    node.close()
    store = Store(node.path)
    entries = [key for key, _ in store.scan(prefix, prefix + b"\xff")]
    assert len(entries) > 1
    store.write([], entries[::2])
    store.sync(store.sequence())
    store.close()
    change(node.path, entries[1])
    if prefix == b"s":
        with pytest.raises(StoreError, match=f"segment entry {entries[1].hex()} is damaged"):
            node._open()
    report = repair(node.path, node.clock)
    assert report.given_up == []
    assert len(report.damage) == len(entries[::2]) + 1 + (prefix == b"k")
    node._open()
    assert {task_id: node.get(task_id).state for task_id in everything} == everything
    assert node.create(key="key-7", payload=b"7") == replayed
    node.close()


@pytest.mark.parametrize("lost", ["directory", "head", "record", "created"])
def test_T35_a_repair_brings_no_task_back_that_was_cleaned_up(tmp_path: Path, lost: str) -> None:
    node, ids = filled(tmp_path / "data")
    deleted: list[int] = []
    far = node.clock.now_ms() + 10**12
    node.shard.cleanup.run("t", far, 100, deleted.append)
    node.settle()
    assert deleted == [100]
    everything = [task_id for group in ids.values() for task_id in group]
    away = [task_id for task_id in everything if node.get(task_id) is None]
    left = set(everything) - set(away)
    assert len(away) == 100
    node.close()
    assert check(node.path, node.clock).sound
    store = Store(node.path)
    [(directory, _)] = store.scan(b"d", b"e")
    records = [key for key, chunk in store.scan(b"c", b"d") if purges(chunk)]
    created = next(key for key, chunk in store.scan(b"c", b"d") if created_in(chunk))
    store.close()
    assert len(records) == 2, "of tasks in memory, and of tasks on disk"
    change(node.path, {"directory": directory, "head": b"mhead", "record": records[1]}.get(
        lost, created
    ))  # fmt: skip
    report = repair(node.path, node.clock)
    node._open()
    assert states(node, away) == {None}
    if lost != "created":
        assert None not in states(node, sorted(left))
        assert report.given_up == [] or lost == "record"
    node.close()


def purges(chunk: bytes) -> bool:
    found: set[int] = set()
    return chunk_sound(chunk, found) and bool(found)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_T18_a_pending_webhook_is_kept_when_its_records_are(tmp_path: Path, lost: int) -> None:
    """Of two tasks one loses nothing, its creation, or its end."""
    node = Node(tmp_path / "data")
    ids = [node.create(webhook="https://example.com/hook", payload=BIG) for _ in range(2)]
    for view in node.claim(count=2):
        node.finish(view.id)
    assert node.shard.deliveries.pending == 2
    node.close()
    store = Store(node.path)
    [(first, value), _] = store.scan(b"w", b"x")
    store.close()
    resting = rests_on(first, value)
    assert resting is not None and format_id(resting.task_id) in ids
    change(node.path, [b"mhead", chunk_key(resting.created), chunk_key(resting.ended)][lost])
    report = repair(node.path, node.clock)
    listed = [line for line in report.given_up if line.startswith("pending webhook")]
    assert listed == ([f"pending webhook of task {format_id(resting.task_id)}"] if lost else [])
    node._open()
    deliveries = node.shard.deliveries
    pages: list[Any] = []
    deliveries.page(b"w", deliveries.end, pages.append)
    node.settle()
    assert len(pages[0].owed) == deliveries.pending == (1 if lost else 2)
    outcomes: list[Any] = []
    for owed in pages[0].owed:
        deliveries.load(owed.key, outcomes.append)
    node.settle()
    assert {outcome.task_id for outcome in outcomes} <= set(ids)
    assert len(outcomes) == deliveries.pending and not node.faults
    node.close()


def test_a_damaged_rule_is_named_and_given_up(tmp_path: Path) -> None:
    node = Node(tmp_path / "data")
    node.create()
    node.ask_done(node.shard.queues.pause, "t", "job")
    policy = Policy((0,), 1, "x")
    for name in ("mail", "job"):
        node.ask(node.shard.policies.put, "t", name, policy)
    node.close()
    for key in (b"pqt\0job", b"ptt\0mail"):
        change(node.path, key)
    report = repair(node.path, node.clock)
    assert [line.partition(" (key")[0] for line in report.damage] == [
        "pause of queue", "topic policy",
    ]  # fmt: skip
    assert report.given_up == ["pause of queue t job", "topic policy t mail"]
    node._open()
    assert not node.shard.queues.paused("t", "job")
    assert node.shard.policies.find("t", "mail") is None
    assert node.shard.policies.find("t", "job").policy == policy
    node.close()


def test_I7_a_damaged_key_entry_is_named_by_the_create_that_needs_it(tmp_path: Path) -> None:
    node = Node(tmp_path / "data")
    node.create(key="a")
    node.close()
    store = Store(node.path)
    [(key, _)] = store.scan(b"k", b"l")
    store.close()
    change(node.path, key)
    node._open()
    creates: Any = node.shard.create
    with pytest.raises(AssertionError):
        node.create(key="a")
    assert creates and node.faults == [f"the store is damaged: idempotency key entry {key.hex()}"]
    node.shard.close()


def salvaged(disk: Disk, without: int) -> tuple[Salvage, dict[int, bytes]]:
    """Reads the log of an engine but for one chunk; what is left of the others."""
    end = max(disk.chunks) + 1
    salvage = Salvage(shard_count=1, tail=1, next_seq=end, next_number=256, last_id_ms=0)
    left = {}
    for sequence in range(1, end):
        chunk = EMPTY_CHUNK if sequence == without else disk.chunks[sequence]
        left[sequence] = salvage.chunk(chunk, (), [])
    head = read_head(dict(salvage.done(NOW))[b"mhead"])
    assert head is not None and head[2] == 256 and head[4] == end
    return salvage, left


def test_records_that_do_not_fit_any_more_are_left_out() -> None:
    """A dead letter whose requeue is lost stays one; a heartbeat without its claim is nothing."""
    disk = Disk(max_attempts_default=1)
    [task_id] = make(disk.engine)
    disk.commit()
    claimed(disk.engine)
    disk.commit()
    assert disk.engine.heartbeat(task_id, *MINE, 1000, NOW) == 0
    disk.commit()
    assert disk.engine.nack(task_id, *MINE, 0, b"", NOW)[2]
    disk.commit()
    assert disk.engine.requeue(task_id, TENANT, NOW) == 0
    disk.commit()
    claimed(disk.engine)
    finish(disk.engine, [task_id])
    disk.commit()
    for without, refused, dead, ended in (
        (0, [], 0, 1),
        (2, ["kept"], 0, 1),
        (4, ["requeued"], 0, 1),
        (5, ["claimed", "ended"], 1, 0),
        (1, [], 0, 0),
    ):
        salvage, left = salvaged(disk, without)
        assert [kind for kind, _ in salvage.refused] == refused, without
        assert (salvage.dead_letters, salvage.ended_tasks) == (dead, ended)
        assert salvage.live_tasks == 0
        disk_left = Disk(max_attempts_default=1)
        disk_left.values.update({b"c" + n.to_bytes(8, "big"): v for n, v in left.items()})
        disk_left.values[b"mhead"] = disk.values[b"mhead"]
        disk_left.restart(NOW)
        disk_left.engine.verify()
        changed = [n for n in left if left[n] not in (EMPTY_CHUNK, disk.chunks[n])]
        assert len(changed) == min(1, len(refused)), "what did not fit is not there any more"


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Node, list[str]]:
    """A closed node whose tasks stand in several tables and a log; their ids."""
    monkeypatch.setattr(store_module, "WRITE_BUFFER_BYTES", 128 << 10)
    node = Node(tmp_path / "data")
    ids = []
    for _ in range(8):
        made = node.create_batch([{"payload": b'"%s"' % BIG} for _ in range(20)])
        ids += [made.task_id(i) for i in range(20)]
        node.finish(*[view.id for view in node.claim(count=3)])
        node.shard._store.flush()
    node.create_batch([{"payload": b"1"}])
    shutil.copytree(node.path, tmp_path / "killed")
    node.close()
    node.path = tmp_path / "killed"
    return node, ids


def largest(path: Path, pattern: str) -> Path:
    return max(path.glob(pattern), key=lambda file: file.stat().st_size)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x20
    file.write_bytes(data)


def cut_manifest(path: Path) -> str:
    file = largest(path, "MANIFEST-*")
    with file.open("r+b") as writer:
        writer.truncate(40)
    return file.name


def end_manifest(path: Path) -> str:
    """Cuts it between two records, which RocksDB takes for its end: it would remove the tables
    that only the rest lists."""
    file = largest(path, "MANIFEST-*")
    data, end, ends = file.read_bytes(), 0, []
    while end < len(data):
        end += 7 + int.from_bytes(data[end + 4 : end + 6], "little")
        ends.append(end)
    with file.open("r+b") as writer:
        writer.truncate(ends[len(ends) * 2 // 3])
    return file.name


def flip_manifest(path: Path) -> str:
    file = largest(path, "MANIFEST-*")
    flip(file, file.stat().st_size // 2)
    return file.name


def cut_current(path: Path) -> str:
    (path / "CURRENT").write_bytes(b"MANI")
    return "CURRENT"


def lose_current(path: Path) -> str:
    (path / "CURRENT").unlink()
    return "CURRENT"


def flip_footer(path: Path) -> str:
    file = largest(path, "*.sst")
    flip(file, file.stat().st_size - 20)
    return file.name


def lose_table(path: Path) -> str:
    file = largest(path, "*.sst")
    file.unlink()
    return file.name


@pytest.mark.parametrize(
    "harm", [cut_manifest, end_manifest, flip_manifest, cut_current, lose_current]
)
def test_lists_of_files_are_made_again_without_loss(
    tables: tuple[Node, list[str]], harm: Callable[[Path], str]
) -> None:
    node, ids = tables
    name = harm(node.path)
    for _ in range(2):
        with pytest.raises(StoreError, match=f"data folder {node.path}.*{name}"):
            node._open()
    report = repair(node.path, node.clock)
    assert report.live_tasks == len(ids) + 1 - 24
    assert report.given_up == [] and len(report.damage) == 1
    node._open()
    assert states(node, ids) == {COMPLETED, LEASED, READY} - {LEASED}
    node.close()


@pytest.mark.parametrize("harm", [flip_footer, lose_table])
def test_a_lost_table_is_named_and_what_it_held_is_listed(
    tables: tuple[Node, list[str]], harm: Callable[[Path], str]
) -> None:
    node, ids = tables
    name = harm(node.path)
    with pytest.raises(StoreError, match=name):
        node._open()
    report = repair(node.path, node.clock)
    assert any(name in line for line in report.damage)
    node._open()
    assert_no_silent_loss(node, ids, report)
    node.close()


def assert_no_silent_loss(node: Node, ids: list[str], report: Report) -> None:
    """Every task that is missing is named, by its id or in a range of numbers."""
    text = "\n".join(report.given_up)
    ranges = [
        range(int(line.split()[4]), int(line.split()[6].rstrip(",")) + 1)
        for line in report.given_up
        if line.startswith("tasks with the numbers")
    ]
    for task_id in ids:
        if node.get(task_id) is None:
            number = number_of(task_id)
            named = task_id in text or any(number in one for one in ranges)
            assert named or "writes with the numbers" in text, f"{task_id} ({number})\n{text}"


def test_a_flipped_byte_in_a_table_is_named_by_the_read(tables: tuple[Node, list[str]]) -> None:
    node, ids = tables
    file = largest(node.path, "*.sst")
    flip(file, file.stat().st_size // 2)
    with pytest.raises(StoreError, match=f"checksum mismatch.*{file.name}"):
        node._open()
    report = repair(node.path, node.clock)
    assert any(file.name in line for line in report.damage)
    node._open()
    kept = [task_id for task_id in ids if node.get(task_id) is not None]
    assert len(kept) > len(ids) * 0.8, "only the block is lost"
    assert_no_silent_loss(node, ids, report)
    node.close()


def test_T17_a_lost_log_is_accepted_by_a_repair_only(tmp_path: Path) -> None:
    node = Node(tmp_path / "data")
    ids = [node.create(payload=b'"%s"' % BIG) for _ in range(100)]
    shutil.copytree(node.path, tmp_path / "killed")
    node.close()
    node.path = tmp_path / "killed"
    log = largest(node.path, "*.log")
    flip(log, log.stat().st_size // 2)
    before = snapshot(node.path)
    for _ in range(3):
        with pytest.raises(StoreError, match=f"lost a part of its log \\({log.name}\\)"):
            node._open()
    assert snapshot(node.path) == before, "a start that is refused loses nothing more"
    report = repair(node.path, node.clock)
    assert any("writes with the numbers" in line for line in report.given_up)
    node._open()
    kept = [task_id for task_id in ids if node.get(task_id) is not None]
    assert 80 <= len(kept) < 100, "what stands behind the damage is kept"
    assert ids[0] in kept and ids[-1] in kept
    fresh = node.create()
    assert number_of(fresh) > number_of(ids[-1])
    assert len(node.claim(count=200, bytes_max=1 << 30)) == len(kept) + 1
    node.close()


def test_the_end_of_a_log_is_accepted_as_lost(tmp_path: Path) -> None:
    node = Node(tmp_path / "data")
    ids = [node.create() for _ in range(20)]
    node.close()
    write_synced(node.path, synced_sequence(node.path) + 40)
    with pytest.raises(StoreError, match="lost a part of its log"):
        node._open()
    report = repair(node.path, node.clock)
    assert len(report.given_up) == 1
    node._open()
    assert states(node, ids) == {READY}
    assert number_of(node.create()) >= number_of(ids[-1]) + 32 * 40
    node.close()


@pytest.mark.parametrize("seed", range(12))
def test_any_damage_is_repaired_into_a_state_that_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(store_module, "WRITE_BUFFER_BYTES", 64 << 10)
    node, ids = filled(tmp_path / "data", straggler_slack_bytes=0)
    for _ in range(4):
        node.create_batch([{"command": "more", "payload": BIG} for _ in range(40)])
        node.finish(*[v.id for v in node.claim(("more",), count=30, bytes_max=1 << 30)])
        node.advance(1100)
        if rng.random() < 0.5:
            node.shard._store.flush()
    shutil.copytree(node.path, tmp_path / "killed")
    node.close()
    node.path = tmp_path / "killed"
    for _ in range(rng.randint(1, 4)):
        file = rng.choice(sorted(f for f in node.path.iterdir() if f.suffix in (".sst", ".log")))
        if file.stat().st_size:
            flip(file, rng.randrange(file.stat().st_size))
    report = check(node.path, node.clock, repair=True)
    assert report.repaired or report.sound
    assert check(node.path, node.clock).sound
    node._open()
    node.shard.engine.verify()
    assert_no_silent_loss(node, [i for group in ids.values() for i in group], report)
    ended = {view.id for view in node.claim(count=1000, bytes_max=1 << 30)}
    assert node.finish(*ended) == bytes(len(ended))
    node.restart()
    assert states(node, list(ended)) == {COMPLETED} or not ended
    node.close()


# --- interrupted ----------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("moment", range(40))
def test_a_repair_that_is_interrupted_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    node = Node(tmp_path / "data")
    task_id = node.create()
    node.close()
    write_synced(node.path, synced_sequence(node.path) + 1)
    left = moment
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    try:
        check(node.path, node.clock, repair=True)
    except Stop:
        monkeypatch.undo()
        with pytest.raises(StoreError, match=r"lost a part|unfinished|CURRENT"):
            node._open()
        assert not check(node.path, node.clock).sound
        check(node.path, node.clock, repair=True)
    monkeypatch.undo()
    assert check(node.path, node.clock).sound
    node._open()
    assert node.get(task_id).state == READY
    node.close()


# --- folders that are no store --------------------------------------------------------------------


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match=r"holds letter\.txt and is no codeq store"):
        Node(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["letter.txt", "lost+found"]
    (tmp_path / "letter.txt").unlink()
    Node(tmp_path).close()
    with pytest.raises(StoreError, match="no codeq store"):
        check(tmp_path / "nothing", FakeClock())
    assert folder.ignored("lost+found") and not folder.ignored("letter.txt")
