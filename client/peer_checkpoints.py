"""Checkpoints among peers: asking others to sign one, handing it to joiners, starting from one.

A joiner that trusts enough signers works from a checkpoint at once: one message, whatever the
history.  Behind its work it fetches the history into a second ledger, compares, and puts the
records in the checkpoint's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from ..errors import FormatError, IdentityError, PeerError, UpdateError
from ..identity import Identity
from ..store import digest_of
from ..strategies.charter import Charter
from ..strategies.checkpoint import Checkpoint, Verdict, absorb
from ..strategies.ledger import Ledger
from ..strategies.peer_keys import peer_of
from . import gossip_messages as messages
from .gossip import Gossip, Synced, Transport
from .peer_memory import BASE, SERVED, entry_of
from .record_store import Entry, RecordStore

VERBS = ("checkpoint", "cosign")
MOST_BARREN = 32  # exchanges with peers that have all records, and not those of a checkpoint
Tell = Callable[[str], None]


class Checkpoints:
    """One peer's part in them: signs others', gathers signatures on its own, serves the newest."""

    def __init__(
        self,
        gossip: Gossip,
        transport: Transport,
        store: RecordStore,
        identity: Identity,
        witnesses: int,
    ) -> None:
        """`witnesses` is how many other peers have to sign."""
        self._gossip, self._transport, self._store = gossip, transport, store
        self._identity, self._witnesses = identity, witnesses
        self._served: Checkpoint | None = None
        self._records = 0  # that the served one sums
        for entry in store.entries("checkpoint"):
            if entry.sequence == SERVED:
                self._recall(entry.data)

    def _recall(self, data: bytes) -> None:
        """Go on serving what was served, unless a later member's key begins like one that it names:
        then it has become ambiguous, and the next one takes its place."""
        try:
            self._served = self._decode(data)
        except FormatError:
            return
        self._records = self._served.records

    @property
    def served(self) -> Checkpoint | None:
        return self._served

    def answer(self, caller: bytes, verb: str, request: bytes) -> bytes:
        """Answer a member's request for the newest checkpoint, or for a signature.

        Raises PeerError for a caller that is no member, UpdateError where this peer's own records
        do not give what it is asked to sign, RecordError and FormatError for malformed requests.
        """
        with self._gossip.lock:
            if not self._gossip.ledger.is_member(caller):
                raise PeerError(f"peer {caller.hex()[:16]} is no member of this run")
            body = messages.unseal(self._gossip.ledger.charter.digest, request)
            if verb == "checkpoint":
                return self._served.encoded if self._served and self._stands() else b""
            signed = self._decode(body).sign(self._identity, self._gossip.ledger)
        return signed.signatures[peer_of(self._identity)]

    def gather(self, records: int) -> bool:
        """Have a new checkpoint signed and keep it, if at least `records` more count by now, or
        some that the old one sums no longer do.

        Whether it came about; where too few sign, the old one stays.
        """
        with self._gossip.lock:
            ledger = self._gossip.ledger
            if ledger.base is not None or ledger.overtaken:
                return False
            taken = Checkpoint.take(ledger)
            if self._stands() and taken.records < self._records + records:
                return False
            taken = taken.sign(self._identity, ledger)
        for peer in self._gossip.partners(2 * self._witnesses):
            if len(taken.signatures) > self._witnesses:
                break
            signature = self._asked(peer, taken)
            if signature is not None:
                taken = replace(taken, signatures={**taken.signatures, peer: signature})
        if len(taken.signatures) <= self._witnesses:
            return False
        self._keep(taken)
        return True

    def _stands(self) -> bool:
        """Whether all that the served one sums still counts: a fork may be proven since."""
        cut, ledger = self._served.cut if self._served else {}, self._gossip.ledger
        return all(ledger.chain(peer).head_at(head.count) == head for peer, head in cut.items())

    def _asked(self, peer: bytes, checkpoint: Checkpoint) -> bytes | None:
        """A peer's signature; None where it has other records, or does not answer."""
        try:
            signature = _call(
                self._transport, peer, "cosign", checkpoint.charter, checkpoint.encoded
            )
        except PeerError:
            return None
        return signature if checkpoint.signed_by(peer, signature) else None

    def _keep(self, checkpoint: Checkpoint) -> None:
        old = [entry.key for entry in self._store.entries("checkpoint") if entry.sequence == SERVED]
        entry = stored(checkpoint, SERVED, peer_of(self._identity))
        self._store.replace([key for key in old if key != entry.key], [entry])
        self._served, self._records = checkpoint, checkpoint.records

    def _decode(self, data: bytes) -> Checkpoint:
        ledger = self._gossip.ledger
        return Checkpoint.decode(data, ledger.charter, ledger.members)


