"""Who made this: Ed25519 keys (RFC 8032), and signatures in DSSE envelopes.

DSSE (https://github.com/secure-systems-lab/dsse, v1) signs type and body together, so that bytes
signed as one thing never pass as another.  An envelope is JSON:

    {"payload": base64(body), "payloadType": type, "signatures": [{"keyid": id, "sig": base64}]}

A key's id is the SHA-256, in hexadecimal, of its 32 raw public bytes.  A signature says who vouches
for bytes, never that what they say is true; whom to trust is the verifier's list.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from .errors import FormatError, IdentityError, StorageError
from .store import Disk, explained

HOME = "MEADOW_HOME"
"""The environment variable that names the folder of a user's own key; default ~/.meadow."""

Envelope = dict[str, Any]  # JSON

_OWNER_ONLY = 0o600
_MOST_SIGNATURES = 64


def default_path() -> Path:
    """Where this user's key is.  Raises IdentityError where the user has no home."""
    if folder := os.environ.get(HOME):
        return Path(folder).expanduser() / "identity.pem"
    try:
        return Path.home() / ".meadow" / "identity.pem"
    except RuntimeError as error:
        raise IdentityError("this user has no home folder for a key", f"set {HOME}") from error


def key_id(public: Ed25519PublicKey) -> str:
    """SHA-256, in hexadecimal, of the raw public key."""
    return hashlib.sha256(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


@dataclass(frozen=True)
class Identity:
    """A private key that signs."""

    private: Ed25519PrivateKey

    @classmethod
    def load_or_create(cls, path: Path, disk: Disk | None = None) -> Identity:
        """The key at `path` (PKCS #8, PEM), made on first use and readable to its owner alone.

        Raises IdentityError for a file that is damaged, holds another kind of key or is open to
        others, and StorageError where none can be written.
        """
        disk = disk or Disk()
        if not path.exists():
            disk.folder(path.parent)
            with _alone(path):
                if not path.exists():
                    disk.write(path, _pem(Ed25519PrivateKey.generate()), _OWNER_ONLY)
        return cls(_load(path))

    @property
    def public(self) -> Ed25519PublicKey:
        return self.private.public_key()

    @property
    def key_id(self) -> str:
        return key_id(self.public)

    @property
    def public_pem(self) -> bytes:
        """The public key as others store it; `trust` reads it."""
        return self.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def private_pem(self) -> bytes:
        """The key itself, as `load_or_create` reads it: for its owner's files alone."""
        return _pem(self.private)

    def sign(self, payload_type: str, payload: bytes) -> Envelope:
        """A DSSE envelope around `payload`; the same bytes always give the same envelope."""
        signature = self.private.sign(pae(payload_type, payload))
        return {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"keyid": self.key_id, "sig": base64.b64encode(signature).decode()}],
        }


def own_identity() -> Identity:
    """This user's key, made on first use.  Raises IdentityError where it cannot be had."""
    try:
        return Identity.load_or_create(default_path())
    except StorageError as error:
        raise IdentityError(error.message, f"set {HOME} to a folder that can be written") from error


def trust(*pems: bytes) -> dict[str, Ed25519PublicKey]:
    """Public keys (PEM) by their ids, as `verify` wants them.  IdentityError for another kind."""
    keys = {}
    for pem in pems:
        try:
            public = load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise IdentityError("a trusted key is not a readable PEM public key") from error
        if not isinstance(public, Ed25519PublicKey):
            raise IdentityError("a trusted key is not an Ed25519 key")
        keys[key_id(public)] = public
    return keys


def verify(
    envelope: object, trusted: Mapping[str, Ed25519PublicKey], *, payload_type: str
) -> bytes:
    """The payload of an envelope that at least one trusted key signed as `payload_type`.

    Raises FormatError for what is no such envelope, IdentityError where no trusted key signed it
    or a trusted key's signature does not hold.
    """
    payload, signatures = _open(envelope, payload_type)
    known = [(keyid, signature) for keyid, signature in signatures if keyid in trusted]
    if not known:
        signers = ", ".join(repr(keyid[:16]) for keyid, _ in signatures[:4]) or "nobody"
        raise IdentityError(f"signed by {signers}, by no key that is trusted")
    for keyid, signature in known:
        try:
            trusted[keyid].verify(signature, pae(payload_type, payload))
        except InvalidSignature as error:
            raise IdentityError(
                f"the signature of key {keyid[:16]} does not hold", "type or payload were changed"
            ) from error
    return payload


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: "DSSEv1", length and type, length and body."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


# --- envelopes ---------------------------------------------------------------------------------


def _open(envelope: object, payload_type: str) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Payload and (key id, signature) pairs; their form checked, their truth not."""
    match envelope:
        case {"payload": str(body), "payloadType": str(kind), "signatures": [*entries]}:
            if kind != payload_type:
                raise FormatError(f"the envelope holds {kind[:80]!r}, expected {payload_type!r}")
            if len(entries) <= _MOST_SIGNATURES:
                return _unbase64(body), [_signature(entry) for entry in entries]
    raise FormatError("this is not a signed envelope (DSSE)")


def _signature(entry: object) -> tuple[str, bytes]:
    match entry:
        case {"keyid": str(keyid), "sig": str(signature)}:
            return keyid, _unbase64(signature)
    raise FormatError("the envelope has a signature without key id")


def _unbase64(text: str) -> bytes:
    """Standard or URL-safe base64: DSSE lets a signer choose."""
    try:
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (ValueError, binascii.Error) as error:
        raise FormatError("the envelope is not in base64") from error


# --- key files ---------------------------------------------------------------------------------


def _pem(private: Ed25519PrivateKey) -> bytes:
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load(path: Path) -> Ed25519PrivateKey:
    with explained(path):
        mode = stat.S_IMODE(path.stat().st_mode)
        pem = path.read_bytes()
    if mode & 0o077:
        raise IdentityError(
            f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}, or delete it"
        )
    try:
        private = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(
            f"{path} holds no readable private key", "restore it, or delete it for a new identity"
        ) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise IdentityError(f"{path} is not an Ed25519 key", "delete it for a new identity")
    return private


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time: two that make a key at once must end with the same one."""
    lock = path.with_name(path.name + ".lock")
    with explained(lock):
        file = open(lock, "ab")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
