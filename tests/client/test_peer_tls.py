"""A certificate follows from an identity, has one form, and nobody else's is accepted."""

from __future__ import annotations

import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.client.peer_tls import (
    HOST_NAME,
    LARGEST_CERTIFICATE,
    TlsCertificate,
    certificate_of,
    check_certificate,
    pem_of,
)
from meadow.errors import IdentityError
from meadow.identity import Identity
from meadow.strategies.peer_keys import peer_of

IDENTITY = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
KNOWN = "be73d7c02625b73b6d0dc9e414b21557ad7dc6f795c89e47a02e29c355dccc0a"
OTHER = Identity(Ed25519PrivateKey.from_private_bytes(bytes(32)))


@pytest.fixture(scope="module")
def ours() -> TlsCertificate:
    return certificate_of(IDENTITY)


def parsed(certificate: TlsCertificate) -> x509.Certificate:
    return x509.load_der_x509_certificate(certificate.der)


def test_a_known_identity_has_a_known_certificate(ours: TlsCertificate) -> None:
    """A peer whose certificate changed with a library would be locked out of its runs."""
    assert hashlib.sha256(ours.der).hexdigest() == KNOWN
    assert certificate_of(IDENTITY) == ours
    assert ours.peer == peer_of(IDENTITY) == IDENTITY.private.public_key().public_bytes_raw()


def test_another_library_reads_it_so(ours: TlsCertificate) -> None:
    certificate, key = parsed(ours), load_pem_private_key(ours.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert certificate.public_key() == key.public_key()
    assert certificate.subject == certificate.issuer
    assert certificate.subject.rfc4514_string() == f"CN={ours.peer.hex()}"
    certificate.verify_directly_issued_by(certificate)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [HOST_NAME]
    assert certificate.not_valid_before_utc.year == 1970
    assert certificate.not_valid_after_utc.year == 9999
    assert pem_of(ours.der) == certificate.public_bytes(Encoding.PEM)


@settings(deadline=None, max_examples=30)
@given(st.binary(min_size=32, max_size=32))
def test_every_identity_s_certificate_is_accepted_as_its_own(seed: bytes) -> None:
    certificate = certificate_of(Identity(Ed25519PrivateKey.from_private_bytes(seed)))
    check_certificate(certificate.peer, certificate.der)
    assert len(certificate.der) < LARGEST_CERTIFICATE
    if certificate.peer != peer_of(IDENTITY):
        with pytest.raises(IdentityError):
            check_certificate(peer_of(IDENTITY), certificate.der)


def test_every_changed_byte_is_noticed(ours: TlsCertificate) -> None:
    for place in range(len(ours.der)):
        for change in (0x01, 0x80, 0xFF):
            wrong = bytearray(ours.der)
            wrong[place] ^= change
            with pytest.raises(IdentityError, match="TLS certificate of peer 03a107bff3ce10be"):
                check_certificate(ours.peer, bytes(wrong))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_cut_spliced_and_foreign_bytes_are_refused(data: st.DataObject) -> None:
    der = certificate_of(IDENTITY).der
    start = data.draw(st.integers(0, len(der)))
    end = data.draw(st.integers(start, len(der)))
    wrong = der[:start] + data.draw(st.binary(max_size=80)) + der[end:]
    if wrong != der:
        with pytest.raises(IdentityError):
            check_certificate(peer_of(IDENTITY), wrong)


@pytest.mark.parametrize("size", [0, 1, 400, LARGEST_CERTIFICATE, 10**6])
def test_any_size_is_refused_alike(size: int) -> None:
    with pytest.raises(IdentityError, match="cannot be read|was not signed"):
        check_certificate(peer_of(IDENTITY), b"\x30" * size)


@pytest.mark.parametrize("peer", [b"", b"\x01" * 31, b"\xff" * 32, b"\x01" * 33])
def test_a_name_that_is_no_key_is_refused(ours: TlsCertificate, peer: bytes) -> None:
    with pytest.raises(IdentityError):
        check_certificate(peer, ours.der)


def forged(key: ec.EllipticCurvePrivateKey, subject: x509.Name, *extensions: object) -> bytes:
    """What an attacker can write who knows everything but the identity's private key."""
    start, end = parsed(certificate_of(IDENTITY)).not_valid_before_utc, 9999
    builder = x509.CertificateBuilder(
        subject, subject, key.public_key(), 1, start, start.replace(year=end, month=12)
    )
    for extension in extensions:
        assert isinstance(extension, x509.Extension)
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER)


def test_a_statement_copied_from_another_certificate_is_refused(ours: TlsCertificate) -> None:
    """The identity vouched for one TLS key, and for no other."""
    victim, attacker = parsed(ours), ec.generate_private_key(ec.SECP256R1())
    der = forged(attacker, victim.subject, *victim.extensions)
    with pytest.raises(IdentityError):
        check_certificate(ours.peer, der)
    own_key = load_pem_private_key(certificate_of(OTHER).key_pem, None)
    assert isinstance(own_key, ec.EllipticCurvePrivateKey)
    with pytest.raises(IdentityError):
        check_certificate(ours.peer, forged(own_key, victim.subject, *victim.extensions))


def test_an_own_certificate_with_more_powers_is_refused(ours: TlsCertificate) -> None:
    """A peer could sign itself a certificate that may issue others: it has another form."""
    key = load_pem_private_key(ours.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    usage, host, statement = list(parsed(ours).extensions)[1:]
    powers = x509.Extension(
        x509.BasicConstraints.oid, True, x509.BasicConstraints(ca=True, path_length=3)
    )
    der = forged(key, parsed(ours).subject, powers, usage, host, statement)
    with pytest.raises(IdentityError):
        check_certificate(ours.peer, der)
