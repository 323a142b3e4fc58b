"""How the forwarder shows itself to Flower's SuperNode on the same machine.

The certificate is self-made, for this machine's loopback alone, and never expires: nothing here may
depend on a clock that is wrong.  It is made once, so that a forwarder that is started again is the
same to a SuperNode that was not.
"""

from __future__ import annotations

import ipaddress
import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import IdentityError
from ..key_usage import key_usage
from ..store import Disk, explained

_FIRST_DAY = datetime(1970, 1, 1, tzinfo=UTC)
_NO_EXPIRY = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280, section 4.1.2.5
_USAGE = key_usage(handshakes=True, certificates=True)  # it vouches for itself


def loopback_tls(pair: Path, authority: Path, disk: Disk) -> ssl.SSLContext:
    """The forwarder's side of TLS.

    `pair` is the file of key and certificate, made on first use; `authority` gets the certificate
    alone, for the SuperNode to trust.  Raises IdentityError for a pair that is damaged.
    """
    if not pair.exists():
        disk.write(pair, _make(), 0o600)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(pair)
        with explained(pair):
            certificate = x509.load_pem_x509_certificate(pair.read_bytes())
    except (ssl.SSLError, ValueError) as error:
        raise IdentityError(f"{pair} is damaged", "delete it; it is made anew") from error
    pem = certificate.public_bytes(Encoding.PEM)
    if not authority.exists() or authority.read_bytes() != pem:
        disk.write(authority, pem)
    return context


def _make() -> bytes:
    key = generate_private_key(SECP256R1())
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret + _certificate(key).public_bytes(Encoding.PEM)


def _certificate(key: EllipticCurvePrivateKey) -> x509.Certificate:
    public = key.public_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "meadow forwarder")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    serial = x509.random_serial_number()
    return (
        x509.CertificateBuilder(name, name, public, serial, _FIRST_DAY, _NO_EXPIRY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_USAGE, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(key, SHA256())
    )
