"""The queue in obvious lines: what the engine must do, without any of what makes it fast.

Every task stands in one list for ever, every question looks at all of them. Times are milliseconds.
Backoff is without jitter. Refusals are the numbers of ``cq_code``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

OK, NOT_FOUND, NOT_IN_PROGRESS, NOT_OWNER, NOT_PENDING, ENDED, ABSENT = 0, 13, 15, 16, 21, 100, 101
READY, DELAYED, LEASED, COMPLETED, FAILED, DEAD, GONE = range(1, 8)


class Policy(NamedTuple):
    tiers: tuple[int, ...]
    max_attempts: int
    consumers_max: int
    retention_ms: int


@dataclass
class Task:
    id: bytes
    tenant: bytes
    command: bytes
    payload: bytes
    priority: int
    max_attempts: int
    created_ms: int
    updated_ms: int
    state: int = READY
    due_ms: int = 0
    attempts: int = 0
    worker: bytes = b""
    subject: bytes = b""
    claim: object = None  # the one that leased it
    delivered: bool = True
    error: bytes = b""
    result: bytes | None = None
    key_end_ms: int = 0
    ended_ms: int = 0
    expires_ms: int = 0


class Reference:
    def __init__(
        self,
        retention_ms: int,
        dead_retention_ms: int,
        key_window_ms: int,
        backoff_base_ms: int,
        backoff_max_ms: int,
    ) -> None:
        self.retention_ms, self.dead_retention_ms = retention_ms, dead_retention_ms
        self.key_window_ms = key_window_ms
        self.backoff_base_ms, self.backoff_max_ms = backoff_base_ms, backoff_max_ms
        self.tasks: list[Task] = []  # in creation order
        self.paused: set[tuple[bytes, bytes]] = set()
        self.policies: dict[tuple[bytes, bytes], Policy] = {}

    # --- who waits, in which order

    def find(self, task_id: bytes, tenant: bytes) -> Task | None:
        for task in self.tasks:
            if task.id == task_id and task.tenant == tenant and task.state != GONE:
                return task
        return None

    def in_state(self, tenant: bytes, command: bytes, state: int) -> list[Task]:
        queue = [
            t for t in self.tasks if (t.tenant, t.command, t.state) == (tenant, command, state)
        ]
        return sorted(queue, key=lambda t: -t.priority)  # stable: then in creation order

    def stats(self, tenant: bytes, command: bytes) -> tuple[int, ...]:
        return tuple(len(self.in_state(tenant, command, s)) for s in (READY, DELAYED, LEASED, DEAD))

    def next_due_ms(self) -> int | None:
        dues = [t.expires_ms if t.state == DEAD else t.due_ms for t in self.timed()]
        return min(dues, default=None)

    def timed(self) -> list[Task]:
        return [t for t in self.tasks if t.state in (DELAYED, LEASED, DEAD)]

    # --- transitions

    def create(self, task: Task, due_ms: int | None, keyed: bool) -> bool:
        now_ms = task.created_ms
        policy = self.policies.get((task.tenant, task.command))
        if policy is not None:
            if task.priority == 0 and 0 not in policy.tiers:
                task.priority = min(policy.tiers)
            if task.priority not in policy.tiers:
                return False
            task.max_attempts = task.max_attempts or policy.max_attempts
        task.max_attempts = task.max_attempts or 5
        if due_ms is not None and due_ms > now_ms:
            task.state, task.due_ms = DELAYED, due_ms
        if keyed:
            task.key_end_ms = now_ms + self.key_window_ms
        self.tasks.append(task)
        return True

    def admits(self, tenant: bytes, command: bytes, worker: bytes) -> bool:
        policy = self.policies.get((tenant, command))
        if (tenant, command) in self.paused:
            return False
        holders = {t.worker for t in self.in_state(tenant, command, LEASED)}
        return (
            policy is None
            or not policy.consumers_max
            or worker in holders
            or len(holders) < policy.consumers_max
        )

    def claim(
        self,
        tenant: bytes,
        commands: list[bytes] | None,
        in_order: bool,
        worker: bytes,
        subject: bytes,
        count: int,
        lease_ms: int,
        now_ms: int,
        claim: object,
    ) -> list[Task]:
        named = {t.command for t in self.tasks} if commands is None else dict.fromkeys(commands)
        open_ = [command for command in named if self.admits(tenant, command, worker)]
        ready = [t for command in open_ for t in self.in_state(tenant, command, READY)]
        if commands is None or not in_order:
            ready.sort(key=lambda t: (-t.priority, self.tasks.index(t)))
        for task in ready[:count]:
            task.state, task.due_ms = LEASED, now_ms + lease_ms
            task.attempts += 1
            task.worker, task.subject = worker, subject
            task.claim, task.delivered = claim, False
            task.updated_ms = now_ms
        return ready[:count]

    def delivered(self, claim: object) -> None:
        for task in self.tasks:
            if task.claim is claim:
                task.delivered = True

    def give_back(self, claim: object, now_ms: int) -> int:
        tasks = [t for t in self.tasks if t.state == LEASED and t.claim is claim]
        for task in tasks:
            self._back(task, task.attempts - 1, 0, task.error, now_ms)
        return len(tasks)

    def heartbeat(self, task_id: bytes, caller: tuple, lease_ms: int, now_ms: int) -> int:
        code, task = self._lease(task_id, *caller)
        if task is not None:
            task.due_ms, task.updated_ms, task.delivered = now_ms + lease_ms, now_ms, True
        return code

    def abandon(self, task_id: bytes, caller: tuple, now_ms: int) -> int:
        code, task = self._lease(task_id, *caller)
        if task is not None:
            self._back(task, task.attempts - 1, 0, task.error, now_ms)
        return code

    def nack(
        self, task_id: bytes, caller: tuple, delay_ms: int, reason: bytes, now_ms: int
    ) -> tuple[int, int, bool]:
        code, task = self._lease(task_id, *caller)
        if task is None:
            return code, 0, False
        if task.attempts >= task.max_attempts:
            self._end(task, DEAD, reason if reason.strip() else b"MAX_ATTEMPTS", now_ms)
            return OK, 0, True
        delay_ms = self.backoff(task.attempts) if delay_ms < 0 else delay_ms
        self._back(task, task.attempts, delay_ms, reason, now_ms)
        return OK, delay_ms, False

    def finish(
        self, items: list[tuple[bytes, bool, bytes | None, bytes]], caller: tuple, now_ms: int
    ) -> list[int]:
        codes, ended_here = [], []
        for task_id, completed, result, error in items:
            code, task = self._lease(task_id, *caller)
            known = self.find(task_id, caller[0])
            if known is not None and known.state in (COMPLETED, FAILED) and known not in ended_here:
                code = ENDED
            if task is not None:
                task.result = result
                self._end(
                    task, COMPLETED if completed else FAILED, b"" if completed else error, now_ms
                )
                ended_here.append(task)
            codes.append(code)
        return codes

    def cancel(self, task_id: bytes, tenant: bytes, now_ms: int) -> int:
        task = self.find(task_id, tenant)
        if task is None:
            return ABSENT
        if task.state not in (READY, DELAYED):
            return NOT_PENDING
        self._end(task, FAILED, b"CANCELLED", now_ms)
        return OK

    def requeue(self, task_id: bytes, tenant: bytes, now_ms: int) -> int:
        task = self.find(task_id, tenant)
        if task is None or task.state != DEAD:
            return ABSENT if task is None else NOT_FOUND
        task.state, task.attempts, task.error, task.updated_ms = READY, 0, b"", now_ms
        task.worker = task.subject = b""
        task.ended_ms = task.expires_ms = 0
        return OK

    def purge(self, task_id: bytes, tenant: bytes) -> int:
        task = self.find(task_id, tenant)
        if task is None or task.state != DEAD:
            return ABSENT if task is None else NOT_FOUND
        task.state = GONE
        return OK

    # --- many tasks, in creation order

    def of_queue(self, tenant: bytes, command: bytes, states: tuple[int, ...]) -> list[Task]:
        queue = [t for t in self.tasks if (t.tenant, t.command) == (tenant, command)]
        return [t for t in queue if t.state in states]

    def forget(self, tenant: bytes, before_ms: int, count_max: int) -> list[Task]:
        ended = [
            t
            for t in self.tasks
            if t.tenant == tenant
            and t.state in (COMPLETED, FAILED, DEAD)
            and t.expires_ms <= before_ms
        ]
        for task in ended[:count_max]:
            task.state = GONE
        return ended[:count_max]

    def tick(self, now_ms: int) -> int:
        came = [
            t for t in self.timed() if (t.expires_ms if t.state == DEAD else t.due_ms) <= now_ms
        ]
        for task in came:
            if task.state == DELAYED:
                task.state, task.due_ms = READY, 0
            elif task.state == DEAD:
                task.state = GONE
            elif not task.delivered:
                self._back(task, task.attempts - 1, 0, task.error, now_ms)
            elif task.attempts >= task.max_attempts:
                self._end(task, DEAD, b"LEASE_EXPIRED", now_ms)
            else:
                self._back(
                    task, task.attempts, self.backoff(task.attempts), b"LEASE_EXPIRED", now_ms
                )
        return len(came)

    def backoff(self, attempts: int) -> int:
        return min(self.backoff_base_ms * 2**attempts, self.backoff_max_ms)

    # --- what they share

    def _lease(
        self, task_id: bytes, tenant: bytes, worker: bytes, subject: bytes, attempt: int
    ) -> tuple[int, Task | None]:
        task = self.find(task_id, tenant)
        if task is None:
            return ABSENT, None
        if task.state != LEASED:
            return NOT_IN_PROGRESS, None
        mine = worker == task.worker if worker else subject in (task.worker, task.subject)
        if not mine or attempt not in (-1, task.attempts):
            return NOT_OWNER, None
        return OK, task

    def _back(self, task: Task, attempts: int, delay_ms: int, error: bytes, now_ms: int) -> None:
        task.state, task.due_ms = (DELAYED, now_ms + delay_ms) if delay_ms else (READY, 0)
        task.attempts, task.error, task.updated_ms = attempts, error, now_ms
        task.worker = task.subject = b""
        task.claim = None

    def _end(self, task: Task, state: int, error: bytes, now_ms: int) -> None:
        keep_ms = self.dead_retention_ms if state == DEAD else self.retention_ms
        policy = self.policies.get((task.tenant, task.command))
        keep_ms = (policy and policy.retention_ms) or keep_ms
        task.state, task.error, task.updated_ms = state, error, now_ms
        task.ended_ms, task.expires_ms = now_ms, max(now_ms + keep_ms, task.key_end_ms)
        task.due_ms, task.claim = 0, None
