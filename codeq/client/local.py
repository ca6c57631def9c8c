"""A codeq server of one's own, as a child process: for trying out, tests and benches."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from codeq.errors import CodeqError

START_SECONDS = 60.0
STOP_SECONDS = 30.0
PRODUCER_TOKEN = "dev-producer"
WORKER_TOKEN = "dev-worker"


class LocalServer:
    """``codeq serve --dev`` on free ports of 127.0.0.1, with its data in ``data``.

    After ``start`` the addresses are known, and a later ``start`` uses the same ones. What the
    server logs goes to the file ``log``. ``environment`` holds settings, e.g.
    ``{"LOG_LEVEL": "warn"}``.
    """

    def __init__(self, data: Path, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.http = self.producer = self.worker = "127.0.0.1:0"
        self.pid = 0
        self._data = data
        self._log = log
        inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        self._environment = {**inherited, **(environment or {})}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Returns when the server serves; raises CodeqError with its last words when it does not
        within a minute."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "codeq", "serve", "--dev", "--data", str(self._data)),
                *("--http", self.http, "--producer-stream", self.producer),
                *("--worker-stream", self.worker),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        try:
            async with asyncio.timeout(START_SECONDS):
                line = await self._process.stdout.readline()
        except TimeoutError:
            line = b""
        words = dict(word.split("=", 1) for word in line.decode().split() if "=" in word)
        if not line.startswith(b"ready ") or words.keys() < {"http", "producer", "worker"}:
            await self.kill()
            raise CodeqError("unavailable", f"the server did not start: {self.last_words()}")
        self.http, self.producer, self.worker = words["http"], words["producer"], words["worker"]

    async def kill(self) -> None:
        """kill -9: the server gets no chance to say or save anything."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def stop(self) -> int:
        """Stops the server in order; returns its exit code."""
        if self._process is None:
            return 0
        process = self._process
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                code = await process.wait()
        except TimeoutError:
            await self.kill()
            return -9
        self._process = None
        return code

    def last_words(self) -> str:
        """The last line of the log."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def addresses_of(url: str, producer: str | None, worker: str | None) -> tuple[str, str, str]:
    """HOST:PORT of REST and both streams. The streams are at their usual ports of the same host
    unless they are named. Raises CodeqError for what is no http://HOST:PORT."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise CodeqError("validation-error", f"--url must be http://HOST:PORT, not {url!r}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{parts.port or 80}", producer or f"{host}:9092", worker or f"{host}:9091"


async def until_told(work: Coroutine[Any, Any, int]) -> int:
    """The exit code of ``work``, which SIGTERM and SIGHUP cancel, so that it takes its child
    processes along; 128 + the signal then."""
    loop = asyncio.get_running_loop()
    working = asyncio.ensure_future(work)
    told: list[int] = []

    def tell(number: int) -> None:
        told.append(number)
        working.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, tell, number)
    try:
        return await working
    except asyncio.CancelledError:
        if not told:
            raise
        return 128 + told[0]


#: Variables of the caller's own server, which this one must not take up.
SETTINGS = {"CODEQ_CONFIG_PATH", "PORT", "HTTP_ADDR"}
