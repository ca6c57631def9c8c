"""Notices when the event loop is held: how late its timers are, and what held it.

A probe on the loop measures its lateness; a thread beside it looks, while a probe is late, at what
the loop's thread is doing. Where that holds Python's lock, the look comes right behind the call
that held it, and still names the place.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

log = logging.getLogger("codeq.watchdog")

#: Probes come so often while work is done, and so rarely while there is none
BUSY_SECONDS, IDLE_SECONDS = 0.01, 0.1
#: A probe later than this is logged, with a warning from the second figure on
HELD_SECONDS, HELD_LONG_SECONDS = 0.02, 0.1
FRAMES_MAX = 4


class Watchdog:
    """Watches the running loop from ``start`` to ``stop``.

    ``observe`` is told the lateness of every probe in seconds; ``work`` is a counter that moves
    while there is something to do.
    """

    def __init__(self, observe: Callable[[float], None], work: Callable[[], int]) -> None:
        self._observe = observe
        self._work = work
        self._worked = -1
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._interval = IDLE_SECONDS
        self._due = time.monotonic() + self._interval
        self._cpu_s = time.thread_time()
        self._place = ""  # where the loop was seen while a probe was late
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="codeq-watchdog", daemon=True)

    def start(self) -> None:
        self._handle = self._loop.call_later(self._interval, self._probe)
        self._thread.start()

    def stop(self) -> None:
        self._handle.cancel()
        self._stopping.set()
        self._thread.join()

    def _probe(self) -> None:
        now = time.monotonic()
        cpu_s = time.thread_time()
        late = max(0.0, now - self._due)
        self._observe(late)
        if late > HELD_SECONDS:
            log.log(
                logging.WARNING if late > HELD_LONG_SECONDS else logging.INFO,
                "the loop was held for %d ms, %d of them on the processor: %s",
                late * 1000,
                (cpu_s - self._cpu_s) * 1000,
                self._place or "not seen where",
            )
        worked = self._work()
        self._interval = IDLE_SECONDS if worked == self._worked else BUSY_SECONDS
        self._worked, self._cpu_s, self._place = worked, cpu_s, ""
        self._due = now + self._interval
        self._handle = self._loop.call_later(self._interval, self._probe)

    def _watch(self) -> None:
        while not self._stopping.wait(max(HELD_SECONDS, self._interval)):
            if time.monotonic() - self._due > HELD_SECONDS and not self._place:
                self._place = place(sys._current_frames().get(self._loop_thread))


def place(frame: FrameType | None) -> str:
    """The innermost functions of a thread, the innermost first."""
    names: list[str] = []
    while frame is not None and len(names) < FRAMES_MAX:
        code = frame.f_code
        names.append(f"{Path(code.co_filename).stem}.{code.co_qualname}:{frame.f_lineno}")
        frame = frame.f_back
    return " in ".join(names)
