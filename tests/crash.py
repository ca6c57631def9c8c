"""A real server under load, killed with -9 at random moments and compared with its promises.

    python -m tests.crash --rounds 50 --seed 7 --power-loss

Each round starts ``codeq serve`` on the same folder, checks everything it acknowledged in earlier
rounds, loads it over both streams and over REST, and kills it as soon as a random number of further
acknowledgements has come, or at a named point inside, while creates are in flight. The last round
works everything off. With ``--power-loss`` most kills are followed by the loss of all that was not
synced (power_loss.py), on a store with small logs that change often.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.crash_clients import (
    Load,
    OrderedWorker,
    RestLife,
    RestSingles,
    Retry,
    Server,
    StreamProducer,
    StreamWorker,
    check,
    counts,
)
from tests.ledger import Ledger
from tests.power_loss import Shim

SETTINGS = {
    "DEFAULT_LEASE_SECONDS": "2",
    "LEASE_GRACE_SECONDS": "1",
    "MAX_ATTEMPTS_DEFAULT": "1000",
    "BACKOFF_POLICY": "fixed",
    "BACKOFF_BASE_SECONDS": "1",
    "LIMITS_DISK_RESERVE_BYTES": "0",
    "LOG_LEVEL": "warn",
    "WEBHOOK_HMAC_SECRET": "secret",
}
FAULT_POINTS = ("before-write", "after-write", "after-sync", "before-ack")
READS_PASS = "before-ack"  # a point that answers to reads pass too: the check would spend it
OUTSIDE = "outside"
RECOVERY = "recovery"
KILLS = (OUTSIDE, RECOVERY, *FAULT_POINTS)
LOADS = (StreamProducer, StreamWorker, StreamWorker, RestLife, RestSingles)
DRAIN_SECONDS = 60
POLL_SECONDS = 0.05
#: A round counts as a full one with so many acknowledgements and a create in flight at the kill
COUNTED_ACKNOWLEDGEMENTS = 1000


class Crash:
    """The rounds on one folder with one ledger.

    ``power_loss``: kills are followed by the loss of what was not synced. ``acknowledgements``: at
    least so many in each round before the kill.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        settings: dict[str, str] = SETTINGS,
        *,
        power_loss: bool = False,
        acknowledgements: int = 1,
    ) -> None:
        self.folder, self.random, self.settings = folder, random.Random(seed), settings
        self.ledger = Ledger()
        self.in_flight = 0  # creates that were in flight at a kill, over all rounds
        self.acknowledgements = acknowledgements
        self.counted: Counter[str] = Counter()  # full rounds by kind of kill
        self.losses = 0
        self.module = "tests.small_store" if power_loss else "codeq"
        self.shim = Shim(folder / "shim", folder / "data") if power_loss else None

    def round(self, kill: str = "") -> str:
        """Start, check, load, kill. Returns a line that says what happened. ``kill`` is one of
        KILLS, "" = any."""
        if kill == RECOVERY or (not kill and self.random.random() < 0.3):
            self.kill_during_start(kill or self.random.choice(("", RECOVERY)))
        fault = self.pick_fault(kill)
        server = self.start("" if fault.startswith(READS_PASS) else fault)
        check(server, self.ledger.take_touched())
        if fault.startswith(READS_PASS):
            server.stop(signal.SIGKILL)
            server = self.start(fault)
        first, begun = self.ledger.creates, self.ledger.acknowledgements
        loads = self.load(server, *LOADS)
        if fault:
            assert server.process.wait(60) == -signal.SIGKILL, self.log()
            server.close()
        else:
            self.kill_after(server, self.acknowledgements + self.random.choice((0, 100, 500, 2000)))
        for load in loads:
            load.stopping.set()
        self.ledger.progress()
        self.join(loads)
        lost = self.lose_power()
        in_flight, acknowledged = self.ledger.in_flight(first), self.ledger.acknowledgements - begun
        self.in_flight += in_flight
        if in_flight and acknowledged >= COUNTED_ACKNOWLEDGEMENTS:
            self.counted[kill or fault.partition(":")[0] or OUTSIDE] += 1
        return (
            f"killed {fault or 'from outside'} after {acknowledged} "
            f"acknowledgements with {in_flight} creates in flight "
            f"and {self.ledger.unfinished()} tasks unfinished{lost}"
        )

    def lose_power(self) -> str:
        """Now and then only the process dies, so that logs of two lives stand side by side."""
        if self.shim is None or self.random.random() < 0.15:
            return ""
        self.losses += 1
        return f"; power lost: {self.shim.lose_power(self.random)}"

    def drain(self) -> str:
        """The last round: retry what has a key, work everything off, check everything, stop."""
        server = self.start()
        check(server, self.ledger.take_touched())
        lost = [entry for entry in self.ledger.entries.values() if entry.task_id is None]
        retry = Retry(server, self.ledger, [entry for entry in lost if entry.key])
        retry.start()
        self.join([retry])
        ordered = self.work_off_in_order(server)
        workers = self.load(server, StreamWorker, StreamWorker)
        drained = self.poll(lambda: self.ledger.unfinished() == 0 and counts(server)[1] == 0)
        assert drained, f"{self.ledger.unfinished()} unfinished, {counts(server)[1]} live tasks"
        check(server, self.ledger.take_touched())
        entries = list(self.ledger.entries.values())
        check(server, self.random.sample(entries, min(1000, len(entries))))
        assert server.stop(signal.SIGTERM) == 0, self.log()
        self.join(workers)
        tasks, deliveries = len(self.ledger.numbers), self.ledger.deliveries
        return f"{tasks} tasks, {deliveries} deliveries, {ordered} of them in order at the end"

    def work_off_in_order(self, server: Server) -> int:
        """Once all leases are over and all delays too, tasks come by priority and creation."""
        idle = self.poll(lambda: len({*counts(server)}) == 1)
        assert idle, f"ready and live tasks of the idle queue: {counts(server)}"
        worker = OrderedWorker(server, self.ledger, self.random.getrandbits(32))
        worker.start()
        self.join([worker])
        assert worker.order == sorted(worker.order), "not by priority, then creation order"
        return len(worker.order)

    def poll(self, fact: Callable[[], bool]) -> bool:
        """Asks the server again and again; False when DRAIN_SECONDS are over before."""
        for _ in range(int(DRAIN_SECONDS / POLL_SECONDS)):
            if fact():
                return True
            self.ledger.wait_for(lambda: False, POLL_SECONDS)
        return False

    def pick_fault(self, kill: str) -> str:
        """A fault point at which the server kills itself, or "" for a kill from outside."""
        if kill in (OUTSIDE, RECOVERY) or (not kill and self.random.random() < 0.5):
            return ""
        point = kill or self.random.choice(FAULT_POINTS)
        first = 10 if self.acknowledgements < COUNTED_ACKNOWLEDGEMENTS else 60
        return f"{point}:{self.random.randrange(first, first + 90)}"

    def kill_after(self, server: Server, count: int) -> None:
        goal = self.ledger.acknowledgements + count
        reached = self.ledger.wait_for(lambda: self.ledger.acknowledgements >= goal, 30)
        server.stop(signal.SIGKILL)
        assert reached, f"less than {count} acknowledgements in 30 s\n{self.log()}"

    def launch(self, fault: str) -> Server:
        self.ledger.new_life()
        slow_us = self.random.choice((0, 0, 2_000, 10_000))
        preload = {} if self.shim is None else self.shim.environment(slow_us=slow_us)
        return Server(self.folder, {**self.settings, **preload, "CODEQ_FAULT": fault}, self.module)

    def start(self, fault: str = "") -> Server:
        server = self.launch(fault)
        if not server.wait_ready():
            server.stop(signal.SIGKILL)
            raise AssertionError(f"no ready line\n{self.log()}")
        return server

    def kill_during_start(self, point: str) -> None:
        """At a chunk that recovery reads, or some time after the start of the process."""
        fault = f"{point}:{self.random.randrange(1, 50)}" if point else ""
        server = self.launch(fault)
        server.wait_ready(self.random.uniform(0.2, 1.5))
        server.stop(signal.SIGKILL)
        self.lose_power()

    def load(self, server: Server, *kinds: type[Load]) -> list[Load]:
        loads = [kind(server, self.ledger, self.random.getrandbits(32)) for kind in kinds]
        for load in loads:
            load.start()
        return loads

    def join(self, loads: Sequence[Load]) -> None:
        for load in loads:
            load.join(30)
            assert not load.is_alive(), f"{load} hangs"
            if load.fault is not None:
                raise load.fault
        assert not self.ledger.violations, "\n".join(self.ledger.violations[:20])

    def log(self) -> str:
        return (self.folder / "server.log").read_text()[-4000:]


def options() -> argparse.Namespace:
    given = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    given.add_argument("--rounds", type=int, default=50)
    given.add_argument("--seed", type=int, default=1)
    given.add_argument("--power-loss", action="store_true", help="lose what was not synced")
    given.add_argument("--each", action="store_true", help="so many rounds for each kind of kill")
    given.add_argument("--full", action="store_true", help="1,000 acknowledgements in each round")
    return given.parse_args()


def main() -> None:
    given = options()
    print(f"{given.rounds} rounds with seed {given.seed}", flush=True)
    least = COUNTED_ACKNOWLEDGEMENTS if given.full else 1
    kills = [kill for kill in KILLS for _ in range(given.rounds)] if given.each else []
    with tempfile.TemporaryDirectory(prefix="codeq-crash-") as folder:
        crash = Crash(Path(folder), given.seed, power_loss=given.power_loss, acknowledgements=least)
        for number, kill in enumerate(kills or [""] * given.rounds, 1):
            print(f"{number}: {crash.round(kill)}", flush=True)
        print(f"drained: {crash.drain()}; nothing acknowledged was lost", flush=True)
        print(f"full rounds: {dict(crash.counted)}; power lost {crash.losses} times", flush=True)


if __name__ == "__main__":
    main()
