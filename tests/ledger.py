"""What a server has promised, as its clients saw it, and the rules every observation must keep.

A number stands for one create. It travels in the payload, so that a task can be told apart from
another with a different id that came from the same create. What a worker says of a task follows
from the two, so a result can be compared whoever sent it and however often.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

SKEW_SECONDS = 0.02  # two processes read the same clock, but not at the same moment
#: A delivery that is read so shortly before the end of its lease may count as none
LATE_SECONDS = 0.5
BACKOFF_SECONDS = 1  # of a nack without a delay


class Keeping(NamedTuple):
    """How long ended tasks and keys are kept, in seconds."""

    ended: int = 86_400
    window: int = 86_400


LONG = Keeping()


class Verdict(NamedTuple):
    """A result: COMPLETED with a JSON text, or FAILED with an error."""

    status: str
    text: str


def verdict(number: int, worker: str) -> Verdict:
    """What this worker always says of this task."""
    if (number * 7919 + sum(worker.encode())) % 10 == 0:
        return Verdict("FAILED", f"create {number} failed at {worker}")
    return Verdict("COMPLETED", json.dumps({"number": number, "worker": worker}))


@dataclass
class Entry:
    """One create and all that became known of it. Times are seconds on the client's clock."""

    number: int
    command: str
    key: str
    sent_at: float
    priority: int = 0
    delay_seconds: int = 0
    run_at_ms: int | None = None
    max_attempts: int = 0  # 0 = more than there will ever be
    after_id: str = ""  # the newest id acknowledged before this was sent
    task_id: str | None = None  # from an acknowledgement or a delivery
    acknowledged: bool = False
    not_before: float = 0.0  # no delivery may come earlier
    held_until: float = 0.0  # end of the lease last delivered; 0 when given back by us
    worker: str = ""  # of the last delivery
    deliveries: int = 0
    attempts: int = 0  # of the last delivery
    attempts_min: int = 1  # of the next delivery
    attempts_max: int = 1  # of the next delivery, if it comes in the same life
    life: int = 0  # of the server, in which this was last seen
    finishing: dict[str, float] = field(default_factory=dict)  # worker: when, not answered
    unread: int = 0  # claims that may have been between the last delivery and the result
    late: Counter[str] = field(default_factory=Counter)  # worker: answers due to earlier deliveries
    result: Verdict | None = None  # acknowledged
    nacked: bool = False  # acknowledged, and not delivered since
    dead: bool = False  # acknowledged as a dead letter
    end_sent_at: float = 0.0  # what ended it was sent no earlier

    @property
    def open(self) -> bool:
        """Whether the server owes this create an end, as far as we know."""
        known = self.result is not None or self.dead or bool(self.finishing)
        return self.task_id is not None and not known

    @property
    def verdicts(self) -> list[Verdict]:
        """With which results this task may have ended."""
        if self.result is not None:
            return [self.result]
        return [verdict(self.number, worker) for worker in self.finishing]


