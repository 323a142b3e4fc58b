"""How much one participant may ask at a time, and how often it may speak into the inbox."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .gateway_refusal import Refusal

MOST_AT_ONCE = 16
"""Requests; a SuperNode and its forwarder have five at most."""
MOST_NOTES, NOTES_SECONDS = 60, 3600.0


class Limits:
    """One thread uses it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._busy: Counter[bytes] = Counter()
        self._notes: dict[bytes, deque[float]] = {}

    @contextmanager
    def request(self, key: bytes) -> Iterator[None]:
        """One request of a participant, for as long as it takes."""
        if self._busy[key] >= MOST_AT_ONCE:
            raise Refusal(429, f"{MOST_AT_ONCE} requests at a time are enough", "ask again later")
        self._busy[key] += 1
        try:
            yield
        finally:
            self._busy[key] -= 1
            if not self._busy[key]:
                del self._busy[key]

    def note(self, key: bytes) -> None:
        """Count a note; Refusal for one too many within the hour."""
        times, now = self._notes.setdefault(key, deque()), self._clock()
        while times and times[0] <= now - NOTES_SECONDS:
            times.popleft()
        if len(times) >= MOST_NOTES:
            raise Refusal(429, f"{MOST_NOTES} notes an hour are enough", "ask again later")
        times.append(now)
