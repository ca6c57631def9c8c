"""What a simulated node runs on: a store that forgets what was not synced, helper threads and a
loop that do their work when told to, and a model of every task that can be taken back to what was
durable."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from codeq.engine.clock import FakeClock
from codeq.engine.store import CHUNK_PREFIX, Store
from tests.manual_runner import ManualRunner

OK, CONFLICT, NOT_FOUND, TASK_NOT_FOUND = 0, 11, 13, 14
NOT_IN_PROGRESS, NOT_OWNER, NOT_PENDING, ENDED, ABSENT = 15, 16, 21, 100, 101
READY, DELAYED, LEASED, COMPLETED, FAILED, DEAD, GONE = range(1, 8)
FINAL = (COMPLETED, FAILED)
LIVE = (READY, DELAYED, LEASED)

Pairs = Sequence[tuple[bytes, bytes]]


class MemoryStore:
    """The face of ``Store`` over a dictionary; ``late`` says for how long it puts off the removal
    of chunks. ``crash`` gives what a new start would find."""

    def __init__(
        self, path: Path, late: random.Random, values: dict[bytes, bytes] | None = None
    ) -> None:
        self.path = path
        self.values = dict(values or {})
        self.durable = dict(self.values)
        self.written = self.synced = 0  # groups
        self.told = 0
        self.cut_due = False
        self._late = late
        self._cuts: list[tuple[bytes, bytes]] = []
        self._sorted: list[bytes] | None = None

    def sequence(self) -> int:
        return self.written

    @property
    def put_off(self) -> bool:
        return bool(self._cuts)

    def write(self, puts: Pairs, deletes: Sequence[bytes] = (), ranges: Pairs = ()) -> None:
        for begin, end in ranges:
            if begin[:1] == CHUNK_PREFIX:
                self._cuts.append((begin, end))
            else:
                self._remove(begin, end)
        for key in deletes:
            self.values.pop(key, None)
        self.values.update(puts)
        self.written += 1
        self._sorted = None
        self.cut_due = self.put_off and self._late.random() < 0.3

    def cut(self) -> None:
        for begin, end in self._cuts:
            self._remove(begin, end)
        self._cuts, self.cut_due = [], False
        self._sorted = None

    def _remove(self, begin: bytes, end: bytes) -> None:
        for key in [key for key in self.values if begin <= key < end]:
            del self.values[key]

    def sync(self, sequence: int) -> None:
        self.durable = dict(self.values)
        self.synced = self.written

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        return [self.values.get(key) for key in keys]

    def scan(
        self, begin: bytes, end: bytes, limit: int = 0, *, ahead: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        if self._sorted is None:
            self._sorted = sorted(self.values)
        values = self.values
        found = [key for key in self._sorted if begin <= key < end]
        return iter([(key, values[key]) for key in (found[:limit] if limit else found)])

    def free_bytes(self) -> int:
        return 1 << 40

    def close(self) -> None:
        pass

    def crash(self, keep: bool) -> MemoryStore:
        """The store after the process died; ``keep``: what was written and not synced is there."""
        return MemoryStore(self.path, self._late, self.values if keep else self.durable)


class FileStore(Store):
    """The real store, which copies its files before every write: that is the last synced state."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.written = self.synced = 0
        self._copy = path.with_name(path.name + "-synced")

    def write(self, puts: Pairs, deletes: Sequence[bytes] = (), ranges: Pairs = ()) -> None:
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self.path, self._copy)
        super().write(puts, deletes, ranges)
        self.written += 1

    def sync(self, sequence: int) -> None:
        super().sync(sequence)
        self.synced = self.written

    def crash(self, keep: bool) -> FileStore:
        path = self.path.with_name(self.path.name + "x")
        lost = not keep and self.synced < self.written
        shutil.copytree(self._copy if lost else self.path, path)
        self.close()
        shutil.rmtree(self.path)
        shutil.rmtree(self._copy, ignore_errors=True)
        return FileStore(path)


