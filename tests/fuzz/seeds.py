"""Valid inputs to start from: messages with every member, and the log of a lively engine."""

from __future__ import annotations

import random

from tests.engine_disk import NOW, Disk
from tests.fuzz.build import golden
from tests.test_engine_log import do_something
from tests.test_text import INVALID, VALID
from tests.test_wire_fuzz import BAD, EVENTS, Cook, full

#: Numbers below this are given out in the log that the target ``load`` reads
LOADED_TASKS = 600
CHUNK_FRAME_BYTES = 5
SOUPS = 100


def seeds(target: str) -> list[bytes]:
    made = golden(target)
    if target in EVENTS:
        return made + messages(target)
    if target == "text":
        return made + [text.encode() for text in (*VALID, *INVALID)]
    logs = [log(seed) for seed in range(20)]
    if target == "chunk":
        return made + [chunk for chunks in logs for chunk in chunks]
    if target == "load":
        return made + [b"".join(map(_counted, chunks)) for chunks in logs]
    return [*made, bytes(24), bytes(8 + 2560)]


def messages(stream: str) -> list[bytes]:
    kind = EVENTS[stream]
    cook = Cook(seed=1)
    whole = [kind(**{name: value}).SerializeToString() for name, value in full(kind).items()]
    return whole + [bytes.fromhex(text) for text in BAD] + [cook.soup(3) for _ in range(SOUPS)]


def log(seed: int) -> list[bytes]:
    """The records of a few chunks."""
    dice = random.Random(seed)
    disk = Disk(backoff_policy="fixed", backoff_base_ms=300, straggler_slack_bytes=0)
    now, ids = NOW, list[bytes]()
    while len(disk.chunks) < 8:
        now += dice.choice([0, 1, 200])
        do_something(disk.engine, dice, ids, now)
        disk.commit()
    return [chunk[CHUNK_FRAME_BYTES:] for chunk in disk.chunks.values()]


def _counted(chunk: bytes) -> bytes:
    return len(chunk).to_bytes(2, "little") + chunk
