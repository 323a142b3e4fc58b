"""The grow-only set of records, and the Q that is its sum.

Whoever holds the same valid records and introductions has the same Q, in whatever order they came:
each record fixes its own increments, integers add up alike in any order, and which records count is
a function of the set (see chain).  Q is kept up to date: a record's increments go in when it begins
to count and come out when a proven fork excludes it.

No clock, no network, no thread and no disk: whoever owns a ledger serialises access to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from ..errors import RecordError, UpdateError
from .chain import Chain, Change, Outcome, Proof
from .charter import MOST_MEMBERS, Charter, Member
from .introductions import Introduction
from .records import Head, Reason, Record, announced

Cut = Mapping[bytes, Head]
"""Up to where each peer's chain is summed."""


class Kind(IntEnum):
    """What travels between ledgers and is kept by them."""

    RECORD = 0
    INTRODUCTION = 1
    PROOF = 2  # two records, one after the other


@dataclass(frozen=True)
class Item:
    """One thing that a ledger holds, as bytes; peer and sequence say what it is about."""

    kind: Kind
    data: bytes
    peer: bytes
    sequence: int = 0


@dataclass(frozen=True)
class Added:
    """What became of bytes that were offered to a ledger."""

    outcome: Outcome
    item: Item | None = None  # what to keep and to pass on: a proof, where a record revealed one
    error: RecordError | None = None  # where it was refused

    @property
    def kept(self) -> bool:
        return self.outcome in (Outcome.NEW, Outcome.PENDING)


@dataclass(frozen=True)
class Base:
    """The sum that stands for the records up to a cut, where a ledger starts from a checkpoint."""

    cut: Cut
    q: Tensor


