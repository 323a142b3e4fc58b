"""A Q that several peers vouch for, so that a joiner need not fetch the history first.

A checkpoint is Q at a cut: how many records of each member it sums, and the digest of the last of
them, so that the records that follow can be linked to it.  A peer signs only what it computed
itself from the records.  The joiner starts from it at once, fetches the history in its own time
into a second ledger, and then has the two compared: see `absorb`.

Layout, little-endian; its size does not depend on the history:

    u8 format = 1 | 8 run | u8 width | u16 members | u8 signatures
    members     8 key | u32 records | u32 steps | 32 digest of the last record      sorted by key
    Q           a signed integer of `width` bytes each, the least that hold all of them
    signatures  8 key | 64 signature                                                sorted by key

Run and keys are shortened to their first eight bytes on the wire; what is signed has them in full.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError, IdentityError, UpdateError
from ..identity import Identity
from ..peft_adapters.pool import refuse_overflow
from .charter import MOST_MEMBERS, Charter
from .ledger import Base, Cut, Ledger
from .peer_keys import SIGNATURE, holds, peer_of, sign
from .records import LAST_STEP, Head

FORMAT = 1
MOST_SIGNATURES = 64
MOST_BEHIND = 1024  # records of the signer's that follow the cut: each is taken out of Q anew

_PURPOSE = b"meadow/checkpoint/v1\0"
_SHORT = 8  # bytes of a key
_HEAD = struct.Struct("<B8sBHB")
_ENTRY = struct.Struct("<8sII32s")
_FULL_ENTRY = struct.Struct("<32sII32s")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Q at a cut, and who signed it."""

    charter: Charter
    cut: Cut  # of every member of which something counts
    q: Tensor  # int64 (cores, r, r)
    signatures: Mapping[bytes, bytes] = field(default_factory=dict)  # by signer

    @classmethod
    def take(cls, ledger: Ledger) -> Checkpoint:
        """All that counts now, signed by nobody.  Raises UpdateError where Q is not known."""
        _ = ledger.state_id  # refuses an overflow and an overtaken base
        return cls(ledger.charter, ledger.heads, ledger.q)

    @property
    def records(self) -> int:
        """How many it sums."""
        return sum(head.count for head in self.cut.values())

    @cached_property
    def body(self) -> bytes:
        """What is signed.  Raises UpdateError where Q has overflowed."""
        entries = (
            _FULL_ENTRY.pack(peer, head.count, head.steps, head.digest)
            for peer, head in sorted(self.cut.items())
        )
        state = bytes.fromhex(self.charter.pool.state_id(self.q))
        return b"".join((self.charter.digest, *entries, state))

    def sign(self, identity: Identity, ledger: Ledger) -> Checkpoint:
        """With one more signature, where the signer's own records give the same Q.

        Raises UpdateError where they do not, do not reach the cut, are far ahead of it, or are not
        all there because the signer itself started from a checkpoint.
        """
        if ledger.base is not None:
            raise UpdateError("the signer has not seen the history", "fetch it, then sign")
        if sum(head.count for head in ledger.heads.values()) - self.records > MOST_BEHIND:
            raise UpdateError(
                f"the signer has over {MOST_BEHIND} records that follow the checkpoint",
                "take a newer one",
            )
        if not torch.equal(ledger.q_at(self.cut), self.q):
            raise UpdateError("the checkpoint's Q is not what the signer's own records give")
        signature = sign(identity, _PURPOSE, self.body)
        return replace(self, signatures={**self.signatures, peer_of(identity): signature})

    def signed_by(self, peer: bytes, signature: bytes) -> bool:
        """Whether this is the signature of `peer` on this checkpoint."""
        return holds(peer, signature, _PURPOSE, self.body)

    def verify(self, members: Collection[bytes], threshold: int) -> None:
        """Raise IdentityError unless `threshold` members signed, and every signature holds."""
        for peer, signature in self.signatures.items():
            if peer not in members or not self.signed_by(peer, signature):
                raise IdentityError(f"the signature of {peer.hex()[:16]} on a checkpoint fails")
        if len(self.signatures) < threshold:
            raise IdentityError(
                f"{len(self.signatures)} members signed the checkpoint, {threshold} are required",
                "ask other peers for theirs, or fetch the history",
            )

    @property
    def encoded(self) -> bytes:
        """Raises UpdateError where Q has overflowed."""
        width = _width(self.q)
        head = _HEAD.pack(
            FORMAT, self.charter.run[:_SHORT], width, len(self.cut), len(self.signatures)
        )
        entries = (
            _ENTRY.pack(peer[:_SHORT], each.count, each.steps, each.digest)
            for peer, each in sorted(self.cut.items())
        )
        tail = (peer[:_SHORT] + each for peer, each in sorted(self.signatures.items()))
        return b"".join((head, *entries, _pack(self.q, width), *tail))

    @classmethod
    def decode(cls, data: bytes, charter: Charter, members: Collection[bytes]) -> Checkpoint:
        """Read a checkpoint of this charter; `verify` tells whether to believe it.

        Raises FormatError for what is not one, or speaks of peers that are not among `members`.
        """
        width, entries, numbers, signatures = _split(data, charter)
        names = _Names(members)
        cut = {}
        for short, count, steps, digest in _ENTRY.iter_unpack(entries):
            cut[names.full(short)] = Head(count, steps, digest)
        signed = {names.full(each[:_SHORT]): each[_SHORT:] for each in signatures}
        q = torch.from_numpy(_unpack(numbers, width)).view(charter.pool.zero().shape)
        checkpoint = cls(charter, cut, q, signed)
        plausible = all(0 < h.count <= h.steps <= LAST_STEP for h in cut.values())
        if not plausible or checkpoint.encoded != data:
            raise FormatError("the checkpoint contradicts itself")
        return checkpoint

    def start(self, known: Ledger) -> Ledger:
        """A ledger that counts on from here, with what another holds: its members, proofs, and the
        records that the checkpoint does not stand for."""
        ledger = Ledger(self.charter, Base(self.cut, self.q))
        for item in known.items():
            ledger.add(item.kind, item.data)
        ledger.tally = known.tally.copy()
        return ledger


