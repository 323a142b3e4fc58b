"""How a run's membership grows: a peer asks, a member introduces it, and the word spreads.

The joiner signs what it wants to be known by; the member signs that.  So nobody can introduce a
peer under a certificate or an address that the peer did not choose.  Members are a set that only
grows: the charter's founders and whoever a member introduced.

    request       u8 format = 1 | 32 run | 32 peer | u16 length, certificate | u8 length, address
                  64 the joiner's signature
    introduction  request | 32 introducer | 64 the introducer's signature of all before it
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..errors import FormatError, RecordError
from ..identity import Identity
from .charter import LARGEST_ADDRESS, LARGEST_CERTIFICATE, Member
from .peer_keys import KEY, SIGNATURE, holds, peer_of, sign
from .records import Reason

FORMAT = 1
_REQUEST = b"meadow/join-request/v1\0"
_INTRODUCTION = b"meadow/introduction/v1\0"
_FIXED = 1 + KEY + KEY  # format, run, peer
_TAIL = KEY + SIGNATURE
_SMALLEST = _FIXED + 2 + 1 + SIGNATURE

LARGEST = _FIXED + 2 + LARGEST_CERTIFICATE + 1 + LARGEST_ADDRESS + SIGNATURE + _TAIL


@dataclass(frozen=True)
class JoinRequest:
    """A peer that wants to be a member, in its own words."""

    run: bytes
    member: Member
    signature: bytes = b""

    @classmethod
    def sign(cls, identity: Identity, run: bytes, certificate: bytes, address: str) -> JoinRequest:
        """Raises FormatError for a certificate or an address that cannot be one."""
        unsigned = cls(run, Member(peer_of(identity), certificate, address))
        return cls(run, unsigned.member, sign(identity, _REQUEST, unsigned.body))

    @cached_property
    def body(self) -> bytes:
        member, address = self.member, self.member.address.encode()
        return b"".join(
            (
                bytes([FORMAT]) + self.run + member.peer,
                len(member.certificate).to_bytes(2, "little") + member.certificate,
                bytes([len(address)]) + address,
            )
        )

    @property
    def encoded(self) -> bytes:
        return self.body + self.signature

    @classmethod
    def decode(cls, data: bytes, run: bytes) -> JoinRequest:
        """Read a request to join `run` and check its signature.  Raises RecordError."""
        if data[:1] not in (b"", bytes([FORMAT])):
            raise _refuse(Reason.VERSION, f"has format {data[0]}, this meadow reads {FORMAT}")
        if len(data) < _SMALLEST:
            raise _refuse(Reason.SIZE, f"has {len(data)} bytes, not at least {_SMALLEST}")
        request = cls._parse(data)
        if request.encoded != data:
            raise _refuse(Reason.SIZE, f"contradicts itself about its {len(data)} bytes")
        if request.run != run:
            raise _refuse(Reason.RUN, f"belongs to run {request.run.hex()[:16]}")
        if not holds(request.member.peer, request.signature, _REQUEST, request.body):
            raise _refuse(Reason.SIGNATURE, "was not signed by the peer that it names")
        return request

    @classmethod
    def _parse(cls, data: bytes) -> JoinRequest:
        """Lenient about lengths: `decode` compares with what it would encode."""
        middle = _FIXED + 2 + int.from_bytes(data[_FIXED : _FIXED + 2], "little")
        certificate = data[_FIXED + 2 : middle]
        end = middle + 1 + int.from_bytes(data[middle : middle + 1], "little")
        try:
            address = data[middle + 1 : end].decode("ascii")
            member = Member(data[1 + KEY : _FIXED], certificate, address)
        except (FormatError, UnicodeDecodeError) as error:
            raise _refuse(Reason.RANGE, f"names no member: {error}") from error
        return cls(data[1 : 1 + KEY], member, data[end : end + SIGNATURE])


@dataclass(frozen=True)
class Introduction:
    """A member's word that a peer belongs to the run."""

    request: JoinRequest
    introducer: bytes
    signature: bytes

    @classmethod
    def sign(cls, introducer: Identity, request: JoinRequest) -> Introduction:
        peer = peer_of(introducer)
        body = request.encoded + peer
        return cls(request, peer, sign(introducer, _INTRODUCTION, body))

    @property
    def member(self) -> Member:
        return self.request.member

    @property
    def encoded(self) -> bytes:
        return self.request.encoded + self.introducer + self.signature

    @classmethod
    def decode(cls, data: bytes, run: bytes) -> Introduction:
        """Read an introduction to `run` and check both signatures.

        Whether the introducer is a member is the ledger's to know.  Raises RecordError.
        """
        if len(data) > LARGEST:
            raise _refuse(Reason.SIZE, f"has {len(data)} bytes, at most {LARGEST} are read")
        request = JoinRequest.decode(data[:-_TAIL], run)
        introduction = cls(request, data[-_TAIL:-SIGNATURE], data[-SIGNATURE:])
        if not holds(
            introduction.introducer, introduction.signature, _INTRODUCTION, data[:-SIGNATURE]
        ):
            raise _refuse(Reason.SIGNATURE, "was not signed by the introducer that it names")
        return introduction


def _refuse(reason: Reason, what: str) -> RecordError:
    return RecordError(reason, f"a request to join {what}")
