"""Applies each change of table.py to a copy of the tree and runs the test that must notice it,
before the change and after.

    python -m tests.mutants [NAME...]

Ends with 1 when a change went unnoticed.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = ("build", ".git", ".venv", "__pycache__", ".*_cache", "*.egg-info")
TEST_SECONDS = 120
#: A changed program may ask for memory without end
MEMORY_BYTES_MAX = 4 << 30
BUILD_SECONDS = 900
TESTS_FAILED = 1  # exit code of pytest


class Copy:
    """A copy of the tree that is changed and changed back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        self._built: dict[Path, bytes] = {}  # the extensions without any change
        self._sound: set[str] = set()  # tests that pass without any change

    def try_out(self, mutant: Mutant) -> str:
        """What became of the mutant: caught, MISSED, or why that cannot be said."""
        path = self.folder / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return f"BROKEN: the old text stands {text.count(mutant.old)} times in {mutant.file}"
        if mutant.test not in self._sound:
            code, output = self._test(mutant)
            if code:
                return f"BROKEN: {mutant.test} fails without any change\n{output[-3000:]}"
            self._sound.add(mutant.test)
        compiled = path.suffix in (".c", ".h", ".pyx")
        if compiled and not self._built:
            self._build()
            extensions = self.folder.glob("codeq/engine/*.so")
            self._built = {extension: extension.read_bytes() for extension in extensions}
        path.write_text(text.replace(mutant.old, mutant.new))
        try:
            if compiled:
                self._build()
            return self._verdict(mutant)
        finally:
            path.write_text(text)
            for extension, built in self._built.items() if compiled else ():
                extension.write_bytes(built)

    def _verdict(self, mutant: Mutant) -> str:
        code, output = self._test(mutant)
        if code == 0:
            return "MISSED"
        last = output.strip().rpartition("\n")[2]
        # A mutant that crashes or hangs the interpreter is caught as well, one without test is not
        return f"caught: {last}" if code == TESTS_FAILED or code < 0 else f"BROKEN: {last}"

    def _test(self, mutant: Mutant) -> tuple[int, str]:
        arguments = ["-q", "-x", "--timeout", str(TEST_SECONDS), f"tests/{mutant.test}"]
        return self._run(["-m", "pytest", *arguments], TEST_SECONDS + 60)

    def _build(self) -> None:
        command = ["setup.py", "-q", "build_ext", "--inplace"]
        code, output = self._run(command, BUILD_SECONDS)
        if code:
            raise SystemExit(f"the changed tree does not build:\n{output[-3000:]}")

    def _run(self, arguments: list[str], seconds: float) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            preexec_fn=bound_memory,
            check=False,
        )
        return done.returncode, done.stdout


def bound_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))


def main(names: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    unknown = set(names) - {mutant.name for mutant in chosen}
    if unknown:
        raise SystemExit(f"no such mutant: {', '.join(sorted(unknown))}")
    escaped = 0
    with tempfile.TemporaryDirectory(prefix="codeq-mutants-") as folder:
        copy = Copy(Path(folder) / "tree")
        for mutant in sorted(chosen, key=lambda mutant: mutant.file.startswith("csrc")):
            began = time.monotonic()
            verdict = copy.try_out(mutant)
            escaped += not verdict.startswith("caught")
            print(f"{mutant.name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{len(chosen) - escaped} of {len(chosen)} mutants caught", flush=True)
    return min(escaped, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
