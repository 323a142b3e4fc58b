"""Keys, a clock that stands still, and participants at each point of their enrolment."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurve,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from meadow.identity import Identity
from meadow.server.roster import Participant, Roster

DAY = 86_400.0
NOON = 1_800_000_000.0  # a moment in 2027


class Clock:
    """Says what it was set to."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def new_identity() -> Identity:
    return Identity(Ed25519PrivateKey.generate())


def new_key() -> bytes:
    return new_identity().public.public_bytes_raw()


def new_flower_key(curve: EllipticCurve | None = None) -> str:
    public = generate_private_key(curve or SECP384R1()).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def enrolled(roster: Roster, name: str) -> Participant:
    """A participant that waits for approval."""
    return roster.enrol(roster.invite(name, DAY), new_key(), new_flower_key())


def approved(roster: Roster, name: str, node_id: int = 1) -> Participant:
    enrolled(roster, name)
    return roster.approve(name, node_id)
