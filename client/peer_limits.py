"""How much one peer may ask of another: token buckets, concurrent requests, and what was counted.

Only intervals of a monotonic clock are used, and a caller may bring its own.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Clock = Callable[[], float]  # seconds, never going back


@dataclass(frozen=True)
class PeerLimits:
    """Bounds that a peer keeps to as a caller and holds its callers to.

    Rates are per calling peer.  Its whole claim on memory at one moment is `concurrent` requests
    of `message` bytes, and as many answers.
    """

    message: int = 4 * 2**20  # bytes of one request, and of one answer
    seconds: float = 10.0  # from a call's start to its answer, waiting included
    concurrent: int = 4  # requests of one peer at once
    workers: int = 16  # requests of all peers at once
    waiting: int = 32  # requests that may wait for a worker
    requests_per_second: float = 50.0
    request_burst: float = 200.0
    bytes_per_second: float = 4e6  # requests and answers together
    byte_burst: float = 32e6
    channels: int = 64  # peers that a caller keeps connections to


class TokenBucket:
    """`burst` tokens, refilled at `rate` a second.  Not for several threads.

    What is taken may exceed what is there, because the size of an answer is known only afterwards:
    the next one waits until the debt is paid.
    """

    def __init__(self, rate: float, burst: float, clock: Clock = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._since = burst, clock()

    def wait(self, amount: float = 0.0) -> float:
        """Seconds until the bucket holds `amount` (at most its burst), or any debt is paid; 0.0
        if it does now."""
        self._refill()
        return max(0.0, (min(amount, self._burst) - self._tokens) / self._rate)

    def take(self, amount: float) -> None:
        self._refill()
        self._tokens -= amount

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._since) * self._rate)
        self._since = now


class Allowance:
    """What one peer may still ask; threads may share it."""

    def __init__(self, limits: PeerLimits, clock: Clock = time.monotonic) -> None:
        self._requests = TokenBucket(limits.requests_per_second, limits.request_burst, clock)
        self._bytes = TokenBucket(limits.bytes_per_second, limits.byte_burst, clock)
        self._free = limits.concurrent
        self._lock = threading.Lock()

    def enter(self) -> float:
        """Begin a request: 0.0 if it may, or the seconds after which to ask again.

        A request that was turned away costs nothing, so that waiting as told always helps.
        """
        with self._lock:
            wait = max(self._requests.wait(1.0), self._bytes.wait(), 0.0 if self._free else 0.1)
            if not wait:
                self._free -= 1
                self._requests.take(1.0)
            return wait

    def leave(self, size: int) -> None:
        """End a request that moved `size` bytes."""
        with self._lock:
            self._free += 1
            self._bytes.take(size)


class Counts:
    """How often each thing happened, by peer; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[bytes, str]] = Counter()

    def add(self, peer: bytes, what: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[peer, what] += amount

    def of(self, peer: bytes) -> dict[str, int]:
        """Everything counted for one peer, sorted by name."""
        with self._lock:
            return {what: n for (who, what), n in sorted(self._counts.items()) if who == peer}

    def all(self) -> dict[tuple[str, bytes], int]:
        """What, and of which peer, how often."""
        with self._lock:
            return {(what, who): n for (who, what), n in self._counts.items()}

    def total(self, what: str) -> int:
        with self._lock:
            return sum(n for (_, name), n in self._counts.items() if name == what)


class Slots:
    """A number of places of which each caller takes one, waiting a limited time."""

    def __init__(self, number: int) -> None:
        self._free = threading.Semaphore(number)

    @contextmanager
    def one(self, seconds: float) -> Iterator[bool]:
        """Hold a place during the block; False if none came free in time."""
        taken = self._free.acquire(timeout=max(0.0, seconds))
        try:
            yield taken
        finally:
            if taken:
                self._free.release()
