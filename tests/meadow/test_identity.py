"""Keys and envelopes: held against the `cryptography` package and published values."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from meadow.errors import FormatError, IdentityError
from meadow.identity import (
    Identity,
    default_path,
    key_id,
    own_identity,
    pae,
    trust,
    verify,
)

KIND = "application/test+json"
# RFC 8032, section 7.1, test 1: secret key, public key, signature of the empty message.
RFC_SECRET = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
RFC_PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def identity(secret: str = RFC_SECRET) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)))


def known(*identities: Identity) -> dict[str, Ed25519PublicKey]:
    return {one.key_id: one.public for one in identities}


def pem(private: Any) -> bytes:
    encoded: bytes = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return encoded


def test_pae_is_the_one_of_the_dsse_specification() -> None:
    """The worked example of DSSE's protocol.md."""
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected
    assert pae("", b"") == b"DSSEv1 0  0 "
    assert pae("ä", b"\0 \n") == b"DSSEv1 2 \xc3\xa4 3 \0 \n"  # lengths count bytes


@given(st.tuples(st.text(), st.binary()), st.tuples(st.text(), st.binary()))
def test_no_two_messages_have_one_pae(one: tuple[str, bytes], two: tuple[str, bytes]) -> None:
    try:
        equal = pae(*one) == pae(*two)
    except UnicodeEncodeError:  # half a surrogate pair has no bytes
        return
    assert equal == (one == two)


def test_a_key_id_is_the_hash_of_the_raw_public_key() -> None:
    assert identity().key_id == hashlib.sha256(bytes.fromhex(RFC_PUBLIC)).hexdigest()
    assert identity().key_id == key_id(
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(RFC_PUBLIC))
    )


def test_an_envelope_is_what_an_independent_verifier_expects() -> None:
    envelope = identity().sign(KIND, b"body")
    assert set(envelope) == {"payload", "payloadType", "signatures"}
    assert base64.b64decode(envelope["payload"]) == b"body"
    (signature,) = envelope["signatures"]
    signed = b"DSSEv1 21 application/test+json 4 body"
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(RFC_PUBLIC))
    public.verify(base64.b64decode(signature["sig"]), signed)
    assert signature["keyid"] == identity().key_id


def test_signing_twice_gives_the_same_bytes() -> None:
    assert identity().sign(KIND, b"body") == identity().sign(KIND, b"body")


@given(st.binary(max_size=2000))
def test_what_was_signed_is_what_verifies(payload: bytes) -> None:
    envelope = identity().sign(KIND, payload)
    assert verify(envelope, known(identity()), payload_type=KIND) == payload
    url_safe = {
        **envelope,
        "payload": base64.urlsafe_b64encode(payload).decode(),
    }
    assert verify(url_safe, known(identity()), payload_type=KIND) == payload


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_no_flipped_bit_of_payload_or_signature_verifies(place: int, bit: int) -> None:
    envelope = identity().sign(KIND, b"a body that matters")
    signature = envelope["signatures"][0]

    def flipped(text: str) -> str:
        raw = bytearray(base64.b64decode(text))
        raw[place % len(raw)] ^= 1 << bit
        return base64.b64encode(raw).decode()

    for changed in (
        {**envelope, "payload": flipped(envelope["payload"])},
        {**envelope, "signatures": [{**signature, "sig": flipped(signature["sig"])}]},
    ):
        with pytest.raises(IdentityError, match="does not hold"):
            verify(changed, known(identity()), payload_type=KIND)


def test_a_changed_type_is_refused_even_where_it_is_expected() -> None:
    envelope = identity().sign(KIND, b"body")
    with pytest.raises(FormatError, match="expected 'text/plain'"):
        verify(envelope, known(identity()), payload_type="text/plain")
    with pytest.raises(IdentityError, match="does not hold"):
        verify({**envelope, "payloadType": "x"}, known(identity()), payload_type="x")


def test_only_trusted_keys_count() -> None:
    stranger = identity("11" * 32)
    envelope = identity().sign(KIND, b"body")
    with pytest.raises(IdentityError, match="by no key that is trusted"):
        verify(envelope, known(stranger), payload_type=KIND)
    with pytest.raises(IdentityError, match="by no key that is trusted"):
        verify(envelope, {}, payload_type=KIND)
    with pytest.raises(IdentityError, match="signed by nobody"):
        verify({**envelope, "signatures": []}, known(identity()), payload_type=KIND)


