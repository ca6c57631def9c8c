"""codeq: a durable task queue. ``from codeq import Producer, Worker``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codeq.client import Fail, Nack, NewTask, Producer, Task, Tls, Worker
    from codeq.errors import CodeqError

__version__ = "0.1.0.dev0"

__all__ = [
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


def __getattr__(name: str) -> Any:
    """Imports the client when it is first asked for: the server and the tools do without it."""
    if name not in __all__:
        raise AttributeError(f"module 'codeq' has no attribute {name!r}")
    home = "codeq.errors" if name == "CodeqError" else "codeq.client"
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
