"""Backups: a copy made while serving holds every acknowledgement made before the call, and starts
as a store of its own."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from copy import copy
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from codeq import cli
from codeq.engine import backup as backup_module
from codeq.engine._engine import COMPLETED, READY
from codeq.engine.backup import Backup, restore
from codeq.engine.check import check
from codeq.engine.clock import FakeClock, Faults
from codeq.engine.store import Store, write_synced
from codeq.errors import CodeqError, StoreError
from tests.conftest import refusal
from tests.crash_check import check as check_promises
from tests.crash_check import check_result
from tests.crash_clients import COMMANDS, Rest, started
from tests.crash_rounds import SETTINGS
from tests.crash_server import Server as Served
from tests.ledger import Entry, Ledger
from tests.node import Node
from tests.test_check import BIG, filled, flip, largest, snapshot


def made(node: Node, name: str) -> Any:
    got: list[Any] = []
    node.shard.backups.make(name, got.append)
    node.settle()
    assert len(got) == 1
    return got[0]


def refused(node: Node, name: str) -> str:
    outcome = made(node, name)
    assert isinstance(outcome, CodeqError)
    return outcome.slug


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "backups"


@pytest.fixture
def node(tmp_path: Path, place: Path) -> Iterator[Node]:
    node = Node(tmp_path / "data", backup_dir=place)
    yield node
    node.shard.close()


def test_a_backup_restores_to_what_the_store_was(tmp_path: Path, place: Path) -> None:
    node, ids = filled(tmp_path / "data", backup_dir=place)
    digest = node.shard.engine.digest()
    outcome = made(node, "monday")
    assert outcome == Backup(str(place / "monday"), sum(s.stat().st_size for s in files(place)))
    later = node.create()
    report = check(place / "monday", node.clock)
    assert report.sound and report.synced == report.sequence == node.shard._store.sequence() - 2
    before = snapshot(place)
    assert restore(place / "monday", tmp_path / "again", node.clock) == report.live_tasks
    assert snapshot(place) == before
    copy = Node(tmp_path / "again", node.clock, max_attempts_default=1)
    assert copy.shard.engine.digest() == digest
    for group in ids.values():
        for task_id in group:
            assert vars_of(copy.get(task_id)) == vars_of(node.get(task_id))
    assert copy.get(later) is None
    assert node.create(key="key-3", payload=b"3") == copy.create(key="key-3", payload=b"3")
    copy.close()
    node.close()


def files(place: Path) -> list[Path]:
    return [file for file in place.rglob("*") if file.is_file()]


def vars_of(view: Any) -> tuple[Any, ...]:
    return (view.id, view.state, view.payload, view.attempts, view.error, view.result, view.due_ms)


def test_the_store_goes_on_and_a_backup_does_not_change_with_it(node: Node, place: Path) -> None:
    first = [node.create(payload=BIG) for _ in range(50)]
    made(node, "one")
    before = snapshot(place)
    node.finish(*[view.id for view in node.claim(count=50, bytes_max=1 << 30)])
    made(node, "two")
    for _ in range(3):
        node.create_batch([{"payload": BIG} for _ in range(200)])
        node.shard._store.flush()
    assert {k: v for k, v in snapshot(place).items() if k.startswith("one")} == before
    for name, state in (("one", READY), ("two", COMPLETED)):
        copy = Node(place / name, node.clock)
        assert {copy.get(task_id).state for task_id in first} == {state}
        copy.close()


def test_a_name_that_is_taken_is_a_conflict(node: Node, place: Path) -> None:
    (place / "file").parent.mkdir()
    (place / "file").write_text("mine")
    (place / "link").symlink_to("nowhere")
    made(node, "one")
    before = snapshot(place)
    assert [refused(node, name) for name in ("one", "file", "link")] == ["conflict"] * 3
    assert snapshot(place) == before


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\\b", "a\0b", "a\nb", "x" * 201, "\ud800"],
)
def test_T39_a_name_cannot_leave_the_folder(name: str) -> None:
    assert not backup_module.is_name(name)
    assert backup_module.is_name("2026-11-24 évening.1")


def test_a_disk_without_room_is_a_refusal_and_nothing_stays(
    node: Node, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "free_bytes", lambda self: 1 << 20)
        assert refused(node, "one") == "unavailable"
    with monkeypatch.context() as patch:

        def full(path: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("codeq.engine.folder.sync_all", full)
        outcome = made(node, "one")
        assert (outcome.slug, outcome.message) == (
            "unavailable", "the backup could not be made: the disk has no room for it",
        )  # fmt: skip
    assert files(place) == [] and not (node.path / "backup.tmp").exists()
    node.create()
    assert isinstance(made(node, "one"), Backup) and node.faults == []


def test_a_backup_to_another_file_system_is_copied(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    place = shared / f"codeq-test-{os.getpid()}"
    node = Node(tmp_path / "data", backup_dir=place)
    try:
        ids = [node.create(payload=BIG) for _ in range(20)]
        assert isinstance(made(node, "far"), Backup)
        assert os.listdir(place) == ["far"] and check(place / "far", node.clock).sound
        restore(place / "far", tmp_path / "back", node.clock)
        copy = Node(tmp_path / "back", node.clock)
        assert all(copy.get(task_id).state == READY for task_id in ids)
        copy.close()
        node.shard.backups.stop()
        assert refused(node, "late") == "unavailable"
    finally:
        node.close()
        subprocess.run(["rm", "-r", str(place)], check=True)


def test_what_an_unfinished_backup_left_is_removed(node: Node, place: Path, tmp_path: Path) -> None:
    class Died(BaseException):
        pass

    def die() -> None:
        raise Died

    task_id = node.create()
    for count in (1, 2):
        node.clock.faults = Faults({"in-backup": count}, die)
        node.restart()
        node.shard.backups._remove_unfinished = lambda: None  # type: ignore[method-assign]
        with pytest.raises(Died):
            made(node, "one")
        assert (node.path / "backup.tmp").exists() or list(place.glob(".one.*"))
        assert not (place / "one").exists()
    node.clock.faults = Faults({})
    other = place / ".mine.tmp"
    other.mkdir()
    node.restart()
    assert not (node.path / "backup.tmp").exists() and list(place.iterdir()) == [other]
    made(node, "one")
    restore(place / "one", tmp_path / "again", node.clock)
    copy = Node(tmp_path / "again", node.clock)
    assert copy.get(task_id).state == READY
    copy.close()


# --- restore --------------------------------------------------------------------------------------


def test_restore_refuses_what_is_not_empty_and_what_is_damaged(
    node: Node, place: Path, tmp_path: Path
) -> None:
    node.create(payload=BIG)
    made(node, "one")
    clock = FakeClock()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").touch()
    with pytest.raises(StoreError, match="is not empty: it holds letter"):
        restore(place / "one", tmp_path / "full", clock)
    with pytest.raises(StoreError, match="no codeq store"):
        restore(place / "none", tmp_path / "empty", clock)
    table = largest(place / "one", "*.sst")
    flip(table, table.stat().st_size // 3)
    with pytest.raises(StoreError, match=r"backup .*one is damaged"):
        restore(place / "one", tmp_path / "empty", clock)
    assert list((tmp_path / "empty").iterdir()) == []


def test_an_interrupted_restore_is_no_store_and_can_be_repeated(
    node: Node, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = node.create()
    made(node, "one")
    target = tmp_path / "target"
    rename = Path.rename
    for moment in range(20):
        left = moment

        def renamed(self: Path, to: Path) -> Path:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return rename(self, to)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", renamed)
            try:
                restore(place / "one", target, node.clock)
                break
            except KeyboardInterrupt:
                pass
        with pytest.raises(StoreError, match="unfinished"):
            Node(target, node.clock)
        try:
            restore(place / "one", target, node.clock)
        except StoreError as error:
            assert "is finished now" in error.message
        copy = Node(target, node.clock)
        assert copy.get(task_id).state == READY
        copy.close()
        subprocess.run(["rm", "-r", str(target)], check=True)
    assert moment > 5


# --- over REST and with real processes ------------------------------------------------------------


@pytest.fixture
def operated(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """``operated(folder, FAULT)`` starts a server whose producer is an operator."""
    running: list[Served] = []

    def start(name: str = "one", fault: str = "") -> Served:
        (tmp_path / name).mkdir(exist_ok=True)
        environ = {**SETTINGS, "BACKUP_DIR": str(tmp_path / "backups"), "CODEQ_FAULT": fault}
        running.append(Served(tmp_path / name, environ, "tests.operator_server"))
        assert running[-1].wait_ready(), (tmp_path / name / "server.log").read_text()
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)


def call(server: Served, token: str, body: object) -> tuple[int, Any]:
    rest = Rest(server, token)
    try:
        return rest.call("POST", "/admin/backup", body)
    finally:
        rest.close()


def test_who_may_make_a_backup_and_under_what_name(
    operated: Callable[..., Served], start_server: Callable[..., Any], place: Path
) -> None:
    server = operated()
    status, answer = call(server, "dev-producer", {"name": "one"})
    assert status == 201 and set(answer) == {"path", "bytes"}
    assert answer["path"] == str(place / "one") and answer["bytes"] > 0
    for body in ({"name": "../two"}, {"name": ".."}, {"name": ""}):
        status, answer = call(server, "dev-producer", body)
        assert (status, answer["code"], answer["message"]) == (
            400, "validation-error", "invalid name",
        )  # fmt: skip
    for body in ({}, {"name": 7}, [], {"name": None}):
        status, answer = call(server, "dev-producer", body)
        assert (status, answer["message"]) == (400, "invalid body")
    status, answer = call(server, "dev-producer", {"name": "one"})
    assert (status, answer["code"]) == (409, "conflict")
    status, answer = call(server, "dev-worker", {"name": "two"})
    assert status == 401
    plain = start_server(BACKUP_DIR=str(place))
    response = plain.client("dev-producer").post("/admin/backup", json={"name": "two"})
    assert refusal(response) == (403, "permission-denied", "operator only")
    assert os.listdir(place) == ["one"]


def acknowledged(ledger: Ledger) -> list[Entry]:
    """What has been promised so far, as of now."""
    with ledger.changed:
        return [copy(entry) for entry in ledger.entries.values() if entry.acknowledged]


def restored_holds(server: Served, promised: list[Entry]) -> None:
    """Every task and result of before the backup is there, and each task ends exactly once."""
    rest, worker = Rest(server, "dev-producer"), Rest(server, "dev-worker")
    for entry in promised:
        status, task = rest.call("GET", f"/tasks/{entry.task_id}")
        assert status == 200 and json.loads(task["payload"])["number"] == entry.number, entry
        if entry.result is not None:
            status, answer = rest.call("GET", f"/tasks/{entry.task_id}/result")
            assert status == 200, entry
            check_result(entry, answer["task"], answer["result"])
    left = {e.task_id for e in promised if e.result is None}
    done: set[str] = set()
    claim = {"commands": COMMANDS, "count": 100, "waitSeconds": 4, "leaseSeconds": 60}
    while (got := worker.call("POST", "/tasks/claim/batch", claim))[0] == 200:
        ids = [task["id"] for task in got[1]["tasks"]]
        assert not done & set(ids)
        done.update(ids)
        results = [{"taskId": task_id, "status": "COMPLETED"} for task_id in ids]
        assert worker.call("POST", "/tasks/batch/results", {"results": results})[0] == 200
    for task_id in left:
        status, task = rest.call("GET", f"/tasks/{task_id}")
        assert status == 200 and task["status"] in ("COMPLETED", "FAILED"), task
    assert not done & {e.task_id for e in promised if e.result is not None}
    rest.close()
    worker.close()


def test_T17_a_backup_under_load_holds_all_that_was_acknowledged_before(
    tmp_path: Path, operated: Callable[..., Served], place: Path
) -> None:
    server = operated()
    ledger = Ledger()
    loads = started(server, ledger, random.Random(0))
    promises = []
    for number in range(3):
        goal = ledger.acknowledgements + 500
        assert ledger.wait_for(lambda goal=goal: ledger.acknowledgements > goal, 30)
        promises.append(acknowledged(ledger))
        begun = ledger.acknowledgements
        assert call(server, "dev-producer", {"name": f"b{number}"})[0] == 201
        assert ledger.acknowledgements >= begun
    for load in loads:
        load.stopping.set()
    for load in loads:
        load.join(30)
        assert load.fault is None
    assert server.stop(signal.SIGTERM) == 0
    assert not ledger.violations
    for number in (0, 2):
        folder = tmp_path / f"again{number}"
        assert cli.run(["restore", str(place / f"b{number}"), "--data", str(folder / "data")]) == 0
        again = operated(folder.name)
        restored_holds(again, promises[number])
        assert again.stop(signal.SIGTERM) == 0
    assert cli.run(["check", "--data", str(place / "b1")]) == 0


@pytest.mark.parametrize("count", [1, 2])
def test_T17_kill_9_in_the_middle_of_a_backup(
    tmp_path: Path, operated: Callable[..., Served], place: Path, count: int
) -> None:
    server = operated("one", f"in-backup:{count}")
    ledger = Ledger()
    loads = started(server, ledger, random.Random(0))
    assert ledger.wait_for(lambda: ledger.acknowledgements > 300, 30)
    with pytest.raises((OSError, HTTPException)):
        call(server, "dev-producer", {"name": "one"})
    assert server.process.wait(30) == -signal.SIGKILL
    server.close()
    for load in loads:
        load.stopping.set()
        load.join(30)
    ledger.new_life()
    again = operated("one")
    check_promises(again, ledger, list(ledger.entries.values()))
    assert call(again, "dev-producer", {"name": "one"})[0] == 201
    assert os.listdir(place) == ["one"] and not (tmp_path / "one/data/backup.tmp").exists()
    assert again.stop(signal.SIGTERM) == 0
    assert cli.run(["restore", str(place / "one"), "--data", str(tmp_path / "two/data")]) == 0
    copy = operated("two")
    restored_holds(copy, acknowledged(ledger))


def test_the_server_goes_on_when_the_disk_for_a_backup_is_full(
    tmp_path: Path, operated: Callable[..., Served]
) -> None:
    small = tmp_path / "backups"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")
    try:
        server = operated()
        rest = Rest(server, "dev-producer")
        made = {"command": COMMANDS[0], "payload": "x" * 2_000_000}
        assert rest.call("POST", "/tasks", made)[0] == 201
        status, answer = call(server, "dev-producer", {"name": "one"})
        assert (status, answer["code"]) == (503, "unavailable") and "no room" in answer["message"]
        assert os.listdir(small) == []
        assert rest.call("POST", "/tasks", made)[0] == 201
        rest.close()
        assert server.stop(signal.SIGTERM) == 0
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


# --- command line ---------------------------------------------------------------------------------


def test_the_commands(
    operated: Callable[..., Served],
    tmp_path: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = operated()
    rest = Rest(server, "dev-producer")
    assert rest.call("POST", "/tasks", {"command": "a", "payload": 1})[0] == 201
    rest.close()
    url = ["--base-url", f"http://{server.address['http']}"]
    token = ["--token", "dev-producer"]
    assert cli.run(["backup", "one", *url, *token]) == 0
    assert str(place / "one") in capsys.readouterr().out
    for arguments, says in [
        (["backup", "one", *url, *token], "backup one exists"),
        (["backup", "a/b", *url, *token], "invalid name"),
        (["backup", "two", *url, "--token", "none"], "invalid token"),
        (["backup", "two", "--base-url", "http://127.0.0.1:1", *token], "did not answer"),
        (["backup", "two", "--base-url", "file:///etc", *token], "--base-url"),
        (["check", "--data", str(tmp_path / "one/data")], "in use by another process"),
        (["check", "--data", str(tmp_path / "none")], "no codeq store"),
        (["restore", str(place / "one"), "--data", str(tmp_path / "one/data")], "is not empty"),
    ]:
        codes = {"did not answer": 4, "--base-url": cli.EXIT_USAGE}
        assert cli.run(arguments) == codes.get(says, 1)
        said = capsys.readouterr().err
        assert said.startswith("codeq: ") and said.count("\n") == 1 and says in said
    assert server.stop(signal.SIGTERM) == 0
    data = str(tmp_path / "one/data")
    assert cli.run(["check", "--data", data, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sound"] and report["liveTasks"] == 1 and report["records"]["created"] == 1
    config = tmp_path / "codeq.yaml"
    config.write_text(f"persistenceConfig: {{path: {data}}}\n")
    write_synced(Path(data), report["synced"] + 9)
    assert cli.run(["check", "--config", str(config)]) == 1
    assert "would be given up: writes with the numbers" in capsys.readouterr().out
    assert cli.run(["check", "--config", str(config), "--repair"]) == 1
    assert "repaired; the old files are in" in capsys.readouterr().out
    assert cli.run(["check", "--config", str(config)]) == 0
    assert cli.run(["check", "--config", str(tmp_path / "none.yaml")]) == 2
    assert operated().stop(signal.SIGTERM) == 0
