"""What a server has promised, as its clients saw it, and the rules every observation must keep.

A number stands for one create. It travels in the payload, so that a task can be told apart from
another with a different id that came from the same create.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

SKEW_SECONDS = 0.05  # two processes read the same clock, but not at the same moment


@dataclass
class Entry:
    """One create and all that became known of it. Times are seconds on the client's clock."""

    number: int
    key: str
    priority: int = 0
    delay_seconds: int = 0
    task_id: str | None = None  # from an acknowledgement or a delivery
    acknowledged: bool = False
    not_before: float = 0.0  # no delivery may come earlier
    held_until: float = 0.0  # end of the lease last delivered; 0 when given back by us
    attempts: int = 0  # of the last delivery
    attempts_min: int = 1  # of the next delivery
    attempts_max: int = 1  # of the next delivery, if it comes in the same life
    life: int = 0  # of the server, in which this was last seen
    result_sent: tuple[str, str] | None = None  # status and text, sent and not answered
    result: tuple[str, str] | None = None  # status and text, acknowledged

    @property
    def open(self) -> bool:
        """Whether the server owes this create an end."""
        return self.task_id is not None and self.result is None and self.result_sent is None


@dataclass
class Ledger:
    """Thread-safe; ``violations`` holds a sentence for each broken promise."""

    entries: dict[int, Entry] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)  # task id -> number
    violations: list[str] = field(default_factory=list)
    creates: int = 0
    backlog: int = 0  # creates acknowledged minus results acknowledged
    acknowledgements: int = 0
    deliveries: int = 0
    life: int = 0  # of the server and its clients: a claim nobody read ends with it
    touched: set[int] = field(default_factory=set)  # numbers acknowledged since ``take_touched``
    changed: threading.Condition = field(default_factory=threading.Condition)

    def new_create(self, *, keyed: bool, priority: int = 0, delay_seconds: int = 0) -> Entry:
        """A create that is about to be sent."""
        with self.changed:
            number = self.creates
            self.creates += 1
            entry = Entry(number, f"key-{number}" if keyed else "", priority, delay_seconds)
            entry.life = self.life
            entry.not_before = time.time() + delay_seconds
            self.entries[number] = entry
            return entry

    def new_life(self) -> None:
        """The server was started again, or clients went that may have left claims unread. Of a
        result whose answer was lost nobody knows: its task no longer counts as backlog."""
        with self.changed:
            self.life += 1
            self.backlog = sum(entry.acknowledged and entry.open for entry in self.entries.values())

    def created(self, number: int, task_id: str) -> None:
        """The create was acknowledged with this id."""
        with self.changed:
            self._same_task(number, task_id)
            self.backlog += not self.entries[number].acknowledged
            self.entries[number].acknowledged = True
            self.acknowledgements += 1
            self.touched.add(number)

    def delivered(self, number: int, task_id: str, attempts: int, lease_until: str) -> None:
        """A worker received the task. ``lease_until`` is RFC 3339, rounded down by the server."""
        now = time.time()
        with self.changed:
            entry = self.entries[number]
            self.deliveries += 1
            self._same_task(number, task_id)
            if entry.result is not None:
                self._broken(entry, "was delivered after its result was acknowledged")
            if now < entry.held_until - SKEW_SECONDS:
                left = entry.held_until - now
                self._broken(entry, f"was delivered while a lease had {left:.1f} s to run")
            if now < entry.not_before - SKEW_SECONDS:
                early = entry.not_before - now
                self._broken(entry, f"was delivered {early:.2f} s before it was due")
            if attempts < entry.attempts_min:
                self._broken(entry, f"came with attempt {attempts}, not {entry.attempts_min}")
            if entry.life == self.life and attempts > entry.attempts_max:
                self._broken(entry, f"came with attempt {attempts}, not {entry.attempts_max}")
            entry.life = self.life
            entry.attempts = attempts
            entry.attempts_min = entry.attempts_max = attempts + 1
            entry.held_until = int(datetime.fromisoformat(lease_until).timestamp())
            entry.result_sent = None

    def abandoning(self, number: int) -> None:
        """An abandon is about to be sent: the task may come again at once, its attempt unused."""
        with self.changed:
            entry = self.entries[number]
            entry.held_until = 0.0
            entry.attempts_min = entry.attempts  # attempts_max: the lease may be over already

    def nacking(self, number: int, delay_seconds: int) -> None:
        """A nack is about to be sent: the attempt counts, the task waits for the delay at least,
        or for the end of the lease if the nack comes to nothing."""
        with self.changed:
            entry = self.entries[number]
            entry.not_before = min(entry.held_until, time.time() + delay_seconds)
            entry.held_until = 0.0

    def extended(self, task_id: str, attempts: int, until: float) -> None:
        """A heartbeat was acknowledged: the lease of this attempt lasts to ``until`` at least."""
        with self.changed:
            entry = self.entries[self.numbers[task_id]]
            if entry.attempts == attempts:
                entry.held_until = max(entry.held_until, until)
            self.acknowledgements += 1

    def sending_result(self, number: int, status: str, text: str) -> None:
        with self.changed:
            self.entries[number].result_sent = (status, text)

    def answered(self, task_id: str, ok: bool) -> None:
        """The result sent last for this task was acknowledged or refused."""
        with self.changed:
            entry = self.entries[self.numbers[task_id]]
            if ok:
                entry.result = entry.result or entry.result_sent
                self.backlog -= entry.acknowledged
                self.acknowledgements += 1
                self.touched.add(entry.number)
            entry.result_sent = None

    def forget_ended(self) -> None:
        """Drops what has a result, so that a long run stays small."""
        with self.changed:
            for entry in [entry for entry in self.entries.values() if entry.result is not None]:
                del self.entries[entry.number], self.numbers[entry.task_id or ""]
            self.touched.clear()

    def progress(self) -> None:
        """Wakes who waits; called once per message, not per task."""
        with self.changed:
            self.changed.notify_all()

    def take_touched(self) -> list[Entry]:
        with self.changed:
            numbers, self.touched = sorted(self.touched), set()
            return [self.entries[number] for number in numbers]

    def wait_for(self, fact: Callable[[], bool], timeout: float) -> bool:
        """Waits until ``fact()`` holds; False when ``timeout`` seconds are over before."""
        with self.changed:
            return self.changed.wait_for(fact, timeout)

    def in_flight(self, first: int) -> int:
        """Creates from number ``first`` on that were neither acknowledged nor delivered."""
        with self.changed:
            return sum(e.task_id is None for e in self.entries.values() if e.number >= first)

    def unfinished(self) -> int:
        with self.changed:
            return sum(entry.open for entry in self.entries.values())

    def _same_task(self, number: int, task_id: str) -> None:
        entry = self.entries[number]
        if entry.task_id not in (None, task_id):
            self._broken(entry, f"is there twice, also as {task_id}")
        entry.task_id = task_id
        self.numbers[task_id] = number

    def _broken(self, entry: Entry, what: str) -> None:
        self.violations.append(f"task {entry.task_id} (create {entry.number}) {what}")
