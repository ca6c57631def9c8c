"""What a handler gets and how it answers: Task, Fail, Nack."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from codeq.engine import _wire


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


class Task:
    """One task as its handler sees it. Fields are read from the message when asked for."""

    __slots__ = ("_wire",)

    def __init__(self, wire: _wire.ClientTask) -> None:
        self._wire = wire

    @property
    def id(self) -> str:
        return self._wire.id

    @property
    def command(self) -> str:
        return self._wire.command

    @property
    def payload(self) -> bytes:
        """The bytes that the producer sent."""
        return self._wire.payload

    def json(self, type: Any = Any) -> Any:
        """The payload read as JSON, as a value of ``type`` (a msgspec Struct, a dataclass, ...).
        Raises msgspec.DecodeError when it is something else."""
        return msgspec.json.decode(self._wire.payload, type=type)

    @property
    def priority(self) -> int:
        return self._wire.priority

    @property
    def attempts(self) -> int:
        """How often the task was claimed, this time included."""
        return self._wire.attempts

    @property
    def max_attempts(self) -> int:
        return self._wire.max_attempts

    @property
    def lease_until(self) -> str:
        """RFC 3339, whole seconds; heartbeats make the lease longer than this."""
        return self._wire.lease_until

    @property
    def tenant_id(self) -> str:
        return self._wire.tenant_id

    @property
    def webhook(self) -> str:
        return self._wire.webhook

    @property
    def created_ms(self) -> int:
        """Milliseconds since the epoch."""
        return self._wire.created_ms

    def __repr__(self) -> str:
        return f"<Task {self.id} {self.command!r} attempt {self.attempts}>"