def test_a_stranger_cannot_sign_under_a_trusted_key_id() -> None:
    envelope = identity("11" * 32).sign(KIND, b"body")
    envelope["signatures"][0]["keyid"] = identity().key_id
    with pytest.raises(IdentityError, match="does not hold"):
        verify(envelope, known(identity()), payload_type=KIND)


def test_a_second_signature_of_a_stranger_does_no_harm() -> None:
    envelope = identity().sign(KIND, b"body")
    other = identity("11" * 32)
    envelope["signatures"] = other.sign(KIND, b"body")["signatures"] + envelope["signatures"]
    assert verify(envelope, known(identity()), payload_type=KIND) == b"body"
    assert verify(envelope, known(other), payload_type=KIND) == b"body"


@pytest.mark.parametrize(
    "envelope",
    [
        None,
        [],
        "text",
        {},
        {"payload": "AA==", "payloadType": KIND},
        {"payload": 3, "payloadType": KIND, "signatures": []},
        {"payload": "AA==", "payloadType": KIND, "signatures": "none"},
        {"payload": "A", "payloadType": KIND, "signatures": []},
        {"payload": "ä", "payloadType": KIND, "signatures": []},
        {"payload": "AA==", "payloadType": KIND, "signatures": [None]},
        {"payload": "AA==", "payloadType": KIND, "signatures": [{"sig": "AA=="}]},
        {"payload": "AA==", "payloadType": KIND, "signatures": [{"keyid": "a", "sig": "*"}]},
        {"payload": "AA==", "payloadType": KIND, "signatures": [{"keyid": "", "sig": ""}] * 65},
    ],
)
def test_what_is_no_envelope_is_refused(envelope: object) -> None:
    with pytest.raises(FormatError):
        verify(envelope, known(identity()), payload_type=KIND)


# --- key files ---------------------------------------------------------------------------------


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity.pem"
    made = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Identity.load_or_create(path)
    assert again.key_id == made.key_id
    raw = serialization.load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(raw, Ed25519PrivateKey)
    assert key_id(raw.public_key()) == made.key_id
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")  # PKCS #8


def test_a_wide_umask_does_not_open_the_key(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Identity.load_or_create(tmp_path / "identity.pem")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "identity.pem").stat().st_mode) == 0o600


def test_two_keys_differ(tmp_path: Path) -> None:
    one = Identity.load_or_create(tmp_path / "a.pem")
    two = Identity.load_or_create(tmp_path / "b.pem")
    assert one.key_id != two.key_id


def test_processes_that_start_together_end_with_one_key(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    program = (
        "import sys; from pathlib import Path; from meadow.identity import Identity;"
        "print(Identity.load_or_create(Path(sys.argv[1])).key_id)"
    )
    command = [sys.executable, "-c", program, str(path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    ids = {process.communicate()[0].strip() for process in running}
    assert ids == {Identity.load_or_create(path).key_id}


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o604])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"mode {mode:o}.*chmod 600"):
        Identity.load_or_create(path)


def test_a_damaged_key_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    Identity.load_or_create(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:60], whole.replace(b"PRIVATE", b"PUBLIC"), b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(IdentityError, match="holds no readable private key"):
            Identity.load_or_create(path)
        assert path.read_bytes() == damaged


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    path.touch(0o600)
    path.write_bytes(pem(generate_private_key(SECP256R1())))
    with pytest.raises(IdentityError, match="not an Ed25519 key"):
        Identity.load_or_create(path)


def test_the_users_own_key_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEADOW_HOME", str(tmp_path / "here"))
    assert default_path() == tmp_path / "here" / "identity.pem"
    assert own_identity().key_id == own_identity().key_id
    assert default_path().is_file()
    monkeypatch.delenv("MEADOW_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_path() == tmp_path / "home" / ".meadow" / "identity.pem"


def test_a_home_that_cannot_be_written_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEADOW_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(IdentityError, match="set MEADOW_HOME"):
        own_identity()


def test_a_public_key_travels_as_pem() -> None:
    trusted = trust(identity().public_pem)
    envelope = identity().sign(KIND, b"body")
    assert verify(envelope, trusted, payload_type=KIND) == b"body"


def test_only_ed25519_public_keys_are_trusted() -> None:
    other = generate_private_key(SECP256R1()).public_key()
    wrong = other.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for bad in (wrong, b"no key", pem(Ed25519PrivateKey.generate())):
        with pytest.raises(IdentityError):
            trust(bad)
