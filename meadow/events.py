"""The one event schema: what metrics files, progress displays and dashboards read.

An event is a kind, a round and plain JSON data.  Kinds: run_started, round_opened, contribution,
refused, late, round_closed, published, run_finished, notice; of a peer without a coordinator:
listening, record (its round is the sequence number), measured, notice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .store import explained

FORMAT = 1
_TAIL = 2**18  # bytes of a log that are searched for its newest events


@dataclass(frozen=True)
class Event:
    kind: str
    round: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)


Observer = Callable[[Event], None]


class EventLog:
    """Appends each event as one JSON line.  A record for people: a run resumes from its journal,
    never from here, so lines are not synced one by one and a torn last line does no harm.

    Raises StorageError where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained(path):
            self._file = path.open("ab", buffering=0)  # so that a full disk shows at once
            if _is_torn(path):
                self._append(b"\n")

    def __call__(self, event: Event) -> None:
        row = {
            "format": FORMAT,
            "time": round(time.time(), 3),
            "kind": event.kind,
            "round": event.round,
            **event.data,
        }
        self._append(json.dumps(row, separators=(",", ":")).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        with explained(self._path):
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


def _is_torn(path: Path) -> bool:
    """Whether the last line has no end; a log of months is not read for that."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size > 0 and file.read() != b"\n"


class EventTail:
    """Reads the events that another process appends to a log, from where it stands now."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> Iterator[Event]:
        """What has been appended since; a line that is not whole yet comes later."""
        if not self._path.exists():
            return
        with explained(self._path), self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            event = _event(line)
            if event is not None:
                yield event


def last_events(path: Path, count: int) -> list[Event]:
    """The newest events of a log, oldest first; their `data` has the "time" (Unix seconds)."""
    if not path.exists():
        return []
    with explained(path), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().splitlines()
    found = [event for line in lines if (event := _event(line)) is not None]
    return found[-count:]


def _event(line: bytes) -> Event | None:
    """An event of a log's line; None for one that a crash tore."""
    try:
        row = json.loads(line)
        kind, number = row.pop("kind"), row.pop("round")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return Event(kind, number, row)


def tee(*observers: Observer) -> Observer:
    """One observer that tells all of them."""

    def tell(event: Event) -> None:
        for observer in observers:
            observer(event)

    return tell
