"""Places: who gets the next one, and what slow jobs cannot take from the others."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from codeq.engine.clock import FakeClock
from codeq.server import places
from codeq.server.places import NEW, PLACE, SLOW, Lane, Place, Places


class Room:
    """Places whose jobs end when the test says so, each at once or after a wait of the clock."""

    def __init__(self, count: int, per_host: int) -> None:
        self.clock = FakeClock()
        self.places = Places(count, per_host, self.clock)
        self.running: dict[asyncio.Future[bool], tuple[str, str]] = {}  # in the order they began
        self.begun: list[tuple[str, str]] = []

    def add(
        self,
        tenant: str,
        host: str,
        count: int = 1,
        reads: Awaitable[None] | None = None,
        **kw: Any,
    ) -> None:
        """``reads``: what the jobs wait for before they begin to send."""
        for _ in range(count):
            self.places.submit(tenant, host, self._job(tenant, host, reads), **kw)

    def _job(
        self, tenant: str, host: str, reads: Awaitable[None] | None
    ) -> Callable[[], Awaitable[None]]:
        async def job() -> None:
            place = PLACE.get()
            assert place is not None
            if reads is not None:
                await reads
            place.began_s = self.clock.monotonic_s()
            end: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self.running[end] = (tenant, host)
            self.begun.append((tenant, host))
            place.failed = await end

        return job

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def end(
        self, tenant: str | None = None, host: str | None = None, *, failed: bool = False
    ) -> None:
        """Ends the oldest of these jobs."""
        found = next(
            end
            for end, of in self.running.items()
            if tenant in (None, of[0]) and host in (None, of[1])
        )
        del self.running[found]
        found.set_result(failed)
        await self.settle()

    async def prove(self, tenant: str, host: str, *, seconds: float = 0, **kw: Any) -> None:
        """One try, so that the standing is known."""
        self.add(tenant, host)
        await self.settle()
        self.clock.advance(int(seconds * 1000))
        await self.end(tenant, host, **kw)

    def held(self) -> Counter[tuple[str, str]]:
        return Counter(self.running.values())

    def of_tenant(self, tenant: str) -> int:
        return sum(of[0] == tenant for of in self.running.values())


def in_room(
    scenario: Callable[[Room], Awaitable[None]], count: int = 16, per_host: int = 4
) -> None:
    async def run() -> None:
        room = Room(count, per_host)
        try:
            await scenario(room)
        finally:
            await room.places.stop()

    asyncio.run(run())


def test_T52_a_tenant_has_half_of_the_places_at_most_and_alone_three_quarters() -> None:
    async def scenario(room: Room) -> None:
        for tenant in ("a", "b"):
            for number in range(8):
                await room.prove(tenant, f"{tenant}{number}")
        for number in range(8):
            room.add("a", f"a{number}", 8)
        await room.settle()
        assert room.of_tenant("a") == 12, "alone"
        room.add("b", "b0", 9)
        await room.settle()
        assert room.of_tenant("b") == 4, "as many as a host may have"
        for _ in range(5):
            await room.end("a")
        assert room.of_tenant("a") == 8
        for _ in range(9):
            await room.end("b")
        assert (room.of_tenant("a"), room.of_tenant("b")) == (12, 0), "alone again"

    in_room(scenario)


def test_T52_a_host_that_is_not_known_to_be_quick_gets_less() -> None:
    async def scenario(room: Room) -> None:
        room.add("a", "h", 20)
        await room.settle()
        assert room.held()["a", "h"] == 1, "before the first try is over"
        await room.end()
        assert room.held()["a", "h"] == 4, "quick"
        room.clock.advance(1_001)
        await room.end()
        assert room.held()["a", "h"] == 3, "the others have taken long too"
        await room.end()
        await room.end()
        assert room.held()["a", "h"] == 2, "half of its places"
        await room.end()
        await room.end()
        assert room.held()["a", "h"] == 4, "it is quick again"

    in_room(scenario)


def test_T52_slow_names_without_end_leave_places_to_the_new_and_the_quick() -> None:
    async def scenario(room: Room) -> None:
        for tenant in ("a", "b", "c", "d"):
            await room.prove(tenant, "quick")
            for number in range(9):
                await room.prove(tenant, f"slow{number}", seconds=15)
        for tenant in ("a", "b", "c", "d"):
            for number in range(9):
                room.add(tenant, f"slow{number}", 9)
        await room.settle()
        assert len(room.running) == 8, "half of all"
        assert room.of_tenant("a") == 4, "half of what a tenant may have"
        for number in range(9):
            room.add("b", f"new{number}", 9)
        await room.settle()
        assert (len(room.running), room.of_tenant("b")) == (10, 6), "three quarters of it"
        for number in range(9):
            room.add("e", f"new{number}", 9)
        await room.settle()
        assert len(room.running) == 12, "three quarters of all"
        for tenant in ("a", "b", "c", "d"):
            room.add(tenant, "quick")
            await room.settle()
            assert room.held()[tenant, "quick"] == 1
            await room.end(tenant, "quick")

    in_room(scenario)


def test_T52_of_a_host_that_many_share_a_slow_tenant_takes_half() -> None:
    async def scenario(room: Room) -> None:
        await room.prove("a", "shared", seconds=2)
        room.add("a", "shared", 9)
        await room.settle()
        assert room.held()["a", "shared"] == 2
        await room.prove("b", "shared")
        room.add("b", "shared", 9)
        await room.settle()
        assert room.held()["b", "shared"] == 2
        begun = len(room.begun)
        for _ in range(4):
            await room.end("b")
        assert room.begun[begun:].count(("b", "shared")) == 4

    in_room(scenario)


@pytest.mark.parametrize(("slow", "held"), [("", [2, 1, 1]), ("ab", [1, 1, 2])])
def test_no_place_of_a_host_is_left_over_unless_to_the_slow(slow: str, held: list[int]) -> None:
    async def scenario(room: Room) -> None:
        for tenant in "abc":
            await room.prove(tenant, "shared", seconds=2 * (tenant in slow))
        for count in (1, 9):
            for tenant in "abc":
                room.add(tenant, "shared", count)
        await room.settle()
        assert [room.of_tenant(tenant) for tenant in "abc"] == held

    in_room(scenario)


def test_T52_hosts_that_never_answer_leave_a_slow_host_of_the_tenant_its_part() -> None:
    async def scenario(room: Room) -> None:
        found = ["slow", *(f"dead{number}" for number in range(4))]
        for host in found:
            await room.prove("a", host, seconds=2)
        for host in found:
            room.add("a", host, 9)
        await room.settle()
        room.clock.advance(15_000)
        for _ in range(6):
            await room.end()
        for _ in range(5):
            room.clock.advance(1_500)
            await room.end("a", "slow")
            assert room.held()["a", "slow"] == 1
        assert len(room.running) == 6, "one of the others has two"

    in_room(scenario, count=24)


def test_T52_tenants_take_turns_at_a_host_and_in_all() -> None:
    async def scenario(room: Room) -> None:
        for tenant in ("a", "b"):
            for host in ("h", "i", "j"):
                await room.prove(tenant, host)
        for host in ("h", "i", "j"):
            room.add("a", host, 30)
        await room.settle()
        room.add("b", "h", 30)
        begun = len(room.begun)
        for _ in range(30):
            await room.end()
        shared = Counter(of for of in room.begun[begun:] if of[1] == "h")
        assert min(shared["a", "h"], shared["b", "h"]) >= 4

    in_room(scenario, count=8)


def test_T52_a_place_of_a_host_is_offered_to_no_more_than_can_take_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offers = 0
    offer = Places._offer

    def counted(found: Places, lane: Lane) -> None:
        nonlocal offers
        offers += 1
        offer(found, lane)

    monkeypatch.setattr(Places, "_offer", counted)

    async def scenario(room: Room) -> None:
        nonlocal offers
        for number in range(1_000):
            room.add(f"t{number}", "shared", 2)
        await room.settle()
        offers = 0
        for _ in range(100):
            await room.end()
        assert offers <= 500
        assert len(set(room.begun)) == 104, "and each has its turn"

    in_room(scenario)


def test_a_host_that_gets_more_to_do_keeps_its_turn() -> None:
    async def scenario(room: Room) -> None:
        for host in ("x", "y", "h", "i"):
            await room.prove("a", host)
        for host in ("x", "y", "z", "h", "i", "h"):
            room.add("a", host)
        await room.settle()
        assert room.held() == {("a", "x"): 1, ("a", "y"): 1, ("a", "z"): 1}
        await room.end()
        assert room.begun[-1] == ("a", "h")

    in_room(scenario, count=4)


def test_results_and_notifications_take_turns() -> None:
    async def run() -> None:
        places, ran = Places(1, 1, FakeClock()), []

        def job(what: str) -> Callable[[], Awaitable[None]]:
            async def note() -> None:
                ran.append(what)

            return note

        for _ in range(3):
            places.submit("t", "h", job("result"))
        for _ in range(2):
            places.submit("t", "h", job("notification"), notification=True)
        while len(ran) < 5:
            await asyncio.sleep(0)
        assert ran[1:] == ["result", "notification"] * 2, "the first was begun before all others"

    asyncio.run(run())


def test_a_place_is_kept_until_its_look_ups_are_done() -> None:
    async def run() -> None:
        places, ran = Places(1, 1, FakeClock()), []
        looking: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def first() -> None:
            place = PLACE.get()
            assert place is not None
            place.lookups.append(looking)

        async def second() -> None:
            ran.append(PLACE.get())

        places.submit("t", "h", first)
        places.submit("t", "h", second)
        for _ in range(9):
            await asyncio.sleep(0)
        assert not ran
        looking.set_exception(OSError("no such name"))
        while not ran:
            await asyncio.sleep(0)
        await places.stop()

    asyncio.run(run())


def test_T52_who_becomes_slow_while_it_waits_has_its_turn_all_the_same() -> None:
    async def scenario(room: Room) -> None:
        await room.prove("a", "h")
        await room.prove("b", "i")
        room.add("a", "h")
        room.add("b", "i", 2)
        await room.settle()
        assert room.held() == {("a", "h"): 1, ("b", "i"): 1}
        room.clock.advance(1_001)
        await room.end("a")
        assert room.held() == {("b", "i"): 2}

    in_room(scenario, count=2)


def test_a_host_that_does_not_answer_its_first_try_gets_no_second_place() -> None:
    async def scenario(room: Room) -> None:
        room.add("a", "h", 9)
        await room.settle()
        room.clock.advance(14_999)
        room.add("a", "h")
        await room.settle()
        assert room.held() == {("a", "h"): 1}
        await room.end()
        assert room.held() == {("a", "h"): 2}, "now it is slow"

    in_room(scenario)


def could_begin(room: Room) -> list[tuple[str, str]]:
    """The lanes with a job that waits although there is a place for it."""
    found = room.places

    def may(lane: Lane) -> bool:
        standing = found._standing(lane)
        return (
            lane.waits
            and len(lane.running) < min(found._per_lane[standing], found._part(lane.host, standing))
            and lane.host.running < found._per_host
            and found._may_have(lane.tenant, standing)
            and found._held.may_begin(standing, found._most)
        )

    lanes = [lane for tenant in found._tenants.values() for lane in tenant.lanes.values()]
    return [(lane.tenant.name, lane.host.name) for lane in lanes if may(lane)]


def check_bounds(room: Room, count: int, per_host: int) -> None:
    half, most = (min(count, max(2, part)) for part in (count // 2, count * 3 // 4))
    lanes = [lane for tenant in room.places._tenants.values() for lane in tenant.lanes.values()]
    running = [place for lane in lanes for place in lane.running]
    assert max(Counter(place.lane.host.name for place in running).values(), default=0) <= per_host
    assert len(running) <= count
    assert_parts(running, count)
    for tenant in room.places._tenants:
        of_tenant = [place for place in running if place.lane.tenant.name == tenant]
        assert len(of_tenant) <= most, "alone, else not more than half"
        assert_parts(of_tenant, half)


def assert_parts(running: list[Place], count: int) -> None:
    assert sum(place.standing >= NEW for place in running) <= count - count // 4
    assert sum(place.standing == SLOW for place in running) <= count - count // 2


@pytest.mark.parametrize("seed", range(40))
def test_T52_whatever_comes_every_bound_holds_and_everything_has_its_turn(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random jobs that end in a random order. A job that could begin has begun, so at the end
    nothing is left."""
    rng = random.Random(seed)
    count, per_host = rng.choice([(1, 1), (2, 1), (3, 2), (8, 3), (12, 5), (16, 20), (64, 8)])
    tenants, hosts = "abcdefg"[: rng.randint(1, 7)], "vwxyz"[: rng.randint(1, 5)]
    monkeypatch.setattr(places, "KNOWN_MAX", rng.choice([2, 9, 99]))

    async def scenario(room: Room) -> None:
        added = 0
        for _ in range(300):
            step = rng.random()
            if step < 0.4:
                more = rng.randint(1, 9)
                added += more
                many: dict[str, Any] = {"notification": rng.random() < 0.3}
                room.add(rng.choice(tenants), rng.choice(hosts), more, **many)
            elif step < 0.55:
                room.clock.advance(rng.choice([10, 500, 2_000]))
            elif room.running:
                await room.end(*rng.choice(list(room.running.values())))
            await room.settle()
            check_bounds(room, count, per_host)
            assert not could_begin(room)
        while room.running:
            await room.end()
        assert len(room.begun) == added, "nothing was forgotten"
        assert room.places._tenants == {} and room.places._hosts == {}
        assert not any(room.places._rings) and room.places._held._held == [0, 0, 0]

    in_room(scenario, count, per_host)


