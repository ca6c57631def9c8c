"""What a handler gets and how it answers: Task, Fail, Nack."""

from __future__ import annotations

import math

from codeq.engine._client import Counts, Task

__all__ = ["Counts", "Fail", "Nack", "Task"]


class Fail(Exception):
    """Raised or returned by a handler: the task ends FAILED with this text, without a retry."""


class Nack(Exception):
    """Raised or returned by a handler: the task is given back, to be tried again.

    ``delay_seconds`` 0 leaves the delay to the server's backoff; fractions are rounded up.
    """

    def __init__(self, delay_seconds: float = 0, reason: str = "") -> None:
        super().__init__(reason)
        self.delay_seconds = min(math.ceil(delay_seconds), 2**31 - 1)
        self.reason = reason
