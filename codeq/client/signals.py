"""Signals that end a worker: the first lets it finish, the second has it give back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopping(stop: Callable[[bool], object]) -> Iterator[None]:
    """While it is open, the first SIGTERM or SIGINT calls ``stop(False)``, the second
    ``stop(True)``; a third does what it did before, so that nothing can hold the program for ever.

    The calls come in the main thread, between any two instructions. Raises ValueError in another
    thread, which no signal reaches.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("signals reach the main thread only")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    seen = 0

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def tell(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            restore()
        stop(seen == 2)

    for number in SIGNALS:
        signal.signal(number, tell)
    try:
        yield
    finally:
        restore()
