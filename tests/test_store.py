"""How the store asks RocksDB to use the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from codeq.engine import folder
from codeq.engine.store import Store

DIRECT = "use_direct_io_for_flush_and_compaction="


def options_of(path: Path) -> str:
    """What RocksDB wrote down of the options it was opened with."""
    return max(path.glob("OPTIONS-*")).read_text()


@pytest.mark.parametrize("takes", [True, False])
def test_tables_pass_by_the_kernels_cache_where_the_file_system_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: bool
) -> None:
    if takes and not folder.takes_direct_writes(tmp_path):
        pytest.skip("the file system of the tests takes no direct writes")
    monkeypatch.setattr(folder, "takes_direct_writes", lambda _: takes)
    store = Store(tmp_path / "data")
    written = [(b"c" + bytes([n]), bytes([n]) * 5_000) for n in range(200)]
    store.write([*written, (b"mkey", b"value")])
    store.flush()
    store.close()
    assert DIRECT + str(takes).lower() in options_of(tmp_path / "data")
    again = Store(tmp_path / "data")
    assert list(again.scan(b"c", b"d")) == list(again.scan(b"c", b"d", ahead=True)) == written
    assert again.get([b"mkey"]) == [b"value"]
    again.close()


def test_a_look_whether_direct_writes_are_taken_leaves_nothing(tmp_path: Path) -> None:
    folder.takes_direct_writes(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_files_takes_no_direct_writes() -> None:
    assert not folder.takes_direct_writes(Path("/proc/self"))
    assert not folder.takes_direct_writes(Path("/nowhere"))


def test_a_file_system_that_refuses_the_write_takes_no_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not folder.takes_direct_writes(tmp_path):
        pytest.skip("the file system of the tests takes no direct writes")
    refused: list[int] = []

    def refuse(fd: int, _block: object) -> int:
        refused.append(fd)
        raise OSError("Invalid argument")

    monkeypatch.setattr(folder.os, "write", refuse)
    assert not folder.takes_direct_writes(tmp_path)
    assert len(refused) == 1
