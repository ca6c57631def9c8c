"""A server process of the crash tests: started by itself, or forked from a nursery."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 30
STOP_SECONDS = 30
ENTRY = "codeq"
SMALL = "tests.small_store"


def arguments_of(folder: Path) -> list[str]:
    """codeq serve --dev on this folder, on ports the system picks."""
    listeners = ("--http", "--producer-stream", "--worker-stream")
    ports = [word for name in listeners for word in (name, "127.0.0.1:0")]
    return ["serve", "--dev", "--data", str(folder / "data"), *ports]


class Server:
    """One run of ``codeq serve --dev`` on ``folder``, with what it says in ``server.log``.

    ``module`` is what Python runs: codeq, or something that runs it with other constants.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str], module: str = ENTRY) -> None:
        self.log = (folder / "server.log").open("ab")
        self.address: dict[str, str] = {}
        self.process = self.begin(arguments_of(folder), settings, module)
        self.pid = self.process.pid
        atexit.register(self.process.kill)  # when a check failed; does nothing once it has ended

    def begin(
        self, arguments: list[str], settings: Mapping[str, str], module: str
    ) -> subprocess.Popen[bytes] | Child:
        """Starts the process."""
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=ROOT,
            env={**os.environ, **settings},
        )

    def wait_ready(self, seconds: float = START_SECONDS) -> bool:
        """Waits for the ready line and reads the addresses from it; False when there is none."""
        out = self.process.stdout
        assert out is not None
        if not select.select([out], [], [], seconds)[0]:
            return False
        line = out.readline().decode()
        self.address = dict(word.split("=", 1) for word in line.split()[1:])
        return line.startswith("ready ")

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Waits for the end and returns the exit code. Raises TimeoutError."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(str(error)) from error
        self.close()
        return code

    def stop(self, by: signal.Signals) -> int:
        """Sends the signal, waits for the end and returns the exit code."""
        self.process.send_signal(by)
        return self.wait()

    def close(self) -> None:
        atexit.unregister(self.process.kill)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()


class Child:
    """What a Server needs to know of a process that is another one's child."""

    def __init__(self, nursery: socket.socket, output: int) -> None:
        self._nursery = nursery
        self.pid = int(nursery.recv(64))
        self.stdout = os.fdopen(output, "rb")
        self._code: int | None = None

    def send_signal(self, number: int) -> None:
        if self._code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        if self._code is None:
            self._nursery.settimeout(timeout)
            self._code = int(self._nursery.recv(64))
            self._nursery.settimeout(None)
        return self._code


class Forked(Server):
    """The same, forked by a nursery, which holds the imports ready."""

    def __init__(
        self, nursery: Nursery, folder: Path, settings: Mapping[str, str], module: str = ENTRY
    ) -> None:
        self.nursery = nursery
        super().__init__(folder, settings, module)

    def begin(self, arguments: list[str], settings: Mapping[str, str], module: str) -> Child:
        given = {"arguments": arguments, "settings": dict(settings), "small": module == SMALL}
        output, write_end = os.pipe()
        requests = self.nursery.requests
        socket.send_fds(requests, [json.dumps(given).encode()], [write_end, self.log.fileno()])
        os.close(write_end)
        return Child(requests, output)


class Nursery:
    """Runs nursery.py, with the library at ``shim`` preloaded."""

    def __init__(self, shim: Path) -> None:
        self.shim = shim
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery"],
            stdin=theirs,
            cwd=ROOT,
            env={**os.environ, "LD_PRELOAD": str(shim)},
        )
        theirs.close()
        atexit.register(self.process.kill)

    def close(self) -> None:
        """Ends the process, which must have no child."""
        self.requests.close()
        self.process.wait(STOP_SECONDS)
        atexit.unregister(self.process.kill)
