"""Compares what a server says of its tasks with what it acknowledged; differences raise
AssertionError."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from tests.crash_clients import COMMANDS, Rest
from tests.crash_server import Server
from tests.ledger import Entry, Ledger

ENDED = ("COMPLETED", "FAILED")


def check(server: Server, ledger: Ledger, entries: list[Entry]) -> None:
    """Asks for each acknowledged create, result, nack and dead letter."""
    rest = Rest(server, "dev-producer")
    try:
        for entry in entries:
            if entry.acknowledged or entry.result is not None:
                check_entry(rest, ledger, entry)
    finally:
        rest.close()


def check_entry(rest: Rest, ledger: Ledger, entry: Entry) -> None:
    """A result is asked for when there must be one, else the task alone."""
    asked = "/result" if entry.result is not None or entry.dead else ""
    status, answer = rest.call("GET", f"/tasks/{entry.task_id}{asked}")
    if status == 404 and ledger.may_be_gone(entry):
        return
    assert status == 200, f"{entry} was acknowledged and is gone: {answer}"
    if asked:
        check_task(entry, answer["task"])
        check_result(entry, answer["task"], answer["result"])
    else:
        check_task(entry, answer)
        if answer["status"] in ENDED:
            status, answer = rest.call("GET", f"/tasks/{entry.task_id}/result")
            if status != 404 or not ledger.may_be_gone(entry):
                assert status == 200, f"{entry} ended without a result: {answer}"
                check_result(entry, answer["task"], answer["result"])


def check_task(entry: Entry, task: dict[str, Any]) -> None:
    assert json.loads(task["payload"])["number"] == entry.number, f"{entry} became {task}"
    assert task["priority"] == entry.priority, f"{entry} became {task}"
    assert task["command"] == entry.command, f"{entry} became {task}"
    status, dead = task["status"], is_dead(task)
    used_up = bool(entry.max_attempts) and task["attempts"] == entry.max_attempts
    if status not in ENDED:
        assert entry.result is None and not entry.dead, f"{entry} runs again: {task}"
    elif dead:
        assert used_up and entry.result is None, f"{entry} is no dead letter: {task}"
    else:
        assert entry.verdicts and not entry.dead, f"{entry} ended by itself: {task}"
    if entry.result is not None or entry.dead:
        more = task["attempts"] - entry.attempts
        assert 0 <= more <= entry.unread, f"{entry} has other attempts: {task}"
    least = entry.attempts_min - 1
    assert task["attempts"] >= least, f"{entry} has fewer attempts: {task}"
    if entry.nacked and task["attempts"] == entry.attempts:
        assert status == "PENDING", f"{entry} was nacked and is leased: {task}"


def is_dead(task: dict[str, Any]) -> bool:
    return bool(task["lastKnownLocation"] == "DLQ_SET")


def check_result(entry: Entry, task: dict[str, Any], record: dict[str, Any]) -> None:
    said = [
        {"status": "COMPLETED", "result": json.loads(text)}
        if status == "COMPLETED"
        else {"status": "FAILED", "error": text}
        for status, text in entry.verdicts
    ]
    found = {name: record[name] for name in ("status", "result", "error") if name in record}
    if is_dead(task):
        assert found["status"] == "FAILED" and found["error"], f"{entry} ended as {record}"
    else:
        assert found in said, f"{entry} has another result: {record}"


def counts(server: Server) -> tuple[int, int, int]:
    """Tasks that are ready, all live ones and dead letters, as the statistics say."""
    rest = Rest(server, "dev-producer")
    ready = live = dead = 0
    try:
        for command in COMMANDS:
            status, stats = rest.call("GET", f"/admin/queues/{quote(command, safe='')}")
            assert status == 200, stats
            ready += stats["ready"]
            live += stats["ready"] + stats["delayed"] + stats["inProgress"]
            dead += stats["dlq"]
        return ready, live, dead
    finally:
        rest.close()
