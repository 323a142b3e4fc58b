"""The key of Flower's SuperNode: ECDSA on P-384, made on the participant's machine.

Flower asks for it; who a participant is, its identity says.  It is kept in OpenSSH's format, as
flower-supernode reads it.  What a SuperNode signs is the text of a time stamp alone, so that the
forwarder, which holds the key too, can put the coordinator's time in place of a wrong clock's.
"""

from __future__ import annotations

import base64
import binascii
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from ..errors import IdentityError
from ..fleet_routes import PUBLIC_KEY, SIGNATURE, TIMESTAMP, timestamp
from ..store import Disk, explained

FRESH_SECONDS = 305.0
"""How old a signature may be; Flower's own limit."""


@dataclass(frozen=True)
class FlowerKey:
    """One SuperNode's key."""

    private: EllipticCurvePrivateKey

    @classmethod
    def load_or_create(cls, path: Path, disk: Disk | None = None) -> FlowerKey:
        """The key at `path`, made on first use and readable to its owner alone.

        Raises IdentityError for a file that is damaged, of another kind or open to others.
        """
        if not path.exists():
            (disk or Disk()).write(path, _openssh(generate_private_key(SECP384R1())), 0o600)
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> FlowerKey:
        """The key at `path`; errors as above."""
        with explained(path):
            mode, data = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
        if mode & 0o077:
            raise IdentityError(
                f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}"
            )
        try:
            key = load_ssh_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise IdentityError(f"{path} holds no readable private key", "join again") from error
        if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
            raise IdentityError(f"{path} is not an ECDSA key on P-384", "join again")
        return cls(key)

    @property
    def public_pem(self) -> str:
        """The public key, as it is enrolled."""
        public = self.private.public_key()
        return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def headers(self, now: float) -> dict[str, str]:
        """A SuperNode's authentication at a time (Unix seconds)."""
        text = timestamp(now)
        signature = self.private.sign(text.encode(), ECDSA(SHA256()))
        return {
            PUBLIC_KEY: self._header,
            TIMESTAMP: text,
            SIGNATURE: base64.b64encode(signature).decode(),
        }

    def made(self, headers: Mapping[str, str], now: float) -> bool:
        """Whether this key's holder, on this machine, made a request just now.

        `now` is this machine's own clock, by which the SuperNode signed as well.
        """
        text = headers.get(TIMESTAMP, "")
        try:
            signature = base64.b64decode(headers.get(SIGNATURE, ""), validate=True)
            self.private.public_key().verify(signature, text.encode(), ECDSA(SHA256()))
            age = now - datetime.fromisoformat(text).timestamp()
        except (InvalidSignature, binascii.Error, ValueError):
            return False
        return headers.get(PUBLIC_KEY) == self._header and abs(age) < FRESH_SECONDS

    @property
    def _header(self) -> str:
        return base64.b64encode(self.public_pem.encode()).decode()


def _openssh(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
