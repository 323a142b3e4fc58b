"""What the peers of a run agree on before its first step, and who they are.

A charter is canonical JSON in a DSSE envelope that one of its founders signed.  Peers hold it as a
file; all that they sign names its run, and every message its digest, so that peers with another
base, pool or scale part before any work.  Later members come by introduction: see introductions.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ..canonical_json import canonical
from ..errors import FormatError, IdentityError
from ..identity import Identity, key_id, verify
from ..peft_adapters.pool import Pool
from .peer_keys import KEY, peer_of
from .records import MOST_SHIFT

FORMAT = 1
PAYLOAD = "application/vnd.meadow.charter+json"
MOST_MEMBERS = 4096
LARGEST = 2**24  # bytes of a charter file
LARGEST_CERTIFICATE = 2048  # bytes
LARGEST_ADDRESS = 255  # characters

_EXPONENTS = range(-60, 61)
_ADDRESS = re.compile(r"[!-~]+:[0-9]{1,5}")
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Member:
    """A peer as the others know it."""

    peer: bytes  # its raw Ed25519 public key
    certificate: bytes  # DER, the one that it shows over TLS
    address: str = ""  # "host:port"; empty for a peer that only calls others

    def __post_init__(self) -> None:
        """Raises FormatError for what cannot be a member."""
        if len(self.peer) != KEY:
            raise FormatError(f"a member's key has {len(self.peer)} bytes, not {KEY}")
        if len(self.certificate) > LARGEST_CERTIFICATE:
            raise FormatError(f"a member's certificate has {len(self.certificate)} bytes")
        if self.address and not _is_address(self.address):
            raise FormatError(f"{self.address[:80]!r} is no address", "write host:port")

    @property
    def reachable(self) -> bool:
        return bool(self.address)

    def to_json(self) -> dict[str, str]:
        certificate = base64.b64encode(self.certificate).decode()
        return {"key": self.peer.hex(), "certificate": certificate, "address": self.address}

    @classmethod
    def from_json(cls, fields: Any) -> Member:
        certificate = base64.b64decode(fields["certificate"], validate=True)
        return cls(bytes.fromhex(fields["key"]), certificate, str(fields["address"]))


@dataclass(frozen=True)
class Charter:
    """The terms of one run."""

    pool: Pool
    founders: tuple[Member, ...]
    epsilon_exponent: int = -10  # losses are measured at W +- 2^epsilon_exponent u v^T
    gradient_exponent: int = 0  # a byte of 1 at shift 0 is a projected gradient of 2^this
    largest_shift: int = MOST_SHIFT

    def __post_init__(self) -> None:
        """Raises FormatError for terms that no run can have."""
        peers = [member.peer for member in self.founders]
        if not _DIGEST.fullmatch(self.pool.run_id) or not _DIGEST.fullmatch(self.pool.base_digest):
            raise FormatError("a charter's run id and base digest are 64 hexadecimal digits each")
        if not 0 < len(peers) <= MOST_MEMBERS or peers != sorted(set(peers)):
            raise FormatError("a charter's founders are sorted by key, each named once")
        if not 0 <= self.largest_shift <= MOST_SHIFT:
            raise FormatError(f"a charter's largest shift is {self.largest_shift}, not 0 to 16")
        if not {self.epsilon_exponent, self.gradient_exponent} <= set(_EXPONENTS):
            raise FormatError("a charter's exponents are -60 to 60")

    @property
    def run(self) -> bytes:
        """The run's id, 32 bytes."""
        return bytes.fromhex(self.pool.run_id)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the terms: peers with equal digests can work together."""
        return hashlib.sha256(canonical(self.to_json()).encode()).digest()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "pool": self.pool.to_json(),
            "founders": [member.to_json() for member in self.founders],
            "epsilon_exponent": self.epsilon_exponent,
            "gradient_exponent": self.gradient_exponent,
            "largest_shift": self.largest_shift,
        }

    def sign(self, founder: Identity) -> bytes:
        """The charter file.  Raises IdentityError where the signer is not among the founders."""
        if peer_of(founder) not in {member.peer for member in self.founders}:
            raise IdentityError("a charter is signed by one of its founders")
        envelope = founder.sign(PAYLOAD, canonical(self.to_json()).encode())
        return canonical(envelope).encode()

    @classmethod
    def read(cls, data: bytes) -> Charter:
        """The terms of a charter file, once a founder's signature on them holds.

        Raises FormatError for what is not a charter of this format, IdentityError where no founder
        signed it.  Who the founders are is for the reader to know: the file came from one of them.
        """
        charter = cls._parse(data)
        publics = map(Ed25519PublicKey.from_public_bytes, (m.peer for m in charter.founders))
        trusted = {key_id(public): public for public in publics}
        verify(json.loads(data), trusted, payload_type=PAYLOAD)
        return charter

    @classmethod
    def _parse(cls, data: bytes) -> Charter:
        """Terms that nobody's signature vouches for yet."""
        if len(data) > LARGEST:
            raise FormatError(f"the charter has {len(data)} bytes, at most {LARGEST} are read")
        try:
            payload = base64.b64decode(json.loads(data)["payload"])
            fields = json.loads(payload)
            if fields["format"] != FORMAT:
                raise FormatError(
                    f"the charter has format {str(fields['format'])[:40]!r},"
                    f" this meadow reads {FORMAT}",
                    "install the same version of meadow on all peers",
                )
            charter = cls._from_json(fields)
        except (ValueError, TypeError, KeyError, RecursionError, binascii.Error) as error:
            raise FormatError(f"this is not a charter: {str(error)[:80]}") from error
        if canonical(charter.to_json()).encode() != payload:
            raise FormatError("the charter is not in canonical form")
        return charter

    @classmethod
    def _from_json(cls, fields: Any) -> Charter:
        return cls(
            Pool.from_json(dict(fields["pool"])),
            tuple(map(Member.from_json, fields["founders"])),
            int(fields["epsilon_exponent"]),
            int(fields["gradient_exponent"]),
            int(fields["largest_shift"]),
        )


def _is_address(text: str) -> bool:
    fits = len(text) <= LARGEST_ADDRESS and _ADDRESS.fullmatch(text)
    return bool(fits) and 0 < int(text.rpartition(":")[2]) < 2**16
