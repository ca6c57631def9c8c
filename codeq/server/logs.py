"""Logging to standard error, as text or as one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar

from codeq.model import rfc3339

#: The X-Request-Id of the request that the running task answers; empty outside of requests
REQUEST_ID: ContextVar[bytes] = ContextVar("REQUEST_ID", default=b"")

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class TextFormatter(logging.Formatter):
    """``time level logger: message``, then the request's id in brackets"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """RFC 3339 in UTC."""
        return rfc3339(int(record.created * 1000))

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without the trace of a fault."""
        request_id = REQUEST_ID.get()
        line = super().formatMessage(record)
        return f"{line} [request {request_id.decode('ascii')}]" if request_id else line


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message; inside of a request ``requestId``; for
    faults ``trace``."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": rfc3339(int(record.created * 1000)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            entry["requestId"] = request_id.decode("ascii")
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure(level: str, form: str) -> None:
    """Sends every record of ``level`` and above to standard error, and nothing anywhere else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
