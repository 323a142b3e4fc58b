"""One peer's records as another peer knows them: what counts, what waits, what proves a fork.

What counts is a function of the set of records alone, whatever the order they come in: the unbroken
chain from the first record up to, not including, the smallest sequence number at which the peer
signed two different records.  Nothing from there on counts, so nothing from there on is kept, but
for the two records that prove it.  Signatures were checked before, and sums are the ledger's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from .records import Head, Reason, Record

MOST_PENDING = 1024  # records of one peer that wait for what comes before them

Proof = tuple[Record, Record]
"""Two different records of one peer with one sequence number, sorted by digest."""


class Outcome(Enum):
    """What became of something that was added."""

    NEW = "new"  # it counts, or proves a fork
    PENDING = "pending"  # kept until what comes before it is there
    KNOWN = "known"
    REFUSED = "refused"


@dataclass
class Change:
    """What one addition did: the records that count since, and those that no longer do."""

    outcome: Outcome
    reason: Reason | None = None  # where it was refused
    counted: list[Record] = field(default_factory=list)
    uncounted: list[Record] = field(default_factory=list)


class Chain:
    """The records of one peer.  `start` is not the beginning where a checkpoint stands for it."""

    def __init__(self, start: Head | None = None) -> None:
        self.start = start or Head()
        self.proof: Proof | None = None
        self._counted: list[Record] = []
        self._pending: dict[int, Record] = {}

    @property
    def head(self) -> Head:
        """The end of what counts."""
        return self._counted[-1].head if self._counted else self.start

    @property
    def end(self) -> int | None:
        """The sequence number from which on nothing counts, if a fork is proven."""
        return self.proof[0].sequence if self.proof else None

    @property
    def overtaken(self) -> bool:
        """Whether the fork lies within what the checkpoint counted, so that its sum is wrong."""
        return self.end is not None and self.end < self.start.count

    def at(self, sequence: int) -> Record | None:
        """The record that counts or waits at a place before any fork."""
        index = sequence - self.start.count
        if 0 <= index < len(self._counted):
            return self._counted[index]
        return self._pending.get(sequence)

    def head_at(self, count: int) -> Head | None:
        """The head of the first `count` records, where they count here."""
        if count == self.start.count:
            return self.start
        index = count - self.start.count
        return self._counted[index - 1].head if 0 < index <= len(self._counted) else None

    def counted(self, start: int = 0, stop: int | None = None) -> list[Record]:
        """The counted records with sequence numbers from `start` up to, not including, `stop`."""
        base = self.start.count
        last = self.head.count if stop is None else stop
        return self._counted[max(start - base, 0) : max(last - base, 0)]

    def kept(self) -> Iterator[Record]:
        """All records but the proof's, by sequence."""
        yield from self._counted
        yield from (self._pending[sequence] for sequence in sorted(self._pending))

    def holds(self, record: Record) -> bool:
        """Whether the same record, by its body, is kept."""
        known = self.at(record.sequence)
        candidates = [known] if known else []
        return any(record.digest == other.digest for other in (*candidates, *(self.proof or ())))

    def add(self, record: Record) -> Change:
        """Take in one valid record."""
        if self.holds(record):
            return Change(Outcome.KNOWN)
        if self.end is not None and record.sequence >= self.end:
            return Change(Outcome.REFUSED, Reason.EXCLUDED)
        if record.sequence < self.start.count:
            return Change(Outcome.REFUSED, Reason.PAST)
        other = self.at(record.sequence)
        if other is not None:
            return self.exclude(record, other)
        if self.head.continued_by(record):
            return Change(Outcome.NEW, counted=self._append(record))
        return self._wait(record)

    def exclude(self, one: Record, other: Record) -> Change:
        """Take in a proof: two different valid records with one sequence number."""
        if self.end is not None and self.end <= one.sequence:
            return Change(Outcome.KNOWN)
        first, second = sorted((one, other), key=lambda record: record.digest)
        self.proof = first, second
        keep = max(one.sequence - self.start.count, 0)
        uncounted, self._counted = self._counted[keep:], self._counted[:keep]
        self._pending = {s: r for s, r in self._pending.items() if s < one.sequence}
        return Change(Outcome.NEW, uncounted=uncounted)

    def _append(self, record: Record) -> list[Record]:
        """Count a record that continues the chain, and what waited for it."""
        added: list[Record] = []
        following: Record | None = record
        while following is not None and self.head.continued_by(following):
            self._pending.pop(following.sequence, None)
            self._counted.append(following)
            added.append(following)
            following = self._pending.get(self.head.count)
        return added

    def _wait(self, record: Record) -> Change:
        """Keep a record that does not count yet; where too many wait, the furthest gives way."""
        self._pending[record.sequence] = record
        if len(self._pending) > MOST_PENDING:
            furthest = max(self._pending)
            del self._pending[furthest]
            if furthest == record.sequence:
                return Change(Outcome.REFUSED, Reason.AHEAD)
        return Change(Outcome.PENDING)
