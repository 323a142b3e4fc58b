"""Many peers in one process: calls between them, with every byte counted and any of them lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import MeadowError, PeerError

Handler = Callable[[bytes, str, bytes], bytes]
"""Of the calling peer's key, a verb and a request; gives the answer or raises MeadowError."""

Fault = Callable[[bytes, bytes], bool]
"""Whether a message from one peer to another is lost."""


class PeerNetwork:
    """Peers that call each other directly.  `traffic` counts bytes that a peer sent or received.

    A request or an answer for which `lost` says so does not arrive, and the caller gets PeerError;
    where the answer is lost, the other side has acted all the same.
    """

    def __init__(self, lost: Fault = lambda sender, receiver: False) -> None:
        self.traffic: Counter[bytes] = Counter()
        self.calls: Counter[str] = Counter()
        self._lost = lost
        self._handlers: dict[bytes, Handler] = {}

    def join(self, peer: bytes, handler: Handler) -> None:
        self._handlers[peer] = handler

    def leave(self, peer: bytes) -> None:
        del self._handlers[peer]

    def transport(self, caller: bytes) -> MemoryTransport:
        """How `caller` reaches the others."""
        return MemoryTransport(self, caller)

    def deliver(self, caller: bytes, peer: bytes, verb: str, body: bytes) -> bytes:
        """One call.  Raises PeerError."""
        self.calls[verb] += 1
        self._carry(caller, peer, body)
        try:
            answer = self._handlers[peer](caller, verb, body)
        except MeadowError as error:
            raise PeerError(f"peer {peer.hex()[:16]} refused: {error}") from error
        self._carry(peer, caller, answer)
        return answer

    def _carry(self, sender: bytes, receiver: bytes, data: bytes) -> None:
        self.traffic[sender] += len(data)
        gone = sender not in self._handlers or receiver not in self._handlers
        if gone or self._lost(sender, receiver):
            raise PeerError("the message was lost", "try again later")
        self.traffic[receiver] += len(data)


@dataclass(frozen=True)
class MemoryTransport:
    """One peer's way into a `PeerNetwork`."""

    network: PeerNetwork
    caller: bytes

    def call(self, peer: bytes, verb: str, body: bytes) -> bytes:
        return self.network.deliver(self.caller, peer, verb, body)
