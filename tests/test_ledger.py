"""The ledger of the crash tests sees each kind of broken promise."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.ledger import Entry, Keeping, Ledger, verdict

ID, OTHER = "01a20d3f-18b0-7000-8000-000000000001", "01a20d3f-18b0-7000-8000-000000000002"
HOUR = 3600


def deliver(
    ledger: Ledger, attempts: int = 1, lease: float = HOUR, worker: str = "w", task_id: str = ID
) -> Entry:
    return ledger.delivered(0, task_id, attempts, time.time() + lease, worker)


def created(ledger: Ledger, max_attempts: int = 0, delay_seconds: int = 0) -> Entry:
    entry = ledger.new_create(
        "c", keyed=True, max_attempts=max_attempts, delay_seconds=delay_seconds
    )
    ledger.created(entry.number, ID)
    return entry


def finished(ledger: Ledger) -> Entry:
    created(ledger)
    entry = deliver(ledger, lease=0)
    ledger.finishing(entry, "w")
    ledger.answered(ID, "w", True)
    return entry


def twice(ledger: Ledger) -> None:
    created(ledger)
    ledger.created(0, OTHER)


def older_than_an_earlier_one(ledger: Ledger) -> None:
    ledger.new_create("c", keyed=False)
    ledger.created(0, OTHER)
    ledger.new_create("c", keyed=False)
    ledger.created(1, ID)


def after_its_result(ledger: Ledger) -> None:
    finished(ledger)
    deliver(ledger, 2)


def leased_twice(ledger: Ledger) -> None:
    created(ledger)
    deliver(ledger)
    deliver(ledger, 2, worker="v")


def lease_cut_by_a_restart(ledger: Ledger) -> None:
    created(ledger)
    deliver(ledger, lease=0.1)
    ledger.leases_last(time.time(), time.time() + HOUR)
    ledger.new_life()
    deliver(ledger, 2)


def too_early(ledger: Ledger) -> None:
    created(ledger, delay_seconds=1)
    deliver(ledger)


def early_after_a_nack(ledger: Ledger) -> None:
    created(ledger)
    entry = deliver(ledger)
    sent_at = ledger.nacking(entry, HOUR)
    ledger.was_nacked(entry, 1, sent_at, HOUR, False)
    deliver(ledger, 2)


def attempt_not_counted(ledger: Ledger) -> None:
    created(ledger)
    deliver(ledger).held_until = 0.0  # its lease is over
    deliver(ledger)


def attempt_counted_twice(ledger: Ledger) -> None:
    created(ledger)
    deliver(ledger, 2)


def abandon_counted(ledger: Ledger) -> None:
    created(ledger)
    entry = deliver(ledger)
    ledger.abandoning(entry)
    ledger.abandoned(entry, 1, True)
    deliver(ledger, 2)


def more_attempts_than_allowed(ledger: Ledger) -> None:
    created(ledger, max_attempts=1)
    deliver(ledger, lease=0)
    deliver(ledger, 2)


def dead_too_soon(ledger: Ledger) -> None:
    created(ledger, max_attempts=2)
    entry = deliver(ledger)
    ledger.was_nacked(entry, 1, ledger.nacking(entry, 0), 0, True)


def result_refused_to_its_holder(ledger: Ledger) -> None:
    created(ledger)
    ledger.finishing(deliver(ledger), "w")
    ledger.answered(ID, "w", False)


def result_of_another_taken(ledger: Ledger) -> None:
    created(ledger)
    entry = deliver(ledger, lease=0)
    ledger.finishing(entry, "w")
    deliver(ledger, 2, worker="v")
    ledger.answered(ID, "w", True)


def out_of_order(ledger: Ledger) -> None:
    ledger.in_order([(0, -7, OTHER), (0, -7, ID)])


@pytest.mark.parametrize(
    "breaks",
    [
        twice,
        older_than_an_earlier_one,
        after_its_result,
        leased_twice,
        lease_cut_by_a_restart,
        too_early,
        early_after_a_nack,
        attempt_not_counted,
        attempt_counted_twice,
        abandon_counted,
        more_attempts_than_allowed,
        dead_too_soon,
        result_refused_to_its_holder,
        result_of_another_taken,
        out_of_order,
    ],
)
def test_a_broken_promise_is_seen(breaks: Callable[[Ledger], None]) -> None:
    ledger = Ledger()
    breaks(ledger)
    assert len(ledger.violations) == 1, ledger.violations


def test_a_claim_that_nobody_read_is_no_broken_promise() -> None:
    ledger = Ledger()
    created(ledger)
    deliver(ledger, lease=0)
    ledger.new_life()
    deliver(ledger, 3)
    assert not ledger.violations


def test_a_refusal_that_belongs_to_an_earlier_delivery_is_none() -> None:
    ledger = Ledger()
    created(ledger)
    entry = deliver(ledger, lease=0)
    ledger.finishing(entry, "w")
    deliver(ledger, 2)
    ledger.finishing(entry, "w")
    ledger.answered(ID, "w", False)
    ledger.answered(ID, "w", True)
    assert not ledger.violations and entry.result == verdict(0, "w")


def test_what_ended_may_go_when_retention_and_window_are_over() -> None:
    for keeping, gone in ((Keeping(0, 0), True), (Keeping(0, 60), False), (Keeping(60, 0), False)):
        ledger = Ledger(keeping)
        assert ledger.may_be_gone(finished(ledger)) is gone
