"""How long does a batch of creates wait for its acknowledgement at a given load?

Starts a server of its own and a worker process that empties the queue; this process creates batches
at a fixed rate over the public Producer. Each time counts from the moment the batch was due, so a
producer that falls behind hides nothing.

    python -m benches.acknowledgements --rate 80000 --batch 256 --seconds 20
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path

from codeq.bench.clients import FILL, Role, Tally
from codeq.bench.load import ClientProcess, surroundings
from codeq.client import NewTask, Producer
from codeq.client.local import PRODUCER_TOKEN, WORKER_TOKEN, LocalServer
from codeq.errors import CodeqError

STREAMS = 2
WARM_UP_SECONDS = 2.0


async def paced(address: str, rate: float, batch: int, seconds: float) -> list[float]:
    """Waits in ms, one per batch, after the warm-up."""
    loop = asyncio.get_running_loop()
    waits_ms: list[float] = []
    payload = {"n": 1, "to": "a@b.example", "text": FILL}

    async def one(producer: Producer, due: float, counts: bool) -> None:
        results = await producer.produce_batch([NewTask("load", payload) for _ in range(batch)])
        assert not any(isinstance(result, CodeqError) for result in results)
        if counts:
            waits_ms.append((loop.time() - due) * 1000)

    producers = [Producer(address, token=PRODUCER_TOKEN) for _ in range(STREAMS)]
    for producer in producers:
        await producer.__aenter__()
    began = loop.time()
    calls = []
    for number in range(int((seconds + WARM_UP_SECONDS) * rate / batch)):
        due = began + number * batch / rate
        await asyncio.sleep(max(0.0, due - loop.time()))
        counts = due > began + WARM_UP_SECONDS
        calls.append(asyncio.create_task(one(producers[number % STREAMS], due, counts)))
    await asyncio.gather(*calls)
    for producer in producers:
        await producer.close()
    return waits_ms


async def measure(rate: float, batch: int, seconds: float) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="codeq-acknowledgements-") as scratch:
        folder = Path(scratch)
        settings = {"LIMITS_DISK_RESERVE_BYTES": str(64 << 20), "LOG_LEVEL": "warn"}
        server = LocalServer(folder / "data", folder / "log", settings)
        Tally(folder / "tally", 2)
        await server.start()
        role = Role("work", server.worker, WORKER_TOKEN, "load", str(folder / "tally"), 1)
        role.batch, role.flights, role.streams = batch, 8, STREAMS
        worker = await ClientProcess.start(role)
        try:
            return await paced(server.producer, rate, batch, seconds)
        finally:
            await worker.kill()
            await server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=float, default=80_000, help="tasks per second")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    waits_ms = asyncio.run(measure(args.rate, args.batch, args.seconds))
    for name, value in surroundings(True).items():
        print(f"{name}: {value}")
    steps = statistics.quantiles(waits_ms, n=1000)
    print(
        f"{len(waits_ms):,} batches of {args.batch} at {args.rate:,.0f} tasks/s, ms from due time"
    )
    print(f"p50 {steps[499]:.1f}  p99 {steps[989]:.1f}  p99.9 {steps[998]:.1f}")


if __name__ == "__main__":
    main()
