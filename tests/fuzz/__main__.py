"""Coverage-guided fuzzing of what reads bytes in the C core: stream messages, texts, the log.

    python -m tests.fuzz [TARGET...] --minutes 10 [--keep]

libFuzzer feeds harness.c, built with the address and undefined-behaviour sanitizers; then what it
found interesting is read by ``_wire`` and by the generated protobuf classes (of texts: by Python's
json), which must agree. A finding is added to tests/golden/TARGET.hex, which the suite replays, and
ends the run with 1. ``--keep`` puts the least set of inputs there that covers what the whole corpus
does. The corpus stays in build/fuzz for the next run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.build import GOLDEN, ROOT, TARGETS, build, environment
from tests.fuzz.disagreement import disagree
from tests.fuzz.seeds import seeds

WORK = ROOT / "build" / "fuzz"
INPUT_BYTES_MAX = 4096
KEPT_BYTES_MAX = 1024
#: Shares of the time; one for the others. A log takes a hundred times as long to read as a message
SHARES = {"load": 5}
#: In a golden file, between the findings and the inputs that cover the most
COVERING = "# what covers the most\n"
EDGES = re.compile(r"cov: (\d+) ft: (\d+)")


class Run:
    """One target: its corpus, and what came of it."""

    def __init__(self, target: str, program: Path) -> None:
        self.target = target
        self._program = program
        self.corpus = WORK / "corpus" / target
        self._crashes = WORK / "crashes" / target
        for folder in (self.corpus, self._crashes):
            folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds(target)):
            (self.corpus / f"seed-{number}").write_bytes(seed)

    def fuzz(self, seconds: int) -> list[bytes]:
        """Runs, prints one line, returns the findings."""
        for old in self._crashes.iterdir():
            old.unlink()
        code, output = self._libfuzzer(f"-max_total_time={seconds}", str(self.corpus))
        (WORK / f"{self.target}.log").write_text(output)
        if code and not any(self._crashes.iterdir()):
            raise SystemExit(f"{self.target}: libFuzzer ended with {code}\n{output[-4000:]}")
        found = [path.read_bytes() for path in self._crashes.iterdir()]
        found += [data for data in self._inputs() if disagree(self.target, data)]
        executions = re.findall(r"^(?:stat::number_of_executed_units: *|#)(\d+)", output, re.M)
        edges = EDGES.findall(output) or [("0", "0")]
        print(
            f"{self.target}: {int(executions[-1]):,} executions, edges {edges[0][0]} to "
            f"{edges[-1][0]}, features {edges[0][1]} to {edges[-1][1]}, "
            f"{len(found)} findings",
            flush=True,
        )
        if found:
            print(output[-4000:])
        return found

    def least(self) -> list[bytes]:
        """The inputs that cover what the corpus covers, short ones first."""
        folder = WORK / "least" / self.target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        self._libfuzzer("-merge=1", f"-max_len={KEPT_BYTES_MAX}", str(folder), str(self.corpus))
        return sorted((path.read_bytes() for path in folder.iterdir()), key=lambda i: (len(i), i))

    def _inputs(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self.corpus.iterdir())]

    def _libfuzzer(self, *options: str) -> tuple[int, str]:
        usual = [f"-max_len={INPUT_BYTES_MAX}", "-timeout=10", "-rss_limit_mb=2048"]
        more = ["-print_final_stats=1", f"-artifact_prefix={self._crashes}/"]
        done = subprocess.run(
            [self._program, *usual, *more, *options],
            env=environment(self.target),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        return done.returncode, done.stderr


def keep(target: str, findings: Sequence[bytes], covering: Sequence[bytes]) -> None:
    """Adds findings to the golden file; ``covering`` takes the place of those kept before."""
    path = GOLDEN / f"{target}.hex"
    found, _, covered = path.read_text().partition(COVERING)
    found += "".join(f"{data.hex()}\n" for data in findings)
    if covering:
        covered = "".join(f"{data.hex()}\n" for data in covering)
    path.write_text(found + COVERING + covered)


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET")
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--keep", action="store_true")
    given = options.parse_args()
    began = time.monotonic()
    program = build(WORK, fuzzer=True)
    chosen = given.targets or TARGETS
    share = given.minutes * 60 / sum(SHARES.get(target, 1) for target in chosen)
    findings = 0
    for target in chosen:
        run = Run(target, program)
        found = run.fuzz(int(share * SHARES.get(target, 1)))
        findings += len(found)
        keep(target, found, run.least() if given.keep else ())
    print(f"{findings} findings in {(time.monotonic() - began) / 60:.0f} min")
    return min(findings, 1)


if __name__ == "__main__":
    sys.exit(main())
