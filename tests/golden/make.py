"""Prints a store of the present format with a task in every state, as the golden file has it.

python -m tests.golden.make > tests/golden/store-3.json
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from codeq.engine.recovery import FORMAT
from tests.node import Node

SETTINGS: dict[str, Any] = {"straggler_slack_bytes": 0, "backoff_policy": "fixed"}
FIELDS = (
    "id", "command", "payload", "priority", "webhook", "max_attempts", "tenant", "created_ms",
    "trace_parent", "trace_state", "state", "attempts", "updated_ms", "due_ms", "worker", "error",
    "ended_ms", "expires_ms", "result", "artifacts", "ended_worker", "ended_subject",
)  # fmt: skip


def seen(view: Any) -> dict[str, Any]:
    """Every field of a task, as JSON has it."""
    fields = {name: getattr(view, name) for name in FIELDS}
    return {n: v.decode("latin-1") if isinstance(v, bytes) else v for n, v in fields.items()}


def tasks_in_every_state(node: Node) -> dict[str, str]:
    """Makes them; returns the owner of each id."""
    ids = {}

    def make(**fields: Any) -> str:
        task_id = node.create(**fields)
        ids[task_id] = fields.get("tenant", "t")
        return task_id

    make(command="straggler", payload=b"[1]", priority=-7)  # is carried forward
    make(command="ended straggler")
    make(command="dead straggler", max_attempts=1)
    node.nack(node.claim(("dead straggler",))[0].id, 0, "no good")
    first = node.create_batch([{"command": "closed"} for _ in range(254)])
    ids |= {first.task_id(i): "t" for i in (0, 253)}
    node.finish(*[view.id for view in node.claim(("closed",), count=254)])
    make(command="late", payload=b"\x00\xff", delay_seconds=86_400)
    for number in range(175):  # more than a segment of the log
        kept = node.create(command="steps", payload=b"%d" % number)
        node.finish(node.claim(("steps",))[0].id)
    ids[kept] = "t"
    node.advance(3_000)
    node.finish(node.claim(("ended straggler",))[0].id)
    make(command="ready", key="a key", trace_parent="00-1-2-01", trace_state="a=b", priority=9)
    make(command="вінчестер: /ready", tenant="other", payload=b'{"a": 9007199254740993}')
    for command in ("leased", "failed", "again", "completed", "requeued"):
        make(command=command, webhook="https://example.com/hook", max_attempts=3)
        node.claim((command,), worker=f"worker of {command}", lease_ms=600_000)
    by_command = {node.get(i).command: i for i, tenant in ids.items() if tenant == "t"}
    node.heartbeat(by_command["leased"], 900_000, worker="worker of leased")
    node.nack(by_command["again"], 3_600, "not now", worker="worker of again")
    for command, status, more in (
        ("failed", "FAILED", {"error": "why"}),
        ("completed", "COMPLETED", {"result": b'"\xc3\xa9"', "artifacts": b'[{"name":"a"}]'}),
    ):
        item = {"task_id": by_command[command], "status": status, **more}
        assert node.finish_batch([item], worker=f"worker of {command}").codes == b"\0"
    node.abandon(by_command["requeued"], worker="worker of requeued")
    return ids


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        node = Node(Path(folder) / "data", **SETTINGS)
        ids = tasks_in_every_state(node)
        tasks = [seen(node.get(task_id, tenant)) for task_id, tenant in ids.items()]
        store = node.shard._store
        entries = {
            key.hex(): value.hex()
            for bounds in ((b"c", b"d"), (b"\0", b"\xff"))
            for key, value in store.scan(*bounds)
        }
        node.close()
    golden = {"format": FORMAT, "now": node.clock.now_ms(), "tasks": tasks, "entries": entries}
    print(json.dumps(golden, indent=0, ensure_ascii=True))


if __name__ == "__main__":
    main()
