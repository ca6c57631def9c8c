"""What is measured: the surfaces of a server, and the part each client process plays."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from codeq.errors import CodeqError

LATENCY_PER_SECOND = 200.0
#: Lives that may be open at a time, in units of what is on its way to the server
WINDOW = 4
#: Payload bytes that are not text
PAYLOAD_FRAME_BYTES = 55


class Role(msgspec.Struct):
    """What a client process is told. ``calls``: calls or Readys on their way at a time, spread
    over ``streams`` connections; of REST each has a connection of its own."""

    kind: str  # produce, work, rest-produce, rest-work
    batch: int
    calls: int
    streams: int = 1
    merge: bool = True  # the client may put single tasks into batches
    make_keys: bool = False  # the client makes an idempotency key for each create
    window: int = 0  # lives that may be open at a time, 0 = any
    per_second: float = 0.0  # tasks, on a fixed schedule; 0 = as fast as it goes
    payload_bytes: int = 200
    queues: int = 1  # creates take turns; then workers claim from all there are
    address: str = ""
    token: str = ""
    command: str = ""
    tally: str = ""
    slot: int = 0


class Surface(NamedTuple):
    """A way to use the server. Without workers only creates are counted."""

    name: str
    producers: Role
    workers: Role | None

    @property
    def unit(self) -> str:
        return "tasks" if self.workers is None else "lives"


class Wishes(NamedTuple):
    """What the person at the command line wants otherwise than the surface has it."""

    batch: int | None = None
    calls: int | None = None
    streams: int | None = None
    payload_bytes: int = 200
    per_second: float = 0.0
    make_keys: bool = False


def _streams(
    name: str,
    batch: int,
    calls: int,
    streams: int,
    *,
    claim: tuple[int, int] = (0, 0),
    merge: bool = True,
    per_second: float = 0.0,
) -> Surface:
    """``claim``: tasks a Ready and number of Readys, where they are not those of the creates."""
    tasks, readys = claim if claim[0] else (batch, calls)
    window = 0 if per_second else WINDOW * batch * calls
    make = Role("produce", batch, calls, streams, merge, window=window, per_second=per_second)
    work = Role("work", tasks, readys, streams, merge, per_second=per_second)
    return Surface(name, make, work)


def _rest(name: str, batch: int, calls: int) -> Surface:
    make = Role("rest-produce", batch, calls, window=WINDOW * batch * calls)
    return Surface(name, make, Role("rest-work", batch, calls))


def _creates(name: str, batch: int, calls: int) -> Surface:
    return Surface(name, Role("rest-produce", batch, calls), None)


SURFACES = {
    surface.name: surface
    for surface in (
        _streams("stream-batch", 1000, 12, 2),
        _streams("stream-batch-256", 256, 16, 2),
        _streams("stream", 1, 2048, 1, claim=(256, 8)),
        _streams("stream-wire", 1, 1024, 4, merge=False),
        _rest("rest", 1, 32),
        _rest("rest-batch", 100, 8),
        _creates("rest-create", 1, 64),
        _creates("rest-create-batch", 100, 16),
        _streams("latency", 1, 1, 1, claim=(1, 4), per_second=LATENCY_PER_SECOND),
    )
}
ALL = "all"


def chosen(names: list[str]) -> list[Surface]:
    """The surfaces of these names, all when there is none; raises CodeqError for an unknown one."""
    if not names or ALL in names:
        return list(SURFACES.values())
    for name in names:
        if name not in SURFACES:
            known = ", ".join([*SURFACES, ALL])
            raise CodeqError("validation-error", f"no surface {name!r}; there are {known}")
    return [SURFACES[name] for name in names]


def wished(surface: Surface, wishes: Wishes) -> Surface:
    """The surface as the person wants it. A fixed rate makes it an open loop: nothing waits for
    anything, and every time counts from the moment the task was due."""
    make, take = surface.producers, surface.workers
    batch = wishes.batch or make.batch
    calls = wishes.calls or make.calls
    streams = wishes.streams or make.streams
    per_second = wishes.per_second or make.per_second
    make = msgspec.structs.replace(
        make,
        batch=batch,
        calls=max(calls, streams),
        streams=streams,
        window=0 if per_second or not make.window else WINDOW * batch * calls,
        per_second=per_second,
        payload_bytes=wishes.payload_bytes,
        make_keys=wishes.make_keys,
    )
    if take is not None:
        take = msgspec.structs.replace(
            take,
            batch=wishes.batch or take.batch,
            calls=max(wishes.calls or take.calls, streams),
            streams=streams,
            per_second=per_second,
        )
    return Surface(surface.name, make, take)
