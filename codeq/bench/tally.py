"""Counters that the processes of one bench share, in a file mapped into memory."""

from __future__ import annotations

import mmap
from pathlib import Path

CREATED, DELIVERED, FINISHED, ACKNOWLEDGED = COLUMNS = range(4)


class Tally:
    """Four counters for each process, and whether times are to be noted at the moment."""

    def __init__(self, path: Path, slots: int = 0) -> None:
        """Makes the file for so many processes, unless it is there."""
        if not path.exists():
            path.write_bytes(bytes(8 * (len(COLUMNS) * slots + 1)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._cells = memoryview(self._map).cast("Q")
        self._end = len(self._cells) - 1

    @property
    def noting(self) -> bool:
        """Whether times count: the warm-up is over and the end has not come."""
        return self._cells[self._end] != 0

    def note(self, wanted: bool) -> None:
        self._cells[self._end] = int(wanted)

    def put(self, slot: int, column: int, value: int) -> None:
        self._cells[slot * len(COLUMNS) + column] = value

    def total(self, column: int) -> int:
        return sum(self._cells[column : self._end : len(COLUMNS)])
