"""Rounds of one server on one folder: loaded, killed, compared with what it acknowledged."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.crash_check import check, counts
from tests.crash_clients import LOADS, Load, OrderedWorker, Retry, started
from tests.crash_server import ENTRY, SMALL, Forked, Nursery, Server
from tests.ledger import BACKOFF_SECONDS, LONG, Keeping, Ledger
from tests.power_loss import Shim
from tests.small_store import REMOVAL_AFTER

GRACE_SECONDS = 1
SETTINGS = {
    "DEFAULT_LEASE_SECONDS": "2",
    "LEASE_GRACE_SECONDS": str(GRACE_SECONDS),
    "MAX_ATTEMPTS_DEFAULT": "1000",
    "BACKOFF_POLICY": "fixed",
    "BACKOFF_BASE_SECONDS": str(BACKOFF_SECONDS),
    "LIMITS_DISK_RESERVE_BYTES": "0",
    "LOG_LEVEL": "warn",
    "WEBHOOK_HMAC_SECRET": "secret",
}
#: A create may be repeated when its window still has so long to go, on a slow machine as well
REPEAT_MARGIN_SECONDS = 1.8
#: Ended tasks and keys that are removed while a round runs
SHORT = Keeping(ended=2, window=3)
OUTSIDE, RECOVERY = "outside", "recovery"
WRITE_POINTS = ("before-write", "after-write", "after-sync", "before-ack")
CUT_POINTS = ("before-cut", "after-cut")
REMOVAL_POINTS = ("in-retention", "before-removal-write", "after-removal-write", *CUT_POINTS)
PLAIN = (OUTSIDE, RECOVERY)
KILLS = (*PLAIN, *WRITE_POINTS, *REMOVAL_POINTS)
#: How often a point is passed, after enough was acknowledged, before it kills
HITS = {**dict.fromkeys(WRITE_POINTS, 12), **dict.fromkeys(REMOVAL_POINTS, 3), RECOVERY: 40}
#: So many acknowledgements and a commit in flight at the kill make a round count
COUNTED_ACKNOWLEDGEMENTS = 1000
#: How much longer a sync takes: at a point, and where the kill is to meet one from outside
SLOW_US, PLAIN_SLOW_US = (500, 2_000, 5_000, 10_000), (5_000, 20_000, 50_000)
PAYLOAD_MEMORY_BYTES = (20_000, 500_000_000)
CHECKED_NEWEST, CHECKED_OTHERS, REPEATED = 300, 100, 50
FAULT_SECONDS, LOAD_SECONDS, JOIN_SECONDS, DRAIN_SECONDS = 6, 60, 30, 60
POLL_SECONDS = 0.05


class Round(NamedTuple):
    """What became of one round."""

    kill: str
    acknowledgements: int
    in_flight: bool  # a commit was, and requests waited for it
    counted: bool
    power_lost: bool
    text: str


class Crash:
    """The rounds on one folder with one ledger.

    ``power_loss``: most kills are followed by the loss of what was not synced, and only these
    rounds count. ``keeping``: how long what ended is kept. ``small``: see small_store.py; always so
    with power loss. ``nursery``: forks the servers, else each is started by itself.
    """

    def __init__(
        self,
        folder: Path,
        seed: int | str,
        *,
        power_loss: bool = False,
        keeping: Keeping = LONG,
        small: bool = False,
        acknowledgements: int = COUNTED_ACKNOWLEDGEMENTS,
        nursery: Nursery | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.random = folder, random.Random(seed)
        self.keeping, self.power_loss, self.acknowledgements = keeping, power_loss, acknowledgements
        self.settings = {
            **SETTINGS,
            "RETENTION_SECONDS": str(keeping.ended),
            "DEAD_RETENTION_SECONDS": str(keeping.ended),
            "IDEMPOTENCY_WINDOW_SECONDS": str(keeping.window),
        }
        self.ledger = Ledger(keeping)
        self.losses = 0
        self.nursery = nursery
        self.module = SMALL if small or power_loss else ENTRY
        library = None if nursery is None else nursery.shim
        self.shim = Shim(folder / "shim", folder / "data", library)
        self.died_at = 0.0
        self.rounds = 0

    # --- one round

    def kills(self) -> tuple[str, ...]:
        """Where the next round can be killed: removal needs something that is old enough."""
        removes = self.keeping is not LONG and self.rounds > self.keeping.window
        return KILLS if removes else (*PLAIN, *WRITE_POINTS)

    def round(self, kill: str = "") -> Round:
        """Start, compare, load, kill. ``kill`` is one of KILLS, "" = any."""
        self.rounds += 1
        kill = kill or self.random.choice(self.kills())
        if self.random.random() < 0.1:
            self.kill_during_start()
        server = self.start("" if kill in PLAIN else self.fault(kill))
        self.compare(server)
        first, begun = self.ledger.creates, self.ledger.acknowledgements
        loads = self.load(server, *LOADS)
        kill = self.kill(server, kill)
        for load in loads:
            load.stopping.set()
        self.ledger.progress()
        self.join(loads)
        acknowledged, in_flight = self.ledger.acknowledgements - begun, self.ledger.in_flight(first)
        in_commit = kill not in PLAIN or self.shim.syncs_a_log()
        losses, lost = self.losses, self.lose_power()
        if kill == RECOVERY and not self.kill_in_recovery():
            kill = OUTSIDE
        power_lost = self.losses > losses
        in_commit &= in_flight > 0
        enough = acknowledged >= COUNTED_ACKNOWLEDGEMENTS and power_lost is self.power_loss
        text = (
            f"{kill} after {acknowledged} acknowledgements with {in_flight} requests in flight "
            f"and {self.ledger.unfinished()} tasks unfinished{lost}"
        )
        return Round(kill, acknowledged, in_commit, in_commit and enough, power_lost, text)

    def fault(self, kill: str) -> str:
        """The point and its hit, more often an early one, which is quicker."""
        return f"{kill}:{self.random.randint(1, self.random.randint(1, HITS[kill]))}"

    def kill(self, server: Server, kill: str) -> str:
        """Waits for enough acknowledgements, then for the fault, or kills. Returns what it was."""
        goal = self.ledger.acknowledgements + self.acknowledgements
        if kill in PLAIN:
            goal += self.random.choice((0, 100, 500))
        reached = self.ledger.wait_for(lambda: self.ledger.acknowledgements >= goal, LOAD_SECONDS)
        assert reached, f"not {goal} acknowledgements in {LOAD_SECONDS} s\n{self.log()}"
        if kill in PLAIN:
            self.ledger.wait_for(lambda: False, self.random.uniform(0, POLL_SECONDS))
            self.end(server)
            return kill
        self.shim.arm()
        try:
            code = server.wait(FAULT_SECONDS)
        except TimeoutError:  # nothing was there to be removed
            self.end(server)
            return OUTSIDE
        self.died_at = time.time()
        assert code == -signal.SIGKILL, self.log()
        return kill

    def end(self, server: Server) -> None:
        server.stop(signal.SIGKILL)
        self.died_at = time.time()

    def lose_power(self) -> str:
        """Now and then only the process dies, so that logs of two lives stand side by side."""
        if not self.power_loss:
            self.shim.forget()
            return ""
        if self.random.random() < 0.1:
            return ""
        self.losses += 1
        return f"; power lost: {self.shim.lose_power(self.random)}"

    def kill_in_recovery(self) -> bool:
        """Kills a start at a chunk that it reads; False when there were not so many."""
        server = self.launch(self.fault(RECOVERY))
        self.shim.arm()
        ready = server.wait_ready()
        self.end(server)
        self.lose_power()
        return not ready

    def kill_during_start(self) -> None:
        """Kills a start some time after it began."""
        server = self.launch()
        server.wait_ready(self.random.uniform(0.01, 0.5))
        self.end(server)
        self.lose_power()

    # --- start and comparison

    def launch(self, fault: str = "", *, fresh: bool = False) -> Server:
        """``fresh``: not from the nursery."""
        self.ledger.new_life()
        self.shim.disarm()
        slow_us = self.random.choice(SLOW_US if fault or fresh else PLAIN_SLOW_US)
        memory_bytes = self.random.choice(PAYLOAD_MEMORY_BYTES[: 1 if fresh else 2])
        settings = {
            **self.settings,
            **self.shim.environment(slow_us=slow_us),
            "LIMITS_PAYLOAD_MEMORY_BYTES": str(memory_bytes),
            "CODEQ_FAULT": fault,
            REMOVAL_AFTER: str(self.shim.armed) if fault.startswith(REMOVAL_POINTS) else "",
            "CODEQ_FAULT_ARMED": str(self.shim.armed),
        }
        if self.nursery is None or fresh:
            return Server(self.folder, settings, self.module)
        return Forked(self.nursery, self.folder, settings, self.module)

    def start(self, fault: str = "", *, fresh: bool = False) -> Server:
        launched_at = time.time()
        server = self.launch(fault, fresh=fresh)
        if not server.wait_ready():
            server.stop(signal.SIGKILL)
            raise AssertionError(f"no ready line\n{self.log()}")
        self.ledger.leases_last(self.died_at, launched_at + GRACE_SECONDS)
        return server

    def compare(self, server: Server) -> None:
        """Repeats creates that have a key, then asks for what was acknowledged: all of the newest,
        where a loss would be, and some of the others."""
        seconds = self.keeping.window - REPEAT_MARGIN_SECONDS
        unanswered = self.ledger.to_repeat(seconds, acknowledged=False)
        answered = self.ledger.to_repeat(seconds, acknowledged=True)
        answered = self.random.sample(answered, min(REPEATED, len(answered)))
        retry = Retry(server, self.ledger, unanswered + answered)
        touched = self.ledger.take_touched()
        retry.start()
        self.join([retry])
        others = touched[:-CHECKED_NEWEST]
        sample = self.random.sample(others, min(CHECKED_OTHERS, len(others)))
        check(server, self.ledger, touched[-CHECKED_NEWEST:] + sample)
        self.ledger.forget_gone()

    # --- the end

    def drain(self) -> str:
        """The last round: works everything off in order and compares everything. Where what ended
        goes after seconds it waits until what was there has gone, or was carried forward."""
        server = self.start(fresh=True)
        self.compare(server)
        if self.keeping is not LONG:
            self.ledger.wait_for(lambda: False, self.keeping.window + 1)
        idle = self.poll(lambda: counts(server)[0] == counts(server)[1])
        assert idle, f"ready and live tasks of the idle queue: {counts(server)}"
        worker = OrderedWorker(server, self.ledger, self.random.getrandbits(32), "ordered")
        worker.start()
        self.join([worker])
        assert worker.order == sorted(worker.order), "not by priority, then creation order"
        assert counts(server)[1] == 0, "live tasks are left, and no claim gets them"
        assert self.ledger.unfinished() == 0, f"{self.ledger.unfinished()} tasks never came"
        check(server, self.ledger, list(self.ledger.entries.values()))
        dead = sum(entry.dead for entry in self.ledger.entries.values())
        assert self.keeping is not LONG or counts(server)[2] >= dead, "dead letters are missing"
        assert server.stop(signal.SIGTERM) == 0, self.log()
        return (
            f"{self.ledger.creates} creates, {self.ledger.deliveries} deliveries, "
            f"{len(worker.order)} of them in order at the end, {self.ledger.repeats} creates "
            f"answered again, {dead} dead letters"
        )

    def poll(self, fact: Callable[[], bool]) -> bool:
        """Asks the server again and again; False when DRAIN_SECONDS are over before."""
        for _ in range(int(DRAIN_SECONDS / POLL_SECONDS)):
            if fact():
                return True
            self.ledger.wait_for(lambda: False, POLL_SECONDS)
        return False

    # --- clients

    def load(self, server: Server, *kinds: type[Load]) -> list[Load]:
        return started(server, self.ledger, self.random, kinds)

    def join(self, loads: Sequence[Load]) -> None:
        for load in loads:
            load.join(JOIN_SECONDS)
            assert not load.is_alive(), f"{load} hangs"
            if load.fault is not None:
                raise load.fault
        assert not self.ledger.violations, "\n".join(self.ledger.violations[:20])

    def log(self) -> str:
        return (self.folder / "server.log").read_text()[-4000:]
