"""Names that can be shown, compared, certified, and used in a path."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meadow.errors import InvitationError
from meadow.participant_name import normal_name


@pytest.mark.parametrize("name", ["a", "St. Mary's, ward 3", "Klinikum Süd", "病院", "x" * 64])
def test_names_that_people_have(name: str) -> None:
    assert normal_name(name) == name


def test_accents_are_composed() -> None:
    assert normal_name("Su\u0308d") == "Süd"


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a ",
        " a",
        ".",
        "..",
        "../a",
        "a/b",
        "a\\b",
        ".hidden",
        "a.",
        "a\nb",
        "a\0",
        "\x1b[2J",
    ]
    + ["\x1b[2J", "a\u200bb", "a\u202eb", "a\ufeff", "\ud800", "a\u00a0b", "x" * 65, "ü" * 33],
)
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(InvitationError):
        normal_name(name)


@given(st.text(max_size=70))
def test_a_name_is_normal_once_and_for_all(text: str) -> None:
    try:
        name = normal_name(text)
    except InvitationError:
        return
    assert normal_name(name) == name == unicodedata.normalize("NFC", text)
    assert name.isprintable() and 1 <= len(name.encode()) <= 64
