"""The window of pending deliveries over a store and places that are not real: what is read when."""

from __future__ import annotations

import asyncio
import bisect
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import cast

from codeq.engine.deliveries import PAGE_ENTRIES, PREFIX, Deliveries, Owed, Page
from codeq.server.places import Places
from codeq.server.window import Window


class Store:
    """Entries of the tenant ``t``, each named by its host; ``pages`` counts what was read."""

    def __init__(self, hosts: list[str]) -> None:
        self.keys = [PREFIX + number.to_bytes(16, "big") for number in range(len(hosts))]
        self.owed = [
            Owed(key, f"http://{host}/hook", "t", "job")
            for key, host in zip(self.keys, hosts, strict=True)
        ]
        self.end = self.keys[-1] + b"\0"
        self.committed: Callable[[bytes], None] | None = None
        self.pages = 0

    def page(self, begin: bytes, end: bytes, done: Callable[[Page], None]) -> None:
        self.pages += 1
        first, last = bisect.bisect_left(self.keys, begin), bisect.bisect_left(self.keys, end)
        after = first + PAGE_ENTRIES
        page = Page(self.owed[first : min(after, last)], self.keys[after] if after < last else None)
        asyncio.get_running_loop().call_soon(done, page)


class Quick:
    """Places that know one host as quick."""

    def is_quick(self, tenant: str, host: str) -> bool:
        return host == "quick"


class Reading:
    """A window and what it has in memory, by host."""

    def __init__(self, hosts: list[str], window_max: int) -> None:
        self.store = Store(hosts)
        self.held: dict[str, int] = defaultdict(int)
        deliveries, places = cast(Deliveries, self.store), cast(Places, Quick())
        self.window = Window(deliveries, places, self._admit, window_max=window_max)
        self.window.start()

    def _admit(self, owed: Owed, host: str) -> None:
        self.held[host] += 1

    def drop(self, host: str) -> None:
        """All that is in memory of the host is over."""
        for _ in range(self.held.pop(host)):
            self.window.drop("t", host)

    async def settle(self) -> None:
        pages = -1
        while pages != self.store.pages:
            pages = self.store.pages
            for _ in range(9):
                await asyncio.sleep(0)

    async def pages_until(self, host: str) -> int:
        """How many pages are read until there is something of the host again."""
        before = self.store.pages
        while not self.held[host]:
            await asyncio.sleep(0)
        return self.store.pages - before


def reading(
    hosts: list[str], scenario: Callable[[Reading], Awaitable[None]], window_max: int = 16_384
) -> None:
    async def run() -> None:
        made = Reading(hosts, window_max)
        await made.settle()
        await scenario(made)
        await made.window.stop()

    asyncio.run(run())


def test_T52_a_quick_host_does_not_wait_for_all_that_was_passed_over_of_its_tenant() -> None:
    async def scenario(made: Reading) -> None:
        assert made.window.held == 200, "no room for more of the tenant"
        for host in ("quick", *others):
            made.drop(host)
        assert await made.pages_until("quick") <= 3

    others = [f"h{number}" for number in range(184)]
    reading(["quick"] * 400 + others + ["dead"] * 10_000, scenario, window_max=8 * 200)


def test_T52_hosts_of_a_tenant_take_turns_at_what_was_passed_over_of_them() -> None:
    async def scenario(made: Reading) -> None:
        made.drop("slow")
        await made.pages_until("slow")
        made.drop("quick")
        assert await made.pages_until("quick") <= 3
        assert made.held["slow"] == 4, "the others of it are still looked for"
        await made.settle()
        assert made.held["slow"] == 8

    reading(["quick"] * 400 + ["slow"] * 20 + ["dead"] * 10_000 + ["slow"] * 4, scenario)
