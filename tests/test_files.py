"""The calls on open files that keep the GIL: what they write and say, and their errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from codeq.engine._files import links_and_size, write_at


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_write_at_writes_all_of_it_there_and_leaves_the_rest(file: int) -> None:
    write_at(file, b"0123456789", 0)
    write_at(file, b"ab", 4)
    write_at(file, b"", 4)
    write_at(file, b"z", 12)
    assert os.pread(file, 99, 0) == b"0123ab6789\0\0z"


def test_links_and_size_follow_the_file(file: int, tmp_path: Path) -> None:
    assert links_and_size(file) == (1, 0)
    write_at(file, b"x" * 70_000, 0)
    os.link(tmp_path / "file", tmp_path / "other")
    assert links_and_size(file) == (2, 70_000)
    for name in ("file", "other"):
        (tmp_path / name).unlink()
    assert links_and_size(file) == (0, 70_000)


def test_a_call_that_fails_says_why(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "read", os.O_RDONLY | os.O_CREAT)
    with pytest.raises(OSError, match="Bad file descriptor") as found:
        write_at(fd, b"x", 0)
    assert found.value.errno == errno.EBADF
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        links_and_size(fd)
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left") as found:
        write_at(full, b"x", 0)
    assert found.value.errno == errno.ENOSPC
    os.close(full)
