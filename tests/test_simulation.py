"""The simulation over many seeds. Every seed replays exactly.

``CODEQ_SEEDS=first:count`` runs other seeds than the few of the suite; a failure names its seed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.simulated import MemoryStore
from tests.simulation import Simulation

FIRST, COUNT = (int(part) for part in os.environ.get("CODEQ_SEEDS", "0:100").split(":"))
SEEDS_ON_FILES = 2
REPLAYED_SEED = 6


def run(seed: int, path: Path, *, files: bool) -> None:
    try:
        Simulation(seed, path, files=files).run()
    except BaseException as error:
        error.add_note(f"seed {seed}{', on files' if files else ''}")
        raise


@pytest.mark.timeout(0)
def test_I1_I2_I3_I4_I5_I6_I7_I8_whatever_happens_in_whatever_order(tmp_path: Path) -> None:
    for seed in range(FIRST, FIRST + COUNT):
        run(seed, tmp_path, files=False)


def test_T17_a_real_store_loses_and_doubles_nothing_either(tmp_path: Path) -> None:
    for seed in range(FIRST, FIRST + min(COUNT, SEEDS_ON_FILES)):
        run(seed, tmp_path / str(seed), files=True)


def trace(seed: int) -> str:
    """A digest of all that a run decided and wrote."""
    simulation = Simulation(seed, Path(), files=False)
    written = hashlib.sha256()
    write = MemoryStore.write

    def noted(store: MemoryStore, *changes: Any) -> None:
        written.update(repr(changes).encode())
        write(store, *changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryStore, "write", noted)
        simulation.run()
    written.update(repr((simulation.rng.getstate(), simulation.model.tasks)).encode())
    return written.hexdigest()


def test_a_seed_replays_exactly() -> None:
    """Also in another process, whose sets have another order."""
    ask = f"from tests.test_simulation import trace; print(trace({REPLAYED_SEED}))"
    answers = {
        subprocess.run(
            [sys.executable, "-c", ask],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert len(answers) == 1
