"""A real server under load, killed with -9 again and again and compared with its promises.

    python -m tests.crash --counted 300 --seed 7 --each --power-loss

A round starts ``codeq serve`` on the folder of the last one, compares, loads it over both streams
and over REST, and kills it once 1,000 acknowledgements have come and a commit is in flight: at a
named point inside, from outside, or in the recovery after that. Rounds on one folder make an
episode, which ends with everything worked off and compared. The seed fixes the loads, where and at
which hit each round is killed, and what power loss does; not when a thread runs. Servers are forked
from a process that holds the imports ready (nursery.py); the last one of an episode is not.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.crash_rounds import KILLS, SHORT, Crash, Round
from tests.crash_server import Nursery
from tests.ledger import LONG
from tests.power_loss import compiled

EPISODE_ROUNDS_MAX = 25


class Summary:
    """What all rounds together came to."""

    def __init__(self, seed: int) -> None:
        self.seed, self.began_s = seed, time.monotonic()
        self.rounds = self.acknowledgements = self.power_losses = self.creates = 0
        self.counted: Counter[str] = Counter()  # rounds by kill
        self.counted_losses = 0

    def add(self, done: Round) -> None:
        self.rounds += 1
        self.acknowledgements += done.acknowledgements
        self.power_losses += done.power_lost
        self.counted[done.kill] += done.counted
        self.counted_losses += done.counted and done.power_lost

    def minutes(self) -> float:
        return (time.monotonic() - self.began_s) / 60

    def facts(self, failure: str) -> dict[str, object]:
        return {
            "seed": self.seed,
            "rounds": self.rounds,
            "counted": self.counted.total(),
            "counted_by_point": {kill: self.counted[kill] for kill in KILLS},
            "counted_power_losses": self.counted_losses,
            "power_losses": self.power_losses,
            "acknowledgements": self.acknowledgements,
            "creates": self.creates,
            "lost": failure or 0,
            "minutes": round(self.minutes(), 1),
        }


class Episodes:
    """Rounds on one folder after the other until there are enough."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.summary = Summary(given.seed)
        self.nursery = Nursery(compiled(folder))
        self.episode = given.episode
        # also few rounds make two episodes: one keeps all, one removes
        self.episode_rounds = min(EPISODE_ROUNDS_MAX, (given.rounds + 1) // 2 or EPISODE_ROUNDS_MAX)

    def enough(self) -> bool:
        given, summary = self.given, self.summary
        if given.minutes and summary.minutes() >= given.minutes:
            return True
        if given.counted:
            return summary.counted.total() >= given.counted
        return bool(given.rounds) and summary.rounds >= given.rounds

    def run(self) -> None:
        while not self.enough():
            self.run_one()
            self.episode += 1
        self.nursery.close()

    def run_one(self) -> None:
        seed = f"{self.given.seed}-{self.episode}"
        dice = random.Random(seed)
        short = self.episode % 2 == 1
        crash = Crash(
            self.folder / str(self.episode),
            seed,
            power_loss=self.given.power_loss,
            keeping=SHORT if short else LONG,
            small=short or dice.random() < 0.5,
            nursery=self.nursery,
        )
        kept = "seconds" if short else "all"
        print(f"episode {self.episode}: seed {self.given.seed}, keeps {kept}", flush=True)
        while crash.rounds < self.episode_rounds and not self.enough():
            began_s = time.monotonic()
            done = crash.round(self.next_kill(crash))
            self.summary.add(done)
            mark, seconds = "*" if done.counted else "-", time.monotonic() - began_s
            print(f"{self.summary.rounds}{mark} {seconds:.1f} s: {done.text}", flush=True)
        print(f"drained: {crash.drain()}", flush=True)
        self.summary.creates += crash.ledger.creates
        shutil.rmtree(crash.folder)

    def next_kill(self, crash: Crash) -> str:
        """With --each the one that was counted least."""
        if not self.given.each:
            return ""
        return min(crash.kills(), key=lambda kill: self.summary.counted[kill])


def options() -> argparse.Namespace:
    given = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    given.add_argument("--rounds", type=int, default=0, help="so many rounds in all")
    given.add_argument("--counted", type=int, default=0, help="until so many count")
    given.add_argument("--minutes", type=float, default=0, help="at most so long")
    given.add_argument("--seed", type=int, default=1)
    given.add_argument("--episode", type=int, default=0, help="the first one, to repeat it")
    given.add_argument("--power-loss", action="store_true", help="lose what was not synced")
    given.add_argument("--each", action="store_true", help="spread evenly over the kinds of kill")
    given.add_argument("--json", type=Path, help="file for the summary")
    given.add_argument("--folder", type=Path, help="where to work; kept after a failure")
    return given.parse_args()


def main() -> int:
    given = options()
    if not (given.rounds or given.counted or given.minutes):
        given.rounds = 50
    folder = Path(tempfile.mkdtemp(prefix="codeq-crash-", dir=given.folder))
    episodes = Episodes(given, folder)
    failure = ""
    try:
        episodes.run()
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        failure = f"{type(error).__name__} in episode {episodes.episode}: {error}"[:2000]
        print(f"FAILED: {failure}\nthe folder is kept: {folder}", flush=True)
    finally:
        facts = episodes.summary.facts(failure)
        print(f"{'power loss' if given.power_loss else 'kill -9'}: {json.dumps(facts)}", flush=True)
        if given.json:
            given.json.write_text(json.dumps(facts, indent=1) + "\n")
    if failure:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
