"""A killed server keeps its word; ``ci/crash`` runs the same for as long as you like."""

from pathlib import Path
from typing import Any

from tests.crash_rounds import (
    OUTSIDE,
    RECOVERY,
    REMOVAL_POINTS,
    SHORT,
    WRITE_POINTS,
    Crash,
)
from tests.crash_server import Nursery
from tests.power_loss import compiled

ACKNOWLEDGEMENTS = 300


def crashed(folder: Path, seed: int, kills: tuple[str, ...], **kinds: Any) -> Crash:
    """Rounds on one folder, drained."""
    nursery = Nursery(compiled(folder))
    crash = Crash(folder, seed, acknowledgements=ACKNOWLEDGEMENTS, nursery=nursery, **kinds)
    rounds = [crash.round(kill) for kill in kills]
    assert any(done.in_flight for done in rounds), "nothing was in flight, so nothing was tried"
    crash.drain()
    nursery.close()
    return crash


def test_T17_kill_9_after_an_acknowledgement_loses_nothing(tmp_path: Path) -> None:
    """Also T14 (leases are known after a crash inside a claim) and T31 (keys survive a restart)."""
    crashed(tmp_path, 17, (OUTSIDE, RECOVERY, *WRITE_POINTS))


def test_T17_power_loss_after_an_acknowledgement_loses_nothing(tmp_path: Path) -> None:
    """Everything that no sync covered is cut or overwritten before each restart, as the library
    preloaded into the server saw the syncs."""
    crash = crashed(tmp_path, 18, (OUTSIDE, OUTSIDE, RECOVERY, *WRITE_POINTS), power_loss=True)
    assert crash.losses > 3


def test_T44_power_loss_inside_removal_loses_nothing_that_is_kept(tmp_path: Path) -> None:
    """Keeping times of seconds, so that ranges of the log go while it grows."""
    before = (OUTSIDE,) * SHORT.window
    crash = crashed(tmp_path, 19, (*before, *REMOVAL_POINTS), power_loss=True, keeping=SHORT)
    assert crash.ledger.repeats > 0
