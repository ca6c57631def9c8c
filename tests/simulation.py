"""A whole node in one thread, under a fake clock, against a model: operations in random order, held
syncs and reads, time jumps, removal all the time, kills and restarts."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codeq.engine import _wire
from codeq.engine._engine import Engine
from codeq.engine._wire import Creates, Finishes, format_id
from codeq.engine.clock import FakeClock
from codeq.engine.recovery import recover
from codeq.engine.shard import ClaimRequest, Shard, ShardSettings
from codeq.engine.stored import Wanted
from tests.simulated import (
    COMPLETED,
    CONFLICT,
    DEAD,
    DELAYED,
    FAILED,
    FINAL,
    GONE,
    LEASED,
    LIVE,
    NOT_FOUND,
    NOT_IN_PROGRESS,
    NOT_PENDING,
    OK,
    READY,
    TASK_NOT_FOUND,
    FileStore,
    MemoryStore,
    Model,
    SimulatedRunner,
    Task,
    Watched,
)

STEPS = 120
TENANTS = ("acme", "umbrella")
COMMANDS = ("mail", "x/y: z", "проба")
WORKERS = (("w1", "s1"), ("w2", "s1"), ("w3", "s2"))
KEYS = ("", "", "", "k1", "k2", "k3")
FULL_CHUNK = b"x" * 8200  # such a record stands alone in its chunk
MASS_LOOKS = 32
BATCHES_MAX = 1 << 20


def settings_of(rng: random.Random) -> dict[str, Any]:
    return {
        "retention_seconds": rng.choice([1, 5, 40]),
        "dead_retention_seconds": rng.choice([2, 30]),
        "idempotency_window_seconds": rng.choice([1, 7, 60]),
        "backoff_policy": "fixed",
        "backoff_base_seconds": rng.choice([0, 2]),
        "backoff_max_seconds": 10,
        "payload_memory_bytes": rng.choice([0, 20_000, 1 << 24]),
        "straggler_slack_bytes": rng.choice([0, 0, 8 << 20]),
        "num_shards": rng.choice([1, 3]),
        "commit_creates_max": rng.choice([100, 1000]),
        "lease_grace_seconds": rng.choice([0, 0, 3]),
        "disk_reserve_bytes": 0,
    }


class Simulation:
    """One node, what its clients were told, and what they hold."""

    def __init__(self, seed: int, path: Path, *, files: bool) -> None:
        self.rng = random.Random(seed)
        self.clock = FakeClock(1_700_000_000_000 + seed % 1000, seed)
        self.settings = settings_of(self.rng)
        self.model = Model(self.settings)
        self.store: Any = (
            FileStore(path / "data") if files else MemoryStore(path, random.Random(seed))
        )
        self.faults: list[str] = []
        self.open()

    def open(self) -> None:
        """A process starts on what the store holds."""
        self.runner = SimulatedRunner(self.clock)
        self.waiting: dict[int, str] = {}  # operations that were not answered
        self.operations = 0
        self.waiters: list[tuple[Any, ClaimRequest, dict[str, Any]]] = []
        self.hands: list[Any] = []  # deliveries that no edge has written yet
        self.waits: list[tuple[Any, bytes, int, list[Any]]] = []
        self.claim_groups: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no identity is given twice
        self.model.group = lambda: self.store.written + 1
        grace_ms = self.settings["lease_grace_seconds"] * 1000
        engine = self.loaded(grace_ms)
        self.model.restarted(self.clock.now_ms(), grace_ms)
        self.engine = Watched(engine, self.model, self.claimed)
        self.shard = Shard(
            ShardSettings(path=self.store.path, **self.settings),
            self.clock,
            self.runner,
            self.store,
            self.engine,  # type: ignore[arg-type]
            self.faults.append,
        )
        cleanup = self.shard.cleanup
        take_away = cleanup._take_away
        cleanup._take_away = lambda found: self.swept(found, take_away)  # type: ignore

    def loaded(self, grace_ms: int) -> Engine:
        given = self.settings
        engine = Engine(
            seed=self.clock.entropy(),
            shard_count=given["num_shards"],
            payload_memory_bytes=given["payload_memory_bytes"],
            retention_ms=given["retention_seconds"] * 1000,
            dead_retention_ms=given["dead_retention_seconds"] * 1000,
            key_window_ms=given["idempotency_window_seconds"] * 1000,
            backoff_policy=given["backoff_policy"],
            backoff_base_ms=given["backoff_base_seconds"] * 1000,
            backoff_max_ms=given["backoff_max_seconds"] * 1000,
            straggler_slack_bytes=given["straggler_slack_bytes"],
        )
        window_ms = given["idempotency_window_seconds"] * 1000
        recover(engine, self.store, self.clock, given["num_shards"], grace_ms, window_ms)
        engine.verify()
        return engine

    # --- answers

    def expect(
        self, what: str, check: Callable[..., None], *, writes: bool = False
    ) -> Callable[..., None]:
        """The callback of an operation that is decided now; ``writes``: into the open group."""
        number = self.operations = self.operations + 1
        self.waiting[number] = what
        decided = self.store.written + (writes or self.engine.pending_records > 0)

        def answered(*answer: Any) -> None:
            assert self.store.synced >= decided, f"T17: {what} was answered before its sync"
            del self.waiting[number]  # KeyError: answered twice
            check(*answer)

        return answered

    def same(self, view: Any, task: Task | None, now_ms: int) -> None:
        """A reader sees the task as it was at the call; one that expired since may be gone."""
        if view is None and task is not None:
            assert self.went(task), task
            return
        if task is None:
            assert view is None
            return
        spec = task.spec
        assert (view.id_bytes, view.tenant, view.command) == (task.id, task.tenant, task.command)
        assert (view.payload, view.priority) == (spec["payload"], task.priority)
        assert (view.state, view.attempts, view.max_attempts, view.error) == (
            task.state,
            task.attempts,
            task.max_attempts,
            task.error,
        )
        assert view.created_ms == task.created_ms
        assert (view.ended_ms, view.expires_ms) == (task.ended_ms, task.expires_ms)
        if task.state in FINAL:
            assert (view.result, view.ended_worker) == (task.result, task.worker)
        elif task.state != DEAD:
            assert (view.worker, view.due_ms) == (task.worker, task.due_ms)

    def went(self, task: Task) -> bool:
        """Whether it expired or was taken away since, for good: as late as that may an answer look
        at it."""
        newer = self.model.tasks[task.id]
        if newer.state == GONE:
            return self.model.swept.get(task.id, 0) <= self.store.synced
        return 0 < newer.expires_ms <= self.clock.now_ms()

    # --- creates

    def create(self) -> None:
        tenant = self.rng.choice(TENANTS)
        self.send(tenant, [self.spec() for _ in range(self.rng.choice([1, 1, 2, 5, 30]))])

    def spec(self) -> dict[str, Any]:
        rng = self.rng
        return {
            "command": rng.choice(COMMANDS),
            "payload": b'"%d"' % rng.randrange(4) + b" " * rng.choice([0, 0, 10, 3000, 9000]),
            "priority": rng.choice([0, 0, 0, -(2**31), 5, 2**31 - 1]),
            "key": rng.choice(KEYS),
            "delay_seconds": rng.choice([0, 0, 0, 1, 5, 100, 2**31 - 1]),
            "max_attempts": rng.choice([0, 1, 2]),
            "webhook": rng.choice(["", "", "https://example.com/hook"]),
            "trace_parent": rng.choice(["", "00-1-2-01"]),
        }

    def send(self, tenant: str, specs: list[dict[str, Any]]) -> Creates:
        creates = Creates()
        for spec in specs:
            encoded = {k: v.encode() if isinstance(v, str) else v for k, v in spec.items()}
            creates.add(encoded.pop("command"), encoded.pop("payload"), **encoded)
        self.engine.specs[id(creates)] = specs
        self.kept.append(creates)
        self.shard.create(creates, tenant, lambda answer: answered(answer))
        if len(specs) <= 100:  # else it is decided in parts
            self.check_keys(creates, tenant, specs)
        answered = self.expect("create", lambda _: None)
        return creates

    def check_keys(self, creates: Creates, tenant: str, specs: list[dict[str, Any]]) -> None:
        now_ms = self.clock.now_ms()
        for index, spec in enumerate(specs):
            known = self.model.keys.get((tenant, spec["key"])) if spec["key"] else None
            if known is not None and now_ms < known[2] + self.model.window_ms:
                if self.model.tasks[known[0]].state == GONE:
                    if creates.codes[index] == OK and creates.id_bytes(index) == known[0]:
                        # As if it had come before the cleanup, whose group is still open.
                        assert self.model.swept[known[0]] > self.store.written
                        continue
                    self.check_free(creates, index, tenant, spec, known)
                    continue
                same = {**known[1], "trace_parent": ""} == {**spec, "trace_parent": ""}
                assert creates.codes[index] == (OK if same else CONFLICT), "T30"
                assert creates.codes[index] or creates.id_bytes(index) == known[0], "I7"
                continue
            assert creates.codes[index] == OK
            if spec["key"]:
                found = (creates.id_bytes(index), spec, now_ms)
                self.model.put(self.model.keys, (tenant, spec["key"]), found)

    def check_free(
        self, creates: Creates, index: int, tenant: str, spec: dict[str, Any], known: Any
    ) -> None:
        """The task of a key is gone: the key is free, or was until the group that is open."""
        if creates.codes[index] == CONFLICT:
            assert self.model.swept.get(known[0], 0) > self.store.written, "T31"
            return
        assert creates.codes[index] == OK, "T31"
        found = (creates.id_bytes(index), spec, self.clock.now_ms())
        self.model.put(self.model.keys, (tenant, spec["key"]), found)

    def mass(self) -> None:
        """Fills buckets and segments, and ends nearly all of it at once."""
        count = self.rng.choice([40, 130, 256, 300])
        spec = {"command": "mass", "payload": FULL_CHUNK, "key": "", "max_attempts": 1}
        held, self.runner.hold_syncs = self.runner.hold_syncs, False
        self.send("mass", [spec] * count)
        self.runner.settle()
        got: list[Any] = []
        self.claim_as("mass", None, ("w1", "s1"), count, got, wait=False)
        self.runner.settle()
        for delivery in got:
            delivery.accepted()
            ids = delivery._claim.ids()
            some = self.rng.choice([len(ids), len(ids), len(ids) - 1])
            for at in range(0, some, 100):
                self.end("mass", ids[at : min(at + 100, some)], ("w1", "s1"))
        self.runner.settle()
        self.runner.hold_syncs = held

    # --- claims

    def claimed(self, claim: Any) -> None:
        self.kept.append(claim)
        self.claim_groups[id(claim)] = self.store.written + 1

    def claim(self) -> None:
        rng = self.rng
        commands = rng.choice([None, COMMANDS, COMMANDS[:1], ("x/y: z", "mail"), ("none",)])
        self.claim_as(
            rng.choice(TENANTS),
            commands,
            rng.choice(WORKERS),
            rng.choice([1, 1, 3, 40, 2**31 - 1]),
            None,
            wait=rng.random() < 0.6,
            in_order=commands is not None and rng.random() < 0.7,
            bytes_max=rng.choice([BATCHES_MAX, 5000]),
            lease_ms=rng.choice([1, 1000, 1000, 5000, 60_000]),
        )

    def claim_as(
        self,
        tenant: str,
        commands: tuple[str, ...] | None,
        who: tuple[str, str],
        count: int,
        got: list[Any] | None,
        *,
        in_order: bool = False,
        bytes_max: int = 64 << 20,
        lease_ms: int = 60_000,
        wait: bool,
    ) -> None:
        state: dict[str, Any] = {"over": False}

        def deliver(delivery: Any) -> None:
            assert not state["over"], "answered twice, or after it was cancelled"
            state["over"] = True
            if delivery is None:
                assert not wait
                return
            assert self.store.synced >= self.claim_groups[id(delivery._claim)], "I4"
            (self.hands if got is None else got).append(delivery)

        request = ClaimRequest(
            tenant=tenant,
            commands=None if commands is None else tuple(c.encode() for c in commands),
            in_order=in_order,
            worker=who[0],
            subject=who[1],
            count=count,
            lease_ms=lease_ms,
            bytes_max=bytes_max,
            wait=wait,
            deliver=deliver,
        )
        self.waiters.append((self.shard.claim(request), request, state))

    def cancel_waiter(self) -> None:
        if self.waiters:
            waiter, _, state = self.waiters.pop(self.rng.randrange(len(self.waiters)))
            waiter.cancel()
            state["over"] = True

    def hand_over(self) -> None:
        """An edge writes a delivery, or finds its client gone."""
        if not self.hands:
            return
        delivery = self.hands.pop(self.rng.randrange(len(self.hands)))
        tasks = self.model.of_claim(delivery._claim)
        if self.rng.random() < 0.5:
            views = delivery.views()
            assert {view.id_bytes for view in views} == {task.id for task in tasks}
            for view in views:
                self.same(view, self.model.tasks[view.id_bytes], self.clock.now_ms())
        else:
            self.check_message(delivery.encode(False), {format_id(t.id): t for t in tasks})
        if self.rng.random() < 0.8 and self.clock.now_ms() < delivery.lease_until_ms:
            delivery.accepted()
        else:
            delivery.give_back()

    def check_message(self, message: bytes, tasks: dict[str, Task]) -> None:
        if not tasks:
            assert message == b""
            return
        _, sent = _wire.decode_worker_server_event(message)
        assert len(sent) == len(tasks)
        for index in range(len(sent)):
            task = tasks[sent[index].id]
            assert (sent[index].payload, sent[index].attempts) == (
                task.spec["payload"],
                task.attempts,
            )

    # --- lease calls and results

    def some_task(self) -> Task | None:
        tasks = list(self.model.tasks.values())
        leased = [task for task in self.model.busy if task.state == LEASED]
        return self.rng.choice(leased if leased and self.rng.random() < 0.8 else tasks or [None])

    def caller(self, task: Task) -> tuple[str, str]:
        if task.state == LEASED and self.rng.random() < 0.9:
            return task.worker, task.subject
        return self.rng.choice([*WORKERS, ("", "s1"), ("", "w1")])

    def lease_call(self) -> None:
        rng = self.rng
        task = self.some_task()
        if task is None:
            return
        tenant = task.tenant if rng.random() < 0.95 else "other"
        worker, subject = self.caller(task)
        known, now_ms = self.model.find(task.id, tenant), self.clock.now_ms()
        expected = {self.model.check(known, worker, subject, -1)}
        if known is None:
            expected = {NOT_FOUND}
        elif known.state in FINAL and known.expires_ms <= now_ms:
            expected = {NOT_FOUND, NOT_IN_PROGRESS}  # as long as it is in memory

        def check(code: int, *_: Any) -> None:
            ended = known is not None and known.state in FINAL
            assert code in expected or (ended and self.went(known) and code == NOT_FOUND)

        args = (format_id(task.id), tenant, worker, subject)
        what = rng.choice(["heartbeat", "abandon", "nack", "nack"])
        if what == "heartbeat":
            self.shard.heartbeat(*args, rng.choice([1, 5000]), lambda *a: answered(*a))
        elif what == "abandon":
            self.shard.abandon(*args, lambda *a: answered(*a))
        else:
            delay = rng.choice([None, -1, 0, 3, 10**9])
            self.shard.nack(*args, delay, rng.choice(["", "why"]), lambda *a: answered(*a))
        answered = self.expect(what, check)

    def finish(self) -> None:
        task = self.some_task()
        if task is not None:
            more = [
                t for t in (self.some_task() for _ in range(3)) if t and t.tenant == task.tenant
            ]
            ids = [task.id, *(t.id for t in more if self.rng.random() < 0.5)]
            self.end(task.tenant, ids, self.caller(task))

    def end(self, tenant: str, ids: list[bytes], who: tuple[str, str]) -> None:
        rng = self.rng
        completed = rng.random() < 0.8
        result = rng.choice([b"1", b"1", b"[2,  3]"])
        specs = [
            {"id": i, "completed": completed, "result": result, "error": "broken"} for i in ids
        ]
        finishes = Finishes()
        for spec in specs:
            status = b"COMPLETED" if completed else b"FAILED"
            error = b"" if completed else b"broken"
            finishes.add(format_id(spec["id"]).encode(), status, result=result, error=error)
        finishes.check(1 << 20, lenient_error=True)
        self.engine.specs[id(finishes)] = specs
        self.kept.append(finishes)
        expected = self.expected_codes(specs, tenant, *who)
        known = {i: self.model.tasks.get(i) for i in ids}

        def check() -> None:
            for code, wanted, task_id in zip(finishes.codes, expected, ids, strict=True):
                task = known[task_id]
                ended = task is not None and task.state in FINAL
                assert code == wanted or (ended and self.went(task) and code == TASK_NOT_FOUND)

        self.shard.finish(finishes, tenant, *who, lambda: answered())
        answered = self.expect("finish", check)

    def expected_codes(
        self, specs: list[dict[str, Any]], tenant: str, worker: str, subject: str
    ) -> list[int]:
        codes: list[int] = []
        taken: set[bytes] = set()
        for spec in specs:
            task = self.model.find(spec["id"], tenant)
            if task is None:
                codes.append(TASK_NOT_FOUND)
            elif task.id in taken:
                codes.append(NOT_IN_PROGRESS)
            elif task.state in FINAL:
                if self.model.seen(task.id, tenant, self.clock.now_ms()) is None:
                    codes.append(TASK_NOT_FOUND)
                    continue
                taken.add(task.id)
                codes.append(OK if _repeats(task, spec, worker, subject) else NOT_IN_PROGRESS)
            else:
                codes.append(self.model.check(task, worker, subject, -1))
                if codes[-1] == OK:
                    taken.add(task.id)
        return codes

    # --- what operators do

    def cancel(self) -> None:
        waiting = [task for task in self.model.busy if task.state in LIVE]
        task = self.rng.choice(waiting) if waiting and self.rng.random() < 0.7 else self.some_task()
        if task is None:
            return
        tenant = task.tenant if self.rng.random() < 0.9 else "other"
        known = self.model.seen(task.id, tenant, self.clock.now_ms())
        ends = known is not None and known.state in (READY, DELAYED)

        def check(code: int, view: Any) -> None:
            if ends:
                assert code == OK and (view is None or view.error == "CANCELLED")
            elif known is None:
                # As long as an ended task is in memory it is known not to wait.
                assert code == NOT_FOUND or task.state in FINAL
            else:
                ended = known.state in FINAL
                assert code == NOT_PENDING or (ended and self.went(known) and code == NOT_FOUND)

        self.shard.cancel(format_id(task.id), tenant, lambda *answer: answered(*answer))
        answered = self.expect("cancel", check)

    def dead_letters(self) -> None:
        rng, queues = self.rng, self.shard.queues
        known = [(t.tenant, t.command) for t in self.model.busy if t.state == DEAD]
        tenant, command = rng.choice(known or [(rng.choice(TENANTS), rng.choice(COMMANDS))])
        ids = [format_id(t.id) for t in (self.some_task() for _ in range(4)) if t]
        dead = self.model.waiting(tenant, command, [DEAD])
        ids += [format_id(task.id) for task in dead[::2]]
        operation = rng.choice([queues.requeue, queues.purge_dead])
        limit = rng.choice([1, 3, 10_000])
        operation(tenant, command, rng.choice([None, ids]), limit, lambda count: None)

    def purge_queue(self) -> None:
        ready, delayed = self.rng.choice([(True, False), (False, True), (True, True)])
        tenant, command = self.rng.choice(TENANTS), self.rng.choice(COMMANDS)
        self.shard.queues.purge_waiting(
            tenant, command, ready=ready, delayed=delayed, done=lambda count: None
        )

    def pause(self) -> None:
        queue = self.rng.choice(TENANTS), self.rng.choice(COMMANDS)
        was = self.model.paused.get(queue)
        change = self.shard.queues.resume if was else self.shard.queues.pause
        change(*queue, lambda: answered())
        answered = self.expect("pause", lambda: None, writes=True)

    def clean_up(self) -> None:
        tenant = self.rng.choice([*TENANTS, "mass"])
        before_ms = self.clock.now_ms() + self.rng.choice([0, 2000, 10**12])
        self.shard.cleanup.run(tenant, before_ms, self.rng.choice([1, 50, 10_000]), lambda n: None)

    def swept(self, found: Any, take_away: Callable[[Any], None]) -> None:
        """Cleanup takes tasks out of their directories."""
        take_away(found)
        for _, view in found.tasks:
            task = self.model.tasks[view.id_bytes]
            assert task.state in FINAL or task.state == GONE, "cleanup took a live task"
            if task.state != GONE:
                self.model.set(task, state=GONE)
                self.model.swept[task.id] = self.store.written + 1

    def list_tasks(self) -> None:
        """Every page of a list, of which each task is there once and in its place."""
        self.quiet()
        tenant, command = self.rng.choice([*TENANTS, "mass"]), self.rng.choice([None, *COMMANDS])
        states = self.rng.choice([[READY, DELAYED], [COMPLETED], [FAILED, DEAD], range(1, 7)])
        wanted = Wanted(
            tenant.encode(), command and command.encode(), sum(1 << state for state in states)
        )
        begin: int | None = 0
        got: list[Any] = []
        while begin is not None:
            pages: list[Any] = []
            count_max = self.rng.choice([7, 1000])
            self.shard.listing.page(
                wanted, begin, count_max, 1 << 20, lambda *page, pages=pages: pages.append(page)
            )
            self.quiet()
            [(views, begin)] = pages
            assert len(views) <= count_max
            got += views
        now_ms = self.clock.now_ms()
        expected = [
            task
            for task in self.model.tasks.values()
            if self.model.seen(task.id, tenant, now_ms) is not None
            and task.state in states
            and command in (None, task.command)
        ]
        expected.sort(key=lambda task: task.number)
        assert [view.id_bytes for view in got] == [task.id for task in expected]
        for view, task in zip(got, expected, strict=True):
            self.same(view, task, now_ms)

    # --- reads

    def get(self) -> None:
        task = self.some_task()
        if task is None or self.rng.random() < 0.1:
            task_id = bytes(6) + b"\x70\0\x80" + bytes(7)  # the number 0, of another store
            answered = self.expect("get", lambda view: self.same(view, None, 0))
            self.shard.get(format_id(task_id), "acme", answered)
            return
        tenant = task.tenant if self.rng.random() < 0.9 else "other"
        now_ms = self.clock.now_ms()
        known = self.model.seen(task.id, tenant, now_ms)
        looks = self.engine.looked.setdefault(task.id, [])
        first = len(looks)

        def check(view: Any) -> None:
            """A record that moved meanwhile is looked up again, and is then as it was then."""
            same = [t for t in looks[first:] if view and (t.state, t.attempts) == _state(view)]
            self.same(view, same[0] if same and known else known, now_ms)

        self.shard.get(format_id(task.id), tenant, lambda view: answered(view))
        answered = self.expect("get", check)

    def wait_for_result(self) -> None:
        task = self.some_task()
        if task is None:
            return
        got: list[Any] = []
        wait_ms = self.rng.choice([0, 500, 20_000])
        wait = self.shard.result(format_id(task.id), task.tenant, wait_ms, got.append)
        if wait is not None:
            self.waits.append((wait, task.id, self.clock.now_ms() + wait_ms, got))

    def cancel_wait(self) -> None:
        if self.waits:
            wait, _, _, got = self.waits.pop(self.rng.randrange(len(self.waits)))
            wait.cancel()
            assert len(got) <= 1

    # --- the world

    def time_passes(self) -> None:
        self.runner.advance(self.rng.choice([0, 1, 400, 1000, 1000, 3000, 20_000]))

    def clock_jumps(self) -> None:
        """As after a suspended machine: no timer saw it."""
        self.clock.advance(self.rng.choice([1, 700, 5000]))

    def threads_stall(self) -> None:
        self.runner.hold_syncs = self.rng.random() < 0.6
        self.runner.hold_reads = self.rng.random() < 0.6

    def threads_work(self) -> None:
        for _ in range(self.rng.randrange(4)):
            self.rng.choice([self.runner.sync_one, self.runner.read_one, self.runner.answer_one])()
            if self.rng.random() < 0.5:
                self.runner.settle()

    def crash(self) -> None:
        keep = self.rng.random() < 0.5
        self.model.forget_after(self.store.written if keep else self.store.synced)
        self.store = self.store.crash(keep)
        self.open()
        self.quiet()
        self.check_all()

    def quiet(self) -> None:
        """Everything at hand is done: nobody may be left waiting who could be served."""
        self.runner.hold_syncs = self.runner.hold_reads = False
        self.shard.journal.kick()
        self.runner.settle()
        self.runner.advance(0)
        assert self.faults == []
        assert self.waiting == {}, "not answered"
        self.check_owed()
        for _, request, state in self.waiters:
            if not state["over"]:
                assert request.wait, "not answered"
                names = request.commands and [c.decode() for c in request.commands]
                assert not self.model.ready(request.tenant, names, False), "left waiting"
        for _, task_id, end_ms, got in self.waits:
            ended = self.model.tasks[task_id].state not in LIVE
            assert len(got) == (ended or end_ms <= self.clock.now_ms()) or got
        self.engine.verify()
        for tenant in TENANTS:
            for command in COMMANDS:
                counts = self.engine.stats(tenant.encode(), command.encode())
                assert counts == self.model.stats(tenant, command)
                paused = bool(self.model.paused.get((tenant, command)))
                assert self.shard.queues.paused(tenant, command) == paused

    def twin(self) -> None:
        """I8: memory is what a scan of the store gives."""
        self.quiet()
        if self.settings["lease_grace_seconds"] == 0:
            assert self.engine.pending_records == 0
            assert self.loaded(0).digest() == self.engine.digest(), "I8"

    def restart(self) -> None:
        self.twin()
        self.model.forget_after(self.store.written)
        self.store = self.store.crash(True)
        self.open()
        self.quiet()
        self.check_all()

    def check_all(self) -> None:
        """Every task of the model is there as it should be, or gone as it should be (of the mass,
        some)."""
        now_ms = self.clock.now_ms()
        for task in list(self.model.tasks.values()):
            if task.tenant == "mass" and task.number % MASS_LOOKS:
                continue
            known = self.model.seen(task.id, task.tenant, now_ms)
            check = self.expect("get", lambda view, known=known: self.same(view, known, now_ms))
            self.shard.get(format_id(task.id), task.tenant, check)
        self.quiet()

    def check_owed(self) -> None:
        """T18: every pending webhook on disk was announced, counted once, and no more are."""
        deliveries = self.shard.deliveries
        keys = [key for key, _ in self.store.scan(b"w", b"x")]
        assert all(key < deliveries.end for key in keys)
        assert deliveries.pending == sum(deliveries.pending_by.values()) == len(keys)

    # --- the whole

    def run(self) -> None:
        weights: dict[Callable[[], None], int] = {
            self.create: 20,
            self.claim: 18,
            self.hand_over: 20,
            self.cancel_waiter: 2,
            self.lease_call: 14,
            self.finish: 12,
            self.get: 6,
            self.wait_for_result: 2,
            self.cancel_wait: 1,
            self.mass: 8,
            self.cancel: 4,
            self.dead_letters: 6,
            self.purge_queue: 1,
            self.pause: 2,
            self.clean_up: 2,
            self.list_tasks: 2,
            self.time_passes: 12,
            self.clock_jumps: 1,
            self.threads_stall: 6,
            self.threads_work: 8,
            self.runner_settles: 14,
            self.crash: 1,
            self.restart: 1,
            self.twin: 2,
        }
        if self.rng.random() < 0.5:  # threads that stand still for seconds, again and again
            weights |= {self.threads_stall: 15, self.threads_work: 25, self.runner_settles: 25}
            weights |= {self.time_passes: 25, self.twin: 0, self.list_tasks: 0}
        for operation in self.rng.choices([*weights], [*weights.values()], k=STEPS):
            operation()
        self.quiet()
        self.check_all()
        self.run_down()

    def runner_settles(self) -> None:
        self.runner.settle()

    def run_down(self) -> None:
        """All work ends, all keeping times end: nothing may be left."""
        while self.waiters:
            self.cancel_waiter()
        for queue in [queue for queue, paused in self.model.paused.items() if paused]:
            self.shard.queues.resume(*queue, lambda: None)
        for _ in range(40):
            self.quiet()
            while self.hands:
                self.hand_over()
            live = [t for t in self.model.busy if t.state in LIVE]
            for tenant in sorted({task.tenant for task in live}):
                self.claim_as(tenant, None, ("w1", "s1"), 10_000, None, wait=False)
            self.runner.settle()
            for task in [t for t in self.model.busy if t.state == LEASED]:
                self.end(task.tenant, [task.id], (task.worker, task.subject))
            due_ms = self.engine.next_due_ms() or 0
            self.clock.advance(max(3000, due_ms - self.clock.now_ms()))
            self.runner.advance(1000)
            if not live:
                break
        for tick in range(8):
            self.clock.advance(100_000 if tick < 3 else 0)
            self.runner.advance(1000)
        self.mass()
        for tick in range(8):
            self.clock.advance(100_000 if tick < 3 else 0)
            self.runner.advance(1000)
        self.quiet()
        assert self.model.busy == []
        assert self.engine.queues(None) == [] and self.engine.body_bytes == 0
        assert (self.engine.live_tasks, self.engine.next_due_ms()) == (0, None)
        if self.settings["straggler_slack_bytes"] == 0:
            self.check_removed()
        self.check_all()

    def check_removed(self) -> None:
        """T44: of the log only the segment that is being filled is left, and no entry below it."""
        head = self.store.get([b"mhead"])[0]
        next_seq = int.from_bytes(head[24:32], "little")
        assert self.engine.tail >= next_seq // 512 * 512
        for key, value in self.store.scan(b"a", b"z"):
            if key[:1] == b"c":
                assert int.from_bytes(key[1:], "big") >= self.engine.tail
            elif key[:1] in b"dew":
                assert int.from_bytes(value[:8], "big") >= self.engine.tail, key
            elif key[:1] == b"s":
                assert int.from_bytes(key[1:], "big") >= self.engine.tail // 512
            else:
                assert key[:1] == b"m", key


def _state(view: Any) -> tuple[int, int]:
    return view.state, view.attempts


def _repeats(task: Task, spec: dict[str, Any], worker: str, subject: str) -> bool:
    mine = worker == task.worker if worker else subject in (task.worker, task.subject)
    completed = task.error == ""
    return mine and (completed, task.result) == (spec["completed"], spec["result"])
