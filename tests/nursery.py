"""A process that has imported the server and forks one for each request, so that a start costs no
import.

Standard input is a socket. A request is one message: JSON with ``arguments`` of codeq, ``settings``
for the environment and ``small`` (see small_store.py), with two descriptors, standard output and
standard error of the server. Answers are the pid and, when that process has ended, its exit code as
subprocess counts it. One server at a time.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
from typing import Any

from codeq import cli
from codeq.server import app
from tests.small_store import shrink

MESSAGE_BYTES_MAX = 65_536
PR_SET_PDEATHSIG = 1
SERVE = app.serve  # imported here, not in each child


def main() -> None:
    die_with_parent()
    requests = socket.socket(fileno=0)
    ended = 0
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES_MAX, 2)
        if ended:
            os.waitpid(ended, 0)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            os._exit(serve(json.loads(message), *descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(b"%d" % pid)
        # Only looked at: as long as the pid is not free, a late kill hits nobody else.
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert end is not None
        requests.send(b"%d" % (end.si_status if end.si_code == os.CLD_EXITED else -end.si_status))
        ended = pid


def serve(request: dict[str, Any], output: int, errors: int) -> int:
    """The life of a child."""
    die_with_parent()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, output, errors)):
        os.dup2(descriptor, number)
    os.environ.update(request["settings"])
    ctypes.CDLL(None).shim_begin()
    if request["small"]:
        shrink()
    return cli.run(request["arguments"])


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
