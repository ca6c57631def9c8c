"""The client processes of the load bench: each plays one role until its standard input ends.

Run as ``python -m codeq.bench.clients``, told its role on the first line of standard input. What it
counts stands in a file that all processes share, so that producers can wait for workers. Told to
end, a client finishes what it has begun and reports on its last line.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable
from typing import Protocol

import msgspec
import uvloop

from codeq.bench.client import Client
from codeq.bench.plan import Role


class Playing(Protocol):
    """Plays one role with the client's counters."""

    def __init__(self, client: Client) -> None: ...

    async def play(self, ready: Callable[[], None]) -> None:
        """Calls ``ready`` when connected; returns after the client was told to stop."""


#: Where each role is played. Peers need packages of their own: a role is loaded when it is needed
ROLES = {
    "produce": "codeq.bench.stream_clients:StreamCreates",
    "work": "codeq.bench.stream_clients:StreamClaims",
    "rest-produce": "codeq.bench.rest_clients:RestCreates",
    "rest-work": "codeq.bench.rest_clients:RestClaims",
    "postgres-produce": "codeq.bench.peers.postgres:Creates",
    "postgres-work": "codeq.bench.peers.postgres:Claims",
    "redis-produce": "codeq.bench.peers.redis_streams:Creates",
    "redis-work": "codeq.bench.peers.redis_streams:Claims",
}


def player(kind: str) -> type[Playing]:
    module, _, name = ROLES[kind].partition(":")
    found: type[Playing] = getattr(importlib.import_module(module), name)
    return found


def ready() -> None:
    print("ready", flush=True)


async def play(role: Role) -> None:
    """Plays the role until standard input ends, then prints what it saw."""
    client = Client(role)
    loop = asyncio.get_running_loop()
    told = loop.run_in_executor(None, sys.stdin.buffer.read)
    told.add_done_callback(lambda _: client.stopping.set())
    await player(role.kind)(client).play(ready)
    print(msgspec.json.encode(client.report()).decode(), flush=True)


if __name__ == "__main__":
    uvloop.run(play(msgspec.json.decode(sys.stdin.buffer.readline(), type=Role)))
