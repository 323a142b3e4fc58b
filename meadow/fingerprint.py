"""A public key in a form that two people can read to each other over the telephone."""

from __future__ import annotations

import hashlib

_BYTES = 16  # 128 bits: finding a second key with this fingerprint takes 2^128 tries


def fingerprint(key: bytes) -> str:
    """The first 16 bytes of the SHA-256 of a raw public key, as "ab12 cd34 ..."; "" of no key."""
    if not key:
        return ""
    digits = hashlib.sha256(key).digest()[:_BYTES].hex()
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))
