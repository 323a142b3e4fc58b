"""The sessions in which requests count once.

They live in memory only: after a restart of the gateway everybody opens a new one, and nothing that
was signed in an old one is ever accepted again.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from ..signed_request import SequenceWindow
from .gateway_refusal import UNKNOWN_SESSION, Refusal

IDLE_SECONDS = 3600.0
MOST_PER_KEY = 8
NONCES_KEPT = 256


@dataclass
class _Session:
    key: bytes
    used: float
    window: SequenceWindow = field(default_factory=SequenceWindow)


class Sessions:
    """Every session that is open.  One thread uses it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # least recently used first
        self._nonces: dict[bytes, OrderedDict[str, None]] = {}

    def open(self, key: bytes, nonce: str) -> str:
        """A new session of a participant's key.  Refusal for a nonce that it has used before."""
        self._remember(key, nonce)
        self._expire()
        own = [name for name, session in self._sessions.items() if session.key == key]
        for name in own[: max(0, len(own) - MOST_PER_KEY + 1)]:
            del self._sessions[name]
        name = secrets.token_hex(16)
        self._sessions[name] = _Session(key, self._clock())
        return name

    def require(self, name: str, key: bytes) -> None:
        """Refusal unless the session is open and that key's own."""
        self._expire()
        session = self._sessions.get(name)
        if session is None or session.key != key:
            raise Refusal(401, UNKNOWN_SESSION, "open a new one")

    def admit(self, name: str, key: bytes, sequence: int) -> None:
        """Let a request count, once.  Its signature has been checked."""
        self.require(name, key)
        session = self._sessions[name]
        if not session.window.admit(sequence):
            raise Refusal(401, "the request was made before", "every request is signed anew")
        session.used = self._clock()
        self._sessions.move_to_end(name)

    def _remember(self, key: bytes, nonce: str) -> None:
        seen = self._nonces.setdefault(key, OrderedDict())
        if nonce in seen:
            raise Refusal(401, "the request was made before", "take another nonce")
        seen[nonce] = None
        if len(seen) > NONCES_KEPT:
            seen.popitem(last=False)

    def _expire(self) -> None:
        latest = self._clock() - IDLE_SECONDS
        while self._sessions:
            name, session = next(iter(self._sessions.items()))
            if session.used > latest:
                return
            del self._sessions[name]
