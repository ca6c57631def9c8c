"""Calls on open files that take less time than it takes to get the GIL back, so they keep it."""

def write_at(fd: int, data: bytes, offset: int) -> None:
    """Writes all of ``data`` at ``offset`` (bytes) of a regular file. Raises OSError."""

def links_and_size(fd: int) -> tuple[int, int]:
    """How many names the file has, and its length in bytes. Raises OSError."""
