"""A peer's signed record of its steps: one byte each, and what binds them to its chain.

Layout, little-endian; a record of 200 steps has 377 bytes:

    u8 format = 1 | 32 run | 32 peer | u32 sequence | 32 digest of the peer's previous record
    u64 first step | u8 shift | u8 quantisation of the peer's base | u16 count
    count signed bytes | 64 signature of all before it

The byte q of step t moves Q, at the direction that run, peer and t name, by -(q << shift).  A zero
is a step whose loss was not finite, or whose gradient rounded to nothing.

A record is named by the digest of its body: a signature can be made anew for the same body, and
must not make a second record of it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import RecordError
from ..identity import Identity
from ..peft_adapters.pool import directions, fold
from .peer_keys import KEY, SIGNATURE, holds, peer_of, sign

FORMAT = 1
MOST_STEPS = 1000  # in one record
MOST_SHIFT = 16
LAST_STEP = 2**24  # of one peer: with the bounds above and 4,096 members int64 cannot wrap
START = bytes(32)  # in place of a digest, before the first record

_PURPOSE = b"meadow/record/v1\0"
_HEAD = struct.Struct("<B32s32sI32sQBBH")
_OUT_OF_RANGE = b"\x80"  # -128, which has no counterpart

SMALLEST = _HEAD.size + 1 + SIGNATURE
LARGEST = _HEAD.size + MOST_STEPS + SIGNATURE


class Reason(StrEnum):
    """Why something of a peer was refused, as it is counted."""

    VERSION = "another format version"
    RUN = "another run"
    SIZE = "truncated or too large"
    RANGE = "out of range"
    SIGNATURE = "bad signature"
    STRANGER = "unknown peer"
    AHEAD = "too far ahead"
    EXCLUDED = "after a proven fork"
    PAST = "before the checkpoint"
    FULL = "too many members"
    PROOF = "not a proof"
    CHARTER = "another charter"
    MALFORMED = "malformed message"
    WITHHELD = "announced and not given"


class Quantisation(IntEnum):
    """To what the peer's own base was quantised; recorded, it changes no number of Q."""

    NONE = 0
    EIGHT_BIT = 1
    FOUR_BIT = 2


@dataclass(frozen=True)
class Head:
    """Where a peer's chain ends: what its next record has to continue."""

    count: int = 0  # records, so the next one's sequence
    steps: int = 0  # so the next one's first step
    digest: bytes = START  # of the last record

    def continued_by(self, record: Record) -> bool:
        link = (record.sequence, record.first_step, record.previous)
        return link == (self.count, self.steps, self.digest)


