"""One node's tasks: engine, journal and store behind the operations that the edges call.

Every method runs on the loop thread, decides at once and answers through a callback, never before
it returns and never before everything the answer rests on is on disk. Ids are texts as the client
sent them; refusals are the numbers of codeq.errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from codeq import errors
from codeq.engine import _engine, targets
from codeq.engine._engine import Claim, Engine
from codeq.engine._views import TaskView
from codeq.engine._wire import Creates, Finishes, parse_id
from codeq.engine.backup import Backups
from codeq.engine.claims import ClaimRequest, Claims, Delivery, Waiter
from codeq.engine.cleanup import Cleanup
from codeq.engine.clock import Clock
from codeq.engine.deliveries import Deliveries
from codeq.engine.journal import Journal, Runner
from codeq.engine.keys import Keys
from codeq.engine.listing import Listing
from codeq.engine.pauses import Pauses
from codeq.engine.policies import Policies
from codeq.engine.queues import Queues
from codeq.engine.reader import LOOKS_MAX, Reader
from codeq.engine.recovery import last_id_ms, recover
from codeq.engine.retention import Retention
from codeq.engine.store import Store
from codeq.engine.subscriptions import Subscriptions
from codeq.errors import StoreError

log = logging.getLogger("codeq.shard")

TICK_TASKS_MAX = 2_000
#: Tasks claimed, and tasks that came due, for one commit group: it becomes one write, which holds
#: the loop. What is left comes first in the next.
GROUP_CLAIMS_MAX = 10_000
GROUP_DUE_MAX = 10_000
#: A group of so many bytes takes in no more creates and results: those wait for the next.
GROUP_BYTES_MAX = 1 << 20
MAINTENANCE_MS = 1_000

Number = int
__all__ = ["ClaimRequest", "Delivery", "ResultWait", "Shard", "ShardSettings", "TaskView", "Waiter"]


class ShardSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard needs of the settings; names and defaults as in the settings tree."""

    path: Path
    backup_dir: Path = Path("codeq-backups")
    fsync_on_commit: bool = True
    num_shards: int = 1
    default_lease_seconds: int = 300
    lease_max_seconds: int = 86_400
    max_attempts_default: int = 5
    backoff_policy: str = "exp_full_jitter"
    backoff_base_seconds: int = 5
    backoff_max_seconds: int = 900
    nack_delay_max_seconds: int = 86_400
    idempotency_window_seconds: int = 86_400
    idempotency_lenient: bool = False
    retention_seconds: int = 86_400
    dead_retention_seconds: int = 604_800
    lease_grace_seconds: int = 10
    live_tasks_max: int = 0
    payload_memory_bytes: int = 512 << 20
    journal_pending_bytes: int = 64 << 20
    disk_reserve_bytes: int = 1 << 30
    payload_bytes_max: int = 4_128_768
    commit_creates_max: int = 1_000
    commit_results_max: int = 1_000
    command_labels_max: int = 1_000
    straggler_slack_bytes: int = 256 << 20  # dead bytes of the log for which nothing is carried
    webhooks_private: bool = False
    subscription_cleanup_seconds: int = 60


class ResultWait:
    """Somebody who waits for the end of a task. ``cancel`` forgets it."""

    def __init__(
        self, waits: dict[bytes, list[ResultWait]], task_id: bytes, end: Callable[[], None]
    ) -> None:
        self._waits = waits
        self._task_id = task_id
        self._end: Callable[[], None] | None = end
        self.stop_timer: Callable[[], None] | None = None
        waits.setdefault(task_id, []).append(self)

    def cancel(self) -> None:
        self._end = None
        if self.stop_timer is not None:
            self.stop_timer()
        others = self._waits.get(self._task_id, [])
        if self in others:
            others.remove(self)
            if not others:
                del self._waits[self._task_id]

    def finish(self) -> None:
        """The task ended or the wait is over; calls back once."""
        end = self._end
        self.cancel()
        if end is not None:
            end()


