"""The pending deliveries that are in memory. All others wait in the store, where they are read
when there is room.

There is room for so many in all, for an eighth of them of each tenant, and for so many of what a
tenant sends to one host. So a host with a long line keeps none of the others waiting, and a tenant
with many such hosts no other tenant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from codeq.engine.deliveries import PREFIX, Deliveries, Owed, Page
from codeq.server.callbacks import host_of
from codeq.server.places import Places
from codeq.server.request import promise

#: Of one tenant at one host that is quick, at one of any other kind, and of all
HOST_MAX = 128
SLOW_MAX = 16
WINDOW_MAX = 16_384


class Line:
    """What one tenant sends to one host: how many are in memory, where in the store the others
    begin, and how many were over since there was nothing."""

    __slots__ = ("count", "more", "name", "over")

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.over = 0
        self.more: bytes | None = None  # all of its keys in memory are below


class Owner:
    """The same of a tenant. What stands below ``more`` is in memory or known to its line."""

    __slots__ = ("count", "hungry", "lines", "more", "name", "turn")

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.more: bytes | None = None
        self.lines: dict[str, Line] = {}
        self.turn = 0
        self.hungry: dict[Line, None] = {}  # those with room for what they have in the store


class Window:
    """Reads deliveries and hands each to ``admit``, once, with its host; the caller says with
    ``drop`` when it is over. Make it inside the loop; it begins with ``start``. ``held`` counts
    what is in memory."""

    def __init__(
        self,
        deliveries: Deliveries,
        places: Places,
        admit: Callable[[Owed, str], None],
        *,
        host_max: int = HOST_MAX,
        window_max: int = WINDOW_MAX,
    ) -> None:
        self._deliveries = deliveries
        self._places = places
        self._admit_to = admit
        self._host_max = host_max
        self._window_max = window_max
        self._tenant_max = max(1, window_max // 8)
        # room for some at once, since each time much of the store may have to be read
        self._tenant_refill = min(self._tenant_max - 1, self._tenant_max * 7 // 8)
        self._loop = asyncio.get_running_loop()
        self._owners: dict[str, Owner] = {}
        self._hungry: dict[Owner, None] = {}  # those with room for what they have in the store
        self._at = PREFIX  # what is in the store before this was looked at
        self._end = PREFIX
        self._wake = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self.held = 0

    def start(self) -> None:
        """Takes up what is pending and what comes."""
        self._deliveries.committed = self._committed
        self._reader = self._loop.create_task(self._read())
        self._committed(self._deliveries.end)

    async def stop(self) -> None:
        """Reads nothing more."""
        self._deliveries.committed = None
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def drop(self, tenant_name: str, host_name: str) -> None:
        """A delivery is over: there is room for another."""
        owner = self._owners[tenant_name]
        line = owner.lines[host_name]
        self._count(owner, line, -1)
        line.over += 1
        if self._is_hungry(owner, line):
            owner.hungry[line] = None
        self._forget(owner, line)
        self._line_up(owner)
        self._wake.set()

    # --- reading

    def _committed(self, end: bytes) -> None:
        self._end = end
        self._wake.set()

    async def _read(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._has_room() and (self._at < self._end or self._hungry):
                if self._at < self._end:
                    await self._read_new()
                if self._hungry and self._has_room():
                    await self._read_more(next(iter(self._hungry)))

    async def _read_new(self) -> None:
        end = self._end
        page = await self._page(self._at, end)
        for owed in page.owed:
            if not self._has_room():
                self._at = owed.key
                return
            owner = self._owners.setdefault(owed.tenant, Owner(owed.tenant))
            if owner.more is None and owner.count == self._tenant_max:
                owner.more = owed.key
            elif owner.more is None:
                self._take(owner, owed)
        self._at = page.next or end

    async def _read_more(self, owner: Owner) -> None:
        """One page of what was passed over of the tenant, whose turn is over with it: by turns of
        what no line knows of and of what a line has, so that neither takes all room."""
        del self._hungry[owner]
        owner.turn ^= 1
        if owner.more is not None and (owner.turn or not owner.hungry):
            await self._read_owner(owner)
        else:
            line = next(iter(owner.hungry))
            await self._read_line(owner, line)
            del owner.hungry[line]
            if self._is_hungry(owner, line):
                owner.hungry[line] = None  # at the end
            self._forget(owner, line)
        self._line_up(owner)

    async def _read_owner(self, owner: Owner) -> None:
        assert owner.more is not None
        page = await self._page(owner.more, self._at)
        for owed in page.owed:
            if owed.tenant != owner.name:
                continue
            if not self._has_room(owner):
                owner.more = owed.key
                return
            self._take(owner, owed)
        owner.more = page.next

    async def _read_line(self, owner: Owner, line: Line) -> None:
        assert line.more is not None
        page = await self._page(line.more, owner.more or self._at)
        for owed in page.owed:
            if owed.tenant != owner.name or host_of(owed.url) != line.name:
                continue
            if not self._has_room(owner) or line.count >= self._most(owner, line):
                line.more = owed.key
                return
            self._admit(owner, line, owed)
        line.more = page.next

    async def _page(self, begin: bytes, end: bytes) -> Page:
        answer, done = promise(self._loop)
        self._deliveries.page(begin, end, done)
        page: Page = await answer
        return page

    # --- who has room

    def _has_room(self, owner: Owner | None = None) -> bool:
        return self.held < self._window_max and (owner is None or owner.count < self._tenant_max)

    def _most(self, owner: Owner, line: Line) -> int:
        """Little for what is slow, which could not use more: its places are few. What is quick gets
        more with each that is over, since it may hang from now on."""
        quick = self._places.is_quick(owner.name, line.name)
        return min(self._host_max, SLOW_MAX + line.over * quick)

    def _is_hungry(self, owner: Owner, line: Line) -> bool:
        return line.more is not None and line.count <= self._most(owner, line) // 2

    def _line_up(self, owner: Owner) -> None:
        """Puts the tenant among the hungry, or takes it out, or forgets it."""
        passed_over = owner.more is not None or owner.hungry
        if passed_over and owner.count <= self._tenant_refill:
            self._hungry[owner] = None
            return
        self._hungry.pop(owner, None)
        if not owner.lines and owner.more is None:
            self._owners.pop(owner.name, None)

    # --- what is in memory

    def _take(self, owner: Owner, owed: Owed) -> None:
        """Admits the delivery or leaves it to its line; the tenant has room."""
        name = host_of(owed.url)
        line = owner.lines.setdefault(name, Line(name))
        if line.more is None and line.count < self._most(owner, line):
            self._admit(owner, line, owed)
        elif line.more is None:
            line.more = owed.key

    def _admit(self, owner: Owner, line: Line, owed: Owed) -> None:
        self._count(owner, line, 1)
        self._admit_to(owed, line.name)

    def _count(self, owner: Owner, line: Line, more: int) -> None:
        self.held += more
        owner.count += more
        line.count += more

    def _forget(self, owner: Owner, line: Line) -> None:
        if not line.count and line.more is None:
            owner.hungry.pop(line, None)
            owner.lines.pop(line.name, None)
