"""A shard that decides nothing: it keeps what the stream edge asks of it until a test answers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from codeq.engine._wire import Creates, Finishes
from codeq.engine.clock import FakeClock
from codeq.engine.shard import ClaimRequest
from tests.protos import workerpb


class FakeDelivery:
    """Tasks on their way; counts what became of them."""

    def __init__(self, request: ClaimRequest, payloads: list[bytes], lease_until_ms: int) -> None:
        self.lease_until_ms = lease_until_ms
        self.accepted_count = 0
        self.given_back_count = 0
        self.task_ids = [str(uuid.uuid4()) for _ in payloads]
        self.tasks = [
            workerpb.Task(id=task_id, payload=payload, worker_id=request.worker)
            for task_id, payload in zip(self.task_ids, payloads, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.tasks)

    def encode(self, single: bool) -> bytes:
        event = workerpb.ServerEvent()
        if single:
            (task,) = self.tasks
            event.task.task.CopyFrom(task)
        else:
            event.task_batch.tasks.extend(self.tasks)
        return bytes(event.SerializeToString())

    def accepted(self) -> None:
        self.accepted_count += 1

    def give_back(self) -> None:
        self.given_back_count += 1


class FakeWaiter:
    """A parked claim."""

    def __init__(self, shard: FakeShard, request: ClaimRequest) -> None:
        self._shard = shard
        self.request = request

    def cancel(self) -> None:
        self._shard.waiters.remove(self)


class FakeShard:
    """What the stream edge sees of a shard. ``commit`` answers all that was asked so far."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.refuses_creates: str | None = None
        self.group_full = False
        self.waiters: list[FakeWaiter] = []
        self.calls: list[tuple[Any, ...]] = []
        self.creates: list[tuple[Creates, str]] = []
        self.number = 0
        self._open: list[Callable[[], None]] = []

    def commit(self) -> None:
        answers, self._open = self._open, []
        for answer in answers:
            answer()

    def create(self, creates: Creates, tenant: str, done: Callable[[None], None]) -> None:
        creates.check(4_128_768)
        for index, code in enumerate(creates.codes):
            if code == 0:
                creates.replay(index, uuid.uuid4().bytes)
        self.creates.append((creates, tenant))
        self._open.append(lambda: done(None))

    def claim(self, request: ClaimRequest) -> FakeWaiter:
        waiter = FakeWaiter(self, request)
        self.waiters.append(waiter)
        return waiter

    def deliver(self, *payloads: bytes, waiter: FakeWaiter | None = None) -> FakeDelivery:
        """Serves a parked claim (the first) with tasks of these payloads."""
        waiter = waiter or self.waiters[0]
        self.waiters.remove(waiter)
        request = waiter.request
        until_ms = self.clock.now_ms() + request.lease_ms
        delivery = FakeDelivery(request, list(payloads), until_ms)
        request.deliver(delivery)  # type: ignore[arg-type]
        return delivery

    def finish(
        self,
        finishes: Finishes,
        tenant: str,
        worker: str,
        subject: str,
        done: Callable[[], None],
    ) -> None:
        self.calls.append(("finish", len(finishes), tenant, worker, subject))
        for index, code in enumerate(finishes.codes):
            if code == 0 and self.number:
                finishes.refuse(index, self.number)
        self._open.append(done)

    def heartbeat(self, *call: Any) -> None:
        *said, done = call
        self.calls.append(("heartbeat", *said))
        self._open.append(lambda: done(self.number))

    def abandon(self, *call: Any) -> None:
        *said, done = call
        self.calls.append(("abandon", *said))
        self._open.append(lambda: done(self.number))

    def nack(self, *call: Any) -> None:
        *said, done = call
        self.calls.append(("nack", *said))
        self._open.append(lambda: done(self.number, 7, False))
