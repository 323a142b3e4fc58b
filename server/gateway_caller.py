"""Who makes a request: the participant whose certificate the connection showed.

The certificate names a key, and the roster, asked anew each time, says whose key it is and whether
that participant may speak.  A certificate that is not of our authority ends the connection before
any request is read.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import lru_cache

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from .gateway_refusal import Refusal
from .participant import Participant
from .roster import Roster

_JOIN = "`meadow client join` with an invitation"
_WAITING = {
    "invited": "has not enrolled",
    "pending": "waits for the operator's approval",
    "suspended": "is suspended by the operator",
    "revoked": "was revoked by the operator",
}


@dataclass(frozen=True)
class Holder:
    """Who holds the key of a certificate of ours."""

    key: bytes
    """Raw Ed25519 public key."""
    until: float
    """Unix seconds."""


def holder_of(request: web.BaseRequest, now: float) -> Holder:
    """Whose certificate the connection showed.  Refusal for none, and for one that has ended
    while the connection lasts."""
    tls = request.get_extra_info("ssl_object")
    der = tls.getpeercert(binary_form=True) if isinstance(tls, ssl.SSLObject) else None
    if not der:
        raise Refusal(403, "this needs a participant's certificate", _JOIN)
    holder = _read(der)
    if now >= holder.until:
        raise Refusal(403, "the participant's certificate has expired", "connect anew")
    return holder


def approved(roster: Roster, key: bytes) -> Participant:
    """The participant of a key.  Refusal unless it may take part now."""
    known = not_barred(roster, key)
    if known is None:
        raise Refusal(403, "nobody here has this key", _JOIN)
    return known


def not_barred(roster: Roster, key: bytes) -> Participant | None:
    """The participant of a key, None where it is nobody's any longer.  Refusal for one that the
    operator has not let in, or has shut out."""
    known = roster.by_key(key)
    if known is not None and known.status != "approved":
        raise Refusal(403, f"{known.name} {_WAITING[known.status]}", "ask the operator")
    return known


@lru_cache(1024)
def _read(der: bytes) -> Holder:
    certificate = x509.load_der_x509_certificate(der)
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise Refusal(403, "the certificate is not for an Ed25519 key", _JOIN)
    return Holder(key.public_bytes_raw(), certificate.not_valid_after_utc.timestamp())
