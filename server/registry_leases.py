"""Which versions are in use now, by whichever process; nothing of it outlives that process.

    leases/HOLDER.lock   held (flock) for as long as the holder lives; the system lets go of it
    leases/HOLDER/ID     an empty file for each version in use

A version is leased first, and then looked up: who deletes versions forgets them first, and then
looks at the leases once more.  One of the two thus sees the other.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from ..closeable import Closeable
from ..store import explained

_LOCK = ".lock"


class Leases(Closeable):
    """The leases of one holder, which threads may share, in a folder that all holders share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._own = folder / self._name
        self._counts: Counter[str] = Counter()
        self._guard = threading.Lock()
        self._lock: BinaryIO | None = None  # held from the first lease on

    def take(self, id: str) -> None:
        """From now on, a version is in use once more."""
        with self._guard, explained(self._folder):
            if self._lock is None:
                self._claim()
            if not self._counts[id]:
                (self._own / id).touch()
            self._counts[id] += 1

    def give(self, id: str) -> None:
        """A version is in use once less."""
        with self._guard, explained(self._folder):
            self._counts[id] -= 1
            if self._counts[id] <= 0:
                del self._counts[id]
                (self._own / id).unlink(missing_ok=True)

    def renew(self) -> None:
        """Note what is in use in the folder that lies there now, where another one lay before."""
        with self._guard, explained(self._folder):
            if self._lock is not None:
                self._lock.close()
                self._lock = None
                self._claim()

    def _claim(self) -> None:
        lock = _held(self._folder / (self._name + _LOCK))
        self._own.mkdir(exist_ok=True)
        for id in self._counts:
            (self._own / id).touch()
        self._lock = lock

    def held(self) -> set[str]:
        """Versions that any living process uses; what the dead left is removed."""
        with explained(self._folder):
            living = [path for path in self._folder.glob("*" + _LOCK) if not _buried(path)]
            return {id for path in living for id in _names(path.with_suffix(""))}

    def close(self) -> None:
        with self._guard:
            if self._lock is None:
                return
            shutil.rmtree(self._own, ignore_errors=True)  # else the next `held` does it
            (self._folder / (self._name + _LOCK)).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def _held(path: Path) -> BinaryIO:
    """A lock file that this process holds and nobody has taken for a dead one's meanwhile."""
    while True:
        file = open(path, "ab")  # noqa: SIM115 - held until `close`
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()


def _buried(path: Path) -> bool:
    """Whether a holder is dead; what it left is removed then."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return True  # it has just closed
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink(missing_ok=True)
    return True


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []  # it uses nothing yet, or has just closed
