"""A change of the source that a test must notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """``old`` stands exactly once in ``file`` and becomes ``new``; then ``test``, a node id below
    tests/, must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str
