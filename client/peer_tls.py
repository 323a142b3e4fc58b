"""A peer's TLS certificate: it follows from the peer's identity, and proves it.

gRPC's TLS takes no Ed25519 certificates, so a peer has a P-256 key besides.  The key is derived
from the identity's private key (HKDF, RFC 5869) and every signature is deterministic (RFC 6979):
the identity file alone gives the same certificate on every start, and there is no second secret
to store, back up or lose.

The certificate is self-signed and never expires, since nothing may depend on clocks.  It names the
peer (its raw Ed25519 public key in hexadecimal) and carries, in an extension, the identity's
signature over the TLS key, as libp2p's TLS handshake does: nobody can present a certificate as
another peer's.  Only one form exists: `check_certificate` accepts what `certificate_of` writes and
nothing else, so that no two parsers can disagree about a certificate that came from outside.

Peers trust exactly the certificates of the membership: no authority, no host names.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    derive_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from ..errors import IdentityError
from ..identity import Identity
from ..key_usage import key_usage
from ..strategies.peer_keys import peer_of

HOST_NAME = "meadow.peer"
"""The one host name in every certificate; who a peer is, its certificate alone says."""
LARGEST_CERTIFICATE = 1024  # bytes; ours have about 560

_INFO = b"meadow/peer-tls/v1"
_STATEMENT = b"meadow/peer-tls-key/v1\0"
_EXTENSION = x509.ObjectIdentifier("2.25.329800735698586629295641978511506172918")  # a UUID
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
_ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
_FIRST_DAY = datetime(1970, 1, 1, tzinfo=UTC)
_NO_EXPIRY = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280, section 4.1.2.5
_USAGE = key_usage(handshakes=True, certificates=False)
_POINT, _STATEMENT_SIZE = 65, 64  # bytes of an uncompressed point, of an Ed25519 signature


@dataclass(frozen=True)
class TlsCertificate:
    """What one peer shows to the others."""

    peer: bytes
    """Raw Ed25519 public key, 32 bytes."""
    der: bytes
    key_pem: bytes
    """The private key (PKCS #8, PEM, not encrypted): never written anywhere."""


def certificate_of(identity: Identity) -> TlsCertificate:
    """The certificate of an identity; the same identity always gives the same bytes."""
    key, peer = _derived_key(identity), peer_of(identity)
    statement = identity.private.sign(_statement(key.public_key()))
    certificate = _builder(peer, key.public_key(), statement).sign(
        key, SHA256(), ecdsa_deterministic=True
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return TlsCertificate(peer, certificate.public_bytes(Encoding.DER), pem)


def check_certificate(peer: bytes, der: bytes) -> None:
    """Raise IdentityError unless `der` is the certificate of `peer` in its one form.

    That is: `peer` signed the TLS key in it, the TLS key signed the certificate, and every other
    byte is what `certificate_of` would have written.
    """
    try:
        key, statement, signature = _variable_parts(der)
        signed = _signed_part(peer, key, statement)
        Ed25519PublicKey.from_public_bytes(peer).verify(statement, _statement(key))
        key.verify(signature, signed, ECDSA(SHA256()))
    except InvalidSignature as error:
        raise _refusal(peer, "was not signed by it") from error
    except ValueError as error:
        raise _refusal(peer, "cannot be read") from error
    if der != _assembled(signed, signature):
        raise _refusal(peer, "has another form than meadow writes")


def pem_of(der: bytes) -> bytes:
    """A certificate as gRPC takes it, with one kind of line breaks."""
    return ssl.DER_cert_to_PEM_cert(der).encode("ascii")


def _derived_key(identity: Identity) -> EllipticCurvePrivateKey:
    """48 bytes reduced modulo the order less one: FIPS 186-5, A.2.1."""
    material = HKDF(SHA256(), 48, salt=None, info=_INFO).derive(
        identity.private.private_bytes_raw()
    )
    return derive_private_key(int.from_bytes(material) % (_ORDER - 1) + 1, SECP256R1())


def _statement(key: EllipticCurvePublicKey) -> bytes:
    """What an identity signs to vouch for a TLS key."""
    return _STATEMENT + key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _builder(peer: bytes, key: EllipticCurvePublicKey, statement: bytes) -> x509.CertificateBuilder:
    """The certificate but for its signature.  It may sign no other certificate."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer.hex())])
    builder = x509.CertificateBuilder(name, name, key, 1, _FIRST_DAY, _NO_EXPIRY)
    host = x509.SubjectAlternativeName([x509.DNSName(HOST_NAME)])
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_USAGE, critical=True)
        .add_extension(host, critical=False)
        .add_extension(x509.UnrecognizedExtension(_EXTENSION, statement), critical=False)
    )


def _signed_part(peer: bytes, key: EllipticCurvePublicKey, statement: bytes) -> bytes:
    """All of the certificate but its signature; who signs it does not change it."""
    anybody = derive_private_key(1, SECP256R1())
    return _builder(peer, key, statement).sign(anybody, SHA256()).tbs_certificate_bytes


# Every certificate has its parts in the same places, so that bytes from outside are compared and
# not parsed: parsers of X.509 are lenient, each in its own way.


@cache
def _places() -> tuple[int, int, int]:
    """Where in a certificate the TLS key's point, the statement and the signature begin."""
    key, statement = derive_private_key(1, SECP256R1()).public_key(), b"\xff" * _STATEMENT_SIZE
    signed = _signed_part(bytes(32), key, statement)
    whole = _assembled(signed, bytes(_POINT))
    point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return whole.index(point), whole.index(statement), len(whole) - _POINT


def _variable_parts(der: bytes) -> tuple[EllipticCurvePublicKey, bytes, bytes]:
    """TLS key, the identity's statement and the signature; ValueError where there is no key."""
    point, statement, signature = _places()
    if not signature < len(der) <= LARGEST_CERTIFICATE:
        raise ValueError(f"{len(der)} bytes")
    key = EllipticCurvePublicKey.from_encoded_point(SECP256R1(), der[point : point + _POINT])
    return key, der[statement : statement + _STATEMENT_SIZE], der[signature:]


def _assembled(signed: bytes, signature: bytes) -> bytes:
    """The certificate of a signed part and a signature (RFC 5280, section 4.1)."""
    return _der(0x30, signed + _ECDSA_WITH_SHA256 + _der(0x03, b"\0" + signature))


def _der(tag: int, body: bytes) -> bytes:
    """One DER value of up to 65,535 bytes."""
    size = len(body)
    if size < 0x80:
        return bytes([tag, size]) + body
    octets = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(octets)]) + octets + body


def _refusal(peer: bytes, reason: str) -> IdentityError:
    hint = "ask that peer for its own entry again"
    return IdentityError(f"the TLS certificate of peer {peer.hex()[:16]} {reason}", hint)
