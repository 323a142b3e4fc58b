"""How a participant asks for a certificate of its identity key (PKCS #10, RFC 2986).

Of a request only its key counts, and that whoever made it holds the key.  Names and extensions in
it are never read: what a certificate says is its authority's to decide.
"""

from __future__ import annotations

import base64
import binascii

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from .errors import IdentityError
from .identity import Identity

LARGEST = 4096  # bytes; ours have about 250

_ROTATION = b"meadow/rotate/v1\0"


def request_certificate(identity: Identity) -> bytes:
    """A request (PEM) for a certificate of this key, signed by the key and naming nobody."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(identity.private, None).public_bytes(Encoding.PEM)


def requested_key(request: bytes) -> bytes:
    """The raw Ed25519 public key (32 bytes) that signed a request.

    Raises IdentityError where it is malformed, for another kind of key, or not signed by it.
    """
    if len(request) > LARGEST:
        raise IdentityError(f"the certificate request has {len(request)} bytes, {LARGEST} at most")
    try:
        parsed = x509.load_pem_x509_csr(request)
        key, signed = parsed.public_key(), parsed.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError("the certificate request cannot be read") from error
    if not isinstance(key, Ed25519PublicKey):
        raise IdentityError("the certificate request is not for an Ed25519 key")
    if not signed:
        raise IdentityError("the certificate request was not signed by the key in it")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def rotation_proof(old_key: bytes, new: Identity) -> str:
    """The new key's word (base64) that it takes the place of the old one (raw)."""
    statement = _ROTATION + old_key + new.public.public_bytes_raw()
    return base64.b64encode(new.private.sign(statement)).decode()


def check_rotation(old_key: bytes, new_key: bytes, proof: str) -> None:
    """Raise IdentityError unless `proof` is what `rotation_proof` gives for these raw keys."""
    try:
        signature = base64.b64decode(proof, validate=True)
        public = Ed25519PublicKey.from_public_bytes(new_key)
        public.verify(signature, _ROTATION + old_key + new_key)
    except (InvalidSignature, ValueError, binascii.Error) as error:
        raise IdentityError("the new key's signature does not hold") from error
