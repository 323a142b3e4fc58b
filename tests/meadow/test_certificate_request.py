"""Requests for certificates: of all that can be in one, only its key is taken."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from enrolment import new_identity

from meadow.certificate_request import (
    check_rotation,
    request_certificate,
    requested_key,
    rotation_proof,
)
from meadow.errors import IdentityError

ME = new_identity()
KEY = ME.public.public_bytes_raw()


def request(key: Any, algorithm: Any = None) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM)


def test_a_request_names_its_key_and_nobody() -> None:
    pem = request_certificate(ME)
    assert requested_key(pem) == KEY
    assert list(x509.load_pem_x509_csr(pem).subject) == []


@pytest.mark.parametrize(
    "pem",
    [
        request(ec.generate_private_key(ec.SECP256R1()), SHA256()),
        request(ec.generate_private_key(ec.SECP384R1()), SHA256()),
        request(rsa.generate_private_key(65537, 2048), SHA256()),
        request(ed448.Ed448PrivateKey.generate()),
    ],
    ids=["p256", "p384", "rsa", "ed448"],
)
def test_other_kinds_of_key(pem: bytes) -> None:
    with pytest.raises(IdentityError, match="not for an Ed25519 key"):
        requested_key(pem)


def test_a_key_that_somebody_else_holds_cannot_be_asked_for() -> None:
    """Another's public key under one's own signature."""
    der = x509.load_pem_x509_csr(request_certificate(ME)).public_bytes(Encoding.DER)
    stolen = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    forged = der.replace(KEY, stolen)
    text = base64.encodebytes(forged)
    pem = b"-----BEGIN CERTIFICATE REQUEST-----\n" + text + b"-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(IdentityError, match="not signed by the key in it"):
        requested_key(pem)


@pytest.mark.parametrize(
    "pem", [b"", b"x", b"\xff" * 10, request_certificate(ME)[:-40], b"x" * 10**6], ids=len
)
def test_what_is_no_request(pem: bytes) -> None:
    with pytest.raises(IdentityError):
        requested_key(pem)


def test_a_new_key_agrees_to_take_the_old_ones_place() -> None:
    new, other = new_identity(), new_identity()
    mine, others = new.public.public_bytes_raw(), other.public.public_bytes_raw()
    proof = rotation_proof(KEY, new)
    check_rotation(KEY, mine, proof)
    statement = b"meadow/rotate/v1\0" + KEY + mine
    new.public.verify(base64.b64decode(proof), statement)
    for old_key, new_key, text in [
        (others, mine, proof),
        (KEY, others, proof),
        (mine, KEY, proof),
        (KEY, b"short", proof),
        (KEY, mine, ""),
        (KEY, mine, "?"),
        (KEY, mine, "ä"),
    ]:
        with pytest.raises(IdentityError):
            check_rotation(old_key, new_key, text)
