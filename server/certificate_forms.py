"""What meadow's certificates look like; nothing here reads a file or a clock.

They follow RFC 5280 as strictly as OpenSSL's X509_V_FLAG_X509_STRICT asks for.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from ..errors import ConfigError
from ..key_usage import key_usage

AUTHORITY_LIFE = timedelta(days=3650)
BACKDATED = timedelta(days=2)
"""By how much a certificate's life begins before it was made, for clocks that are slow."""

_HOST = re.compile(r"(?=.{1,253}$)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")

PublicKey = EllipticCurvePublicKey | Ed25519PublicKey
HostName = x509.DNSName | x509.IPAddress


def self_signed(key: EllipticCurvePrivateKey, now: float) -> x509.Certificate:
    """The authority's own; its name ends in random digits, so that no two are confused."""
    name, begun = common_name(f"meadow authority {secrets.token_hex(4)}"), moment_of(now)
    begins, ends = begun - BACKDATED, begun + AUTHORITY_LIFE
    builder = unsigned(name, name, key.public_key(), begins, ends, is_authority=True)
    return builder.sign(key, SHA256())


def unsigned(
    subject: x509.Name,
    issuer: x509.Name,
    key: PublicKey,
    begins: datetime,
    ends: datetime,
    *,
    is_authority: bool,
) -> x509.CertificateBuilder:
    """A certificate but for its signature and what is particular to its use."""
    constraints = x509.BasicConstraints(is_authority, 0 if is_authority else None)
    serial = x509.random_serial_number()
    usage = key_usage(
        handshakes=not is_authority, certificates=is_authority, revocations=is_authority
    )
    return (
        x509.CertificateBuilder(issuer, subject, key, serial, begins, ends)
        .add_extension(constraints, critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def moment_of(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), UTC)


def host_names(hosts: Sequence[str]) -> list[HostName]:
    """Hosts as certificates name them.  ConfigError for none, and for what is no host."""
    if not hosts:
        raise ConfigError("a server's certificate needs a host", "name the coordinator's own")
    return [_host_name(host) for host in dict.fromkeys(hosts)]


def _host_name(host: str) -> HostName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise ConfigError(
                f"{host[:80]!r} is no host name or IP address",
                "without port and wildcard; international names in their form xn--...",
            ) from None
        return x509.DNSName(host.lower())
