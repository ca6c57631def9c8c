"""The inputs that fuzzing found and those that cover the most, read again (see tests/fuzz)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fuzz.build import TARGETS, build, environment, golden
from tests.fuzz.disagreement import disagree


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C core with the sanitizers, as a program that reads files."""
    return build(tmp_path_factory.mktemp("harness"), fuzzer=False)


@pytest.mark.parametrize("target", TARGETS)
def test_T47_golden_inputs_break_nothing(target: str, harness: Path, tmp_path: Path) -> None:
    paths = []
    for number, data in enumerate(golden(target)):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(data)
    done = subprocess.run(
        [harness, *paths],
        env=environment(target),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("\n") == len(paths)


@pytest.mark.parametrize("target", TARGETS)
def test_golden_inputs_are_read_as_others_read_them(target: str) -> None:
    assert [data.hex() for data in golden(target) if disagree(target, data)] == []