def test_a_host_is_quick_that_takes_what_is_sent_and_at_once() -> None:
    async def scenario(room: Room) -> None:
        def quick() -> bool:
            return room.places.is_quick("a", "h")

        assert not quick()
        await room.prove("a", "h")
        assert quick()
        room.add("a", "h")
        await room.settle()
        room.clock.advance(1_000)
        assert quick()
        room.clock.advance(1)
        assert not quick(), "one that runs takes longer"
        await room.end()
        assert not quick()
        await room.prove("a", "h", failed=True)
        assert not quick() and room.places._known["a", "h"].quick
        await room.prove("a", "h")
        assert quick()

    in_room(scenario)


def test_T52_a_disk_that_is_slow_makes_no_host_slow() -> None:
    async def scenario(room: Room) -> None:
        await room.prove("a", "h")
        reads: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        room.add("a", "h", reads=reads)
        await room.settle()
        room.clock.advance(5_000)
        assert room.places.is_quick("a", "h")
        reads.set_result(None)
        await room.settle()
        await room.end()
        assert room.places.is_quick("a", "h")

    in_room(scenario)


def test_what_is_known_of_hosts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "KNOWN_MAX", 100)

    async def scenario(room: Room) -> None:
        await room.prove("b", "h")
        for number in range(95):
            await room.prove("a", f"h{number}")
        await room.prove("b", "h")
        for number in range(95, 110):
            await room.prove("a", f"h{number}")
        assert len(room.places._known) == 100
        assert room.places.is_quick("a", "h109") and not room.places.is_quick("a", "h9")
        assert room.places.is_quick("b", "h"), "told of last, so not forgotten"

    in_room(scenario)
