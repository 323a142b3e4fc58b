"""A command that its user interrupts: it ends in order, or, asked once more, at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

from .service_process import ENDING


@contextmanager
def until_interrupted(stop: Callable[[], None], ending: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C, or SIGTERM, calls `ending` and, on another thread, `stop`; the next ends
    the command at once.  For a main thread."""
    before = {number: signal.getsignal(number) for number in ENDING}

    def ask(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        ending()
        Thread(target=stop).start()  # what it locks, the interrupted code may hold

    for number in ENDING:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
