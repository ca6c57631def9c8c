"""An engine with a dictionary for a disk, as the engine's own tests need it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from codeq.engine._engine import COMPLETED, FAILED, Claim, Engine
from codeq.engine._views import TaskView, directory_without
from codeq.engine._wire import Creates, Finishes, format_id
from codeq.engine.stored import Stored, Wanted

TENANT, WORKER, SUBJECT = b"acme", b"w1", b"sub1"
BYTES_MAX = 1 << 40
PAYLOAD_MAX = 1 << 22
NOW = 1_700_000_000_000
HOUR = 3_600_000
MINE = (TENANT, WORKER, SUBJECT, -1)  # whose lease `claim` makes, any attempt


class Chunks(Mapping[int, bytes]):
    """The chunks of a disk by sequence."""

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self._values = values

    def __getitem__(self, seq: int) -> bytes:
        return self._values[b"c" + seq.to_bytes(8, "big")]

    def __iter__(self) -> Iterator[int]:
        return (int.from_bytes(key[1:], "big") for key in sorted(self._values) if key[:1] == b"c")

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Disk:
    """``engine`` and what it has written; ``restart`` makes another engine from that alone."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.values: dict[bytes, bytes] = {}
        self.chunks = Chunks(self.values)
        self.paused: set[tuple[bytes, bytes]] = set()
        self.policies: dict[tuple[bytes, bytes], tuple[int, int, int, int]] = {}
        self.starts = 1
        self.engine = Engine(seed=self.starts, **settings)

    def commit(self) -> list[tuple[bytes, bytes]]:
        puts = self.engine.take()
        self.values.update(puts)
        return puts

    def trim(self, now_ms: int) -> tuple[int, int] | None:
        """Removes what nobody needs, with the commit that says so, as the journal does."""
        gone = self.engine.trim(now_ms)
        self.commit()
        for seq in range(*gone) if gone else ():
            self.values.pop(b"c" + seq.to_bytes(8, "big"))
        for key, value in list(self.values.items()):
            rests_on = int.from_bytes(value[:8], "big")
            segment = int.from_bytes(key[1:], "big")
            if key[:1] in b"de" and rests_on < self.engine.tail:
                del self.values[key]
            if key[:1] == b"s" and segment < self.engine.tail // 512:
                del self.values[key]
        return gone

    def carry(self, now_ms: int) -> int:
        """Carries stragglers forward until nothing lags; returns how many tasks moved."""
        moved = 0
        for _ in range(1000):
            found = self.engine.straggler_chunks()
            self.commit()  # asking may have closed a bucket
            if found is None:
                return moved
            for seq in range(*found):
                if seq in self.chunks:
                    moved += self.engine.carry(seq, self.chunks[seq], now_ms)
            self.commit()
        raise AssertionError("carrying does not come to an end")

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        return [self.values.get(key) for key in keys]

    def scan(self, begin: bytes, end: bytes, limit: int = 0) -> Iterator[tuple[bytes, bytes]]:
        keys = sorted(key for key in self.values if begin <= key < end)
        return iter([(key, self.values[key]) for key in keys])

    def clean_up(self, tenant: bytes, before_ms: int, now_ms: int) -> int:
        """Takes away every ended task of the tenant, in memory and on disk."""
        end, looks = self.engine.next_number, 10**6
        count, after, _ = self.engine.forget(tenant, before_ms, 0, end, looks, looks, now_ms)
        assert after == end
        self.commit()
        wanted = Wanted(tenant, None, 1 << COMPLETED | 1 << FAILED)
        found = Stored(self).tasks(  # type: ignore[arg-type]
            wanted, 0, end, looks, looks, 1 << 40, lambda view: view.expires_ms <= before_ms
        )
        assert found.next == end
        for place, _ in found.tasks:
            directory = self.values.pop(place.key)
            rest = directory_without(directory, [place.number]) if place.key[:1] == b"d" else None
            if rest is not None:
                self.values[place.key] = rest
        return count + len(found.tasks)

    def listed(
        self, tenant: bytes, command: bytes | None, states: int, looks: int, count_max: int
    ) -> list[TaskView]:
        """Every wanted task, walked over with so many looks at a time; not filled."""
        views: list[TaskView] = []
        begin, end = 0, self.engine.next_number
        while begin < end:
            part, after = self.engine.walk(
                tenant, command, states, begin, end, looks, count_max, 1 << 40
            )
            found = Stored(self).tasks(  # type: ignore[arg-type]
                Wanted(tenant, command, states & (1 << COMPLETED | 1 << FAILED)),
                begin, after, 10**6, 10**6, 1 << 40, lambda view: True,
            )  # fmt: skip
            assert begin < after == found.next <= end and len(part) <= count_max
            part += [view for _, view in found.tasks]
            views += sorted(part, key=lambda view: view.number)
            begin = after
        return views

    def restart(self, now_ms: int, lease_grace_ms: int = 0) -> Engine:
        """Loads a new engine from the disk and makes it the engine; returns the old one."""
        old = self.engine
        self.starts += 1
        new = Engine(seed=self.starts, **self.settings)
        start = new.load_head(self.values.get(b"mhead"))
        for key in sorted(key for key in self.values if key[:1] == b"s"):
            new.load_segment(key, self.values[key])
        for seq in self.chunks:
            if seq >= start:
                new.load_chunk(seq, self.chunks[seq])
        new.load_done(now_ms, lease_grace_ms)
        for tenant, command in self.paused:
            new.pause(tenant, command)
        for (tenant, command), policy in self.policies.items():
            new.govern(tenant, command, *policy)
        new.count_consumers()
        new.verify()
        self.engine = new
        return old

    def look(self, task_id: bytes, tenant: bytes, now_ms: int) -> TaskView | None:
        """A task as a reader sees it: from memory or from disk, all its fields filled."""
        view = self.engine.view(task_id, tenant)
        if view is None:
            keys = self.engine.directory_keys(task_id)
            values = [self.values.get(key) for key in keys]
            view = self.engine.view_stored(task_id, tenant, values)
        if view is None:
            return None
        try:
            view.fill(self.chunks)
        except KeyError:
            return None
        return None if view.has_record and view.expires_ms <= now_ms else view


