"""A request that only one key can have made, that holds for one connection's end, and once.

The participant's identity (Ed25519) signs

    "meadow/request/v1\\0" + canonical JSON of
    [session, sequence, method, path, SHA-256 of the body, SHA-256 of the server's certificate]

with both digests in hexadecimal.  The server gives out sessions and keeps, for each, which sequence
numbers it has seen: no clock is involved.  Because the certificate that the participant saw is
signed too, a request cannot be passed on by whoever stands between them with another one.

Before there is a session, the request that asks for one is signed with session "" and sequence 0.
It can be repeated, and a repeat gains nothing: the session that it opens can be used only by
whoever can sign in it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import threading
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from .canonical_json import canonical
from .errors import IdentityError
from .identity import Identity

SESSION = "Meadow-Session"
SEQUENCE = "Meadow-Sequence"
SIGNATURE = "Meadow-Signature"
WINDOW = 1024  # how far behind the newest request another may arrive

_DOMAIN = b"meadow/request/v1\0"
_SESSION = re.compile("(?:[0-9a-f]{32})?")
_SEQUENCE = re.compile("0|[1-9][0-9]{0,17}")
_SIGNATURE = re.compile("[A-Za-z0-9+/]{86}==")


class Headers(Protocol):
    """What a request's headers need to offer; how names are spelled is the mapping's affair."""

    def get(self, name: str, /) -> str | None: ...


@dataclass(frozen=True)
class Claim:
    """What a request with a good signature says of itself."""

    session: str
    """32 hexadecimal digits, or "" where it asks for a session."""
    sequence: int


class Signer:
    """Signs one participant's requests.  Threads may share one."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._lock = threading.Lock()
        self._session = ""
        self._sequence = 0

    @property
    def session(self) -> str:
        """The session that `headers` signs in; "" before the first."""
        return self._session

    def begin(self, session: str) -> None:
        """Go on in a session that the server has just given out."""
        if not session or not _SESSION.fullmatch(session):
            raise IdentityError(f"the coordinator gave out an impossible session {session[:80]!r}")
        with self._lock:
            self._session, self._sequence = session, 0

    def opening(self, method: str, path: str, body: bytes, certificate: bytes) -> dict[str, str]:
        """The headers of a request that asks for a session; see `headers`."""
        return self._signed(Claim("", 0), method, path, body, certificate)

    def headers(self, method: str, path: str, body: bytes, certificate: bytes) -> dict[str, str]:
        """The headers that make this request mine; the next sequence number is used up.

        `path` is the request target byte for byte, `certificate` (DER) what the server showed on
        the connection that carries the request.  ValueError before `begin`.
        """
        with self._lock:
            if not self._session:
                raise ValueError("no session was begun")
            self._sequence += 1
            claim = Claim(self._session, self._sequence)
        return self._signed(claim, method, path, body, certificate)

    def _signed(
        self, claim: Claim, method: str, path: str, body: bytes, certificate: bytes
    ) -> dict[str, str]:
        statement = _statement(claim, method, path, body, certificate)
        return {
            SESSION: claim.session,
            SEQUENCE: str(claim.sequence),
            SIGNATURE: base64.b64encode(self._identity.private.sign(statement)).decode(),
        }


def check(
    headers: Headers, method: str, path: str, body: bytes, *, certificate: bytes, key: bytes
) -> Claim:
    """What the request claims, once `key` (raw, 32 bytes) is found to have signed all of it.

    `certificate` (DER) is the server's own.  Raises IdentityError for headers that are missing or
    in another form and for a signature that does not hold.  Whether the session is that key's, and
    whether the number is new (`SequenceWindow`), the caller has to ask afterwards, in that order.
    """
    claim, signature = _claim(headers)
    try:
        statement = _statement(claim, method, path, body, certificate)
        Ed25519PublicKey.from_public_bytes(key).verify(signature, statement)
    except (InvalidSignature, ValueError) as error:
        raise IdentityError("the request's signature does not hold") from error
    return claim


class SequenceWindow:
    """Which sequence numbers of one session were seen: the highest, and the 1,024 up to it."""

    def __init__(self) -> None:
        self._highest = 0
        self._seen = 1  # bit i: highest - i was seen; 0 was, since numbers begin with 1

    def admit(self, sequence: int) -> bool:
        """True, once, for each number that is not too old to tell."""
        ahead = sequence - self._highest
        if ahead > 0:
            kept = self._seen << ahead if ahead < WINDOW else 0
            self._seen = (kept | 1) & ((1 << WINDOW) - 1)
            self._highest = sequence
            return True
        bit = 1 << -ahead if -ahead < WINDOW else 0
        if sequence < 1 or not bit or self._seen & bit:
            return False
        self._seen |= bit
        return True


def _statement(claim: Claim, method: str, path: str, body: bytes, certificate: bytes) -> bytes:
    """The bytes that are signed."""
    digests = [hashlib.sha256(data).hexdigest() for data in (body, certificate)]
    return _DOMAIN + canonical([claim.session, claim.sequence, method, path, *digests]).encode()


def _claim(headers: Headers) -> tuple[Claim, bytes]:
    """Claim and signature out of headers that have exactly the form that `Signer` gives them."""
    session, sequence, signature = (headers.get(name) for name in (SESSION, SEQUENCE, SIGNATURE))
    if session is None or sequence is None or signature is None:
        raise IdentityError("the request is not signed", "send it through meadow's forwarder")
    patterns = ((_SESSION, session), (_SEQUENCE, sequence), (_SIGNATURE, signature))
    if not all(pattern.fullmatch(text) for pattern, text in patterns):
        raise IdentityError("the request's signature headers are malformed")
    if (session == "") != (sequence == "0"):
        raise IdentityError("the request's sequence number does not fit its session")
    try:
        return Claim(session, int(sequence)), base64.b64decode(signature, validate=True)
    except (ValueError, binascii.Error) as error:
        raise IdentityError("the request's signature headers are malformed") from error
