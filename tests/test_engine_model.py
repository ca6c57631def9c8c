"""The engine against the reference: the same calls, the same answers, with a restart anywhere."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine_disk import BYTES_MAX, NOW, Disk, creates, results
from tests.reference import (
    ABSENT,
    COMPLETED,
    DEAD,
    DELAYED,
    FAILED,
    GONE,
    LEASED,
    OK,
    READY,
    Policy,
    Reference,
    Task,
)

TIMES = {
    "retention_ms": 50_000,
    "dead_retention_ms": 90_000,
    "key_window_ms": 120_000,
    "backoff_base_ms": 1_000,
    "backoff_max_ms": 5_000,
}
NO_TIER = 23
TENANTS = [b"acme", b"umbrella"]
COMMANDS = [b"mail", b"x/y:z", "проба".encode()]
WORKERS = [b"", b"w1", b"w2"]
SUBJECTS = [b"s1", b"w1"]

tenants = st.sampled_from(TENANTS)
commands = st.sampled_from(COMMANDS)
priorities = st.sampled_from([-(2**31), -1, 0, 0, 0, 7, 2**31 - 1])
delays = st.sampled_from([0, 0, 1, 3, 100])
waits_ms = st.sampled_from([0, 1, 500, 1_000, 5_000, 60_000, 200_000])
picks = st.integers(0, 10**6)
callers = st.tuples(
    st.sampled_from(WORKERS), st.sampled_from(SUBJECTS), st.sampled_from([-1, -1, 1, 2])
)


def number_of(task_id: bytes) -> int:
    """The place of a task among all creates, as its id has it."""
    high, low = int.from_bytes(task_id[:8], "big"), int.from_bytes(task_id[8:], "big")
    return (high & 0xFFF) << 36 | low >> 26 & ((1 << 36) - 1)


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_ms = NOW
        self.claims: list[Any] = []

    @initialize(memory=st.sampled_from([0, 300, 1 << 20]), shards=st.sampled_from([1, 4]))
    def start(self, memory: int, shards: int) -> None:
        self.disk = Disk(
            backoff_policy="exponential",
            payload_memory_bytes=memory,
            shard_count=shards,
            straggler_slack_bytes=0,
            **TIMES,
        )
        self.reference = Reference(**TIMES)

    @property
    def engine(self) -> Any:
        return self.disk.engine

    def pick(self, number: int, state: int | None = None) -> Task | None:
        tasks = [t for t in self.reference.tasks if state is None or t.state == state]
        return tasks[number % len(tasks)] if tasks else None

    def same_code(self, code: int, expected: int, task: Task) -> None:
        """An ended task may have left memory: then the engine knows nothing of it."""
        if code != expected:
            assert code == ABSENT and task.state in (COMPLETED, FAILED)
            assert self.engine.view(task.id, task.tenant) is None

    # --- calls

    @rule(
        tenant=tenants,
        command=commands,
        count=st.integers(1, 5),
        priority=priorities,
        delay_seconds=delays,
        max_attempts=st.sampled_from([0, 1, 2]),
        key=st.sampled_from([b"", b"", b"k"]),
        webhook=st.sampled_from([b"", b"", b"http://example.com/done"]),
        trace=st.sampled_from([b"", b"00-1-2-01"]),
    )
    def create(self, tenant: bytes, command: bytes, count: int, **fields: Any) -> None:
        trace = fields.pop("trace")
        batch = creates(
            count, command, b'"%d"' % len(self.reference.tasks), **fields, trace_parent=trace
        )
        made = self.engine.create(batch, tenant, self.now_ms)
        refused = 0
        for index in range(count):
            due_ms = self.now_ms + fields["delay_seconds"] * 1000
            task = Task(
                batch.id_bytes(index),
                tenant,
                command,
                b'"%d"' % (len(self.reference.tasks) - index),
                fields["priority"],
                fields["max_attempts"],
                self.now_ms,
                self.now_ms,
            )
            refused += not self.reference.create(task, due_ms, bool(fields["key"]))
        assert (made, refused) in ((count, 0), (0, count))
        assert batch.codes == bytes([NO_TIER if refused else OK]) * count

    @rule(count=st.sampled_from([200, 256, 300]))
    def create_many(self, count: int) -> None:
        """Enough to fill buckets; they end at once, so that buckets close."""
        batch = creates(count, b"mass", b"1")
        assert self.engine.create(batch, b"mass", self.now_ms) == count
        claim = self.engine.claim(
            b"mass", None, True, b"m", b"m", count, 1_000, BYTES_MAX, self.now_ms
        )
        self.engine.delivered(claim)
        ids = [batch.id_bytes(index) for index in range(count)]
        assert self.engine.finish(results(ids), b"mass", b"m", b"m", -1, self.now_ms) == count

    @rule(
        tenant=tenants,
        named=st.none() | st.lists(commands, min_size=1, max_size=4),
        in_order=st.booleans(),
        worker=st.sampled_from(WORKERS[1:]),
        subject=st.sampled_from(SUBJECTS),
        count=st.sampled_from([1, 2, 5, 2**31 - 1]),
        lease_ms=st.sampled_from([1, 1_000, 30_000]),
    )
    def claim(
        self,
        tenant: bytes,
        named: list[bytes] | None,
        in_order: bool,
        worker: bytes,
        subject: bytes,
        count: int,
        lease_ms: int,
    ) -> None:
        got = self.engine.claim(
            tenant, named, in_order, worker, subject, count, lease_ms, BYTES_MAX, self.now_ms
        )
        expected = self.reference.claim(
            tenant, named, in_order, worker, subject, count, lease_ms, self.now_ms, got
        )
        assert (0 if got is None else len(got)) == len(expected)
        if got is None:
            return
        assert got.lease_until_ms == self.now_ms + lease_ms
        self.disk.commit()
        views = self.engine.claimed_views(got, self.disk.chunks)
        assert [view.id_bytes for view in views] == [task.id for task in expected]
        for view, task in zip(views, expected, strict=True):
            self.same(view, task)
        self.claims.append(got)

    @precondition(lambda self: self.claims)
    @rule(number=picks, deliver=st.booleans())
    def hand_over(self, number: int, deliver: bool) -> None:
        got = self.claims.pop(number % len(self.claims))
        if deliver:
            self.engine.delivered(got)
            self.reference.delivered(got)
        else:
            back = self.engine.give_back(got, self.now_ms)
            assert back == self.reference.give_back(got, self.now_ms)

    @precondition(lambda self: self.reference.tasks)
    @rule(number=picks, caller=callers, tenant=tenants, lease_ms=st.sampled_from([1, 10_000]))
    def heartbeat(self, number: int, caller: Any, tenant: bytes, lease_ms: int) -> None:
        task = self.pick(number, LEASED) or self.pick(number)
        code = self.engine.heartbeat(task.id, tenant, *caller, lease_ms, self.now_ms)
        expected = self.reference.heartbeat(task.id, (tenant, *caller), lease_ms, self.now_ms)
        self.same_code(code, expected, task)

    @precondition(lambda self: self.reference.tasks)
    @rule(number=picks, caller=callers)
    def abandon(self, number: int, caller: Any) -> None:
        task = self.pick(number, LEASED) or self.pick(number)
        code = self.engine.abandon(task.id, task.tenant, *caller, self.now_ms)
        expected = self.reference.abandon(task.id, (task.tenant, *caller), self.now_ms)
        self.same_code(code, expected, task)

    @precondition(lambda self: self.reference.tasks)
    @rule(
        number=picks,
        caller=callers,
        delay_ms=st.sampled_from([-1, 0, 1_500]),
        reason=st.sampled_from([b"", b" ", b"why"]),
    )
    def nack(self, number: int, caller: Any, delay_ms: int, reason: bytes) -> None:
        task = self.pick(number, LEASED) or self.pick(number)
        answer = self.engine.nack(task.id, task.tenant, *caller, delay_ms, reason, self.now_ms)
        expected = self.reference.nack(
            task.id, (task.tenant, *caller), delay_ms, reason, self.now_ms
        )
        self.same_code(answer[0], expected[0], task)
        assert answer[1:] == expected[1:]

    @precondition(lambda self: self.reference.tasks)
    @rule(
        numbers=st.lists(picks, min_size=1, max_size=4),
        caller=callers,
        completed=st.booleans(),
        result=st.sampled_from([None, b"1", b'{"a":[1,2]}']),
    )
    def finish(
        self, numbers: list[int], caller: Any, completed: bool, result: bytes | None
    ) -> None:
        tasks = [self.pick(number, LEASED) or self.pick(number) for number in numbers]
        tenant, ids = tasks[0].tenant, [task.id for task in tasks]
        status = b"COMPLETED" if completed else b"FAILED"
        batch = results(ids, status, result, b"broken")
        before = [task.state for task in tasks]
        self.engine.finish(batch, tenant, *caller, self.now_ms)
        expected = self.reference.finish(
            [(i, completed, result, b"broken") for i in ids], (tenant, *caller), self.now_ms
        )
        for code, wanted, task, state in zip(batch.codes, expected, tasks, before, strict=True):
            if state in (COMPLETED, FAILED):
                self.same_code(code, wanted, task)
            else:
                assert code == wanted

    @precondition(lambda self: self.reference.tasks)
    @rule(number=picks, tenant=tenants, what=st.sampled_from(["cancel", "requeue", "purge"]))
    def manage(self, number: int, tenant: bytes, what: str) -> None:
        task = self.pick(number)
        code = getattr(self.engine, what)(task.id, tenant, self.now_ms)
        arguments = (tenant,) if what == "purge" else (tenant, self.now_ms)
        self.same_code(code, getattr(self.reference, what)(task.id, *arguments), task)

    @rule(
        tenant=tenants,
        command=commands,
        what=st.sampled_from([(READY,), (DELAYED,), (READY, DELAYED)]),
        count_max=st.sampled_from([1, 2, 1000]),
    )
    def cancel_many(
        self, tenant: bytes, command: bytes, what: tuple[int, ...], count_max: int
    ) -> None:
        tasks = self.reference.of_queue(tenant, command, what)[:count_max]
        count, _ = self.engine.cancel_many(
            tenant, command, READY in what, DELAYED in what, 0, 1 << 48, 10**6, count_max,
            self.now_ms,
        )  # fmt: skip
        assert count == len(tasks)
        for task in tasks:
            assert self.reference.cancel(task.id, tenant, self.now_ms) == OK

    @rule(
        tenant=tenants,
        command=commands,
        purge=st.booleans(),
        skip=st.sampled_from([0, 0, 1]),
        count_max=st.sampled_from([1, 2, 1000]),
    )
    def dead_many(
        self, tenant: bytes, command: bytes, purge: bool, skip: int, count_max: int
    ) -> None:
        tasks = self.reference.of_queue(tenant, command, (DEAD,))[skip:]
        begin = number_of(tasks[0].id) if tasks else 0
        tasks = tasks[:count_max]
        many = self.engine.purge_many if purge else self.engine.requeue_many
        if skip and not tasks:
            return
        count, after = many(tenant, command, begin, count_max, self.now_ms)
        assert count == len(tasks)
        for task in tasks:
            assert begin <= number_of(task.id) < after
            if purge:
                assert self.reference.purge(task.id, tenant) == OK
            else:
                assert self.reference.requeue(task.id, tenant, self.now_ms) == OK

    @rule(tenant=tenants, command=commands)
    def pause_or_resume(self, tenant: bytes, command: bytes) -> None:
        if (tenant, command) in self.reference.paused:
            self.engine.resume(tenant, command)
            assert (tenant, command) in self.engine.touched() or (
                self.engine.ready_count(tenant, command) == 0
            )
        else:
            self.engine.pause(tenant, command)
        self.reference.paused ^= {(tenant, command)}
        self.disk.paused = set(self.reference.paused)

    @rule(
        tenant=tenants,
        command=commands,
        policy=st.none()
        | st.builds(
            Policy,
            st.sampled_from([(0,), (0, 7), (3, 7), (7,)]),
            st.sampled_from([1, 3]),
            st.sampled_from([0, 1, 1, 2]),
            st.sampled_from([0, 1_000, 70_000]),
        ),
    )
    def govern(self, tenant: bytes, command: bytes, policy: Policy | None) -> None:
        if policy is None:
            self.reference.policies.pop((tenant, command), None)
            self.disk.policies.pop((tenant, command), None)
            self.engine.govern(tenant, command)
        else:
            tiers = sum(1 << tier for tier in policy.tiers)
            self.reference.policies[tenant, command] = policy
            self.disk.policies[tenant, command] = (tiers, *policy[1:])
            self.engine.govern(tenant, command, tiers, *policy[1:])
        self.engine.count_consumers()

    @rule(tenant=tenants, ahead_ms=st.sampled_from([0, 20_000, 10**12]))
    def clean_up(self, tenant: bytes, ahead_ms: int) -> None:
        """Of those whose keeping time was over before, some may have left the disk already."""
        self.disk.commit()
        before_ms = self.now_ms + ahead_ms
        over = [t for t in self.reference.tasks if t.ended_ms and t.expires_ms <= self.now_ms]
        gone = self.reference.forget(tenant, before_ms, 10**6)
        count = self.disk.clean_up(tenant, before_ms, self.now_ms)
        assert len([t for t in gone if t not in over]) <= count <= len(gone)

    @rule(
        tenant=tenants,
        command=st.none() | commands,
        states=st.sets(st.sampled_from(range(READY, GONE)), min_size=1),
        looks=st.sampled_from([1, 50, 10**6]),
        count_max=st.sampled_from([1, 3, 1000]),
    )
    def list_tasks(
        self, tenant: bytes, command: bytes | None, states: set[int], looks: int, count_max: int
    ) -> None:
        self.disk.commit()
        mask = sum(1 << state for state in states)
        got = [
            view.id_bytes
            for view in self.disk.listed(tenant, command, mask, looks, count_max)
            if not (view.has_record and view.expires_ms <= self.now_ms)
        ]
        assert got == [
            task.id
            for task in self.reference.tasks
            if task.tenant == tenant
            and command in (None, task.command)
            and task.state in states
            and not (task.ended_ms and task.expires_ms <= self.now_ms)
        ]

    @rule(wait_ms=waits_ms, ticks=st.booleans())
    def time_passes(self, wait_ms: int, ticks: bool) -> None:
        self.now_ms += wait_ms
        if ticks:
            self.tick()

    def tick(self) -> None:
        expected = self.reference.tick(self.now_ms)
        assert self.engine.tick(self.now_ms, 10**6) == expected
        assert self.engine.tick(self.now_ms, 10**6) == 0

    # --- the disk

    @rule()
    def commit(self) -> None:
        self.disk.commit()

    @rule()
    def pass_segments(self) -> None:
        """Moves the log on by more than a segment."""
        for _ in range(600):
            (task_id,) = self.filler()
            assert self.engine.cancel(task_id, b"filler", self.now_ms) == OK
            self.disk.commit()

    def filler(self) -> list[bytes]:
        batch = creates(1, b"filler", b"0")
        self.engine.create(batch, b"filler", self.now_ms)
        return [batch.id_bytes(0)]

    @rule()
    def carry(self) -> None:
        self.disk.commit()
        self.disk.carry(self.now_ms)

    @rule()
    def trim(self) -> None:
        self.disk.commit()
        self.disk.trim(self.now_ms)

    @rule()
    def restart(self) -> None:
        self.tick()
        self.disk.commit()
        assert self.engine.pending_bytes == 0 and self.engine.pending_records == 0
        old = self.disk.restart(self.now_ms)
        assert old.digest() == self.engine.digest()
        assert old.live_tasks == self.engine.live_tasks
        assert old.next_due_ms() == self.engine.next_due_ms()
        assert old.queues(None) == self.engine.queues(None)
        assert all(self.engine.holds(task.id) is not False for task in self.live())
        for got in self.claims:
            self.reference.delivered(got)  # after a restart every claim counts as delivered
        self.claims.clear()

    def live(self) -> list[Task]:
        return [task for task in self.reference.tasks if task.state <= LEASED]

    # --- what must hold after each step

    def same(self, view: Any, task: Task) -> None:
        assert (view.state, view.attempts, view.max_attempts) == (
            task.state,
            task.attempts,
            task.max_attempts,
        )
        assert (view.tenant.encode(), view.command.encode()) == (task.tenant, task.command)
        assert (view.payload, view.priority) == (task.payload, task.priority)
        assert (view.created_ms, view.updated_ms) == (task.created_ms, task.updated_ms)
        assert (view.due_ms, view.error.encode()) == (task.due_ms, task.error)
        assert (view.ended_ms, view.expires_ms) == (task.ended_ms, task.expires_ms)
        if task.state == LEASED:
            assert view.worker.encode() == task.worker
        if task.state in (COMPLETED, FAILED):
            assert view.result == task.result
            assert (view.ended_worker.encode(), view.ended_subject.encode()) == (
                task.worker,
                task.subject,
            )

    @invariant()
    def engine_is_sound(self) -> None:
        self.engine.verify()
        for tenant in TENANTS:
            for command in COMMANDS:
                stats = self.reference.stats(tenant, command)
                assert self.engine.stats(tenant, command) == stats
                self.limits_are_told(tenant, command, stats[0] > 0)
        live = sum(task.state <= LEASED for task in self.reference.tasks)
        assert self.engine.live_tasks == live
        assert self.engine.next_due_ms() == self.reference.next_due_ms()

    def limits_are_told(self, tenant: bytes, command: bytes, ready: bool) -> None:
        """Whether a queue has work that is not for all, and for whom it is."""
        policy = self.reference.policies.get((tenant, command))
        paused = (tenant, command) in self.reference.paused
        limited = ready and not paused and bool(policy and policy.consumers_max)
        assert self.engine.limited(tenant, command) == limited
        for worker in WORKERS[1:]:
            admitted = limited and self.reference.admits(tenant, command, worker)
            assert self.engine.limited(tenant, command, worker) == admitted

    @rule()
    def tasks_read_the_same(self) -> None:
        self.disk.commit()
        for task in self.reference.tasks:
            view = self.disk.look(task.id, task.tenant, self.now_ms)
            kept = task.state != GONE and not (task.ended_ms and task.expires_ms <= self.now_ms)
            assert (view is not None) == kept
            if view is not None:
                self.same(view, task)

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.tasks_read_the_same()
            self.restart()
            self.tasks_read_the_same()
            self.engine_is_sound()


TestEngineModel = EngineMachine.TestCase
TestEngineModel.settings = settings(max_examples=60, stateful_step_count=40)