class Ledger:
    """All that one peer knows of a run."""

    def __init__(self, charter: Charter, base: Base | None = None) -> None:
        self.charter = charter
        self.base = base
        self.tally: Counter[tuple[str, bytes]] = Counter()
        """How often each outcome, or reason to refuse, was met, by who handed it over."""
        self._founders = {member.peer: member for member in charter.founders}
        self._introductions: dict[bytes, Introduction] = {}  # in the order of their acceptance
        self._chains: dict[bytes, Chain] = {}
        self._q = charter.pool.zero() if base is None else base.q.clone()

    # --- what it says -----------------------------------------------------------------------

    @property
    def members(self) -> dict[bytes, Member]:
        """Everyone who belongs to the run, by key."""
        introduced = {peer: each.member for peer, each in self._introductions.items()}
        return {**self._founders, **introduced}

    def is_member(self, peer: bytes) -> bool:
        return peer in self._founders or peer in self._introductions

    def chain(self, peer: bytes) -> Chain:
        """A member's chain; empty where nothing of it is known.  To be read, not changed."""
        found = self._chains.get(peer)
        return found if found is not None else Chain(self._start(peer))

    def head(self, peer: bytes) -> Head:
        """The end of what counts of a peer; its own next record continues this."""
        return self.chain(peer).head

    @property
    def heads(self) -> dict[bytes, Head]:
        """The end of what counts of every member of which something counts."""
        started = {**self._chains, **dict.fromkeys(self.base.cut if self.base else ())}
        found = {peer: self.head(peer) for peer in sorted(started)}
        return {peer: head for peer, head in found.items() if head.count}

    @property
    def excluded(self) -> dict[bytes, int]:
        """From which sequence number on the members that forked their chains do not count."""
        return {
            peer: chain.end for peer, chain in sorted(self._chains.items()) if chain.end is not None
        }

    @property
    def overtaken(self) -> list[bytes]:
        """Members whose fork lies within the checkpoint that this ledger started from.

        While there are any, its Q counts records that no longer do: a newer checkpoint, or the
        history (see checkpoint.absorb), mends that.
        """
        return [peer for peer, chain in sorted(self._chains.items()) if chain.overtaken]

    @property
    def q(self) -> Tensor:
        """The sum of all that counts: int64 (cores, r, r), a copy."""
        return self._q.clone()

    @property
    def state_id(self) -> str:
        """The pool's digest of Q: equal at all peers that hold the same records.

        Raises UpdateError where Q has overflowed, or a checkpoint has been overtaken.
        """
        if self.overtaken:
            raise UpdateError(
                f"the checkpoint counts records of {self.overtaken[0].hex()[:16]} that a proven"
                " fork excludes",
                "start from a newer checkpoint, or wait for the history",
            )
        return self.charter.pool.state_id(self._q)

    @property
    def introduced(self) -> list[bytes]:
        """Members that are no founders, each after the one that introduced it."""
        return list(self._introductions)

    def introduction(self, peer: bytes) -> bytes | None:
        """How an introduced member became one."""
        found = self._introductions.get(peer)
        return found.encoded if found else None

    def introductions(self) -> Iterator[Item]:
        """How its members came to be, each after the one that introduced it."""
        for peer, introduction in self._introductions.items():
            yield Item(Kind.INTRODUCTION, introduction.encoded, peer)

    def items(self) -> Iterator[Item]:
        """All that is held, in an order in which another ledger can take it in."""
        yield from self.introductions()
        for _, chain in sorted(self._chains.items()):
            if chain.proof:
                yield proof_item(chain.proof)
            yield from map(record_item, chain.kept())

    # --- what it takes in -------------------------------------------------------------------

    def add(self, kind: Kind, data: bytes, sender: bytes = b"") -> Added:
        """Take in what a peer, or the own disk, offers; refusals are counted, never raised.

        `sender` is the peer that handed it over, who need not be the one that made it.
        """
        take = {
            Kind.RECORD: self._add_record,
            Kind.INTRODUCTION: self._add_introduction,
            Kind.PROOF: self._add_proof,
        }[kind]
        try:
            added = take(data)
            self.tally[added.outcome.value, sender] += 1
        except RecordError as error:
            added = Added(Outcome.REFUSED, error=error)
            self.tally[error.reason, sender] += 1
        return added

    def _add_record(self, data: bytes) -> Added:
        record = self._read(data)
        if self.chain(record.peer).holds(record):  # before the costly look at the signature
            return Added(Outcome.KNOWN, record_item(record))
        record.verify()
        change = self._chain_of(record.peer).add(record)
        return self._account(record_item(record), change)

    def _add_proof(self, data: bytes) -> Added:
        one, other = self._read_proof(data)
        end = self.chain(one.peer).end
        if end is not None and end <= one.sequence:
            return Added(Outcome.KNOWN, proof_item((one, other)))
        one.verify()
        other.verify()
        change = self._chain_of(one.peer).exclude(one, other)
        return self._account(proof_item((one, other)), change)

    def _add_introduction(self, data: bytes) -> Added:
        introduction = Introduction.decode(data, self.charter.run)
        peer = introduction.member.peer
        if self.is_member(peer):
            return Added(Outcome.KNOWN, Item(Kind.INTRODUCTION, data, peer))
        if not self.is_member(introduction.introducer):
            raise _refuse(Reason.STRANGER, "an introducer", introduction.introducer)
        if len(self._founders) + len(self._introductions) >= MOST_MEMBERS:
            raise _refuse(Reason.FULL, f"with {MOST_MEMBERS} members, the introduction", peer)
        self._introductions[peer] = introduction
        return Added(Outcome.NEW, Item(Kind.INTRODUCTION, data, peer))

    def _read(self, data: bytes) -> Record:
        """A record of a member with all but its signature checked."""
        record = Record.decode(data, self.charter.run, self.charter.largest_shift)
        if not self.is_member(record.peer):
            raise _refuse(Reason.STRANGER, "a record", record.peer)
        return record

    def _read_proof(self, data: bytes) -> Proof:
        """Two records of a member that contradict each other, but for their signatures."""
        middle = announced(data)
        one, other = self._read(data[:middle]), self._read(data[middle:])
        if (one.peer, one.sequence) != (other.peer, other.sequence) or one.digest == other.digest:
            raise _refuse(Reason.PROOF, "two records that agree", one.peer)
        return one, other

    def _account(self, item: Item, change: Change) -> Added:
        """Bring Q up to date with a change of what counts."""
        for record in change.counted:
            record.fold_into(self._q)
        for record in change.uncounted:
            record.fold_into(self._q, sign=-1)
        if change.reason is not None:
            raise _refuse(change.reason, "a record", item.peer)
        proof = self._chains[item.peer].proof
        if change.outcome is Outcome.NEW and not change.counted and proof is not None:
            item = proof_item(proof)
        return Added(change.outcome, item)

    def _chain_of(self, peer: bytes) -> Chain:
        return self._chains.setdefault(peer, Chain(self._start(peer)))

    def _start(self, peer: bytes) -> Head | None:
        return self.base.cut.get(peer) if self.base else None

    def rebase(self, history: Ledger) -> None:
        """Go on from the records in `history`, which is used up, instead of from a checkpoint.

        What this ledger holds is added to them.  See `checkpoint.absorb` for when to.
        """
        for item in self.items():
            history.add(item.kind, item.data)
        self.base = history.base
        self._introductions, self._chains = history._introductions, history._chains
        self._q = history._q

    # --- what it computes anew --------------------------------------------------------------

    def rebuild(self, without: Collection[bytes] = ()) -> Tensor:
        """Q summed anew from the records, leaving out some peers' if asked to.

        Raises UpdateError where records are missing because the ledger started from a checkpoint.
        """
        if self.base is not None:
            raise UpdateError(
                "a ledger that started from a checkpoint has not all records", "fetch the history"
            )
        q = self.charter.pool.zero()
        for peer, chain in self._chains.items():
            for record in chain.counted() if peer not in without else ():
                record.fold_into(q)
        return q

    def without(self, peer: bytes) -> Tensor:
        """Q as if `peer` had sent nothing: retraction of its bytes.

        It is not exact unlearning: the others measured their steps on a model that had them.
        """
        return self.rebuild({peer})

    def q_at(self, cut: Cut) -> Tensor:
        """Q as it was, or would have been, with each peer's chain up to a cut.

        Raises UpdateError where this ledger does not count all of the cut.
        """
        if self.base and any(cut.get(p, Head()).count < h.count for p, h in self.base.cut.items()):
            raise UpdateError("the cut lies before the checkpoint that this ledger started from")
        for peer, head in cut.items():
            if self.chain(peer).head_at(head.count) != head:
                raise UpdateError(
                    f"the cut has {head.count} records of {peer.hex()[:16]} that do not count here",
                    "sync, then try again",
                )
        q = self.q
        for peer, chain in self._chains.items():
            for record in chain.counted(start=cut.get(peer, Head()).count):
                record.fold_into(q, sign=-1)
        return q


def _refuse(reason: Reason, what: str, peer: bytes) -> RecordError:
    hint = "a member has to introduce it" if reason is Reason.STRANGER else ""
    return RecordError(reason, f"{what} of {peer.hex()[:16]}: {reason.value}", hint)


def record_item(record: Record) -> Item:
    return Item(Kind.RECORD, record.encoded, record.peer, record.sequence)


def proof_item(proof: Proof) -> Item:
    one, other = proof
    return Item(Kind.PROOF, one.encoded + other.encoded, one.peer, one.sequence)
