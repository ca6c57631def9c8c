"""The table of mutants fits the tree; whether each is caught is tried by ``python -m
tests.mutants``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants.mutant import Mutant
from tests.mutants.table import CRASHED, MUTANTS

ROOT = Path(__file__).resolve().parent.parent
#: The traps that need a test and a change that makes it fail
TRAPS = set(range(1, 68))
TEST = re.compile(r"^(?:async )?def (test_\w+)\(", re.MULTILINE)
TRAP = re.compile(r"(?<=_)T(\d+)(?=_)")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_mutant_can_be_applied_and_its_test_is_there(mutant: Mutant) -> None:
    found = (ROOT / mutant.file).read_text().count(mutant.old)
    assert found == 1, f"tests/mutants/table.py: {mutant.old!r} stands {found} times"
    assert mutant.new != mutant.old
    file, _, name = mutant.test.partition("::")
    tests = (ROOT / "tests" / file).read_text()
    assert re.search(rf"^(async )?def {name}\(", tests, re.MULTILINE), f"no test {mutant.test}"


def test_mutants_have_names_of_their_own() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names))


def test_every_trap_has_a_test_and_a_mutant() -> None:
    files = (ROOT / "tests").glob("test_*.py")
    tests = " ".join(name for path in files for name in TEST.findall(path.read_text()))
    missed = " ".join(mutant.test for mutant in MUTANTS)
    for what, names in (("test", tests), ("mutant", missed)):
        lacking = TRAPS - set(map(int, TRAP.findall(names)))
        assert not lacking, f"traps without a {what}: {sorted(lacking)}"


def test_the_mutants_for_the_crash_harness_are_known() -> None:
    assert set(CRASHED) <= {mutant.name for mutant in MUTANTS}
    assert len(CRASHED) >= 10
