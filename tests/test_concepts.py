"""The moves of docs/concepts.md are those that the engine makes, and no others are missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from codeq.engine import _engine
from codeq.server.views import PLACES

from .conftest import ROOT
from .node import Node

PAGE = (ROOT / "docs/concepts.md").read_text()
STATES = {
    "ready": _engine.READY,
    "delayed": _engine.DELAYED,
    "leased": _engine.LEASED,
    "completed": _engine.COMPLETED,
    "failed": _engine.FAILED,
    "dead": _engine.DEAD,
}
KEPT_SECONDS = 100


class Row(NamedTuple):
    """One row of the table of moves."""

    event: str
    begin: str
    to: str
    attempts: str
    error: str


def rows(heading: str) -> list[list[str]]:
    """The cells of the table that begins with this heading."""
    table = PAGE.partition(heading)[2].partition("\n\n")[0]
    lines = table.splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


MOVES = [Row(*cells[:5]) for cells in rows("| event | from | to |")]


# --- how a task gets to where a move begins, and how each move is made


def ready(node: Node) -> str:
    return node.create(max_attempts=2)


def delayed(node: Node) -> str:
    return node.create(delay_seconds=60)


def leased(node: Node) -> str:
    task_id = ready(node)
    assert node.claim()
    return task_id


def last_try(node: Node) -> str:
    task_id = node.create(max_attempts=1)
    assert node.claim()
    return task_id


def completed(node: Node) -> str:
    task_id = leased(node)
    node.finish(task_id)
    return task_id


def failed(node: Node) -> str:
    task_id = leased(node)
    fail(node, task_id)
    return task_id


def dead(node: Node) -> str:
    task_id = last_try(node)
    node.nack(task_id)
    return task_id


def nothing(node: Node, task_id: str) -> None:
    """The create was all."""


def fail(node: Node, task_id: str) -> None:
    node.finish_batch([{"task_id": task_id, "status": "FAILED", "error": "its text"}])


def not_delivered(node: Node, task_id: str) -> None:
    """The claim is made anew, since what Node.claim gives was accepted by the transport."""
    node.abandon(task_id)
    got: list[Any] = []
    node.shard.claim(node.request(got.append))
    node.settle()
    got[0].give_back()
    node.settle()


def queue(operation: str) -> Callable[[Node, str], Any]:
    return lambda node, task_id: node.ask(
        getattr(node.shard.queues, operation), "t", "job", [task_id], 1
    )


def keeping_time_over(node: Node, _: str) -> None:
    node.advance(KEPT_SECONDS * 1000)


def lease_over(node: Node, _: str) -> None:
    node.advance(60_000)


Place = Callable[[Node], str]
Make = Callable[[Node, str], Any]
HOW: dict[str, tuple[Place, Make]] = {
    "create": (ready, nothing),
    "create with runAt or delaySeconds": (delayed, nothing),
    "due time reached": (delayed, lambda node, _: node.advance(60_000)),
    "claim": (ready, lambda node, _: node.claim()),
    "claim not delivered": (leased, not_delivered),
    "heartbeat": (leased, lambda node, task_id: node.heartbeat(task_id)),
    "abandon": (leased, lambda node, task_id: node.abandon(task_id)),
    "nack, attempts left": (leased, lambda node, task_id: node.nack(task_id, reason="the reason")),
    "nack with delay 0, attempts left": (
        leased,
        lambda node, task_id: node.nack(task_id, 0, "the reason"),
    ),
    "nack, no attempt left": (last_try, lambda node, task_id: node.nack(task_id)),
    "lease over, attempts left": (leased, lease_over),
    "lease over, no attempt left": (last_try, lease_over),
    "result COMPLETED": (leased, lambda node, task_id: node.finish(task_id)),
    "result FAILED": (leased, fail),
    "cancel a ready task": (ready, lambda node, task_id: node.ask(node.shard.cancel, task_id, "t")),
    "cancel a delayed task": (
        delayed,
        lambda node, task_id: node.ask(node.shard.cancel, task_id, "t"),
    ),
    "requeue": (dead, queue("requeue")),
    "purge": (dead, queue("purge_dead")),
    "keeping time over": (completed, keeping_time_over),
    "keeping time over, failed": (failed, keeping_time_over),
    "keeping time over, dead": (dead, keeping_time_over),
}


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.event)
def test_I1_a_move_of_the_table_is_what_happens(move: Row, tmp_path: Path) -> None:
    keep = {"retention_seconds": KEPT_SECONDS, "dead_retention_seconds": KEPT_SECONDS}
    node = Node(tmp_path / "data", backoff_policy="fixed", **keep)
    place, make = HOW[move.event]
    task_id = place(node)
    before = node.get(task_id)
    make(node, task_id)
    after = node.get(task_id)
    node.close()
    if move.begin != "none":
        assert before.state == STATES[move.begin]
    if move.to == "gone":
        assert after is None
        return
    assert after.state == STATES[move.to]
    counts = {"same": 0, "+1": 1, "-1": -1}
    expected = before.attempts + counts[move.attempts] if move.attempts in counts else 0
    assert after.attempts == expected
    texts = {"the reason, else MAX_ATTEMPTS": "MAX_ATTEMPTS"}
    assert after.error == texts.get(move.error, move.error)


def test_the_table_of_moves_and_this_test_have_the_same_events() -> None:
    assert [move.event for move in MOVES] == list(HOW)


def test_the_table_of_places_is_that_of_the_server() -> None:
    shown = {name: (status, place) for name, status, place in rows("| place | `status`")}
    assert shown == {name: PLACES[state] for name, state in STATES.items()}


def test_the_picture_has_the_moves_of_the_table() -> None:
    picture = re.search(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)
    assert picture is not None
    arrows = set(re.findall(r"(\S+) --> (\w+|\[\*\]):", picture[1]))
    ends = {"none": "[*]", "gone": "[*]"}
    table = {(ends.get(move.begin, move.begin), ends.get(move.to, move.to)) for move in MOVES}
    assert arrows == table
