"""Works on the tasks of producer.py until Ctrl-C: start ``codeq serve --dev`` first."""

import asyncio

from codeq import Fail, Task, Worker

worker = Worker("127.0.0.1:9091", token="dev-worker", concurrency=4, batch=10)


@worker.task("greet", type=dict[str, str])
async def greet(task: Task, guest: dict[str, str]) -> dict[str, str]:
    if not guest["name"]:
        raise Fail("a greeting needs a name")  # ends the task FAILED; other errors are retried
    await asyncio.sleep(0.01)  # a handler may take long: its lease is kept alive meanwhile
    return {"greeting": f"Hello, {guest['name']}!"}


asyncio.run(worker.run(signals=True))  # Ctrl-C and SIGTERM: finishes what is in hand
print("finished", worker.counts.finished, "tasks")