# --- comparing with the records ----------------------------------------------------------------


class Verdict(Enum):
    """What an audit found."""

    AGREES = "the records give the checkpoint's Q"
    DIFFERS = "the records give another Q: its signers vouched for what is not so"
    OVERTAKEN = "since then a fork was proven within the cut, so the records give another Q"
    INCOMPLETE = "it counts records that nobody has given"


@dataclass(frozen=True)
class Audit:
    """A verdict, and the members whose records led to it."""

    verdict: Verdict
    peers: tuple[bytes, ...] = ()


def audit(ledger: Ledger, checkpoint: Checkpoint) -> Audit:
    """Compare a checkpoint with a ledger that started without one."""
    views = {peer: _view(ledger, peer, head) for peer, head in sorted(checkpoint.cut.items())}
    for verdict in (Verdict.INCOMPLETE, Verdict.OVERTAKEN, Verdict.DIFFERS):
        peers = tuple(peer for peer, view in views.items() if view is verdict)
        if peers:
            return Audit(verdict, peers)
    same = torch.equal(ledger.q_at(checkpoint.cut), checkpoint.q)
    return Audit(Verdict.AGREES if same else Verdict.DIFFERS)


def _view(ledger: Ledger, peer: bytes, head: Head) -> Verdict:
    """What the records of one member say of its place in the cut."""
    chain = ledger.chain(peer)
    if chain.end is not None and chain.end < head.count:
        return Verdict.OVERTAKEN
    if ledger.base is not None or chain.head.count < head.count:
        return Verdict.INCOMPLETE
    return Verdict.AGREES if chain.head_at(head.count) == head else Verdict.DIFFERS


def absorb(ledger: Ledger, history: Ledger, checkpoint: Checkpoint) -> Audit:
    """Put the records in the place of the checkpoint that `ledger` started from.

    `history` is a second ledger, of the same charter, that started without one and has by now
    fetched what the checkpoint sums; it is used up.  Unless records are missing, in which case
    nothing changes, `ledger` is afterwards equal to one that had them all from the beginning,
    whatever the verdict on the checkpoint.
    """
    found = audit(history, checkpoint)
    if found.verdict is not Verdict.INCOMPLETE:
        ledger.rebase(history)
    return found


# --- bytes ---------------------------------------------------------------------------------------


class _Names:
    """Full keys by their first bytes."""

    def __init__(self, members: Collection[bytes]) -> None:
        self._found: dict[bytes, bytes | None] = {}
        for peer in members:
            short = peer[:_SHORT]
            self._found[short] = None if short in self._found else peer

    def full(self, short: bytes) -> bytes:
        peer = self._found.get(short)
        if peer is None:
            raise FormatError(
                f"the checkpoint speaks of {short.hex()}, who is no known member or not only one",
                "fetch the introductions first",
            )
        return peer


def _split(data: bytes, charter: Charter) -> tuple[int, bytes, bytes, list[bytes]]:
    """Width, entries, Q and signatures of a checkpoint of this charter, by their lengths."""
    if data[:1] not in (b"", bytes([FORMAT])):
        raise FormatError(f"the checkpoint has format {data[0]}, this meadow reads {FORMAT}")
    if len(data) < _HEAD.size:
        raise FormatError(f"the checkpoint is cut off after {len(data)} bytes")
    _, run, width, members, signatures = _HEAD.unpack_from(data)
    if run != charter.run[:_SHORT]:
        raise FormatError(f"the checkpoint belongs to run {run.hex()}")
    if not 1 <= width <= 4 or members > MOST_MEMBERS or signatures > MOST_SIGNATURES:
        raise FormatError("the checkpoint's numbers are out of range")
    middle = _HEAD.size + members * _ENTRY.size
    end = middle + charter.pool.zero().numel() * width
    if len(data) != end + signatures * (_SHORT + SIGNATURE):
        raise FormatError(f"the checkpoint has {len(data)} bytes, not what it announces")
    tail = [data[at : at + _SHORT + SIGNATURE] for at in range(end, len(data), _SHORT + SIGNATURE)]
    return width, data[_HEAD.size : middle], data[middle:end], tail


def _width(q: Tensor) -> int:
    """The least number of bytes that hold each number of Q."""
    refuse_overflow(q)
    low, high = int(q.min()), int(q.max())
    return next(w for w in range(1, 5) if -(2 ** (8 * w - 1)) <= low and high < 2 ** (8 * w - 1))


def _pack(q: Tensor, width: int) -> bytes:
    wide = q.contiguous().numpy().astype("<i4").reshape(-1, 1).view(np.uint8)
    return wide[:, :width].tobytes()


def _unpack(data: bytes, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """The inverse of `_pack`: the last byte's sign fills what was left out."""
    narrow = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.empty((len(narrow), 4), np.uint8)
    wide[:, :width] = narrow
    wide[:, width:] = np.where(narrow[:, -1:] > 127, 255, 0)
    return wide.view("<i4").reshape(-1).astype(np.int64)
