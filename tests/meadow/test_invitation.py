"""Invitations: what one side writes the other reads, and nothing else is read."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from meadow.errors import InvitationError
from meadow.invitation import Invitation
from meadow.server.authority import Authority

PLAIN = Invitation("Ward 3", ("meadow.example.org:8443",), b"", bytes(range(16)), 1_800_000_000)


@pytest.fixture(scope="module")
def invitation(tmp_path_factory: pytest.TempPathFactory) -> Invitation:
    pem = Authority.open(tmp_path_factory.mktemp("authority")).certificate
    der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    return replace(PLAIN, authority=der, addresses=("a.example:1", "[2001:db8::1]:65535"))


def word(fields: Any) -> str:
    """What another program might write: the format of the documentation, by hand."""
    body = fields if isinstance(fields, bytes) else json.dumps(
        fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()  # fmt: skip
    whole = body + hashlib.sha256(body).digest()[:4]
    return "meadow1:" + base64.urlsafe_b64encode(whole).decode().rstrip("=")


FIELDS = {
    "name": "Ward 3",
    "addresses": ["meadow.example.org:8443"],
    "authority": "",
    "token": bytes(range(16)).hex(),
    "expires": 1_800_000_000,
}


def test_the_text_is_as_documented() -> None:
    assert PLAIN.text() == word(FIELDS)
    assert Invitation.parse(word(FIELDS)) == PLAIN


def test_an_authority_travels(invitation: Invitation) -> None:
    assert Invitation.parse(invitation.text()) == invitation
    assert len(invitation.text()) < 2000


def test_white_space_of_mail_programs_does_not_matter(invitation: Invitation) -> None:
    text = invitation.text()
    broken = "\r\n  ".join(text[i : i + 72] for i in range(0, len(text), 72))
    assert Invitation.parse(f"  {broken}\n") == invitation


def test_a_paste_that_was_cut_off_is_named_as_such(invitation: Invitation) -> None:
    text = invitation.text()
    for length in range(len("meadow1:"), len(text)):
        with pytest.raises(InvitationError, match="cut off or was changed"):
            Invitation.parse(text[:length])


@given(st.data())
def test_a_letter_that_changed_is_noticed(data: st.DataObject) -> None:
    text = PLAIN.text()
    place = data.draw(st.integers(len("meadow1:"), len(text) - 1))
    letter = data.draw(st.characters(codec="utf-8").filter(lambda c: c != text[place]))
    with pytest.raises(InvitationError):
        Invitation.parse(text[:place] + letter + "x" * letter.isspace() + text[place + 1 :])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an invitation"),
        ("hello", "not an invitation"),
        ("MEADOW1:abcd", "not an invitation"),
        ("meadow2:abcd", "another version of meadow"),
        ("meadow1:", "cut off"),
        ("meadow1:" + "A" * 20_000, "too long"),
    ],
)
def test_what_is_no_invitation(text: str, message: str) -> None:
    with pytest.raises(InvitationError, match=message):
        Invitation.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        b"", b"{", b"[" * 5000, b"\xff", [], None, {},
        {**FIELDS, "name": "a/b"},
        {**FIELDS, "name": "Su\u0308d"},
        {**FIELDS, "name": 3},
        {**FIELDS, "addresses": []},
        {**FIELDS, "addresses": ["a.example:1"] * 17},
        {**FIELDS, "addresses": "a.example:1"},
        {**FIELDS, "addresses": ["https://a.example:1"]},
        {**FIELDS, "authority": "AAAA"},
        {**FIELDS, "authority": "?"},
        {**FIELDS, "token": "00"},
        {**FIELDS, "token": FIELDS["token"].upper()},  # type: ignore[attr-defined]
        {**FIELDS, "expires": 1.5},
        {**FIELDS, "expires": True},
        {**FIELDS, "expires": -1},
        {**FIELDS, "expires": 2**60},
        {**FIELDS, "more": 1},
        json.dumps(FIELDS).encode(),
    ],
)  # fmt: skip
def test_a_right_checksum_does_not_make_an_invitation(fields: Any) -> None:
    with pytest.raises(InvitationError):
        Invitation.parse(word(fields))


def test_what_cannot_be_read_cannot_be_made() -> None:
    with pytest.raises(InvitationError, match="16"):
        replace(PLAIN, addresses=())
    with pytest.raises(InvitationError, match="normal form"):
        replace(PLAIN, name="Su\u0308d")


@pytest.mark.parametrize("address", ["a", "a:65536", "dns:///host:7070"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InvitationError, match="write host:port"):
        replace(PLAIN, addresses=("a.example:1", address))


def test_the_word_for_a_file_of_it(tmp_path: Path, invitation: Invitation) -> None:
    """An invitation may also be kept in a file, with the line end that editors add."""
    path = tmp_path / "invitation.txt"
    path.write_text(invitation.text() + "\n", encoding="ascii")
    assert Invitation.parse(path.read_text(encoding="ascii")) == invitation
