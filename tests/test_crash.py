"""A killed server keeps its word; ``ci/crash`` runs the same for as long as you like."""

from pathlib import Path

from tests.crash import FAULT_POINTS, OUTSIDE, RECOVERY, Crash


def test_T17_kill_9_after_an_acknowledgement_loses_nothing(tmp_path: Path) -> None:
    """Also T14 (leases are known after a crash inside a claim) and T31 (keys survive a restart)."""
    crash = Crash(tmp_path, seed=17)
    for _ in range(8):
        crash.round()
    assert crash.in_flight > 0, "no kill met a create in flight, so nothing was tried"
    crash.drain()


def test_T17_power_loss_after_an_acknowledgement_loses_nothing(tmp_path: Path) -> None:
    """Everything that no sync covered is cut or overwritten before each restart, as the library
    preloaded into the server saw the syncs."""
    crash = Crash(tmp_path, seed=18, power_loss=True)
    for kill in (OUTSIDE, OUTSIDE, OUTSIDE, RECOVERY, *FAULT_POINTS):
        crash.round(kill)
    assert crash.losses > 4
    assert crash.in_flight > 0, "no kill met a create in flight, so nothing was tried"
    crash.drain()