def stored(checkpoint: Checkpoint, use: int, owner: bytes) -> Entry:
    """A checkpoint as the store keeps it."""
    data = checkpoint.encoded
    return Entry("checkpoint", bytes.fromhex(digest_of(bytes([use]) + data)), owner, use, data)


def fetch(gossip: Gossip, transport: Transport, witnesses: int, tell: Tell) -> Checkpoint | None:
    """The first checkpoint, of the peers that can be called, that enough members signed.

    None where there is none: the joiner then fetches the records.  For records of its own it takes
    nobody's word: it would continue a chain that it has not seen, and could never mend that.
    """
    charter = gossip.ledger.charter
    for peer in gossip.partners(len(gossip.ledger.members)):
        try:
            gossip.meet(peer)
            data = _call(transport, peer, "checkpoint", charter, b"")
            if not data:
                continue
            checkpoint = Checkpoint.decode(data, charter, gossip.ledger.members)
            checkpoint.verify(gossip.ledger.members, witnesses + 1)
            if gossip.me in checkpoint.cut:
                raise UpdateError("it counts records of this peer, which its folder does not hold")
        except PeerError:  # whoever exchanges records with it tells
            continue
        except (FormatError, IdentityError, UpdateError) as error:
            tell(f"no checkpoint from {peer.hex()[:16]}: {error}")
            continue
        return checkpoint
    return None


class History:
    """The records that a checkpoint stands for: fetched behind the work, compared, and kept."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        gossip: Gossip,
        transport: Transport,
        store: RecordStore,
        me: bytes,
    ) -> None:
        self._checkpoint, self._gossip, self._store = checkpoint, gossip, store
        self._ledger = Ledger(checkpoint.charter)
        self._own = Gossip(self._ledger, transport, Random(), me)
        self._missing, self._barren = self._lacking(), 0

    @classmethod
    def begin(
        cls,
        checkpoint: Checkpoint,
        gossip: Gossip,
        transport: Transport,
        store: RecordStore,
        me: bytes,
    ) -> History:
        """Start the gossip's ledger from a checkpoint, durably."""
        with gossip.lock:
            store.append([stored(checkpoint, BASE, me)])
            gossip.ledger = checkpoint.start(gossip.ledger)
        return cls(checkpoint, gossip, transport, store, me)

    def advance(self) -> str:
        """One exchange with a peer at random; what the audit found, once all records are here.

        The ledger, and the store, then have the records in the checkpoint's place; so too where
        the checkpoint counts records that nobody has.  Raises PeerError where the peer does not
        answer.
        """
        for peer in self._gossip.partners(1):
            self._weigh(self._own.sync(peer))
        with self._gossip.lock:
            found = absorb(self._gossip.ledger, self._ledger, self._checkpoint)
            if found.verdict is Verdict.INCOMPLETE:
                if self._barren < MOST_BARREN:
                    return ""
                self._gossip.ledger.rebase(self._ledger)
            kept = [entry_of(item) for item in self._gossip.ledger.items()]
            old = [each.key for each in self._store.entries("checkpoint") if each.sequence == BASE]
            self._store.replace(old, kept)
        signers = ", ".join(sorted(peer.hex()[:16] for peer in self._checkpoint.signatures))
        return f"the checkpoint that {signers} signed was audited: {found.verdict.value}"

    def _weigh(self, done: Synced) -> None:
        """Count the exchange if the other side should have had missing records, and gave none."""
        missing = self._lacking()
        if missing < self._missing:
            self._barren = 0
        elif done.complete and done.whole:
            self._barren += 1
        self._missing = missing

    def _lacking(self) -> int:
        """How many of the records that the checkpoint counts are not here."""
        cut = self._checkpoint.cut.items()
        return sum(max(0, head.count - self._ledger.head(peer).count) for peer, head in cut)


def _call(transport: Transport, peer: bytes, verb: str, charter: Charter, body: bytes) -> bytes:
    return transport.call(peer, verb, messages.seal(charter.digest, body))
