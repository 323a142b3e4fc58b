"""What a peer tells: events, `status.json`, and notices that come when something changes."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..closeable import Closeable
from ..errors import PeerError
from ..events import Event, EventLog, Observer, tee
from ..store import Disk

EVENTS, STATUS = "events.jsonl", "status.json"


class PeerLog(Closeable):
    """Threads may share it; the observer is called by one at a time."""

    def __init__(self, folder: Path, observer: Observer, disk: Disk) -> None:
        """Raises StorageError where the folder cannot be written."""
        self._file = EventLog(folder / EVENTS)
        self._observer = tee(self._file, observer)
        self._status, self._disk = folder / STATUS, disk
        self._lock = threading.Lock()
        self._shown = b""
        self._silent: set[bytes] = set()  # peers that did not answer last time

    def close(self) -> None:
        self._file.close()

    def tell(self, kind: str, data: Mapping[str, Any], number: int = 0) -> None:
        with self._lock:
            self._observer(Event(kind, number, data))

    def notice(self, text: str) -> None:
        self.tell("notice", {"text": text})

    def heard(self, peer: bytes, fault: PeerError | None) -> None:
        """How a call of `peer` ended: told once when it stops, or begins again, to answer."""
        if fault is not None and peer not in self._silent:
            self._silent.add(peer)
            self.notice(str(fault))
        elif fault is None and peer in self._silent:
            self._silent.discard(peer)
            self.notice(f"peer {peer.hex()[:16]} answers again")

    def show(self, status: Mapping[str, Any]) -> None:
        """Put `status.json` in place in one piece, if it says anything new."""
        data = json.dumps(status, indent=1).encode()
        with self._lock:
            if data != self._shown:
                self._disk.write(self._status, data)
                self._shown = data


def counted(*tallies: Mapping[tuple[str, bytes], int]) -> dict[str, int]:
    """How often each thing was met, by whom it came, as `status.json` says it."""
    return {
        f"{what} from {who.hex()[:16] or 'outside'}": n
        for tally in tallies
        for (what, who), n in sorted(tally.items())
    }
