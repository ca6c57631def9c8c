"""Scheduled work: a task that is due later, and a report that comes again and again.

Start ``codeq serve --dev``, then run ``python scheduled.py [SECONDS]``: three reports, so many
seconds apart (2). A task happens once; the handler of each report creates the next one. The key of
the next one is its due time, so that a report which is delivered twice does not start two series.
"""

import asyncio
import sys
from datetime import UTC, datetime, timedelta

from codeq import Producer, Task, Worker

EVERY = timedelta(seconds=float(sys.argv[1]) if len(sys.argv) > 1 else 2)
REPORTS = 3

worker = Worker("localhost:9091", token="dev-worker")
producer = Producer("localhost:9092", token="dev-producer")


async def schedule(number: int, due: datetime) -> None:
    await producer.produce(
        "report",
        {"number": number, "due": due.isoformat()},
        run_at=due,
        idempotency_key=f"report-{due.isoformat()}",
    )


@worker.task("report")
async def report(task: Task) -> None:
    number, due = task.json()["number"], datetime.fromisoformat(task.json()["due"])
    early = datetime.now(UTC) < due
    print("report", number, "came early" if early else "came when it was due")
    if number < REPORTS:
        await schedule(number + 1, due + EVERY)  # from the due time: delays do not add up
    else:
        worker.stop()


async def main() -> None:
    async with producer:
        await schedule(1, datetime.now(UTC) + EVERY)
        await worker.run()


asyncio.run(main())