class SimulatedRunner(ManualRunner):
    """Helper threads that stand still while held: first the work, then its answer."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.hold_reads = False
        self.syncs: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        self.reads: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        self._answers: list[Callable[[], None]] = []  # of reads done, not yet told

    def run(self, work: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        self.syncs.append((work, done))

    def read(self, work: Callable[[], object], done: Callable[[object], None]) -> None:
        self.reads.append((work, done))

    def sync_one(self) -> None:
        """The sync that runs comes to its end."""
        if self.syncs:
            work, done = self.syncs.pop(0)
            work()
            self.soon(lambda: done(None))

    def read_one(self) -> None:
        """The read helper does its next piece of work; nobody is told yet."""
        if self.reads:
            work, done = self.reads.pop(0)
            result = work()
            self._answers.append(lambda: done(result))

    def answer_one(self) -> None:
        if self._answers:
            self.soon(self._answers.pop(0))

    def settle(self) -> None:
        super().settle()
        while (self.syncs and not self.hold_syncs) or (
            (self.reads or self._answers) and not self.hold_reads
        ):
            if not self.hold_syncs:
                self.sync_one()
            if not self.hold_reads:
                self.read_one()
                self.answer_one()
            super().settle()


class Task(NamedTuple):
    """All that is known of one task at one moment."""

    id: bytes
    number: int  # creation order
    tenant: str
    spec: dict[str, Any]
    created_ms: int
    key_end_ms: int
    state: int = READY
    due_ms: int = 0
    attempts: int = 0
    worker: str = ""
    subject: str = ""
    claim: object = None
    delivered: bool = True
    error: str = ""
    result: bytes | None = None
    ended_ms: int = 0
    expires_ms: int = 0

    @property
    def command(self) -> str:
        return str(self.spec["command"])

    @property
    def priority(self) -> int:
        return int(self.spec.get("priority", 0))

    @property
    def max_attempts(self) -> int:
        return int(self.spec.get("max_attempts", 0)) or 5


class Model:
    """Every task and key, and what the decisions of the groups since the last sync changed.

    Its methods are called with the same arguments as the engine and answer what it must answer.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.retention_ms = settings["retention_seconds"] * 1000
        self.dead_retention_ms = settings["dead_retention_seconds"] * 1000
        self.window_ms = settings["idempotency_window_seconds"] * 1000
        self.backoff_ms = settings["backoff_base_seconds"] * 1000
        self.tasks: dict[bytes, Task] = {}
        self._busy: dict[bytes, None] = {}  # those that time or a worker may still change
        self.keys: dict[tuple[str, str], tuple[bytes, dict[str, Any], int]] = {}
        self.paused: dict[tuple[str, str], bool] = {}
        self.swept: dict[bytes, int] = {}  # of tasks cleaned up on disk: the group that says so
        self.group: Callable[[], int] = lambda: 0  # number of the open one
        self._undo: list[tuple[int, dict[Any, Any], Any, Any]] = []

    # --- going back

    def put(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        self._undo.append((self.group(), table, key, table.get(key)))
        table[key] = value
        if table is self.tasks:
            self._note(value)

    def _note(self, task: Task) -> None:
        if task.state in (*FINAL, GONE):
            self._busy.pop(task.id, None)
        else:
            self._busy[task.id] = None

    @property
    def busy(self) -> list[Task]:
        return [self.tasks[task_id] for task_id in self._busy]

    def set(self, task: Task, **fields: Any) -> None:
        self.put(self.tasks, task.id, task._replace(**fields))

    def forget_after(self, group: int) -> None:
        """Takes back what was decided in later groups: they were lost."""
        for number, table, key, old in reversed(self._undo):
            if number > group:
                if old is None:
                    del table[key]
                else:
                    table[key] = old
        self._undo.clear()
        self._busy.clear()
        for task in self.tasks.values():
            self._note(task)

    def restarted(self, now_ms: int, grace_ms: int) -> None:
        for task in self.busy:
            if task.state == DELAYED and task.due_ms <= now_ms:
                self.set(task, state=READY, due_ms=0)
            elif task.state == LEASED:
                due_ms = max(task.due_ms, now_ms + grace_ms)
                self.set(task, due_ms=due_ms, claim=None, delivered=True)

    # --- questions

    def find(self, task_id: bytes, tenant: str) -> Task | None:
        task = self.tasks.get(task_id)
        return task if task is not None and task.tenant == tenant and task.state != GONE else None

    def seen(self, task_id: bytes, tenant: str, now_ms: int) -> Task | None:
        """The task as a reader sees it."""
        task = self.find(task_id, tenant)
        return None if task is None or (task.expires_ms and task.expires_ms <= now_ms) else task

    def ready(self, tenant: str, commands: Sequence[str] | None, in_order: bool) -> list[Task]:
        tasks = [
            t
            for t in self.busy
            if t.state == READY and t.tenant == tenant and not self.paused.get((tenant, t.command))
        ]
        tasks.sort(key=lambda t: (-t.priority, t.number))
        if commands is None:
            return tasks
        if not in_order:
            return [t for t in tasks if t.command in commands]
        return [t for command in dict.fromkeys(commands) for t in tasks if t.command == command]

    def stats(self, tenant: str, command: str) -> tuple[int, ...]:
        states = [t.state for t in self.busy if (t.tenant, t.command) == (tenant, command)]
        return tuple(states.count(state) for state in (READY, DELAYED, LEASED, DEAD))

    # --- transitions

    def create(self, task_id: bytes, tenant: str, spec: dict[str, Any], now_ms: int) -> None:
        high, low = int.from_bytes(task_id[:8], "big"), int.from_bytes(task_id[8:], "big")
        number = (high & 0xFFF) << 36 | low >> 26 & ((1 << 36) - 1)
        due_ms = now_ms + 1000 * int(spec.get("delay_seconds", 0))
        waits = due_ms > now_ms
        self.put(
            self.tasks,
            task_id,
            Task(
                task_id,
                number,
                tenant,
                spec,
                now_ms,
                now_ms + self.window_ms if spec.get("key") else 0,
                DELAYED if waits else READY,
                due_ms if waits else 0,
            ),
        )

    def lease(self, task: Task, worker: str, subject: str, until_ms: int, claim: object) -> None:
        self.set(
            task,
            state=LEASED,
            due_ms=until_ms,
            attempts=task.attempts + 1,
            worker=worker,
            subject=subject,
            claim=claim,
            delivered=False,
        )

    def of_claim(self, claim: object) -> list[Task]:
        return [t for t in self.busy if t.state == LEASED and t.claim is claim]

    def check(self, task: Task | None, worker: str, subject: str, attempt: int) -> int:
        if task is None:
            return ABSENT
        if task.state != LEASED:
            return NOT_IN_PROGRESS
        mine = worker == task.worker if worker else subject in (task.worker, task.subject)
        return OK if mine and attempt in (-1, task.attempts) else NOT_OWNER

    def go_back(self, task: Task, delay_ms: int, *, untried: bool = False, **fields: Any) -> None:
        self.set(
            task,
            state=DELAYED if delay_ms else READY,
            due_ms=self.now_ms + delay_ms if delay_ms else 0,
            attempts=task.attempts - untried,
            worker="",
            subject="",
            claim=None,
            **fields,
        )

    def end(self, task: Task, state: int, error: str, result: bytes | None = None) -> None:
        keep_ms = self.dead_retention_ms if state == DEAD else self.retention_ms
        self.set(
            task,
            state=state,
            error=error,
            result=result,
            due_ms=0,
            claim=None,
            ended_ms=self.now_ms,
            expires_ms=max(self.now_ms + keep_ms, task.key_end_ms),
        )

    def requeue(self, task: Task) -> None:
        clear = {"error": "", "worker": "", "subject": "", "ended_ms": 0, "expires_ms": 0}
        self.set(task, state=READY, attempts=0, **clear)

    def waiting(self, tenant: str, command: str, states: Sequence[int]) -> list[Task]:
        """The tasks of a queue in these states, in creation order."""
        tasks = [t for t in self.busy if (t.tenant, t.command) == (tenant, command)]
        return sorted((t for t in tasks if t.state in states), key=lambda t: t.number)

    now_ms = 0

    def tick(self, now_ms: int) -> int:
        self.now_ms = now_ms
        moved = 0
        for task in self.busy:
            if task.state == DELAYED and task.due_ms <= now_ms:
                self.set(task, state=READY, due_ms=0)
            elif task.state == DEAD and task.expires_ms <= now_ms:
                self.set(task, state=GONE)
            elif task.state == LEASED and task.due_ms <= now_ms:
                self._lease_over(task)
            else:
                continue
            moved += 1
        return moved

    def _lease_over(self, task: Task) -> None:
        if not task.delivered:
            self.go_back(task, 0, untried=True)
        elif task.attempts >= task.max_attempts:
            self.end(task, DEAD, "LEASE_EXPIRED")
        else:
            self.go_back(task, self.backoff_ms, error="LEASE_EXPIRED")


class Watched:
    """An engine whose every decision is compared with that of the model."""

    def __init__(self, engine: Any, model: Model, claimed: Callable[[Any], None]) -> None:
        self.real = engine
        self._model = model
        self._claimed = claimed
        self.specs: dict[int, list[dict[str, Any]]] = {}  # of batches, by identity
        self.looked: dict[bytes, list[Task]] = {}  # what a task was whenever a reader looked

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def view(self, task_id: bytes, tenant: bytes) -> Any:
        if task_id in self._model.tasks:
            self.looked.setdefault(task_id, []).append(self._model.tasks[task_id])
        return self.real.view(task_id, tenant)

    def create(self, creates: Any, tenant: bytes, now_ms: int, begin: int, end: int) -> int:
        made = int(self.real.create(creates, tenant, now_ms, begin, end))
        fresh = 0
        for index in range(begin, end):
            if creates.codes[index] == OK and creates.id_bytes(index) not in self._model.tasks:
                spec = self.specs[id(creates)][index]
                self._model.create(creates.id_bytes(index), tenant.decode(), spec, now_ms)
                fresh += 1
        assert fresh == made
        return made

    def claim(
        self,
        tenant: bytes,
        commands: Sequence[bytes] | None,
        in_order: bool,
        worker: bytes,
        subject: bytes,
        count: int,
        lease_ms: int,
        bytes_max: int,
        now_ms: int,
    ) -> Any:
        claim = self.real.claim(
            tenant, commands, in_order, worker, subject, count, lease_ms, bytes_max, now_ms
        )
        names = None if commands is None else [command.decode() for command in commands]
        wanted = self._model.ready(tenant.decode(), names, in_order)[:count]
        got = [] if claim is None else claim.ids()
        assert got == [task.id for task in wanted][: len(got)], "order"
        assert got or not wanted, "T24: empty while there is a ready task"
        assert len(got) == len(wanted) or bytes_max < 1 << 20
        for task in wanted[: len(got)]:
            assert task.attempts < task.max_attempts
            self._model.lease(task, worker.decode(), subject.decode(), now_ms + lease_ms, claim)
        if claim is not None:
            self._claimed(claim)
        return claim

    def tick(self, now_ms: int, limit: int) -> int:
        moved = int(self.real.tick(now_ms, limit))
        assert moved == self._model.tick(now_ms)
        return moved

    def delivered(self, claim: Any) -> None:
        self.real.delivered(claim)
        for task in self._model.of_claim(claim):
            self._model.set(task, delivered=True)

    def give_back(self, claim: Any, now_ms: int) -> int:
        self._model.now_ms = now_ms
        tasks = self._model.of_claim(claim)
        for task in tasks:
            self._model.go_back(task, 0, untried=True)
        assert self.real.give_back(claim, now_ms) == len(tasks)
        return len(tasks)

    def _check(self, code: int, task: Task | None, caller: Sequence[Any]) -> bool:
        """Compares the code; whether the call was accepted. An ended task may have left memory."""
        worker, subject, attempt = caller
        expected = self._model.check(task, worker.decode(), subject.decode(), attempt)
        assert code == expected or (code == ABSENT and task and task.state in FINAL)
        return code == OK

    def heartbeat(
        self, task_id: bytes, tenant: bytes, w: bytes, s: bytes, a: int, lease_ms: int, now_ms: int
    ) -> int:
        code = int(self.real.heartbeat(task_id, tenant, w, s, a, lease_ms, now_ms))
        task = self._model.find(task_id, tenant.decode())
        if self._check(code, task, (w, s, a)):
            assert task is not None
            self._model.set(task, due_ms=now_ms + lease_ms, delivered=True)
        return code

    def abandon(
        self, task_id: bytes, tenant: bytes, w: bytes, s: bytes, a: int, now_ms: int
    ) -> int:
        code = int(self.real.abandon(task_id, tenant, w, s, a, now_ms))
        self._model.now_ms = now_ms
        task = self._model.find(task_id, tenant.decode())
        if self._check(code, task, (w, s, a)):
            assert task is not None
            self._model.go_back(task, 0, untried=True)
        return code

    def nack(
        self,
        task_id: bytes,
        tenant: bytes,
        w: bytes,
        s: bytes,
        a: int,
        delay_ms: int,
        reason: bytes,
        now_ms: int,
    ) -> tuple[int, int, bool]:
        answer = self.real.nack(task_id, tenant, w, s, a, delay_ms, reason, now_ms)
        self._model.now_ms = now_ms
        task = self._model.find(task_id, tenant.decode())
        if self._check(answer[0], task, (w, s, a)):
            assert task is not None
            dead = task.attempts >= task.max_attempts
            wait_ms = 0 if dead else self._model.backoff_ms if delay_ms < 0 else delay_ms
            assert answer == (OK, wait_ms, dead)
            if dead:
                self._model.end(task, DEAD, reason.decode() or "MAX_ATTEMPTS")
            else:
                self._model.go_back(task, wait_ms, error=reason.decode())
        return answer  # type: ignore[no-any-return]

    def finish(
        self,
        finishes: Any,
        tenant: bytes,
        w: bytes,
        s: bytes,
        a: int,
        now_ms: int,
        begin: int,
        end: int,
    ) -> int:
        ended = int(self.real.finish(finishes, tenant, w, s, a, now_ms, begin, end))
        self._model.now_ms = now_ms
        before = dict(self._model.tasks)
        fresh = 0
        for index in range(begin, end):
            code, spec = finishes.codes[index], self.specs[id(finishes)][index]
            task = self._model.find(spec["id"], tenant.decode())
            if task is not None and task.state in FINAL:
                again = before[task.id].state not in FINAL
                assert code == NOT_IN_PROGRESS if again else code in (ENDED, ABSENT)
            elif self._check(code, task, (w, s, a)):
                assert task is not None
                state = COMPLETED if spec["completed"] else FAILED
                error = "" if spec["completed"] else spec["error"]
                self._model.end(task, state, error, spec["result"])
                fresh += 1
        assert fresh == ended
        return ended

    # --- what operators do

    def cancel(self, task_id: bytes, tenant: bytes, now_ms: int) -> int:
        code = int(self.real.cancel(task_id, tenant, now_ms))
        self._model.now_ms = now_ms
        task = self._model.find(task_id, tenant.decode())
        if task is not None and task.state in (READY, DELAYED):
            assert code == OK
            self._model.end(task, FAILED, "CANCELLED")
        else:
            gone = task is None or task.state in FINAL
            assert code in ((ABSENT, NOT_PENDING) if gone else (NOT_PENDING,))
        return code

    def requeue(self, task_id: bytes, tenant: bytes, now_ms: int, command: bytes) -> int:
        code = int(self.real.requeue(task_id, tenant, now_ms, command))
        task = self._dead(code, task_id, tenant, command)
        if task is not None:
            self._model.requeue(task)
        return code

    def purge(self, task_id: bytes, tenant: bytes, now_ms: int, command: bytes) -> int:
        code = int(self.real.purge(task_id, tenant, now_ms, command))
        task = self._dead(code, task_id, tenant, command)
        if task is not None:
            self._model.set(task, state=GONE)
        return code

    def _dead(self, code: int, task_id: bytes, tenant: bytes, command: bytes) -> Task | None:
        """The task when it is a dead letter of that queue; then the code must be OK."""
        task = self._model.find(task_id, tenant.decode())
        dead = task is not None and (task.state, task.command) == (DEAD, command.decode())
        assert (code == OK) == dead
        return task if dead else None

    def cancel_many(
        self,
        tenant: bytes,
        command: bytes,
        ready: bool,
        delayed: bool,
        begin: int,
        end: int,
        looks: int,
        count_max: int,
        now_ms: int,
    ) -> tuple[int, int]:
        states = [READY] * ready + [DELAYED] * delayed
        tasks = self._model.waiting(tenant.decode(), command.decode(), states)
        count, after = self.real.cancel_many(
            tenant, command, ready, delayed, begin, end, looks, count_max, now_ms
        )
        self._model.now_ms = now_ms
        for task in self._passed(tasks, begin, after, end, count, count_max):
            self._model.end(task, FAILED, "CANCELLED")
        return count, after

    def requeue_many(
        self, tenant: bytes, command: bytes, begin: int, count_max: int, now_ms: int
    ) -> tuple[int, int]:
        tasks = self._model.waiting(tenant.decode(), command.decode(), [DEAD])
        count, after = self.real.requeue_many(tenant, command, begin, count_max, now_ms)
        for task in self._passed(tasks, begin, after, after, count, count_max):
            self._model.requeue(task)
        return count, after

    def purge_many(
        self, tenant: bytes, command: bytes, begin: int, count_max: int, now_ms: int
    ) -> tuple[int, int]:
        tasks = self._model.waiting(tenant.decode(), command.decode(), [DEAD])
        count, after = self.real.purge_many(tenant, command, begin, count_max, now_ms)
        for task in self._passed(tasks, begin, after, after, count, count_max):
            self._model.set(task, state=GONE)
        return count, after

    def _passed(
        self, tasks: list[Task], begin: int, after: int, end: int, count: int, count_max: int
    ) -> list[Task]:
        """Those of the tasks that a walk from ``begin`` on has passed."""
        passed = [task for task in tasks if begin <= task.number < min(after, end)]
        assert len(passed) == count <= count_max
        return passed

    def forget(
        self,
        tenant: bytes,
        before_ms: int,
        begin: int,
        end: int,
        looks: int,
        count_max: int,
        now_ms: int,
    ) -> tuple[int, int, int]:
        ended = [
            task
            for task in self._model.tasks.values()
            if task.tenant == tenant.decode()
            and task.state in (*FINAL, DEAD)
            and begin <= task.number < end
            and task.expires_ms <= before_ms
        ]
        here = [task for task in ended if self._in_memory(task, tenant, now_ms)]
        answer = self.real.forget(tenant, before_ms, begin, end, looks, count_max, now_ms)
        gone = [task for task in here if self.real.cancel(task.id, tenant, now_ms) == ABSENT]
        assert len(gone) == answer[0] <= count_max
        for task in gone:
            assert task.number < answer[1]
            self._model.set(task, state=GONE)
        return answer  # type: ignore[no-any-return]

    def _in_memory(self, task: Task, tenant: bytes, now_ms: int) -> bool:
        """Whether memory has the task, which has ended: cancelling it changes nothing."""
        return bool(self.real.cancel(task.id, tenant, now_ms) == NOT_PENDING)

    def pause(self, tenant: bytes, command: bytes) -> None:
        self.real.pause(tenant, command)
        self._model.put(self._model.paused, (tenant.decode(), command.decode()), True)

    def resume(self, tenant: bytes, command: bytes) -> None:
        self.real.resume(tenant, command)
        self._model.put(self._model.paused, (tenant.decode(), command.decode()), False)
