"""A fleet of workers on an unreliable job: retries, dead letters, and their second chance.

Start ``codeq serve --dev``, then run this. Two workers share the queue ``deliver``. Some doors are
opened at the second ring, one address does not exist: its task uses up its attempts and becomes a
dead letter, until somebody mends the address book and requeues it. The retries take some seconds.
"""

import asyncio

from codeq import Client, NewTask, Producer, Task, Worker

ATTEMPTS = 3
HOUSES = 12
known = set(range(HOUSES - 1))  # the address book; the last house is not in it yet


async def deliver(task: Task) -> str:
    house = task.json()["house"]
    if house not in known:
        raise LookupError(f"no house {house}")  # any exception: tried again after the backoff
    if house % 4 == 0 and task.attempts == 1:
        raise TimeoutError("nobody opened")
    return f"house {house}, ring {task.attempts}"


async def ended(client: Client, ids: list[str]) -> list[str]:
    """The status of each task, once all have ended."""
    results = await asyncio.gather(*(client.wait_for_result(task_id) for task_id in ids))
    return [found.result.status for found in results]


async def main() -> None:
    fleet = [
        Worker("localhost:9091", token="dev-worker", commands=["deliver"], concurrency=3)
        for _ in range(2)
    ]
    working = [asyncio.create_task(worker.run(deliver)) for worker in fleet]

    async with Producer("localhost:9092", token="dev-producer") as producer:
        made = await producer.produce_batch(
            NewTask("deliver", {"house": house}, max_attempts=ATTEMPTS) for house in range(HOUSES)
        )
    ids = [task_id for task_id in made if isinstance(task_id, str)]

    async with Client("http://localhost:8080", token="dev-producer") as client:
        statuses = await ended(client, ids)
        print("delivered", statuses.count("COMPLETED"), "of", HOUSES)

        async for letter in client.dead_letters("deliver"):
            print("dead letter:", letter.error, "after", letter.attempts, "attempts")
            known.add(letter.json()["house"])  # the cause is mended, so try again
        print("requeued", (await client.requeue_dead("deliver")).requeued)
        statuses = await ended(client, ids)
        print("delivered", statuses.count("COMPLETED"), "of", HOUSES)

    for worker in fleet:
        worker.stop()
    await asyncio.gather(*working)
    print("the workers did", " and ".join(str(worker.counts.finished) for worker in fleet))


asyncio.run(main())
