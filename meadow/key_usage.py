"""What a certificate's key may be used for (RFC 5280, section 4.2.1.3)."""

from __future__ import annotations

from cryptography import x509


def key_usage(*, handshakes: bool, certificates: bool, revocations: bool = False) -> x509.KeyUsage:
    """A key that signs TLS handshakes, certificates, lists of revoked ones; nothing else."""
    return x509.KeyUsage(
        digital_signature=handshakes,
        key_cert_sign=certificates,
        crl_sign=revocations,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
