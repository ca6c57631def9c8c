"""Subscriptions in the engine room: whom a commit group tells, when, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from codeq.engine.store import Store
from codeq.engine.subscriptions import PREFIX, Subscription
from codeq.errors import StoreError

from .node import Node

HOUR_MS = 3_600_000


class Told:
    """Who was told what, and the calls that say that a notification is over."""

    def __init__(self, node: Node, *, at_once: bool = True) -> None:
        self.all: list[tuple[str, str, int]] = []
        self.under_way: list[Callable[[], None]] = []
        self._at_once = at_once
        node.shard.subscriptions.notify = self._notify

    def _notify(
        self, subscription: Subscription, command: str, depth: int, done: Callable[[], None]
    ) -> None:
        self.all.append((subscription.id, command, depth))
        if self._at_once:
            done()
        else:
            self.under_way.append(done)

    def take(self) -> list[str]:
        """Who was told since the last call."""
        told, self.all = self.all, []
        return [who for who, _, _ in told]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "data", lease_grace_seconds=0)
    yield made
    made.close()


def add(node: Node, name: str, tenant: str = "t", **fields: Any) -> Subscription:
    got: list[Any] = []
    wish = {
        "url": f"https://example.com/{name}",
        "commands": None,
        "mode": "fanout",
        "group": "",
        "ttl_ms": HOUR_MS,
        "interval_ms": 0,
        **fields,
    }
    node.shard.subscriptions.add(name, tenant, done=got.append, **wish)
    node.settle()
    assert len(got) == 1
    made: Subscription = got[0]
    return made


def renew(
    node: Node,
    name: str,
    tenant: str = "t",
    wait_ms: int = 0,
    ttl_ms: int | None = None,
    may: Callable[[bytes], bool] = lambda command: True,
) -> tuple[list[Any], Any]:
    """The list in which the answer will stand, and the handle of the wait."""
    got: list[Any] = []
    poll = node.shard.subscriptions.renew(
        name, tenant, ttl_ms, wait_ms, may, lambda *answer: got.append(answer)
    )
    node.settle()
    return got, poll


def test_fanout_tells_everybody_who_asked_for_the_queue(node: Node) -> None:
    told = Told(node)
    add(node, "all")
    add(node, "named", commands=("job", "other"))
    add(node, "elsewhere", commands=("other",))
    add(node, "silent", url="")
    node.create()
    assert sorted(told.all) == [("all", "job", 1), ("named", "job", 1)]


def test_T40_nobody_is_told_of_another_tenant(node: Node) -> None:
    told = Told(node)
    add(node, "mine")
    add(node, "theirs", tenant="u")
    node.create(tenant="u")
    assert told.take() == ["theirs"]
    got, _ = renew(node, "theirs", tenant="t")
    assert got == [(None, [])], "not there for others"
    ((kept, available),) = renew(node, "theirs", tenant="u")[0]
    assert kept.id == "theirs" and available == [("job", 1)]


def test_created_due_and_given_back_are_told(node: Node) -> None:
    told = Told(node)
    add(node, "a")
    task_id = node.create(delay_seconds=5)
    assert told.take() == []
    node.advance(5_000)
    assert told.take() == ["a"], "due"
    node.claim(lease_ms=10_000)
    node.abandon(task_id)
    assert told.take() == ["a"], "abandoned"
    node.claim(lease_ms=10_000)
    node.nack(task_id, 0)
    assert told.take() == ["a"], "given back"
    node.claim(lease_ms=10_000)
    assert told.take() == []


def test_what_a_waiting_claim_takes_is_not_told(node: Node) -> None:
    told = Told(node)
    add(node, "a")
    node.park([])
    node.create()
    assert told.take() == []
    node.create_batch([{}] * 3)
    assert told.all == [("a", "job", 3)]


def test_nobody_is_told_before_the_sync(node: Node) -> None:
    told = Told(node)
    add(node, "a")
    node.runner.hold_syncs = True
    with pytest.raises(AssertionError):
        node.create()
    assert told.all == []
    node.runner.hold_syncs = False
    node.runner.release()
    assert told.take() == ["a"]


def test_T63_a_group_is_told_one_member_after_the_other(node: Node) -> None:
    told = Told(node)
    for name in ("a1", "a2", "a3"):
        add(node, name, mode="group", group="a")
    add(node, "b1", mode="group", group="b")
    turns = []
    for _ in range(6):
        node.create()
        turns.append(told.take())
        node.advance(1)
    assert [sorted(turn) for turn in turns] == [[a, "b1"] for a in ("a1", "a2", "a3")] * 2


def test_T63_the_interval_is_that_of_the_member(node: Node) -> None:
    """A member told a moment ago is told again when its own interval is over; the others are not
    held up by it."""
    told = Told(node)
    for name in ("a", "b"):
        add(node, name, mode="group", group="g", interval_ms=5_000)
    node.create()
    node.advance(1_000)
    node.create()
    assert told.take() == ["a", "b"]
    node.create()  # it is a's turn
    assert told.take() == []
    node.advance(3_999)
    assert told.take() == []
    node.advance(1)
    assert told.take() == ["a"]
    node.advance(HOUR_MS)
    assert told.take() == []


def test_T63_hash_reaches_the_member_of_the_minute(node: Node) -> None:
    told = Told(node)
    members = ["a", "b", "c"]
    for name in members:
        add(node, name, mode="hash", ttl_ms=HOUR_MS)
    for _ in range(7):
        chosen = members[node.clock.now_ms() // 60_000 % 3]
        for _ in range(2):
            node.create()
            assert told.take() == [chosen]
            node.advance(1_000)
        node.advance(58_000)


def test_T64_the_interval_coalesces_and_loses_nothing(node: Node) -> None:
    told = Told(node)
    add(node, "a", interval_ms=10_000)
    for _ in range(5):
        node.create()
        node.advance(1_000)
    assert told.all == [("a", "job", 1)]
    node.advance(4_999)
    assert len(told.all) == 1
    node.advance(1)
    assert told.all[1:] == [("a", "job", 5)], "the depth as it is then"
    node.advance(60_000)
    assert len(told.all) == 2, "nothing new has come"


def test_work_that_was_taken_meanwhile_is_not_told(node: Node) -> None:
    told = Told(node)
    add(node, "a", interval_ms=10_000)
    node.create("first")
    node.create("second")
    node.create("third")
    assert told.all == [("a", "first", 1)]
    node.claim(("second",))
    node.advance(10_000)
    assert told.all[1:] == [("a", "third", 1)]


def test_one_notification_at_a_time(node: Node) -> None:
    told = Told(node, at_once=False)
    add(node, "slow")
    node.create()
    node.create()
    node.advance(5_000)
    assert len(told.all) == 1
    told.under_way.pop()()
    node.settle()
    node.advance(1)
    assert told.all[1:] == [("slow", "job", 2)]


def test_T64_subscriptions_survive_a_restart(node: Node) -> None:
    for name in ("a", "b"):
        add(node, name, commands=("Größe/Job", "JOB"), mode="group", group="g", ttl_ms=60_000)
    before = add(node, "gone", ttl_ms=1_000)
    node.advance(1_000)
    node.restart()
    told = Told(node)
    node.create("job")
    assert told.take() == [], "commands are told apart by case"
    node.create("JOB")
    node.create("Größe/Job")
    assert [(who, command) for who, command, _ in told.all] == [("a", "JOB"), ("b", "Größe/Job")]
    assert node.shard.subscriptions.active() == {"Größe/Job": 2, "JOB": 2}
    assert add(node, "new").number > before.number
    node.advance(59_000)
    told.take()
    node.create("JOB")
    assert told.take() == ["new"], "the others have ended"


def test_a_heartbeat_prolongs_durably(node: Node) -> None:
    made = add(node, "a", ttl_ms=10_000)
    node.advance(9_000)
    ((kept, available),) = renew(node, "a")[0]
    assert kept.expires_ms == made.expires_ms + 9_000 and available == []
    node.advance(9_000)
    node.restart()
    ((kept, _),) = renew(node, "a", ttl_ms=50_000)[0]
    assert kept.expires_ms == node.clock.now_ms() + 50_000
    node.advance(50_000)
    assert renew(node, "a")[0] == [(None, [])]


def test_what_has_ended_leaves_the_store(tmp_path: Path) -> None:
    node = Node(tmp_path / "data", subscription_cleanup_seconds=7)
    add(node, "short", ttl_ms=1_000)
    add(node, "long")

    def stored() -> list[bytes]:
        return [key for key, _ in node.shard._store.scan(PREFIX, b"pt")]

    node.advance(6_999)
    assert len(stored()) == 2
    node.advance(1)
    assert stored() == [PREFIX + b"long"]
    node.close()


def test_long_poll(node: Node) -> None:
    add(node, "a", url="", commands=("job", "other"))
    got, poll = renew(node, "a", wait_ms=20_000)
    assert poll is not None and got == []
    node.create("elsewhere")
    assert got == []
    node.create("job")
    ((kept, available),) = got
    assert kept.id == "a" and available == [("job", 1)]
    ((_, at_once),) = renew(node, "a", wait_ms=20_000)[0]
    assert at_once == [("job", 1)]
    ((_, allowed),) = renew(node, "a", may=lambda command: command == b"other")[0]
    assert allowed == [], "only what the token allows"
    assert node.shard.subscriptions._polls == {}


def test_long_poll_that_brings_nothing(node: Node) -> None:
    add(node, "a", url="", ttl_ms=5_000)
    got, _ = renew(node, "a", wait_ms=20_000)
    node.advance(19_999)
    assert got == []
    node.advance(1)
    ((kept, available),) = got
    assert available == [] and kept.expires_ms == node.clock.now_ms()
    assert node.shard.subscriptions._polls == {}


def pause(node: Node, command: str = "job", *, resume: bool = False) -> None:
    change = node.shard.queues.resume if resume else node.shard.queues.pause
    change("t", command, lambda: None)
    node.settle()


@pytest.mark.parametrize("commands", [None, ("job", "other")])
def test_a_paused_queue_is_told_when_it_is_resumed(
    node: Node, commands: tuple[str, ...] | None
) -> None:
    told = Told(node)
    add(node, "a", commands=commands)
    pause(node)
    node.create()
    assert told.take() == [], "a claim would get nothing"
    ((_, at_once),) = renew(node, "a")[0]
    assert at_once == []
    got, _ = renew(node, "a", wait_ms=20_000)
    node.create()
    assert got == []
    pause(node, resume=True)
    ((_, available),) = got
    assert available == [("job", 2)]
    assert told.all == [("a", "job", 2)]


def test_a_queue_paused_within_the_interval_is_told_when_it_is_resumed(node: Node) -> None:
    told = Told(node)
    add(node, "a", interval_ms=5_000)
    node.create()
    node.create()
    pause(node)
    told.take()
    node.advance(5_000)
    assert told.take() == []
    node.restart()
    told = Told(node)
    pause(node, resume=True)
    assert told.all == [("a", "job", 2)]


def test_long_poll_given_up(node: Node) -> None:
    add(node, "a", url="")
    got, poll = renew(node, "a", wait_ms=20_000)
    poll.cancel()
    node.create()
    node.advance(30_000)
    assert got == [] and node.shard.subscriptions._polls == {}


def test_a_tenant_has_only_so_many(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codeq.engine.subscriptions.TENANT_MAX", 2)
    add(node, "a", ttl_ms=1_000)
    add(node, "b")
    assert add(node, "c") is None
    add(node, "d", tenant="u")
    node.advance(1_000)
    assert add(node, "e").id == "e", "one has ended"


def test_nothing_is_asked_when_nobody_listens(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    subscriptions = node.shard.subscriptions
    monkeypatch.setattr(subscriptions, "touched", lambda queues: pytest.fail("asked"))
    node.create()
    assert not subscriptions.wanted


def test_a_damaged_subscription_is_named(node: Node) -> None:
    add(node, "a")
    node.shard.close()
    store = Store(node.path)
    ((key, value),) = store.scan(PREFIX, b"pt")
    store.write([(key, value[:-1] + bytes([value[-1] ^ 1]))])
    store.close()
    with pytest.raises(StoreError, match="subscription psa is damaged"):
        node._open()
    store = Store(node.path)
    store.write([(key, value)])
    store.close()
    node._open()
