"""What a real server does when its disk fails, fills up, or no descriptor is left."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import random
import re
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codeq.engine import _wire
from tests.crash_clients import COMMANDS, LOADS, MESSAGE_BYTES_MAX, Rest, stream
from tests.crash_rounds import SETTINGS, Crash
from tests.crash_server import ENTRY, SMALL, Server
from tests.power_loss import Shim

EXIT_START_FAILED, EXIT_STORE_FAULT = 1, 3
SLOW_MACHINE = "codeq.watchdog"  # logs that the loop was held up
TMPFS_BYTES = 512 << 20
RESERVE_BYTES = 200 << 20
FILL_BYTES = 150 << 20
#: RocksDB takes and gives back room by itself: what REST was told may not hold for the stream
ROOM_ROUNDS = 20
SPENT_BYTES_MAX = 64 << 20  # of the reserve, by tables of what was taken before


def stops_with_one_line(tmp_path: Path, fault: str, module: str = ENTRY) -> str:
    """Loads a server whose disk fails in this way, expects it to stop at once with one line, takes
    away what was not synced, and checks every promise after a restart. Returns the line."""
    crash = Crash(tmp_path, seed=6, power_loss=True)
    crash.module = module
    crash.ledger.new_life()
    server = Server(tmp_path, {**SETTINGS, **crash.shim.environment(fault)}, module)
    assert server.wait_ready(), crash.log()
    loads = crash.load(server, *LOADS)
    assert crash.ledger.wait_for(lambda: crash.ledger.acknowledgements > 500, 30), crash.log()
    crash.shim.arm()
    code = server.wait(30)
    for load in loads:
        load.stopping.set()
    crash.ledger.progress()
    crash.join(loads)
    assert code == EXIT_STORE_FAULT, crash.log()
    lines = [line for line in crash.log().splitlines() if SLOW_MACHINE not in line]
    assert len(lines) == 1, lines
    crash.shim.disarm()
    crash.shim.lose_power(random.Random(6))
    crash.drain()
    return lines[0]


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_T6_a_failed_sync_stops_the_process_and_acknowledges_nothing(
    tmp_path: Path, error: str
) -> None:
    line = stops_with_one_line(tmp_path, f"fsync:{error}:1:.log")
    assert line.startswith("codeq: sync of the store failed: IO error"), line
    assert reason(error) in line


def test_T6_a_full_disk_stops_the_process_and_acknowledges_nothing(tmp_path: Path) -> None:
    line = stops_with_one_line(tmp_path, "write:ENOSPC:1+:.log")
    assert line.startswith("codeq: write to the store failed: IO error"), line
    assert reason("ENOSPC") in line


@pytest.mark.parametrize("fault", ["write:EROFS:1+", "write:EIO:1:.log"])
def test_T6_a_disk_that_became_read_only_or_fails_stops_the_process(
    tmp_path: Path, fault: str
) -> None:
    line = stops_with_one_line(tmp_path, fault)
    assert re.match("codeq: (write to|sync of) the store failed: ", line), line
    assert reason(fault.split(":")[1]) in line


def reason(error: str) -> str:
    return os.strerror(getattr(errno, error))


@pytest.mark.parametrize(
    "fault",
    [
        "write:EIO:1+:.sst",
        "fsync:EIO:1:.sst",
        "open:EMFILE:1:.sst",
        "open:EMFILE:1:.log",  # the next log, or the one to be recycled
        "open:EROFS:1+",
    ],
)
def test_T6_a_flush_that_fails_in_the_background_stops_the_process(
    tmp_path: Path, fault: str
) -> None:
    line = stops_with_one_line(tmp_path, fault, SMALL)
    assert re.match("codeq: (write to|sync of) the store failed: IO error", line), line


@pytest.mark.parametrize("fault", ["open:EROFS:1+", "open:EMFILE:1+", "write:ENOSPC:1+"])
def test_a_start_that_cannot_write_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    shim = Shim(tmp_path / "shim", tmp_path / "data")
    shim.arm()
    server = Server(tmp_path, {**SETTINGS, **shim.environment(fault)})
    assert not server.wait_ready()
    assert server.wait() == EXIT_START_FAILED
    [line] = (tmp_path / "server.log").read_text().splitlines()
    assert line.startswith(f"codeq: cannot open data folder {tmp_path}"), line


def test_T17_answers_wait_for_a_slow_sync(tmp_path: Path) -> None:
    """Were a create answered before its sync, the second one would share no sync with it."""
    shim = Shim(tmp_path / "shim", tmp_path / "data")
    server = Server(tmp_path, {**SETTINGS, **shim.environment(slow_us=300_000)})
    assert server.wait_ready()
    rest = Rest(server, "dev-producer")
    for _ in range(3):
        before = shim.notes.read_text().count("\nsync ")
        assert create(rest)[0] == 201
        assert shim.notes.read_text().count("\nsync ") > before
    rest.close()
    assert server.stop(signal.SIGTERM) == 0


def create(rest: Rest, **fields: Any) -> tuple[int, Any]:
    return rest.call("POST", "/tasks", {"command": COMMANDS[0], "payload": {}, **fields})


# --- no descriptor left ---------------------------------------------------------------------------


def test_T48_without_descriptors_open_connections_are_served_and_others_later(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path, SETTINGS)
    assert server.wait_ready()
    pid = server.pid
    rest = Rest(server, "dev-producer")
    assert create(rest)[0] == 201
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, hard))
    host, _, port = server.address["http"].rpartition(":")
    with contextlib.ExitStack() as crowd:
        for _ in range(20):
            crowd.enter_context(socket.create_connection((host, int(port))))
        with pytest.raises(OSError, match="timed out"):
            late = Rest(server, "dev-producer")
            late.connection.timeout = 1
            crowd.callback(late.close)
            create(late)
        for _ in range(50):
            assert create(rest)[0] == 201
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, hard))
    again = Rest(server, "dev-producer")
    assert create(again)[0] == 201, "the crowd is gone"
    again.close()
    rest.close()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert server.stop(signal.SIGTERM) == 0


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of TMPFS_BYTES in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = f"size={TMPFS_BYTES}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def take(file: Path, size: int) -> None:
    """Makes the file so large."""
    with file.open("ab") as opened:
        os.posix_fallocate(opened.fileno(), 0, size)


def free_bytes(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def create_until(rest: Rest, wanted: int, payload: str, least: Path) -> tuple[int, Any]:
    """Creates until the answer has this status; returns how many were made, and the refusal.
    ``least`` is a disk that must never be full."""
    made = 0
    for _ in range(20_000):
        assert free_bytes(least) > RESERVE_BYTES - SPENT_BYTES_MAX, "the reserve was eaten up"
        try:
            status, answer = create(rest, payload=payload)
        except (OSError, http.client.HTTPException):
            rest.close()  # after a refusal the rest of the body is not read; connects again
            continue
        assert status in (201, 503), answer
        if status == wanted:
            return made, answer
        made += 1
    raise AssertionError(f"no answer {wanted}")


def test_the_reserve_of_a_full_disk_is_kept_and_service_resumes(small_disk: Path) -> None:
    fill = small_disk / "fill"
    take(fill, FILL_BYTES)
    settings = {
        **SETTINGS,
        "LIMITS_DISK_RESERVE_BYTES": str(RESERVE_BYTES),
        "RETENTION_SECONDS": "1",
        "IDEMPOTENCY_WINDOW_SECONDS": "1",
    }
    payload = "x" * 100_000
    server = Server(small_disk, settings)
    assert server.wait_ready(), (small_disk / "server.log").read_text()
    producer, worker = Rest(server, "dev-producer"), Rest(server, "dev-worker")
    made, refusal = create_until(producer, 503, payload, small_disk)
    assert made > 100
    assert refusal["code"] == "unavailable", refusal
    assert producer.retry_after, "503 without Retry-After"
    for _ in range(ROOM_ROUNDS):
        taken, error = stream_create(server)
        if not taken:
            break
        made += 1 + create_until(producer, 503, payload, small_disk)[0]
    assert (taken, error) == (False, "unavailable")
    extend_and_give_back(worker)
    ended = work_off(worker)
    assert len(ended) == made, "claims and results go on"
    gone(worker, ended)
    create_until(producer, 201, "removal made room", small_disk)
    assert stream_create(server)[0]
    take(fill, free_bytes(small_disk) + FILL_BYTES - RESERVE_BYTES // 2)
    create_until(producer, 503, payload, Path("/"))
    fill.unlink()
    create_until(producer, 201, "somebody made room", small_disk)
    producer.close()
    worker.close()
    assert server.stop(signal.SIGTERM) == 0


def stream_create(server: Server) -> tuple[bool, str]:
    """Whether a create on a stream is taken, and the refusal."""
    creates = _wire.Creates()
    creates.add(COMMANDS[0].encode(), b"{}", seq=1)
    address = server.address["producer"]
    with stream(address, "/producerpb.ProducerStream/Stream") as (outgoing, answers):
        outgoing.put(_wire.encode_producer_hello("dev-producer"))
        for message in _wire.encode_creates(creates, MESSAGE_BYTES_MAX):
            outgoing.put(message)
        for message in answers:
            kind, acks = _wire.decode_producer_server_event(message)
            if kind == _wire.CREATE_ACKS:
                assert isinstance(acks, list)
                [(_, ok, _, error)] = acks
                return ok, error
    raise AssertionError("the stream ended")


def extend_and_give_back(worker: Rest) -> None:
    """A heartbeat, a nack and an abandon are taken."""
    for call in ("nack", "abandon"):
        status, task = worker.call("POST", "/tasks/claim", {"commands": COMMANDS})
        assert status == 200, task
        path = f"/tasks/{task['id']}"
        assert worker.call("POST", f"{path}/heartbeat", {"extendSeconds": 60})[0] == 200
        assert worker.call("POST", f"{path}/{call}", {"delaySeconds": 0})[0] == 200


def work_off(worker: Rest) -> list[str]:
    """Claims and finishes whatever is there; the ids."""
    ended: list[str] = []
    while True:
        claim = {"commands": COMMANDS, "count": 10, "leaseSeconds": 60}
        status, answer = worker.call("POST", "/tasks/claim/batch", claim)
        if status == 204:
            return ended
        ids = [task["id"] for task in answer["tasks"]]
        results = [{"taskId": task_id, "status": "COMPLETED", "result": 1} for task_id in ids]
        status, answer = worker.call("POST", "/tasks/batch/results", {"results": results})
        assert status == 200 and all("result" in item for item in answer["results"]), answer
        ended += ids


def gone(rest: Rest, ids: list[str]) -> None:
    """Waits until removal has taken the ended tasks."""
    for _ in range(20_000):
        if all(rest.call("GET", f"/tasks/{task_id}")[0] == 404 for task_id in (ids[0], ids[-1])):
            return
    raise AssertionError("ended tasks stay")
