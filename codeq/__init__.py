"""codeq: a durable task queue. ``from codeq import Producer, Worker``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codeq.client import Fail, Nack, NewTask, Producer, Task, Tls, Worker
    from codeq.client.rest import Client
    from codeq.errors import CodeqError

__version__ = "0.1.0.dev0"

__all__ = [
    "Client",
    "CodeqError",
    "Fail",
    "Nack",
    "NewTask",
    "Producer",
    "Task",
    "Tls",
    "Worker",
    "__version__",
]

#: Where a name comes from, if not from codeq.client
HOMES = {"Client": "codeq.client.rest", "CodeqError": "codeq.errors"}


def __getattr__(name: str) -> Any:
    """Imports the client when it is first asked for: the server and the tools do without it."""
    if name not in __all__:
        raise AttributeError(f"module 'codeq' has no attribute {name!r}")
    home = HOMES.get(name, "codeq.client")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
