"""How many bytes the daemon sent to the coordinator and got back, a line of JSON for each exchange,
also for one that failed, which may have sent less.

    {"time": Unix seconds, "path": ..., "status": HTTP's or 0, "up": bytes, "down": bytes}

The files stay small: the newest lines are in `traffic.jsonl`, those before in `traffic.jsonl.1`.
It is for the participant to look at; the durable record of what was sent is the outgoing log.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

from ..closeable import Closeable
from ..store import explained

LARGEST = 1_000_000
"""Bytes of one file."""


class TrafficLog(Closeable):
    """One forwarder's.  Threads may share it."""

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.time, largest: int = LARGEST
    ) -> None:
        """Raises StorageError where it cannot be written."""
        with explained(path):
            self._file = RotatingFileHandler(
                path, maxBytes=largest, backupCount=1, encoding="utf-8", errors="replace"
            )
        self._clock = clock
        self._lock, self._closed = threading.Lock(), False

    def add(self, path: str, status: int, up: int, down: int) -> None:
        line = {"time": self._clock(), "path": path, "status": status, "up": up, "down": down}
        with self._lock:
            if not self._closed:  # what is still under way at the end would open the file again
                self._file.handle(logging.makeLogRecord({"msg": json.dumps(line)}))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._file.close()
