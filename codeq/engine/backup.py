"""Copies of the store: made while it serves, and put back into an empty folder.

A backup is a RocksDB checkpoint, made inside the data folder, where its tables cost no space, and
then moved below the backup folder: by a rename, or on another file system by copying. It gets its
name last, so that what bears a name is whole.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from codeq.engine import folder
from codeq.engine.check import check
from codeq.engine.clock import Clock
from codeq.engine.journal import Runner
from codeq.engine.store import Store, write_synced
from codeq.errors import BACKUP_EXISTS, CodeqError, StoreError

CHECKPOINT = "backup.tmp"
NAME_BYTES_MAX = 200
#: kept free beside what a backup is known to need
ROOM_BYTES = 16 << 20


class Backup(NamedTuple):
    """A finished backup: its folder, and the bytes of its files."""

    path: str
    bytes: int


Outcome = Backup | CodeqError


def is_name(name: str) -> bool:
    """Whether the text is one plain name of a folder that is not hidden."""
    plain = "/" not in name and "\\" not in name and not name.startswith(".")
    return plain and name.isprintable() and 0 < len(name.encode(errors="replace")) <= NAME_BYTES_MAX


class Backups:
    """Makes backups below ``place``, one at a time, on a helper thread.

    ``reserve_bytes`` of the data's disk stay free.
    """

    def __init__(
        self,
        place: Path,
        store: Store,
        clock: Clock,
        runner: Runner,
        reserve_bytes: int,
    ) -> None:
        self._place = place
        self._store = store
        self._point = clock.faults.point
        self._runner = runner
        self._reserve_bytes = reserve_bytes
        self._stopped = False
        # Several servers may have one place: each removes only what it has left there itself.
        own = blake2b(bytes(store.path.resolve()), digest_size=8).hexdigest()
        self._unfinished = f".{own}.tmp"
        runner.aside(self._remove_unfinished, lambda _: None)

    def make(self, name: str, done: Callable[[Outcome], None]) -> None:
        """Copies what the store holds into the new folder ``name``, for which ``is_name`` is true.
        What was answered before this call is in it, because it was written before. ``done`` gets
        the backup, or why there is none: conflict, unavailable."""

        def settle(outcome: object) -> None:
            assert isinstance(outcome, Backup | CodeqError)
            done(outcome)

        self._runner.aside(lambda: self._made(name), settle)

    def stop(self) -> None:
        """Ends a copy that is being made, and lets no other one begin. Any thread."""
        self._stopped = True

    def _made(self, name: str) -> Outcome:
        try:
            return self._make(name)
        except CodeqError as error:
            return error
        except OSError as error:
            why = "the disk has no room for it" if error.errno in _FULL else error.strerror
            return CodeqError("unavailable", f"the backup could not be made: {why}")
        finally:
            self._remove_unfinished()

    def _make(self, name: str) -> Backup:
        self._go_on()
        self._place.mkdir(parents=True, exist_ok=True)
        if self._place.samefile(self._store.path):
            raise CodeqError("unavailable", "backupDir is the data folder itself")
        target = self._place / name
        if os.path.lexists(target):
            raise CodeqError(BACKUP_EXISTS.slug, BACKUP_EXISTS.message.format(name))
        self._require_room()
        checkpoint = self._store.path / CHECKPOINT
        self._remove_unfinished()
        # The checkpoint holds the GIL and is to find little to write: not even what came in while
        # the first of these ran.
        self._store.flush()
        self._store.flush()
        sequence = self._store.sequence()
        self._store.checkpoint(checkpoint)
        self._point("in-backup")
        write_synced(checkpoint, sequence)
        folder.sync_all(checkpoint)
        stage = self._place / f".{name}{self._unfinished}"
        self._move(checkpoint, stage)
        self._point("in-backup")
        stage.rename(target)
        folder.sync(self._place)
        return Backup(str(target.resolve()), folder.content_bytes(target))

    def _require_room(self) -> None:
        needed = self._store.unflushed_bytes() + ROOM_BYTES
        if self._store.free_bytes() - needed < self._reserve_bytes:
            raise CodeqError("unavailable", "the disk has no room for a backup")

    def _move(self, checkpoint: Path, stage: Path) -> None:
        try:
            checkpoint.rename(stage)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        else:
            folder.sync(self._place)
            return
        if folder.free_bytes(self._place) < folder.content_bytes(checkpoint) + ROOM_BYTES:
            raise CodeqError("unavailable", "the disk of backupDir has no room for a backup")
        stage.mkdir()
        for file in folder.content(checkpoint):
            self._point("in-backup")
            folder.copy_file(file, stage / file.name, self._go_on)
        folder.sync(stage)

    def _go_on(self) -> None:
        if self._stopped:
            raise CodeqError("unavailable", "the server is stopping")

    def _remove_unfinished(self) -> None:
        """What a backup that did not come to its end has left."""
        shutil.rmtree(self._store.path / CHECKPOINT, ignore_errors=True)
        for left in self._place.glob(f".*{self._unfinished}"):
            shutil.rmtree(left, ignore_errors=True)


_FULL = (errno.ENOSPC, errno.EDQUOT)


def restore(backup: Path, data: Path, clock: Clock) -> int:
    """Makes the empty or absent folder ``data`` a copy of a backup, which is read whole before;
    returns its live tasks. Raises StoreError."""
    data.mkdir(parents=True, exist_ok=True)
    if folder.is_unfinished(data):
        folder.finish(data)
        if any(folder.content(data)):
            raise StoreError(f"an interrupted restore of {data} is finished now: it holds a store")
    there = sorted(entry.name for entry in data.iterdir() if not folder.ignored(entry.name))
    if there:
        raise StoreError(f"{data} is not empty: it holds {there[0]}")
    report = check(backup, clock)
    if not report.sound:
        raise StoreError(f"backup {backup} is damaged: {report.damage[0]}")
    try:
        stage = folder.staged(data)
        for file in folder.content(backup):
            if not file.name.startswith(("LOCK", "LOG")):
                folder.copy_file(file, stage / file.name)
        folder.sync(stage)
    except OSError as error:
        folder.finish(data)
        raise StoreError(f"backup {backup} cannot be copied: {error.strerror}") from error
    folder.adopt(data)
    folder.sync(data.resolve().parent)
    return report.live_tasks
