"""The loss of power is as hard as a disk may be, and no harder."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.power_loss import Shim, compiled

SEEDS = 25
BEFORE = {"old.log": b"o" * 10}
HELPERS = """
import os, sys
def path(name): return f"{sys.argv[1]}/{name}"
def write(name, data, at=0):
    file = os.open(path(name), os.O_RDWR | os.O_CREAT)
    os.pwrite(file, data, at)
    return file
def sync_folder():
    os.fsync(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY))
"""
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("shim"))


def after_loss(tmp_path: Path, library: Path, program: str) -> list[Files]:
    """What is on disk after ``program`` and a loss of power, for many seeds; it begins with BEFORE,
    on disk."""
    seen = []
    for seed in range(SEEDS):
        data = tmp_path / str(seed) / "data"
        data.mkdir(parents=True)
        for name, content in BEFORE.items():
            (data / name).write_bytes(content)
        shim = Shim(tmp_path / str(seed) / "shim", data, library)
        command = [sys.executable, "-S", "-c", HELPERS + program, str(data)]
        subprocess.run(command, env={**os.environ, **shim.environment()}, check=True)
        shim.lose_power(random.Random(seed))
        seen.append({path.name: path.read_bytes() for path in data.iterdir()})
    return seen


def test_what_was_synced_stays(tmp_path: Path, library: Path) -> None:
    program = """
os.fsync(write("new.sst", b"n" * 20))
os.fdatasync(write("old.log", b"x" * 4))
os.rename(path("new.sst"), path("named.sst"))
sync_folder()
"""
    for files in after_loss(tmp_path, library, program):
        assert files == {"old.log": b"xxxxoooooo", "named.sst": b"n" * 20}


def test_what_was_not_synced_may_be_lost_behind_what_was(tmp_path: Path, library: Path) -> None:
    """A recycled log keeps its earlier bytes, a new one is cut, both may hold garbage."""
    program = """
for name in ("old.log", "new.log"):
    file = write(name, b"x" * 4)
    os.fsync(file)
    os.pwrite(file, b"y" * 4, 4)
sync_folder()
"""
    seen = after_loss(tmp_path, library, program)
    recycled = {files["old.log"] for files in seen}
    assert {b"xxxxoooooo", b"xxxxyyyyoo"} < recycled, recycled
    assert all(content[:4] == b"xxxx" and content[8:] == b"oo" for content in recycled)
    new = {files["new.log"] for files in seen}
    assert {b"xxxx", b"xxxxyyyy"} < new, new
    assert all(content.startswith(b"xxxx") for content in new)


def test_entries_may_be_lost_from_the_last_one_backwards(tmp_path: Path, library: Path) -> None:
    program = """
os.fsync(write("CURRENT", b"first"))
sync_folder()
os.fsync(write("temporary", b"second"))
os.rename(path("temporary"), path("CURRENT"))
os.unlink(path("old.log"))
"""
    seen = after_loss(tmp_path, library, program)
    before = {**BEFORE, "CURRENT": b"first"}
    after = {"CURRENT": b"second"}
    steps = [before, {**before, "temporary": b"second"}, {**BEFORE, **after}, after]
    assert all(files in steps for files in seen), seen
    assert all(step in seen for step in steps), seen


def test_the_sync_at_hand_is_known(tmp_path: Path, library: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shim = Shim(tmp_path / "shim", data, library)
    program = 'file = write("1.log", b"x"); os.fsync(file); os.fsync(file)'
    command = [sys.executable, "-S", "-c", HELPERS + program, str(data)]
    subprocess.run(command, env={**os.environ, **shim.environment()}, check=True)
    assert not shim.syncs_a_log()
    notes = shim.notes.read_text()
    shim.notes.write_text(notes[: notes.rindex("sync ")])
    assert shim.syncs_a_log(), "died in the second one"
