"""Request and response over the queue: asks a worker and waits for its answer.

Start ``codeq serve --dev``, then run this. Both sides are in this one program; they could be on
different machines, and either may be restarted in between.
"""

import asyncio
from typing import Any

from codeq import Client, Fail, Task, Worker

worker = Worker("localhost:9091", token="dev-worker", concurrency=8)


@worker.task("divide", type=list[float])
async def divide(task: Task, numbers: list[float]) -> float:
    if not numbers[1]:
        raise Fail("division by zero")  # an answer too: no retry would help
    return numbers[0] / numbers[1]


async def ask(client: Client, command: str, question: Any, timeout_seconds: float = 10) -> Any:
    """The worker's answer. Raises RuntimeError with its text when it failed, TimeoutError when
    nobody answered in time."""
    task = await client.create(command, question, max_attempts=2)
    try:
        answer = await client.wait_for_result(task.id, timeout_seconds=timeout_seconds)
    except TimeoutError:
        await client.cancel(task.id)  # nobody waits any more; refused if a worker is at it
        raise
    if answer.result.status != "COMPLETED":
        raise RuntimeError(answer.result.error)
    return answer.result.json()


async def main() -> None:
    working = asyncio.create_task(worker.run())
    async with Client("http://localhost:8080", token="dev-producer") as client:
        print("7 / 2 =", await ask(client, "divide", [7, 2]))
        halves = await asyncio.gather(*(ask(client, "divide", [n, 2]) for n in range(5)))
        print("halves:", halves)
        try:
            await ask(client, "divide", [1, 0])
        except RuntimeError as error:
            print("1 / 0:", error)
    worker.stop()
    await working


asyncio.run(main())
