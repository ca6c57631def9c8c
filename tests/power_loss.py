"""Loss of power for a data folder: all that was never synced is lost, cut, zeroed or garbage.

The server runs with tests/shim/shim.c preloaded, which notes what was really synced; the server
has no say in it. After kill -9 ``Shim.lose_power`` makes of the folder what a disk might hold:
files keep what was synced and get something else behind it, recycled logs their earlier bytes,
and entries of the folder (files made, renamed, removed) that were not synced are undone from the
last one backwards: file systems that keep a journal of their entries write them in order, of others
nothing is known here. An entry counts as synced only after a sync of the folder itself, although
most Linux file systems also write it when the file is synced. Any file may be hit, be it a log, a
recycled log, a table, MANIFEST, CURRENT or SYNCED. Not modelled: disks that lie about a sync, and
damage to what was synced.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "shim" / "shim.c"
#: What RocksDB never relies on
UNIMPORTANT = ("LOG", "LOCK")
BLOCK_BYTES = 4096


@dataclass
class File:
    """What the notes say of one inode. Positions are bytes."""

    synced: int = 0  # written since the opening and on disk up to here
    before: int = 0  # its size at the opening: what lies there is older and on disk


def compiled(folder: Path) -> Path:
    """The library, compiled into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "shim.so"
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    output = ["-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, *output], check=True)
    return library


class Shim:
    """The library at work in a server whose data stand in ``data``; ``folder`` is for its notes.

    ``folder`` and ``data`` must be on one file system. ``library``: None = compile it.
    """

    def __init__(self, folder: Path, data: Path, library: Path | None = None) -> None:
        self.data = data
        self.notes, self.undo = folder / "notes", folder / "undo"
        self.armed = folder / "armed"
        self.library = library or compiled(folder)
        self.undo.mkdir(parents=True)

    def environment(self, fault: str = "", slow_us: int = 0) -> dict[str, str]:
        """Settings for the server. ``fault``, such as "fsync:EIO:1:.log", counts and strikes from
        ``arm`` on; ``slow_us`` is how much longer each fsync takes."""
        return {
            "LD_PRELOAD": str(self.library),
            "SHIM_FOLDER": str(self.data),
            "SHIM_NOTES": str(self.notes),
            "SHIM_UNDO": str(self.undo),
            "SHIM_ARMED": str(self.armed),
            "SHIM_FAULT": fault,
            "SHIM_SLOW_US": str(slow_us),
        }

    def arm(self) -> None:
        self.armed.touch()

    def disarm(self) -> None:
        self.armed.unlink(missing_ok=True)

    def syncs_a_log(self) -> bool:
        """Whether the process died while it synced a log."""
        return any(name.endswith(".log") for name in read_notes(self.notes)[2].values())

    def forget(self) -> None:
        """All that was written is on disk."""
        self.notes.unlink(missing_ok=True)
        for path in self.undo.iterdir():
            path.unlink()

    def lose_power(self, dice: random.Random) -> str:
        """The folder as a disk without power may show it; a line that says what was done."""
        if not self.data.exists():
            return "there was nothing"
        states, pending, _ = read_notes(self.notes)
        undone = self._undo_entries(pending, dice)
        damaged = []
        for path in sorted(self.data.iterdir()):
            state = states.get(path.stat().st_ino)
            if state is not None and not path.name.startswith(UNIMPORTANT):
                what = self._damage(path, state, dice)
                if what:
                    damaged.append(f"{path.name} {what}")
        self.forget()
        return f"{undone} of {len(pending)} entries undone, " + (", ".join(damaged) or "no file")

    def _undo_entries(self, pending: list[list[str]], dice: random.Random) -> int:
        """Entries of the folder reach the disk in order: some of the last ones are undone."""
        count = dice.choice((0, len(pending), dice.randint(0, len(pending))))
        for kind, *words in reversed(pending[len(pending) - count :]):
            if kind == "make":
                (self.data / words[1]).unlink(missing_ok=True)
            elif kind == "rename":
                old, new, saved = words
                (self.data / new).rename(self.data / old)
                self._restore(saved, new)
            else:
                name, saved = words
                self._restore(saved, name)
        return count

    def _restore(self, saved: str, name: str) -> None:
        if saved != "-":
            os.link(self.undo / saved, self.data / name)

    def _damage(self, path: Path, state: File, dice: random.Random) -> str:
        """Puts something else behind what was synced; "" when nothing was unsynced."""
        undo = self.undo / str(path.stat().st_ino)
        old = undo.read_bytes() if undo.exists() else b""
        size = path.stat().st_size
        end = size if size > state.before else len(old)
        if end <= state.synced:
            return ""
        new = path.read_bytes()[state.synced : end]
        log = path.name.endswith(".log")
        mode, left = damaged(new, old[state.synced :], dice, wild=log)
        with path.open("r+b") as file:
            file.seek(state.synced)
            file.write(left)
            if state.synced + len(left) >= state.before and size > state.before:
                file.truncate()
        return f"{mode} from {state.synced} on ({len(new)} bytes)"


def damaged(new: bytes, old: bytes, dice: random.Random, *, wild: bool) -> tuple[str, bytes]:
    """What may stand where ``new`` was written over ``old`` and never synced, and its name.

    ``wild``: also bytes that nobody wrote, and blocks that reached the disk out of order.
    """
    modes = ("old", "half", "kept") + (("zeros", "garbage", "blocks") if wild else ())
    mode = dice.choice(modes)
    if mode == "old":
        return mode, old
    if mode == "kept":
        return mode, new
    if mode == "zeros":
        return mode, bytes(len(new))
    if mode == "garbage":
        return mode, dice.randbytes(len(new))
    if mode == "half":
        middle = dice.randrange(len(new) + 1)
        tail = old[middle:]
        if wild:
            tail = dice.choice((tail, bytes(len(new) - middle), dice.randbytes(len(new) - middle)))
        return mode, new[:middle] + tail
    blocks = bytearray(old + bytes(len(new) - len(old)) if len(old) < len(new) else old)
    for start in range(0, len(new), BLOCK_BYTES):
        if dice.random() < 0.5:
            blocks[start : start + BLOCK_BYTES] = new[start : start + BLOCK_BYTES]
    return mode, bytes(blocks)


def read_notes(notes: Path) -> tuple[Mapping[int, File], list[list[str]], Mapping[int, str]]:
    """What is known of each inode, the changes of the folder's entries since their last sync, and
    the names of the inodes whose sync had begun and not ended."""
    states: dict[int, File] = {}
    pending: list[list[str]] = []
    syncing: dict[int, str] = {}
    for line in notes.read_text().splitlines() if notes.exists() else ():
        kind, *words = line.split()
        if kind == "folder":
            pending.clear()
        elif kind in ("make", "rename", "remove"):
            pending.append([kind, *words])
        elif kind == "begin":
            syncing[int(words[0])] = words[1]
        else:
            inode, position = int(words[0]), int(words[1])
            if kind == "open":
                states[inode] = File(0, position)
            elif kind == "sync":
                states[inode].synced = position
                syncing.pop(inode, None)
            else:
                state = states[inode]
                state.synced = min(state.synced, position)
                state.before = min(state.before, position)
    return states, pending, syncing