class Shard:
    """Every operation on the tasks of one data folder. Make it with ``open``.

    What operators do to whole queues is in ``queues``, ``policies``, ``listing`` and ``cleanup``.
    """

    def __init__(
        self,
        settings: ShardSettings,
        clock: Clock,
        runner: Runner,
        store: Store,
        engine: Engine,
        fault: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.engine = engine
        self.ready = True
        self.refused_because = errors.UNAVAILABLE.message
        self._free_bytes = store.free_bytes()
        self._runner = runner
        self._store = store
        self._claims = Claims(engine)
        self._keys = Keys(
            engine,
            store,
            settings.idempotency_window_seconds * 1000,
            last_id_ms(store),
            lenient=settings.idempotency_lenient,
        )
        self._waits: dict[bytes, list[ResultWait]] = {}
        self._due: tuple[int, Callable[[], None]] | None = None
        self._more_due = False
        self._stop_maintenance: Callable[[], None] = lambda: None
        self.journal = Journal(
            store,
            clock,
            runner,
            close_group=self._close_group,
            take=self._take,
            fault=fault,
            sync=settings.fsync_on_commit,
        )
        self._pauses = Pauses(engine, store, self.journal)
        self.policies = Policies(engine, store, clock, self.journal)
        self._reader = Reader(engine, store, runner, self.journal)
        self.queues = Queues(engine, clock, self.journal, self._pauses)
        self.listing = Listing(engine, store, clock, runner, self.journal)
        self.cleanup = Cleanup(engine, store, clock, runner, self.journal)
        self.deliveries = Deliveries(engine, store, runner, self.journal)
        self.subscriptions = Subscriptions(
            engine,
            store,
            runner,
            self.journal,
            clock,
            self._pauses,
            settings.subscription_cleanup_seconds * 1000,
        )
        self.backups = Backups(
            settings.backup_dir, store, clock, runner, settings.disk_reserve_bytes
        )
        self._retention = Retention(
            engine, store, clock, runner, self.journal, self._keys, self.deliveries
        )
        self._maintain()
        self.journal.kick()

    @classmethod
    def open(
        cls, settings: ShardSettings, clock: Clock, runner: Runner, fault: Callable[[str], None]
    ) -> Shard:
        """Opens the folder and rebuilds memory from it. Raises StoreError in one clear line.

        ``fault`` is told when a write or sync fails; the process must then end.
        """
        store = Store(settings.path)
        try:
            engine = Engine(
                seed=clock.entropy(),
                shard_count=settings.num_shards,
                payload_memory_bytes=settings.payload_memory_bytes,
                retention_ms=settings.retention_seconds * 1000,
                dead_retention_ms=settings.dead_retention_seconds * 1000,
                key_window_ms=settings.idempotency_window_seconds * 1000,
                max_attempts_default=settings.max_attempts_default,
                backoff_policy=settings.backoff_policy,
                backoff_base_ms=settings.backoff_base_seconds * 1000,
                backoff_max_ms=settings.backoff_max_seconds * 1000,
                command_labels_max=settings.command_labels_max,
                straggler_slack_bytes=settings.straggler_slack_bytes,
            )
            recover(
                engine,
                store,
                clock,
                settings.num_shards,
                settings.lease_grace_seconds * 1000,
                settings.idempotency_window_seconds * 1000,
            )
            return cls(settings, clock, runner, store, engine, fault)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Closes the store. Everything answered is on disk already; the rest was never promised.

        The helper threads of the runner must have ended: the store cannot be closed under them.
        """
        self.ready = False
        self.journal.stop()
        self._stop_maintenance()
        self.subscriptions.stop()
        if self._due is not None:
            self._due[1]()
        self._store.sync(self._store.sequence())
        self._store.close()

    def drain(self, done: Callable[[], None]) -> None:
        """Calls ``done`` when everything decided so far is on disk."""
        self.journal.after(done)

    def at(self, when_ms: int, call: Callable[[], None]) -> Callable[[], None]:
        """Calls ``call`` at that time of the clock, never before; returns what cancels it."""
        return self._runner.at(when_ms, call)

    @property
    def waiting_claims(self) -> int:
        """Claims that are parked until a task comes."""
        return self._claims.parked

    def waiting_claims_of(self, tenant: str) -> int:
        """Those of one tenant."""
        return self._claims.parked_by.get(tenant, 0)

    @property
    def disk_free_bytes(self) -> int:
        return self._store.free_bytes()

    # --- creates

    def create(
        self,
        creates: Creates,
        tenant: str,
        done: Callable[[list[TaskView | None] | None], None],
        *,
        views: bool = False,
    ) -> None:
        """Makes tasks of a batch. When ``done`` is called its codes and ids are final.

        A batch longer than ``commit_creates_max`` is made in that many a commit. ``views``:
        ``done`` gets the task of each accepted item as it is now (None for a refused one).
        """
        creates.check(self.settings.payload_bytes_max)
        for index, url in creates.webhooks():
            if not self.target_valid(url):
                creates.refuse(index, errors.WEBHOOK_INVALID.number or 0)
        self._create_part(creates, tenant, 0, partial(self._created, creates, tenant, done, views))

    def _create_part(
        self, creates: Creates, tenant: str, begin: int, done: Callable[[], None]
    ) -> None:
        now_ms = self.clock.now_ms()
        end = min(len(creates), begin + self.settings.commit_creates_max)
        because = self.refuses_creates
        if because is not None:
            self.refused_because = because
            for index, code in enumerate(creates.codes[begin:end], begin):
                if code == errors.OK:
                    creates.refuse(index, errors.UNAVAILABLE.number or 0)
        try:
            fresh = self._keys.resolve(creates, tenant, now_ms, begin, end)
        except StoreError as error:
            self.journal.fail(error.message)
            return
        before = self.engine.pending_bytes
        self.engine.create(creates, tenant.encode(), now_ms, begin, end)
        # Between two looks at the disk: what is written now to the log, and later to its table.
        self._free_bytes -= 2 * (self.engine.pending_bytes - before)
        if fresh:
            for key, value in self._keys.note(creates, fresh, now_ms):
                self.journal.put(key, value)
        if end == len(creates):
            done()
        else:
            self.journal.after(partial(self._create_part, creates, tenant, end, done))

    def _created(
        self,
        creates: Creates,
        tenant: str,
        done: Callable[[list[TaskView | None] | None], None],
        views: bool,
    ) -> None:
        if views:
            now_ms = self.clock.now_ms()
            self._reader.views(creates.accepted_ids(), tenant.encode(), now_ms, done)
        else:
            self.journal.after(lambda: done(None))

    def target_valid(self, url: str) -> bool:
        """Whether the URL may be a webhook or callback, as far as it can be told without asking for
        its address."""
        return targets.is_valid(url, private=self.settings.webhooks_private)

    @property
    def refuses_creates(self) -> str | None:
        """Why creates are refused at the moment; claims, results and removal go on."""
        settings, engine = self.settings, self.engine
        if self._free_bytes < settings.disk_reserve_bytes:
            return "the free space of the disk is down to its reserve"
        if settings.live_tasks_max and engine.live_tasks >= settings.live_tasks_max:
            return "there are as many live tasks as allowed"
        if engine.pending_bytes > settings.journal_pending_bytes:
            return "too much waits to be written to disk"
        return None

    @property
    def group_full(self) -> bool:
        """Whether the open commit group is as large as one write should be: the edges then wait
        with what they have read, or read no more, until it is written."""
        return self.engine.pending_bytes >= GROUP_BYTES_MAX

    # --- claims

    def claim(self, request: ClaimRequest) -> Waiter:
        """Takes up a claim; it is served with the open commit group, or parked."""
        waiter = self._claims.add(request)
        self.journal.kick()
        return waiter

    def _served(self, waiter: Waiter, claim: Claim | None) -> None:
        if claim is None:
            self.journal.after(lambda: None if waiter.cancelled else waiter.request.deliver(None))
        else:
            self.journal.after(lambda: self._load_bodies(waiter, claim, 1))

    def _load_bodies(self, waiter: Waiter, claim: Claim, look: int) -> None:
        missing = claim.missing()
        if not missing or waiter.cancelled:
            self._deliver(waiter, claim, {})
            return

        def got(chunks: Mapping[int, bytes]) -> None:
            if chunks.keys() >= set(claim.missing()):
                self._deliver(waiter, claim, chunks)
            elif look < LOOKS_MAX:  # carried to another chunk meanwhile
                self.journal.after(lambda: self._load_bodies(waiter, claim, look + 1))
            else:
                self.journal.fail(f"the store is damaged: of the chunks {missing} some are missing")

        self._reader.chunks(missing, got)

    def _deliver(self, waiter: Waiter, claim: Claim, chunks: Mapping[int, bytes]) -> None:
        if waiter.cancelled:
            self._give_back(claim)
        elif self.clock.now_ms() >= claim.lease_until_ms:
            self._give_back(claim)
            self._claims.again(waiter)
        else:
            waiter.request.deliver(Delivery(self.engine, claim, chunks, self._give_back))

    def _give_back(self, claim: Claim) -> None:
        self.engine.give_back(claim, self.clock.now_ms())
        self.journal.kick()

    # --- lease calls

    def heartbeat(
        self,
        task_id: str,
        tenant: str,
        worker: str,
        subject: str,
        lease_ms: int,
        done: Callable[[Number], None],
        *,
        attempt: int = -1,
    ) -> None:
        """Sets the lease end to now + ``lease_ms``. ``worker`` "" = none named; ``attempt`` < 0 =
        any."""
        found = parse_id(task_id) or _NO_ID
        now_ms = self.clock.now_ms()
        code = self.engine.heartbeat(
            found, tenant.encode(), worker.encode(), subject.encode(), attempt, lease_ms, now_ms
        )
        self._answer_lease_call(code, found, tenant, done)

    def abandon(
        self,
        task_id: str,
        tenant: str,
        worker: str,
        subject: str,
        done: Callable[[Number], None],
        *,
        attempt: int = -1,
    ) -> None:
        """Gives the task back untried."""
        found = parse_id(task_id) or _NO_ID
        now_ms = self.clock.now_ms()
        code = self.engine.abandon(
            found, tenant.encode(), worker.encode(), subject.encode(), attempt, now_ms
        )
        self._answer_lease_call(code, found, tenant, done)

    def nack(
        self,
        task_id: str,
        tenant: str,
        worker: str,
        subject: str,
        delay_seconds: int | None,
        reason: str,
        done: Callable[[Number, int, bool], None],
        *,
        attempt: int = -1,
    ) -> None:
        """Gives the task back after a failed try: ``done(code, applied delay in s, dead letter)``.

        ``delay_seconds`` None or negative = backoff by policy; a longer one than allowed is cut.
        """
        found = parse_id(task_id) or _NO_ID
        delay_ms = -1
        if delay_seconds is not None and delay_seconds >= 0:
            delay_ms = min(delay_seconds, self.settings.nack_delay_max_seconds) * 1000
        code, applied_ms, dead = self.engine.nack(
            found,
            tenant.encode(),
            worker.encode(),
            subject.encode(),
            attempt,
            delay_ms,
            reason.encode("utf-8", "replace"),
            self.clock.now_ms(),
        )
        applied_s = -(-applied_ms // 1000)
        self._answer_lease_call(code, found, tenant, lambda code: done(code, applied_s, dead))

    def _answer_lease_call(
        self, code: Number, task_id: bytes, tenant: str, done: Callable[[Number], None]
    ) -> None:
        if code != _ABSENT:
            self.journal.after(lambda: done(code))
            return

        def found(views: list[TaskView | None]) -> None:
            row = errors.NOT_FOUND if views[0] is None else errors.NOT_IN_PROGRESS
            done(row.number or 0)

        self._reader.views([task_id], tenant.encode(), self.clock.now_ms(), found)

    # --- results

    def finish(
        self,
        finishes: Finishes,
        tenant: str,
        worker: str,
        subject: str,
        done: Callable[[], None],
        *,
        attempt: int = -1,
    ) -> None:
        """Ends the tasks of a batch. When ``done`` is called its codes and times are final.

        A result that repeats the stored one, from the same owner, is answered as the first was.
        """
        self._finish_part(finishes, tenant, worker, subject, attempt, 0, done)

    def _finish_part(
        self,
        finishes: Finishes,
        tenant: str,
        worker: str,
        subject: str,
        attempt: int,
        begin: int,
        done: Callable[[], None],
    ) -> None:
        end = min(len(finishes), begin + self.settings.commit_results_max)
        owner = (tenant.encode(), worker.encode(), subject.encode())
        now_ms = self.clock.now_ms()
        ended = self.engine.finish(finishes, *owner, attempt, now_ms, begin, end)
        if end != len(finishes):
            rest = (finishes, tenant, worker, subject, attempt, end, done)
            self.journal.after(partial(self._finish_part, *rest))
        elif ended == len(finishes):
            self.journal.after(done)
        else:
            self._finish_repeats(finishes, tenant, worker, subject, done)

    def _finish_repeats(
        self,
        finishes: Finishes,
        tenant: str,
        worker: str,
        subject: str,
        done: Callable[[], None],
    ) -> None:
        late = [i for i, code in enumerate(finishes.codes) if code in (_ENDED, _ABSENT)]
        if not late:
            self.journal.after(done)
            return

        def compare(views: list[TaskView | None]) -> None:
            self._answer_repeats(finishes, late, views, worker, subject)
            done()

        ids: list[bytes | None] = [finishes.id_bytes(i) for i in late]
        self._reader.views(ids, tenant.encode(), self.clock.now_ms(), compare)

    def _answer_repeats(
        self,
        finishes: Finishes,
        late: list[int],
        views: Sequence[TaskView | None],
        worker: str,
        subject: str,
    ) -> None:
        accepted = [i for i, code in enumerate(finishes.codes) if code == errors.OK]
        seen = {finishes.id_bytes(i) for i in accepted}
        for index, view in zip(late, views, strict=True):
            if view is None:
                finishes.refuse(index, errors.TASK_NOT_FOUND.number or 0)
            elif view.id_bytes not in seen and _repeats(
                finishes.item(index), view, worker, subject
            ):
                finishes.accept(index, view.ended_ms, view.artifacts)
            else:
                finishes.refuse(index, errors.NOT_IN_PROGRESS.number or 0)
            if view is not None:
                seen.add(view.id_bytes)

    # --- cancel

    def cancel(
        self, task_id: str, tenant: str, done: Callable[[Number, TaskView | None], None]
    ) -> None:
        """Ends a task that waits: ``done(OK, the task)``, or the refusal's number and None.

        The task is None when its keeping time was over at once.
        """
        found = parse_id(task_id) or _NO_ID
        now_ms = self.clock.now_ms()
        code = self.engine.cancel(found, tenant.encode(), now_ms)
        if code not in (errors.OK, _ABSENT):
            self.journal.after(lambda: done(code, None))
            return

        def read(views: list[TaskView | None]) -> None:
            if code == errors.OK:
                done(code, views[0])
            else:
                row = errors.NOT_FOUND if views[0] is None else errors.NOT_PENDING
                done(row.number or 0, None)

        self._reader.views([found], tenant.encode(), now_ms, read)

    # --- reads

    def get(self, task_id: str, tenant: str, done: Callable[[TaskView | None], None]) -> None:
        """The task as it is now, or None."""
        self._reader.views(
            [parse_id(task_id)], tenant.encode(), self.clock.now_ms(), lambda views: done(views[0])
        )

    def result(
        self, task_id: str, tenant: str, wait_ms: int, done: Callable[[TaskView | None], None]
    ) -> ResultWait | None:
        """The task once it has ended, or as it is after ``wait_ms``; None at once when there is
        none.

        Returns a handle while it waits.
        """
        found = parse_id(task_id)
        view = None if found is None else self.engine.view(found, tenant.encode())
        live = view is not None and view.state in (_engine.READY, _engine.DELAYED, _engine.LEASED)
        if found is None or not live or wait_ms <= 0 or not self.engine.watch(found):
            self.get(task_id, tenant, done)
            return None
        wait = ResultWait(self._waits, found, lambda: self.get(task_id, tenant, done))
        wait.stop_timer = self._runner.at(self.clock.now_ms() + wait_ms, wait.finish)
        return wait

    # --- the open group, timers

    def _close_group(self) -> None:
        now_ms = self.clock.now_ms()
        self.engine.tick(now_ms, TICK_TASKS_MAX)  # what is due is there for the claims
        touched = self.engine.touched()
        if not self._claims.serve(now_ms, self._served, GROUP_CLAIMS_MAX, touched):
            self.journal.after(self.journal.kick)
        if touched and self.subscriptions.wanted:
            self.subscriptions.touched(touched)
        for task_id in self.engine.ended():
            for wait in list(self._waits.get(task_id, ())):
                wait.finish()
        self._arm()

    def _take(self) -> list[tuple[bytes, bytes]]:
        self._keys.written()
        puts = self.engine.take()
        self._retention.written(puts)
        self.deliveries.written(puts)
        return puts

    def _arm(self) -> None:
        if self._more_due:
            return
        due_ms = self.engine.next_due_ms()
        if self._due is not None:
            if due_ms is not None and self._due[0] <= due_ms:
                return
            self._due[1]()
            self._due = None
        if due_ms is not None:
            self._due = (due_ms, self._runner.at(due_ms, self._tick))

    def _tick(self) -> None:
        self._due = None
        moved = self.engine.tick(self.clock.now_ms(), TICK_TASKS_MAX)
        self._more_due = moved == TICK_TASKS_MAX  # the next tick is on its way
        if not self._more_due:
            self._arm()
            self.journal.kick()
        elif self.engine.pending_records < GROUP_DUE_MAX:
            self._runner.soon(self._tick)
            self.journal.kick()
        else:
            self.journal.after(self._tick)

    def _maintain(self) -> None:
        self.clock.follow()
        now_ms = self.clock.now_ms()
        self._stop_maintenance = self._runner.at(now_ms + MAINTENANCE_MS, self._maintain)
        due_ms = self.engine.next_due_ms()
        # Past its time: the clock stepped past the timer.
        if due_ms is not None and due_ms <= now_ms and not self._more_due:
            if self._due is not None:
                self._due[1]()
            self._tick()
        self._free_bytes = self._store.free_bytes()
        self._retention.run(now_ms)
        if self._free_bytes < self.settings.disk_reserve_bytes:
            self._retention.reclaim()


_ENDED = 100  # CQ_ENDED
_ABSENT = 101  # CQ_ABSENT
_NO_ID = bytes(16)


def _repeats(
    item: tuple[str, bytes | None, str, bytes, bytes], view: TaskView, worker: str, subject: str
) -> bool:
    """Whether a result is the stored one again, said by who said it first."""
    status, result, error, _, own_worker = item
    named = own_worker.decode() or worker
    stored_status = "COMPLETED" if view.state == _engine.COMPLETED else "FAILED"
    owner = (
        named == view.ended_worker if named else subject in (view.ended_worker, view.ended_subject)
    )
    return (
        owner
        and view.state != _engine.DEAD
        and status == stored_status
        and (result or b"null") == (view.result or b"null")
        and (status == "COMPLETED" or error == view.error)
    )
