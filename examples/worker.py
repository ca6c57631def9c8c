"""Works on the tasks of producer.py until Ctrl-C: start ``codeq serve --dev`` first."""

import asyncio
import signal

from codeq import Fail, Task, Worker


async def greet(task: Task) -> dict[str, str]:
    name = task.json()["name"]
    if not name:
        raise Fail("a greeting needs a name")  # ends the task FAILED; other errors are retried
    await asyncio.sleep(0.01)  # a handler may take long: its lease is kept alive meanwhile
    return {"greeting": f"Hello, {name}!"}


async def main() -> None:
    worker = Worker(
        "127.0.0.1:9091", token="dev-worker", commands=["greet"], concurrency=4, batch=10
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, worker.stop)  # finishes what is in hand
    await worker.run(greet)
    print("finished", worker.counts.finished, "tasks")


asyncio.run(main())
