"""Group commit: who is answered when."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_T6_a_cut_that_fails_stops_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ManualRunner(FakeClock())
    store = Store(tmp_path)
    said: list[str] = []
    journal = Journal(
        store,
        runner.clock,
        runner,
        close_group=lambda: None,
        take=lambda: [(b"m", b"1")],
        fault=said.append,
    )

    def cut() -> None:
        raise Exception("IO error")  # as bare as those of rocksdict

    monkeypatch.setattr(Store, "put_off", True)
    monkeypatch.setattr(Store, "cut_due", True)
    monkeypatch.setattr(store, "cut", cut)
    journal.after(lambda: said.append("an answer"))
    runner.settle()
    assert said == ["write to the store failed: IO error"]
    assert journal.groups == 0
    store.close()
