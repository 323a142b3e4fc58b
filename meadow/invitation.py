"""What an operator hands to a participant: where the coordinator is, how to know it, a token.

An invitation travels as one word, so that it can be pasted into a command:

    "meadow1:" + base64url(canonical JSON + first 4 bytes of its SHA-256), without padding

The checksum finds a paste that was cut off; it protects from nobody.  Whoever holds the word may
enrol once, before it expires, under the name in it: it is to be sent as a password would be.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from dataclasses import asdict, dataclass

from cryptography import x509

from .address import split_address
from .canonical_json import Json, canonical
from .errors import FormatError, InvitationError
from .participant_name import normal_name

PREFIX = "meadow1:"
TOKEN_BYTES = 16
LARGEST = 16 * 2**10  # characters; a usual one has about 1,000

_CHECKSUM_BYTES = 4
_MOST_ADDRESSES = 16
_LATEST = 2**53  # seconds; every JSON reader keeps it exactly
_AGAIN = "copy the whole invitation, or ask the operator for a new one"


@dataclass(frozen=True)
class Invitation:
    """One participant's invitation.  Making one raises InvitationError for what cannot be."""

    name: str
    """What the operator calls the participant."""
    addresses: tuple[str, ...]
    """"host:port" of the gateway, each to be tried in turn."""
    authority: bytes
    """The coordinator's own authority (a certificate, DER); b"" = those the system trusts."""
    token: bytes
    """16 random bytes, good for one enrolment."""
    expires: int
    """Unix seconds by the coordinator's clock, which alone decides."""

    def __post_init__(self) -> None:
        if normal_name(self.name) != self.name:
            raise InvitationError(f"the name {self.name!r} is not in Unicode's normal form C")
        if not 1 <= len(self.addresses) <= _MOST_ADDRESSES:
            raise InvitationError(
                f"an invitation names 1 to {_MOST_ADDRESSES} addresses, not {len(self.addresses)}"
            )
        for address in self.addresses:
            _check_address(address)
        if self.authority:
            _check_certificate(self.authority)
        if len(self.token) != TOKEN_BYTES or not 0 <= self.expires <= _LATEST:
            raise InvitationError("the invitation's token or expiry cannot be", _AGAIN)

    def text(self) -> str:
        """The invitation as one word; the same invitation always gives the same word."""
        fields = asdict(self) | {"authority": _armour(self.authority), "token": self.token.hex()}
        body = canonical(fields).encode()
        return PREFIX + _armour(body + _checksum(body))

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """The inverse of `text`; white space, which mail programs add, does not matter.

        Raises InvitationError, which says whether the word is cut off, of another version of
        meadow, or no invitation at all.
        """
        word = "".join(text.split())
        body = _body(word)
        try:
            invitation = cls(**_fields(json.loads(body)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvitationError("the invitation cannot be read", _AGAIN) from error
        if invitation.text() != word:
            raise InvitationError("the invitation is not in the form that meadow writes", _AGAIN)
        return invitation


def _check_address(address: str) -> None:
    try:
        split_address(address)
    except FormatError as error:
        raise InvitationError(error.message, error.hint) from error


def _check_certificate(der: bytes) -> None:
    try:
        x509.load_der_x509_certificate(der)
    except ValueError as error:
        raise InvitationError("the invitation's authority is no certificate", _AGAIN) from error


def _body(word: str) -> bytes:
    """The JSON in an invitation, once its checksum holds."""
    if not word.startswith(PREFIX):
        if re.match(r"meadow\d+:", word):
            raise InvitationError(
                "this invitation is of another version of meadow",
                "install the version that the coordinator runs",
            )
        raise InvitationError("this is not an invitation", f'it begins with "{PREFIX}"')
    if len(word) > LARGEST:
        raise InvitationError(f"this is too long for an invitation: {len(word)} characters")
    try:
        data = _unarmour(word.removeprefix(PREFIX))
    except (ValueError, binascii.Error):
        data = b""  # cut off within a group of four, or with a letter that cannot be
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if not body or checksum != _checksum(body):
        raise InvitationError("the invitation is cut off or was changed on its way", _AGAIN)
    return body


def _fields(entry: Json) -> dict[str, Json]:
    """The arguments of an Invitation; ValueError where a value has another type."""
    match entry:
        case {
            "name": str(name),
            "addresses": [*addresses],
            "authority": str(authority),
            "token": str(token),
            "expires": int(expires),
        } if (
            len(entry) == 5
            and all(isinstance(address, str) for address in addresses)
            and not isinstance(expires, bool)
        ):
            return {
                "name": name,
                "addresses": tuple(addresses),
                "authority": _unarmour(authority),
                "token": bytes.fromhex(token),
                "expires": expires,
            }
    raise ValueError("other fields than an invitation has")


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]


def _armour(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _unarmour(text: str) -> bytes:
    plain = text.translate(str.maketrans("-_", "+/"))
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
