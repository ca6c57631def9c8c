"""Steady load with short keeping times: what the server holds in memory and on disk must level out.

    python -m tests.soak --minutes 20

Prints a line every ten seconds and fails when the last third of the run needed clearly more memory
or disk than the third before it, or when a promise was broken (see ledger.py).
"""

from __future__ import annotations

import argparse
import signal
import tempfile
from pathlib import Path

from tests.crash_check import counts
from tests.crash_clients import LOADS, StreamWorker
from tests.crash_rounds import Crash
from tests.crash_server import Server
from tests.ledger import Keeping

KEPT = Keeping(ended=20, window=20)
SAMPLE_SECONDS = 10
GROWTH_MAX = 1.3
SLACK_BYTES = 64 << 20  # write buffers and allocator of a small run


def resident_bytes(server: Server) -> int:
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the server is gone")


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # RocksDB removed it meanwhile
    return total


def levelled(name: str, samples: list[int]) -> None:
    third = len(samples) // 3
    middle, last = max(samples[third : 2 * third]), max(samples[2 * third :])
    print(f"{name}: at most {middle >> 20} MB in the second third, {last >> 20} MB in the last")
    assert last <= middle * GROWTH_MAX + SLACK_BYTES, f"{name} keeps growing"


def soak(folder: Path, samples: int, seed: int) -> None:
    crash = Crash(folder, seed, keeping=KEPT)
    server = crash.start()
    loads = crash.load(server, *LOADS)
    memory, disk = [], []
    for number in range(1, samples + 1):
        before = crash.ledger.acknowledgements
        crash.ledger.wait_for(lambda: False, SAMPLE_SECONDS)
        rate = (crash.ledger.acknowledgements - before) / SAMPLE_SECONDS
        crash.ledger.forget_gone()
        memory.append(resident_bytes(server))
        disk.append(folder_bytes(folder / "data"))
        print(
            f"{number * SAMPLE_SECONDS} s: {rate:.0f} acknowledgements/s, "
            f"{counts(server)[1]} live tasks, "
            f"{memory[-1] >> 20} MB of memory, {disk[-1] >> 20} MB on disk",
            flush=True,
        )
    makers = [load for load in loads if not isinstance(load, StreamWorker)]
    for load in makers:
        load.stopping.set()
    crash.join(makers)
    assert server.stop(signal.SIGTERM) == 0, crash.log()
    crash.join(loads)
    levelled("memory", memory)
    levelled("disk", disk)
    print(f"seed {seed}, {crash.ledger.acknowledgements} acknowledgements, lost 0", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--minutes", type=float, default=20)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    samples = max(6, int(given.minutes * 60 / SAMPLE_SECONDS))
    with tempfile.TemporaryDirectory(prefix="codeq-soak-") as folder:
        soak(Path(folder), samples, given.seed)


if __name__ == "__main__":
    main()
