"""What participants were told when they announced an answer.

A SuperLink lists, to whoever announces an answer, the objects that it has yet to be sent, and from
then on the server app may fetch it.  It forgets the question with the first fetch and refuses what
is announced once more.  Were that list lost on its way, the objects would never come.  So the
gateway gives the same list to whoever announces the same answer again.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from .gateway_superlink import Whole

KEPT_SECONDS = 150.0
"""A SuperLink gives up on objects that do not come for 180 (Flower 1.41)."""


@dataclass
class _Announced:
    """One participant's: its turn, and the last receipt."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    digest: bytes = b""
    receipt: Whole | None = None
    since: float = 0.0


class Receipts:
    """The last one of every participant, by its key.  One event loop uses it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._announced: dict[bytes, _Announced] = {}

    @asynccontextmanager
    async def turn(self, key: bytes) -> AsyncIterator[None]:
        """Wait until no other request of the participant's is at work on an announcement."""
        async with self._announced.setdefault(key, _Announced()).lock:
            yield

    def of(self, key: bytes, body: bytes) -> Whole | None:
        """What was said to the same announcement, if it was the last and not long ago."""
        last = self._announced.get(key, _Announced())
        same = last.digest == hashlib.sha256(body).digest()
        return last.receipt if same and self._clock() <= last.since + KEPT_SECONDS else None

    def keep(self, key: bytes, body: bytes, receipt: Whole) -> None:
        """Remember what is about to be said.  A failure is no receipt."""
        if receipt.status == 200:
            last = self._announced.setdefault(key, _Announced())
            last.digest, last.receipt = hashlib.sha256(body).digest(), receipt
            last.since = self._clock()