@dataclass
class Ledger:
    """Thread-safe; ``violations`` holds a sentence for each broken promise."""

    keeping: Keeping = LONG
    entries: dict[int, Entry] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)  # task id -> number
    violations: list[str] = field(default_factory=list)
    creates: int = 0
    backlog: int = 0  # creates acknowledged minus results acknowledged
    acknowledgements: int = 0
    deliveries: int = 0
    repeats: int = 0  # creates sent again that were answered before
    life: int = 0  # of the server and its clients: a claim nobody read ends with it
    newest_id: str = ""
    touched: dict[int, None] = field(default_factory=dict)  # acknowledged, the newest last
    changed: threading.Condition = field(default_factory=threading.Condition)

    # --- creates

    def new_create(
        self,
        command: str,
        *,
        keyed: bool,
        priority: int = 0,
        delay_seconds: int = 0,
        run_in_ms: int = 0,
        max_attempts: int = 0,
    ) -> Entry:
        """A create that is about to be sent."""
        with self.changed:
            number, now = self.creates, time.time()
            self.creates += 1
            key = f"key-{number}" if keyed else ""
            entry = Entry(number, command, key, now, priority, delay_seconds)
            entry.max_attempts, entry.after_id = max_attempts, self.newest_id
            entry.not_before = now + delay_seconds
            if run_in_ms:
                entry.run_at_ms = int(now * 1000) + run_in_ms
                entry.not_before = entry.run_at_ms / 1000
            entry.life = self.life
            self.entries[number] = entry
            return entry

    def new_life(self) -> None:
        """The server was started again, or clients went that may have left claims unread. Of a
        result whose answer was lost nobody knows: its task no longer counts as backlog."""
        with self.changed:
            self.life += 1
            self.backlog = 0
            for entry in self.entries.values():
                self.backlog += entry.acknowledged and entry.open
                entry.late.clear()

    def leases_last(self, held_at: float, until: float) -> None:
        """After a restart no lease that ran at ``held_at`` ends before ``until``."""
        with self.changed:
            for entry in self.entries.values():
                if entry.held_until > held_at:
                    entry.held_until = max(entry.held_until, until)

    def created(self, number: int, task_id: str) -> None:
        """The create was acknowledged with this id."""
        with self.changed:
            entry = self.entries[number]
            self._same_task(entry, task_id)
            if task_id <= entry.after_id:
                self._broken(entry, f"is older than {entry.after_id}, acknowledged before")
            self.repeats += entry.acknowledged
            self.backlog += not entry.acknowledged
            entry.acknowledged = True
            self.newest_id = max(self.newest_id, task_id)
            self._acknowledged(entry)

    def to_repeat(self, seconds: float, *, acknowledged: bool) -> list[Entry]:
        """Creates with a key that are younger than ``seconds``, answered or not."""
        since = time.time() - seconds
        with self.changed:
            return [
                entry
                for entry in self.entries.values()
                if entry.key and entry.acknowledged is acknowledged and entry.sent_at > since
            ]

    # --- deliveries and what a worker says

    def delivered(
        self, number: int, task_id: str, attempts: int, lease_until: float, worker: str
    ) -> Entry:
        """A worker received the task."""
        now = time.time()
        with self.changed:
            entry = self.entries[number]
            self.deliveries += 1
            self._same_task(entry, task_id)
            self._check_delivery(entry, now, attempts)
            entry.life = self.life
            entry.worker = worker
            entry.deliveries += 1
            entry.attempts = attempts
            entry.attempts_max = attempts + 1
            # On a very slow machine the lease may have been over before the server knew that its
            # message was taken: then the attempt was given back.
            late = now >= lease_until - LATE_SECONDS
            entry.attempts_min = attempts if late else attempts + 1
            entry.held_until = lease_until
            entry.nacked = False
            entry.late.update(entry.finishing.keys())
            entry.finishing.clear()
            return entry

    def _check_delivery(self, entry: Entry, now: float, attempts: int) -> None:
        most = entry.attempts_max + self.life - entry.life  # a life leaves one claim unread
        if entry.result is not None:
            self._broken(entry, "was delivered after its result was acknowledged")
        if entry.dead:
            self._broken(entry, "was delivered after it was a dead letter")
        if now < entry.held_until - SKEW_SECONDS:
            left = entry.held_until - now
            self._broken(entry, f"was delivered while a lease had {left:.2f} s to run")
        if now < entry.not_before - SKEW_SECONDS:
            early = entry.not_before - now
            self._broken(entry, f"was delivered {early:.3f} s before it was due")
        if not entry.attempts_min <= attempts <= most:
            expected = f"{entry.attempts_min} to {most}"
            self._broken(entry, f"came with attempt {attempts}, not {expected}")
        if entry.max_attempts and attempts > entry.max_attempts:
            self._broken(entry, f"came with attempt {attempts} of {entry.max_attempts}")

    def in_order(self, places: list[tuple[int, int, str]]) -> None:
        """The tasks of one claim: rank of the queue, priority downwards, id upwards."""
        if places != sorted(places):
            with self.changed:
                self.violations.append(f"a claim came in the order {places}")

    def abandoning(self, entry: Entry) -> None:
        """An abandon is about to be sent: the task may come again at once, its attempt unused."""
        with self.changed:
            entry.held_until = 0.0
            entry.attempts_min = entry.attempts  # attempts_max: the lease may be over already

    def abandoned(self, entry: Entry, delivery: int, ok: bool) -> None:
        """The abandon of this delivery was answered."""
        with self.changed:
            if ok:
                self._acknowledged(entry)
                if entry.deliveries == delivery:
                    entry.attempts_max = entry.attempts

    def nacking(self, entry: Entry, delay_seconds: int | None) -> float:
        """A nack is about to be sent: the attempt counts, the task waits for the delay at least,
        or for the end of the lease if the nack comes to nothing. Returns the time."""
        with self.changed:
            now = time.time()
            delay = BACKOFF_SECONDS if delay_seconds is None else delay_seconds
            entry.not_before = min(entry.held_until, now + delay)
            entry.held_until = 0.0
            entry.end_sent_at = now
            return now

    def was_nacked(
        self, entry: Entry, delivery: int, sent_at: float, delay_seconds: int | None, dead: bool
    ) -> None:
        """The nack of this delivery was accepted; ``delay_seconds`` is what the server said."""
        with self.changed:
            self._acknowledged(entry)
            if entry.deliveries != delivery:
                return
            used_up = bool(entry.max_attempts) and entry.attempts >= entry.max_attempts
            if dead is not used_up:
                self._broken(entry, f"with {entry.attempts} attempts: dead letter is {dead}")
            entry.dead, entry.nacked = dead, not dead
            if dead:
                self.backlog -= entry.acknowledged
            else:
                entry.not_before = sent_at + (delay_seconds or 0)

    def extending(self, entry: Entry, seconds: float) -> float:
        """A heartbeat is about to be sent; returns the time."""
        with self.changed:
            now = time.time()
            entry.held_until = min(entry.held_until, now + seconds)
            return now

    def extended(self, entry: Entry, delivery: int, until: float) -> None:
        """The heartbeat of this delivery was accepted: its lease lasts to ``until`` at least."""
        with self.changed:
            self._acknowledged(entry)
            if entry.deliveries == delivery:
                entry.held_until = max(entry.held_until, until)

    def finishing(self, entry: Entry, worker: str) -> Verdict:
        """A result is about to be sent, for the last delivery or again; returns it."""
        with self.changed:
            if worker == entry.worker and worker not in entry.finishing:
                entry.finishing[worker] = entry.end_sent_at = time.time()
            return verdict(entry.number, worker)

    def answered(self, task_id: str, worker: str, ok: bool) -> None:
        """The result of this worker for this task was acknowledged or refused."""
        now = time.time()
        with self.changed:
            entry = self.entries[self.numbers[task_id]]
            if ok:
                if entry.worker != worker:
                    self._broken(entry, f"was {entry.worker}'s and took a result of {worker}")
                self.backlog -= entry.acknowledged and entry.result is None
                if entry.result is None:
                    entry.unread = self.life - entry.life
                entry.result = verdict(entry.number, worker)
                self._acknowledged(entry)
                return
            if entry.late[worker]:
                entry.late[worker] -= 1
                return
            if self.may_be_gone(entry):
                return  # an earlier one may have counted
            entry.finishing.pop(worker, None)
            if entry.worker == worker and now < entry.held_until - SKEW_SECONDS:
                left = entry.held_until - now
                self._broken(entry, f"refused a result while its lease had {left:.2f} s to run")

    def unanswered(self, worker: str) -> list[Entry]:
        """Tasks whose result this worker sent without hearing of it."""
        with self.changed:
            return [
                entry
                for entry in self.entries.values()
                if worker in entry.finishing and entry.result is None
            ]

    # --- what is kept

    def may_be_gone(self, entry: Entry) -> bool:
        """Whether the task may have been removed by now."""
        ended = entry.result is not None or bool(entry.finishing) or entry.dead
        if not ended and not entry.max_attempts:
            return False
        kept_until = (entry.end_sent_at or entry.sent_at) + self.keeping.ended
        if entry.key:
            kept_until = max(kept_until, entry.sent_at + self.keeping.window)
        return time.time() >= kept_until

    def forget_gone(self) -> None:
        """Drops what ended and may be gone, so that a long run stays small."""
        with self.changed:
            ended = [e for e in self.entries.values() if e.result is not None or e.dead]
            for entry in filter(self.may_be_gone, ended):
                del self.entries[entry.number]
                self.touched.pop(entry.number, None)
                if entry.task_id is not None:
                    del self.numbers[entry.task_id]

    def take_touched(self) -> list[Entry]:
        """Entries with a new acknowledgement since the last call, the newest last."""
        with self.changed:
            touched, self.touched = self.touched, {}
            return [self.entries[number] for number in touched]

    def in_flight(self, first: int) -> int:
        """Creates from number ``first`` on and results that were sent and not answered."""
        with self.changed:
            entries: Iterable[Entry] = self.entries.values()
            return sum(
                entry.task_id is None if not entry.finishing else entry.result is None
                for entry in entries
                if entry.number >= first or entry.life == self.life
            )

    def unfinished(self) -> int:
        """Tasks that must still get an end from us."""
        with self.changed:
            return sum(e.open and not e.max_attempts for e in self.entries.values())

    # --- waiting

    def progress(self) -> None:
        """Wakes who waits; called once per message, not per task."""
        with self.changed:
            self.changed.notify_all()

    def wait_for(self, fact: Callable[[], bool], timeout: float) -> bool:
        """Waits until ``fact()`` holds; False when ``timeout`` seconds are over before."""
        with self.changed:
            return self.changed.wait_for(fact, timeout)

    def _acknowledged(self, entry: Entry) -> None:
        self.acknowledgements += 1
        self.touched.pop(entry.number, None)
        self.touched[entry.number] = None

    def _same_task(self, entry: Entry, task_id: str) -> None:
        if entry.task_id not in (None, task_id):
            self._broken(entry, f"is there twice, also as {task_id}")
        entry.task_id = task_id
        self.numbers[task_id] = entry.number

    def _broken(self, entry: Entry, what: str) -> None:
        self.violations.append(f"task {entry.task_id} (create {entry.number}) {what}: {entry}")
