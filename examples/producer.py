"""Creates a hundred tasks: start ``codeq serve --dev`` first, then run this beside worker.py."""

import asyncio

from codeq import CodeqError, NewTask, Producer


async def main() -> None:
    async with Producer("127.0.0.1:9092", token="dev-producer") as producer:
        # One task. The id comes back once the task is safe on disk.
        task_id = await producer.produce("greet", {"name": "Ada"}, priority=5)
        print("created", task_id)

        # Many at once. A key makes it safe to send the same create twice.
        tasks = [
            NewTask("greet", {"name": f"guest {n}"}, idempotency_key=f"guest-{n}")
            for n in range(100)
        ]
        for task, result in zip(tasks, await producer.produce_batch(tasks), strict=True):
            if isinstance(result, CodeqError):
                print("refused", task.payload, result)


asyncio.run(main())
