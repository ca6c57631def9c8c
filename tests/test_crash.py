"""A killed server keeps its word; ``ci/crash`` runs the same for as long as you like."""

from pathlib import Path

from tests.crash import Crash


def test_T17_kill_9_after_an_acknowledgement_loses_nothing(tmp_path: Path) -> None:
    """Also T14 (leases are known after a crash inside a claim) and T31 (keys survive a restart)."""
    crash = Crash(tmp_path, seed=17)
    for _ in range(8):
        crash.round()
    assert crash.in_flight > 0, "no kill met a create in flight, so nothing was tried"
    crash.drain()
