"""A server with tokens of every kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .conftest import ANY_PORT, Server

ADMIN, OPERATOR, OTHER, PLAIN = "an-admin", "an-operator", "other-admin", "no-admin"
WORKER = {"acme": "acme-worker", "globex": "globex-worker"}
SCOPES = ("claim", "heartbeat", "abandon", "nack", "result", "subscribe")


@contextmanager
def guarded_server(folder: Path) -> Iterator[Server]:
    """A server of the tenants acme and globex, with an admin of each, an operator, and a producer
    who is neither."""

    def static(token: str, tenant: str, *scopes: str, **more: Any) -> dict[str, Any]:
        config = {"token": token, "subject": token, "raw": {"tid": tenant}, "scopes": scopes}
        return {"type": "static", "config": {**config, **more}}

    def multi(*providers: dict[str, Any]) -> dict[str, Any]:
        return {"providers": providers}

    scopes = [f"codeq:{word}" for word in SCOPES]
    settings = {
        "producerAuthProvider": "multi",
        "producerAuthConfig": multi(
            static(ADMIN, "acme", "codeq:admin"),
            static(OTHER, "globex", "codeq:admin"),
            static(OPERATOR, "acme", "codeq:operator"),
            static(PLAIN, "acme"),
        ),
        "workerAuthProvider": "multi",
        "workerAuthConfig": multi(
            *(static(WORKER[name], name, *scopes, eventTypes=["*"]) for name in WORKER)
        ),
    }
    file = folder / "codeq.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    listeners = ("--http", "--producer-stream", "--worker-stream")
    arguments = ["serve", "--config", str(file), "--data", str(folder / "data")]
    for flag in listeners:
        arguments += [flag, ANY_PORT]
    server = Server(folder, arguments, {"LIMITS_DISK_RESERVE_BYTES": "0"})
    # The page has to find it again after a restart.
    arguments[arguments.index("--http") + 1] = server.http
    try:
        yield server
    finally:
        server.close()
