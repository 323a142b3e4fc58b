"""How peers sign what they gossip: raw Ed25519 (RFC 8032) over a purpose and the bytes.

A peer is named by its public key, 32 bytes.  The purpose, which ends in a zero byte, comes first
in the signed text, so that bytes signed as one thing never pass as another.
"""

from __future__ import annotations

from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ..identity import Identity

KEY = 32  # bytes of a public key
SIGNATURE = 64  # bytes


def peer_of(identity: Identity) -> bytes:
    """The name of the peer that holds this key."""
    return identity.public.public_bytes(Encoding.Raw, PublicFormat.Raw)


def sign(identity: Identity, purpose: bytes, body: bytes) -> bytes:
    """64 bytes; the same key, purpose and body always give the same."""
    return identity.private.sign(purpose + body)


def holds(peer: bytes, signature: bytes, purpose: bytes, body: bytes) -> bool:
    """Whether `peer` signed `body` for `purpose`."""
    try:
        _public(peer).verify(signature, purpose + body)
    except (InvalidSignature, ValueError):  # ValueError: no point of the curve
        return False
    return True


@lru_cache(maxsize=8192)
def _public(peer: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(peer)
