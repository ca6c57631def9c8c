"""Builds harness.c with the C core: for libFuzzer, or to read given files once."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS = (
    *("producer", "producer_server", "worker", "worker_server"),
    *("text", "chunk", "load", "entry"),
)
GOLDEN = ROOT / "tests" / "golden"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c11", "-g1", "-fno-omit-frame-pointer", "-DCODEQ_DEBUG", *SANITIZERS]
COVERAGE = ["-fsanitize-coverage=trace-pc,trace-cmp"]
#: libFuzzer, built by LLVM, as the wheel of atheris carries it
LIBRARY = "libclang_rt.fuzzer_no_main.a"


def golden(target: str) -> list[bytes]:
    """The inputs kept for this target: one a line, in hex; ``#`` begins a comment."""
    lines = (GOLDEN / f"{target}.hex").read_text().splitlines()
    return [bytes.fromhex(line) for line in lines if not line.startswith("#")]


def libfuzzer() -> Path:
    try:
        files = metadata.files("atheris") or []
    except metadata.PackageNotFoundError:
        raise SystemExit("libFuzzer is in the wheel of atheris: pip install atheris") from None
    (found,) = [file for file in files if file.name == LIBRARY]
    return Path(str(found.locate()))


def build(folder: Path, *, fuzzer: bool) -> Path:
    """Compiles into ``folder``; returns the program."""
    folder.mkdir(parents=True, exist_ok=True)
    harness = Path(__file__).with_name("harness.c")
    core = ["-O1", *COVERAGE] if fuzzer else ["-O0"]
    own = ["-O1", "-DLIBFUZZER"] if fuzzer else ["-O0"]
    sources = [*((path, core) for path in sorted((ROOT / "csrc").glob("*.c"))), (harness, own)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(folder, *source), sources))
    program = folder / "harness"
    library = [str(libfuzzer()), "-lstdc++", "-lm", "-lpthread", "-ldl"] if fuzzer else []
    wrap = ["-Wl,--wrap=__sanitizer_cov_trace_pc"] if fuzzer else []
    _run([_compiler(), *SANITIZERS, *wrap, *map(str, objects), *library, "-o", str(program)])
    return program


def _compile(folder: Path, source: Path, flags: list[str]) -> Path:
    output = folder / f"{source.stem}.o"
    include = f"-I{ROOT / 'csrc'}"
    _run([_compiler(), *FLAGS, *flags, include, "-c", str(source), "-o", str(output)])
    return output


def _compiler() -> str:
    return os.environ.get("CC", "gcc")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, env=environment())


def environment(target: str = "") -> dict[str, str]:
    """That of a sanitized program of its own, also below a Python that preloads the sanitizer."""
    left = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    fatal = "abort_on_error=1:print_stacktrace=1"  # only an abort makes libFuzzer keep the input
    more = {"ASAN_OPTIONS": fatal, "UBSAN_OPTIONS": fatal}
    return {**left, **more, "CODEQ_FUZZ_TARGET": target}
