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

#: Of one tenant at one host whose last try was quick, at one of any other kind, and of all
HOST_MAX = 128
SLOW_MAX = 16
WINDOW_MAX = 16_384


class Host:
    """What a tenant sends to one host: how many are in memory, and where in the store the others
    begin."""

    __slots__ = ("count", "more", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.more: bytes | None = None  # all of its keys in memory are below


class Tenant:
    """The same of a tenant. What stands below ``more`` is in memory or known to its host."""

    __slots__ = ("count", "hosts", "hungry", "more", "name", "turn")

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.more: bytes | None = None
        self.hosts: dict[str, Host] = {}
        self.turn = 0
        self.hungry: dict[Host, None] = {}  # those with room for what they have in the store


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
        self._tenants: dict[str, Tenant] = {}
        self._hungry: dict[Tenant, None] = {}  # those with room for what they have in the store
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
        tenant = self._tenants[tenant_name]
        host = tenant.hosts[host_name]
        self._count(tenant, host, -1)
        if self._is_hungry(tenant, host):
            tenant.hungry[host] = None
        self._forget(tenant, host)
        self._line_up(tenant)
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
            tenant = self._tenants.setdefault(owed.tenant, Tenant(owed.tenant))
            if tenant.more is None and tenant.count == self._tenant_max:
                tenant.more = owed.key
            elif tenant.more is None:
                self._take(tenant, owed)
        self._at = page.next or end

    async def _read_more(self, tenant: Tenant) -> None:
        """One page of what was passed over of the tenant, whose turn is over with it: by turns of
        what no host knows of and of what a host has, so that neither takes all room."""
        del self._hungry[tenant]
        tenant.turn ^= 1
        if tenant.more is not None and (tenant.turn or not tenant.hungry):
            await self._read_tenant(tenant)
        else:
            host = next(iter(tenant.hungry))
            await self._read_host(tenant, host)
            del tenant.hungry[host]
            if self._is_hungry(tenant, host):
                tenant.hungry[host] = None  # at the end
            self._forget(tenant, host)
        self._line_up(tenant)

    async def _read_tenant(self, tenant: Tenant) -> None:
        assert tenant.more is not None
        page = await self._page(tenant.more, self._at)
        for owed in page.owed:
            if owed.tenant != tenant.name:
                continue
            if not self._has_room(tenant):
                tenant.more = owed.key
                return
            self._take(tenant, owed)
        tenant.more = page.next

    async def _read_host(self, tenant: Tenant, host: Host) -> None:
        assert host.more is not None
        page = await self._page(host.more, tenant.more or self._at)
        for owed in page.owed:
            if owed.tenant != tenant.name or host_of(owed.url) != host.name:
                continue
            if not self._has_room(tenant) or host.count >= self._most(tenant, host):
                host.more = owed.key
                return
            self._admit(tenant, host, owed)
        host.more = page.next

    async def _page(self, begin: bytes, end: bytes) -> Page:
        answer, done = promise(self._loop)
        self._deliveries.page(begin, end, done)
        page: Page = await answer
        return page

    # --- who has room

    def _has_room(self, tenant: Tenant | None = None) -> bool:
        return self.held < self._window_max and (tenant is None or tenant.count < self._tenant_max)

    def _most(self, tenant: Tenant, host: Host) -> int:
        """Little for what is slow, which could not use more: its places are few."""
        if self._places.is_quick(tenant.name, host.name):
            return self._host_max
        return min(self._host_max, SLOW_MAX)

    def _is_hungry(self, tenant: Tenant, host: Host) -> bool:
        return host.more is not None and host.count <= self._most(tenant, host) // 2

    def _line_up(self, tenant: Tenant) -> None:
        """Puts the tenant among the hungry, or takes it out, or forgets it."""
        passed_over = tenant.more is not None or tenant.hungry
        if passed_over and tenant.count <= self._tenant_refill:
            self._hungry[tenant] = None
            return
        self._hungry.pop(tenant, None)
        if not tenant.hosts and tenant.more is None:
            self._tenants.pop(tenant.name, None)

    # --- what is in memory

    def _take(self, tenant: Tenant, owed: Owed) -> None:
        """Admits the delivery or leaves it to its host; the tenant has room."""
        name = host_of(owed.url)
        host = tenant.hosts.setdefault(name, Host(name))
        if host.more is None and host.count < self._most(tenant, host):
            self._admit(tenant, host, owed)
        elif host.more is None:
            host.more = owed.key

    def _admit(self, tenant: Tenant, host: Host, owed: Owed) -> None:
        self._count(tenant, host, 1)
        self._admit_to(owed, host.name)

    def _count(self, tenant: Tenant, host: Host, more: int) -> None:
        self.held += more
        tenant.count += more
        host.count += more

    def _forget(self, tenant: Tenant, host: Host) -> None:
        if not host.count and host.more is None:
            tenant.hungry.pop(host, None)
            tenant.hosts.pop(host.name, None)