@dataclass(frozen=True)
class Record:
    """One signed record; `sign` and `decode` are the ways to one whose bounds were checked."""

    run: bytes
    peer: bytes
    sequence: int
    previous: bytes
    first_step: int
    shift: int
    quantisation: int
    steps: bytes  # one signed byte each
    signature: bytes = b""

    @classmethod
    def sign(
        cls,
        identity: Identity,
        run: bytes,
        head: Head,
        steps: bytes,
        shift: int,
        quantisation: Quantisation = Quantisation.NONE,
    ) -> Record:
        """The record with which the holder of `identity` continues its chain after `head`.

        Raises RecordError where a field is out of its bounds.
        """
        link = (head.count, head.digest, head.steps)
        unsigned = cls(run, peer_of(identity), *link, shift, quantisation, steps)
        unsigned._check(MOST_SHIFT)
        signature = sign(identity, _PURPOSE, unsigned.body)
        return cls(run, unsigned.peer, *link, shift, quantisation, steps, signature)

    @classmethod
    def decode(cls, data: bytes, run: bytes, largest_shift: int = MOST_SHIFT) -> Record:
        """Read a record of `run`; everything is checked but the signature (see `verify`).

        Raises RecordError, with the reason, for what is not one.
        """
        if data[:1] not in (b"", bytes([FORMAT])):
            raise _refuse(Reason.VERSION, f"has format {data[0]}, this meadow reads {FORMAT}")
        if not SMALLEST <= len(data) <= LARGEST:
            raise _refuse(Reason.SIZE, f"has {len(data)} bytes, not {SMALLEST} to {LARGEST}")
        if len(data) != announced(data):
            raise _refuse(Reason.SIZE, f"announces {announced(data)} bytes and has {len(data)}")
        _, own, peer, sequence, previous, first, shift, quantisation, _ = _HEAD.unpack_from(data)
        steps, signature = data[_HEAD.size : -SIGNATURE], data[-SIGNATURE:]
        record = cls(own, peer, sequence, previous, first, shift, quantisation, steps, signature)
        if record.run != run:
            raise _refuse(Reason.RUN, f"belongs to run {record.run.hex()[:16]}")
        record._check(largest_shift)
        return record

    @cached_property
    def body(self) -> bytes:
        """All that is signed."""
        head = _HEAD.pack(
            FORMAT,
            self.run,
            self.peer,
            self.sequence,
            self.previous,
            self.first_step,
            self.shift,
            self.quantisation,
            len(self.steps),
        )
        return head + self.steps

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the body."""
        return hashlib.sha256(self.body).digest()

    @property
    def encoded(self) -> bytes:
        return self.body + self.signature

    @property
    def head(self) -> Head:
        """The head of a chain that ends with this record."""
        return Head(self.sequence + 1, self.first_step + len(self.steps), self.digest)

    @property
    def increments(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """What each step adds to Q: int64 (count,)."""
        return -(np.frombuffer(self.steps, np.int8).astype(np.int64) << self.shift)

    def fold_into(self, q: Tensor, sign: int = 1) -> None:
        """Add this record to Q (cores, r, r), in place; with sign -1 take it out again."""
        count, size = len(self.steps), q.shape[1] * q.shape[2]
        k = directions(self.run.hex(), self.peer, self.first_step, count, size)
        fold(q, k, sign * self.increments)

    def verify(self) -> None:
        """Raise RecordError unless the peer it names signed it."""
        if not holds(self.peer, self.signature, _PURPOSE, self.body):
            raise _refuse(Reason.SIGNATURE, f"was not signed by {self.peer.hex()[:16]}")

    def _check(self, largest_shift: int) -> None:
        """Raise RecordError where a field, or two together, cannot be an honest peer's."""
        bounds = {
            "shift": (self.shift, 0, largest_shift),
            "quantisation": (self.quantisation, 0, max(Quantisation)),
            "number of steps": (len(self.steps), 1, MOST_STEPS),
            "last step": (self.first_step + len(self.steps), 1, LAST_STEP),
            # every record before it had from one to MOST_STEPS steps
            "first step": (self.first_step, self.sequence, self.sequence * MOST_STEPS),
        }
        for name, (value, least, most) in bounds.items():
            if not least <= value <= most:
                raise _refuse(Reason.RANGE, f"has a {name} of {value}, not {least} to {most}")
        if _OUT_OF_RANGE in self.steps:
            raise _refuse(Reason.RANGE, "has a step of -128, not -127 to 127")
        if (self.sequence == 0) != (self.previous == START) or len(self.peer) != KEY:
            raise _refuse(Reason.RANGE, "is first in its chain and names one before it, or neither")


def announced(data: bytes) -> int:
    """How many bytes the record at the start of `data` says that it has."""
    count = int.from_bytes(data[_HEAD.size - 2 : _HEAD.size], "little")
    return _HEAD.size + count + SIGNATURE


def _refuse(reason: Reason, what: str) -> RecordError:
    return RecordError(reason, f"a record {what}", _HINTS.get(reason, ""))


_HINTS = {
    Reason.VERSION: "install the same version of meadow on all peers",
    Reason.RUN: "give all peers the same charter file",
    Reason.STRANGER: "one of the run's members has to introduce it",
}
