"""Messages that were handed out and not yet confirmed.

A SuperLink hands a message out once.  Were the answer lost on its way, or the SuperNode killed
before it had everything, nobody would ever work on it.  A SuperNode confirms what it has received
before it asks for more; so one that asks without having confirmed gets the same message again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .gateway_superlink import Whole

MOST_TIMES = 5
"""Deliveries of one message: what fails so often fails for another reason."""
KEPT_SECONDS = 600.0


@dataclass
class _Delivery:
    pulled: Whole
    since: float
    times: int = 1


class Deliveries:
    """Of every participant, by its key.  One thread uses it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[bytes, _Delivery] = {}
        self._turns: dict[bytes, object] = {}

    def turn(self, key: bytes) -> Callable[[], bool]:
        """A participant asks anew, and its earlier question waits for nothing any more.

        What is returned says whether this question is still its newest, with nothing to deliver.
        """
        mine = self._turns[key] = object()
        return lambda: self._turns.get(key) is mine and key not in self._open

    def again(self, key: bytes) -> Whole | None:
        """What has to be delivered once more, if anything."""
        delivery = self._open.get(key)
        if delivery is None:
            return None
        late = self._clock() > delivery.since + KEPT_SECONDS
        if late or delivery.times >= MOST_TIMES:
            del self._open[key]
            return None
        delivery.times += 1
        return delivery.pulled

    def keep(self, key: bytes, pulled: Whole) -> None:
        """A message is about to be handed out."""
        if pulled.status == 200 and not pulled.is_empty:
            self._open[key] = _Delivery(pulled, self._clock())

    def confirmed(self, key: bytes) -> None:
        self._open.pop(key, None)