def creates(
    count: int = 1, command: bytes = b"mail", payload: bytes = b'{"n":1}', **fields: Any
) -> Creates:
    batch = Creates()
    for _ in range(count):
        batch.add(command, payload, **fields)
    batch.check(PAYLOAD_MAX)
    return batch


def make(
    engine: Engine, now_ms: int = NOW, *, tenant: bytes = TENANT, **fields: Any
) -> list[bytes]:
    """Creates ``count`` equal tasks; returns their ids."""
    batch = creates(**fields)
    made = engine.create(batch, tenant, now_ms)
    assert made == len(batch)
    return [batch.id_bytes(index) for index in range(made)]


def claim(
    engine: Engine,
    now_ms: int = NOW,
    *,
    commands: list[bytes] | None = None,
    tenant: bytes = TENANT,
    worker: bytes = WORKER,
    subject: bytes = SUBJECT,
    count: int = 1,
    lease_ms: int = 60_000,
    in_order: bool = True,
    bytes_max: int = BYTES_MAX,
) -> Claim | None:
    return engine.claim(
        tenant, commands, in_order, worker, subject, count, lease_ms, bytes_max, now_ms
    )


def claimed(engine: Engine, now_ms: int = NOW, **fields: Any) -> list[bytes]:
    """Claims and delivers; returns the ids in the order of delivery."""
    got = claim(engine, now_ms, **fields)
    if got is None:
        return []
    engine.delivered(got)
    return got.ids()


def results(
    ids: list[bytes],
    status: bytes = b"COMPLETED",
    result: bytes | None = b'{"ok":true}',
    error: bytes = b"",
) -> Finishes:
    batch = Finishes()
    for task_id in ids:
        batch.add(format_id(task_id).encode(), status, result=result, error=error)
    batch.check(PAYLOAD_MAX, lenient_error=True)
    return batch


def finish(
    engine: Engine,
    ids: list[bytes],
    now_ms: int = NOW,
    *,
    tenant: bytes = TENANT,
    worker: bytes = WORKER,
    subject: bytes = SUBJECT,
    attempt: int = -1,
    **fields: Any,
) -> list[int]:
    """Sends results; returns a code for each."""
    batch = results(ids, **fields)
    engine.finish(batch, tenant, worker, subject, attempt, now_ms)
    return list(batch.codes)


def engine(**settings: Any) -> Engine:
    return Engine(seed=7, **({"backoff_policy": "fixed"} | settings))


def look(core: Engine, task_id: bytes) -> TaskView:
    view = core.view(task_id, TENANT)
    assert view is not None
    return view


def place(core: Engine, task_id: bytes) -> tuple[int, int, str]:
    view = look(core, task_id)
    return view.state, view.attempts, view.error
