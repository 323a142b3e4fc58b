"""One process at a time, waiting for its turn; the system ends a turn when the process ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .store import explained


@contextmanager
def own_turn(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which is made where there is none and stays."""
    with explained(path):
        file = open(path, "ab")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_held(path: Path) -> bool:
    """Whether some process holds the lock file `path` now."""
    if not path.exists():
        return False
    with explained(path):
        file = open(path, "rb")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
