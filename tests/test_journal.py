"""Group commit: who is answered when."""

from __future__ import annotations

from pathlib import Path

from codeq.engine.clock import FakeClock
from codeq.engine.journal import Journal
from codeq.engine.store import Store
from tests.manual_runner import ManualRunner


def test_a_wish_during_a_sync_survives_a_commit_that_was_scheduled_before_it(
    tmp_path: Path,
) -> None:
    """A claim that finds nothing asks for another commit from inside one. When that comes up while
    the sync runs, it must not take the wishes that came meanwhile with it: nobody would answer."""
    clock = FakeClock()
    runner = ManualRunner(clock)
    runner.hold_syncs = True
    store = Store(tmp_path)
    answered: list[str] = []
    groups: list[int] = []

    def close_group() -> None:
        groups.append(len(groups))
        if len(groups) == 1:
            runner.soon(lambda: journal.after(lambda: answered.append("during the sync")))
            journal.after(lambda: answered.append("in the group"))

    journal = Journal(
        store,
        clock,
        runner,
        close_group=close_group,
        take=lambda: [(b"m", b"%d" % len(groups))],
        fault=answered.append,
    )
    journal.kick()
    runner.settle()
    assert answered == [], "nothing is on disk yet"
    runner.release()
    assert answered == ["in the group"]
    runner.release()
    assert answered == ["in the group", "during the sync"]
    store.close()
