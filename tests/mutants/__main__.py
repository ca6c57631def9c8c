"""Applies each change of table.py to a copy of the tree and runs the test that must notice it,
before the change and after.

    python -m tests.mutants [--jobs 1] [NAME...]
    python -m tests.mutants --by-crash [--rounds 50] [--seed 1] [NAME...]

With ``--by-crash`` those of CRASHED must be noticed by the crash harness instead, within so many
rounds; without names, all of them. Ends with 1 when a change went unnoticed. ``--jobs`` are copies
that are worked on at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutant import Mutant
from tests.mutants.table import CRASHED, MUTANTS

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = ("build", ".git", ".venv", "__pycache__", ".*_cache", "*.egg-info")
TEST_SECONDS = 120
#: A changed program may ask for memory without end
MEMORY_BYTES_MAX = 4 << 30
BUILD_SECONDS = 900
CRASH_SECONDS = 1800
TESTS_FAILED = 1  # exit code of pytest
ROUND = re.compile(r"^\d+(?::|\W+[\d.]+ s:) ", re.MULTILINE)
FAULT = re.compile(r"^(?:FAILED: |\w+Error: ).*", re.MULTILINE)


class Copy:
    """A copy of the tree that is changed and changed back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder.with_name("tmp")
        self._temporary.mkdir(parents=True)
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        self._built: dict[Path, bytes] = {}  # the extensions without any change
        self._sound: set[str] = set()  # tests that pass without any change
        self._crashed: list[list[str]] = []  # ways in which the crash harness passes so

    def by_test(self, mutant: Mutant) -> str:
        """What became of the mutant: caught, MISSED, or why that cannot be said."""
        if mutant.test not in self._sound:
            code, output = self._test(mutant)
            if code:
                return f"BROKEN: {mutant.test} fails without any change\n{output[-3000:]}"
            self._sound.add(mutant.test)
        with self._changed(mutant):
            code, output = self._test(mutant)
        if code == 0:
            return "MISSED"
        last = _last_line(output)
        # A mutant that crashes or hangs the interpreter is caught as well, one without test is not
        return f"caught: {last}" if code == TESTS_FAILED or code < 0 else f"BROKEN: {last}"

    def by_crash(self, mutant: Mutant, rounds: int, seed: int) -> str:
        """The same of the crash harness, with the round in which it saw the change."""
        how = ["--power-loss"] if CRASHED[mutant.name] else []
        arguments = ["-m", "tests.crash", "--seed", str(seed), *how, "--rounds"]
        if how not in self._crashed:
            code, output = self._run([*arguments, "2"], CRASH_SECONDS)
            if code:
                return f"BROKEN: the harness fails without any change\n{output[-3000:]}"
            self._crashed.append(how)
        with self._changed(mutant):
            code, output = self._run([*arguments, str(rounds)], CRASH_SECONDS)
        survived = len(ROUND.findall(output))
        if code == 0:
            return f"MISSED in {survived} rounds"
        fault = FAULT.findall(output) or [_last_line(output)]
        return f"caught in round {survived + 1}: {fault[-1]}"

    @contextlib.contextmanager
    def _changed(self, mutant: Mutant) -> Iterator[None]:
        """The copy with the change, built; only the extension that it is in is compiled anew."""
        path = self.folder / mutant.file
        text = path.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: its old text stands not once"
        compiled = path.suffix in (".c", ".h", ".pyx")
        if compiled and not self._built:
            self._build()
            extensions = self.folder.glob("codeq/engine/*.so")
            self._built = {extension: extension.read_bytes() for extension in extensions}
        path.write_text(text.replace(mutant.old, mutant.new))
        try:
            if compiled:
                self._build()
            yield
        finally:
            path.write_text(text)
            for extension, built in self._built.items() if compiled else ():
                extension.write_bytes(built)

    def _test(self, mutant: Mutant) -> tuple[int, str]:
        arguments = ["-q", "-x", "--timeout", str(TEST_SECONDS), f"tests/{mutant.test}"]
        return self._run(["-m", "pytest", *arguments], TEST_SECONDS + 60)

    def _build(self) -> None:
        command = ["setup.py", "-q", "build_ext", "--inplace"]
        code, output = self._run(command, BUILD_SECONDS)
        if code:
            raise SystemExit(f"the changed tree does not build:\n{output[-3000:]}")

    def _run(self, arguments: list[str], seconds: float) -> tuple[int, str]:
        """Exit code and output; afterwards nothing that it started runs any more."""
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(self.folder), "TMPDIR": str(self._temporary)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with contextlib.suppress(ProcessLookupError):
                bound = (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX)
                resource.prlimit(process.pid, resource.RLIMIT_DATA, bound)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return code, output.read()


def _last_line(output: str) -> str:
    return output.strip().rpartition("\n")[2]


def options() -> argparse.Namespace:
    given = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    given.add_argument("names", nargs="*", metavar="NAME")
    given.add_argument("--by-crash", action="store_true", help="by the crash harness")
    given.add_argument("--jobs", type=int, default=1, help="mutants tried at the same time")
    given.add_argument("--rounds", type=int, default=50, help="of the crash harness")
    given.add_argument("--seed", type=int, default=1, help="of the crash harness")
    return given.parse_args()


def chosen(names: list[str], among: set[str]) -> list[Mutant]:
    """Those of Python first: they need no build."""
    unknown = set(names) - among
    if unknown:
        raise SystemExit(f"no such mutant: {', '.join(sorted(unknown))}")
    found = [mutant for mutant in MUTANTS if mutant.name in (names or among)]
    return sorted(found, key=lambda mutant: not mutant.file.endswith(".py"))


def run(mutants: list[Mutant], judge: Callable[[Copy, Mutant], str], jobs: int = 1) -> int:
    """Says of each what became of it; returns how many were not caught."""
    caught, began = 0, time.monotonic()
    free: SimpleQueue[Copy] = SimpleQueue()

    def judged(mutant: Mutant) -> tuple[str, float]:
        copy, started = free.get(), time.monotonic()
        try:
            return judge(copy, mutant), time.monotonic() - started
        finally:
            free.put(copy)

    with tempfile.TemporaryDirectory(prefix="codeq-mutants-") as folder:
        for number in range(jobs):
            free.put(Copy(Path(folder) / str(number) / "tree"))
        with ThreadPoolExecutor(jobs) as pool:
            for mutant, (verdict, seconds) in zip(mutants, pool.map(judged, mutants), strict=True):
                caught += verdict.startswith("caught")
                print(f"{mutant.name}: {verdict} ({seconds:.0f} s)", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{caught} of {len(mutants)} mutants caught in {minutes:.0f} min", flush=True)
    return len(mutants) - caught


def main() -> int:
    given = options()
    if given.by_crash:
        mutants = chosen(given.names, set(CRASHED))  # one by one: each loads the machine
        escaped = run(mutants, lambda copy, one: copy.by_crash(one, given.rounds, given.seed))
    else:
        mutants = chosen(given.names, {mutant.name for mutant in MUTANTS})
        escaped = run(mutants, Copy.by_test, given.jobs)
    return min(escaped, 1)


if __name__ == "__main__":
    sys.exit(main())
