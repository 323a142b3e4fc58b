"""The peak resident memory of other processes, as the kernel accounts for it (VmHWM).

It only grows, so that a look now and then loses nothing but what comes after the last one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from ..closeable import Closeable
from ..errors import MeadowError

PROC = Path("/proc")
LOOK_SECONDS = 0.1

Pids = Callable[[], Mapping[str, int]]
"""The processes to look at, by name, as far as they run now."""


class ProcessPeaks(Closeable):
    """Looks at processes from a thread of its own until it is closed."""

    def __init__(self, pids: Pids, proc: Path = PROC) -> None:
        """Raises MeadowError where the kernel keeps no such account."""
        if not (proc / "self/status").exists():
            raise MeadowError("the memory of processes is measured on Linux alone")
        self._pids, self._proc = pids, proc
        self._peaks: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def peaks(self) -> dict[str, int]:
        """Bytes, by name; where a process was started anew, those of its largest life."""
        return dict(self._peaks)

    def look(self) -> None:
        for name, pid in self._pids().items():
            found = peak_of(pid, self._proc)
            self._peaks[name] = max(found, self._peaks.get(name, 0))

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.look()


def peak_of(pid: int, proc: Path = PROC) -> int:
    """A process's peak resident memory in bytes; 0 where it has ended."""
    try:
        lines = (proc / str(pid) / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    for line in lines.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # a zombie has no memory


def pids_in(record: Path) -> dict[str, int]:
    """The processes that a supervisor names in its `processes.json`; none before there is one."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): int(pid) for name, pid in found.items()}


def pid_in(file: Path) -> int:
    """The process id that a file holds; 0 where it does not."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
