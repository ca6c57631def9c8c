"""The table of mutants fits the tree; whether each is caught is tried by ``python -m
tests.mutants``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent


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
