"""Data folders as files: what stands in one, and how another content takes its place at once.

A new content is made in the folder ``incoming.tmp`` inside the data folder, synced and renamed to
``incoming``; then what was there goes, ``incoming`` becomes ``adopting``, and its files move in.
While one of the three is there no store opens, and ``finish`` knows how to go on.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from codeq.errors import StoreError

STAGED, READY, ADOPTING = "incoming.tmp", "incoming", "adopting"
#: What earlier contents are kept under
ASIDE = "damaged-"
COPY_BYTES = 1 << 20
BLOCK_BYTES = 4096
#: Files that RocksDB and codeq make
_OURS = re.compile(
    r"CURRENT|LOCK|LOG(\.old.*)?|IDENTITY|SYNCED|rocksdict-config\.json"
    r"|(MANIFEST|OPTIONS)-\d+(\.dbtmp)?|\d+\.(log|sst|dbtmp)"
)
#: What may stand in a data folder and means nothing
_IGNORED = re.compile(r"lost\+found|lost|archive|\..*|" + ASIDE + r"\d+")


def require_store_or_empty(path: Path) -> None:
    """Refuses a folder in which a store must not be made: one that holds something else, or what is
    left of a store. Raises StoreError."""
    names = {entry.name for entry in path.iterdir()}
    if is_unfinished(path):
        raise StoreError(
            f"data folder {path} holds an unfinished repair or restore: run it once more"
        )
    if "CURRENT" in names:
        return
    foreign = sorted(name for name in names if not (_OURS.fullmatch(name) or ignored(name)))
    if foreign:
        raise StoreError(f"data folder {path} holds {foreign[0]} and is no codeq store")
    left = sorted(name for name in names if name == "SYNCED" or name.endswith((".sst", ".log")))
    if left:
        raise StoreError(f"data folder {path} lacks the file CURRENT: try codeq check --repair")


def is_unfinished(path: Path) -> bool:
    """Whether a new content is being made or put in place, or a process died on the way."""
    return any((path / name).exists() for name in (STAGED, READY, ADOPTING))


def ignored(name: str) -> bool:
    """Whether a name in a data folder means nothing."""
    return _IGNORED.fullmatch(name) is not None


def free_bytes(path: Path) -> int:
    """Bytes a normal process may still write on the file system of the folder."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def takes_direct_writes(path: Path) -> bool:
    """Whether the file system of the folder takes writes that pass by the kernel's cache, in blocks
    as small as RocksDB's."""
    try:
        fd = os.open(path, os.O_TMPFILE | os.O_DIRECT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # at the beginning of a page, as it must be
            return os.write(fd, block) == BLOCK_BYTES
    except OSError:
        return False
    finally:
        os.close(fd)


def content(path: Path) -> Iterator[Path]:
    """The plain files of a folder that belong to a store."""
    return (file for file in path.iterdir() if _OURS.fullmatch(file.name))


def content_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in content(path))


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_all(path: Path) -> None:
    """Makes a folder and its files durable."""
    for file in path.iterdir():
        sync(file)
    sync(path)


def copy_file(source: Path, to: Path, go_on: Callable[[], None] = lambda: None) -> None:
    """Copies and syncs one file; ``go_on`` is called now and then and may raise to stop."""
    with source.open("rb") as reader, to.open("xb") as writer:
        while part := reader.read(COPY_BYTES):
            go_on()
            writer.write(part)
        writer.flush()
        os.fsync(writer.fileno())


def unshare(path: Path, suffix: str) -> None:
    """Gives the folder its own copy of files that it shares with another one."""
    for file in path.iterdir():
        if file.name.endswith(suffix) and file.stat().st_nlink > 1:
            own = file.with_name(file.name + ".own")
            shutil.copyfile(file, own)
            own.rename(file)


def staged(path: Path) -> Path:
    """An empty folder for the next content of ``path``; what an earlier try left there goes."""
    stage = path / STAGED
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    return stage


def adopt(path: Path) -> Path | None:
    """Makes the staged content, which is synced, that of the folder. The old content is kept in a
    folder of its own, which is returned; None when there was none."""
    (path / STAGED).rename(path / READY)
    sync(path)
    return finish(path)


def finish(path: Path) -> Path | None:
    """Goes on with an ``adopt`` that was interrupted, if one was; a content that was not ready is
    removed."""
    shutil.rmtree(path / STAGED, ignore_errors=True)
    aside = None
    if (path / READY).exists():
        aside = _put_aside(path)
        (path / READY).rename(path / ADOPTING)
        sync(path)
    if (path / ADOPTING).exists():
        for file in list(content(path / ADOPTING)):
            file.rename(path / file.name)
        sync(path)
        (path / ADOPTING).rmdir()
        sync(path)
    return aside


def _put_aside(path: Path) -> Path | None:
    """Moves what stands in the folder to one of its own."""
    there = [file for file in content(path) if file.name != "LOCK"]
    if not there:
        return None
    taken = [int(entry.name.removeprefix(ASIDE)) for entry in path.glob(ASIDE + "*")]
    aside = path / f"{ASIDE}{max(taken, default=0) + 1}"
    aside.mkdir()
    for file in there:
        file.rename(aside / file.name)
    sync(aside)
    sync(path)
    return aside
