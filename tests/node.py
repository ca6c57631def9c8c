"""One node under a fake clock: a real store, a real engine, no threads; operations return their
answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codeq.engine._wire import Creates, Finishes
from codeq.engine.clock import FakeClock
from codeq.engine.shard import ClaimRequest, Delivery, Shard, ShardSettings, Waiter

from .manual_runner import ManualRunner


class Node:
    """A shard whose operations are called like functions; ``restart`` closes and reopens it.

    ``crash`` reopens it without closing anything first, as after kill -9: the store is opened from
    a copy of its files.
    """

    def __init__(self, path: Path, clock: FakeClock | None = None, **settings: Any) -> None:
        self.path = path
        self.clock = clock or FakeClock()
        self.settings = {"disk_reserve_bytes": 0, **settings}
        self.faults: list[str] = []
        self._open()

    def _open(self) -> None:
        self.runner = ManualRunner(self.clock)
        self.shard = Shard.open(
            ShardSettings(path=self.path, **self.settings),
            self.clock,
            self.runner,
            self.faults.append,
        )
        self.runner.settle()

    def restart(self) -> None:
        self.shard.close()
        self._open()

    def close(self) -> None:
        self.shard.close()

    def settle(self) -> None:
        self.runner.settle()

    def advance(self, ms: int) -> None:
        self.runner.advance(ms)

    # --- operations

    def create(
        self, command: str = "job", payload: bytes = b"{}", tenant: str = "t", **kw: Any
    ) -> str:
        creates = self.create_batch([{"command": command, "payload": payload, **kw}], tenant)
        assert creates.codes == b"\0", creates.codes
        return creates.task_id(0)

    def create_batch(self, items: list[dict[str, Any]], tenant: str = "t") -> Creates:
        creates = Creates()
        for item in items:
            fields = dict(item)
            command = fields.pop("command", "job").encode()
            payload = fields.pop("payload", b"{}")
            creates.add(command, payload, **{k: _bytes(v) for k, v in fields.items()})
        done: list[Any] = []
        self.shard.create(creates, tenant, done.append)
        self.settle()
        assert len(done) == 1
        return creates

    def request(
        self, deliver: Any, commands: tuple[str, ...] | None = ("job",), **kw: Any
    ) -> ClaimRequest:
        fields: dict[str, Any] = {
            "tenant": "t",
            "in_order": commands is not None,
            "worker": "w",
            "subject": "s",
            "count": 1,
            "lease_ms": 60_000,
            "bytes_max": 1 << 20,
            "wait": False,
            **kw,
        }
        named = None if commands is None else tuple(c.encode() for c in commands)
        return ClaimRequest(commands=named, deliver=deliver, **fields)

    def claim(self, commands: tuple[str, ...] | None = ("job",), **kw: Any) -> list[Any]:
        """Views of the claimed tasks, accepted by the transport; empty when nothing was ready."""
        got: list[Delivery | None] = []
        self.shard.claim(self.request(got.append, commands, **kw))
        self.settle()
        assert len(got) == 1
        if got[0] is None:
            return []
        views = got[0].views()
        got[0].accepted()
        return views

    def park(
        self, deliveries: list[Any], commands: tuple[str, ...] | None = ("job",), **kw: Any
    ) -> Waiter:
        waiter = self.shard.claim(self.request(deliveries.append, commands, wait=True, **kw))
        self.settle()
        return waiter

    def finish(self, *ids: str, status: str = "COMPLETED", **kw: Any) -> bytes:
        finishes = self.finish_batch([{"task_id": i, "status": status} for i in ids], **kw)
        return finishes.codes

    def finish_batch(
        self, items: list[dict[str, Any]], tenant: str = "t", worker: str = "w", subject: str = "s"
    ) -> Finishes:
        finishes = Finishes()
        for item in items:
            fields = dict(item)
            finishes.add(
                fields.pop("task_id").encode(),
                fields.pop("status", "COMPLETED").encode(),
                **{k: _bytes(v) for k, v in fields.items()},
            )
        finishes.check(1 << 20, lenient_error=True)
        done: list[int] = []
        self.shard.finish(finishes, tenant, worker, subject, lambda: done.append(1))
        self.settle()
        assert done == [1]
        return finishes

    def nack(
        self, task_id: str, delay_seconds: int | None = None, reason: str = "", **kw: Any
    ) -> Any:
        got: list[Any] = []
        owner = {"tenant": "t", "worker": "w", "subject": "s", **kw}
        self.shard.nack(
            task_id,
            delay_seconds=delay_seconds,
            reason=reason,
            done=lambda *answer: got.append(answer),
            **owner,
        )
        self.settle()
        return got[0]

    def heartbeat(self, task_id: str, lease_ms: int = 60_000, **kw: Any) -> int:
        got: list[int] = []
        owner = {"tenant": "t", "worker": "w", "subject": "s", **kw}
        self.shard.heartbeat(task_id, lease_ms=lease_ms, done=got.append, **owner)
        self.settle()
        return got[0]

    def abandon(self, task_id: str, **kw: Any) -> int:
        got: list[int] = []
        owner = {"tenant": "t", "worker": "w", "subject": "s", **kw}
        self.shard.abandon(task_id, done=got.append, **owner)
        self.settle()
        return got[0]

    def get(self, task_id: str, tenant: str = "t") -> Any:
        got: list[Any] = []
        self.shard.get(task_id, tenant, got.append)
        self.settle()
        assert len(got) == 1
        return got[0]

    def ask(self, operation: Any, *arguments: Any, **named: Any) -> Any:
        """The answer of any operation whose last argument is its callback."""
        got: list[Any] = []
        operation(*arguments, **named, done=lambda *answer: got.append(answer))
        self.settle()
        assert len(got) == 1
        return got[0][0] if len(got[0]) == 1 else got[0]

    def ask_done(self, operation: Any, *arguments: Any) -> None:
        """Waits for an operation that answers nothing but that it is durable."""
        done: list[int] = []
        operation(*arguments, lambda: done.append(1))
        self.settle()
        assert done == [1]

    def stats(self, command: str = "job", tenant: str = "t") -> tuple[int, int, int, int]:
        counts: tuple[int, int, int, int] = self.ask(self.shard.queues.stats, tenant, command)[1:5]
        return counts


def _bytes(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value
