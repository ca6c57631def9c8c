"""The client processes of the load bench: each plays one role until its standard input ends.

Run as ``python -m codeq.bench.clients``, told its role on the first line of standard input. What it
counts stands in a file that all processes share, so that producers can wait for workers. Told to
end, a client finishes what it has begun and reports on its last line.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Protocol

import msgspec
import uvloop

from codeq.bench.client import Client
from codeq.bench.plan import Role
from codeq.bench.rest_clients import RestClaims, RestCreates
from codeq.bench.stream_clients import StreamClaims, StreamCreates


class Playing(Protocol):
    """Plays one role with the client's counters."""

    def __init__(self, client: Client) -> None: ...

    async def play(self, ready: Callable[[], None]) -> None:
        """Calls ``ready`` when connected; returns after the client was told to stop."""


ROLES: dict[str, type[Playing]] = {
    "produce": StreamCreates,
    "work": StreamClaims,
    "rest-produce": RestCreates,
    "rest-work": RestClaims,
}


def ready() -> None:
    print("ready", flush=True)


async def play(role: Role) -> None:
    """Plays the role until standard input ends, then prints what it saw."""
    client = Client(role)
    loop = asyncio.get_running_loop()
    told = loop.run_in_executor(None, sys.stdin.buffer.read)
    told.add_done_callback(lambda _: client.stopping.set())
    await ROLES[role.kind](client).play(ready)
    print(msgspec.json.encode(client.report()).decode(), flush=True)


if __name__ == "__main__":
    uvloop.run(play(msgspec.json.decode(sys.stdin.buffer.readline(), type=Role)))
