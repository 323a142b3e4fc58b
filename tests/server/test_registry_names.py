"""Which texts refer to a version, and that none of them can be a path."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meadow.errors import RegistryError
from meadow.server.registry_names import Reference, adapter_name

PART = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_-]{0,20}\Z")
NAME = st.one_of(PART, st.builds("{}/{}".format, PART, PART))


@given(NAME, st.integers(1, 10**9 - 1), st.text("0123456789abcdef", min_size=12, max_size=64))
def test_a_reference_is_what_it_prints(name: str, number: int, digest: str) -> None:
    for reference in (
        Reference(name, alias="prod"),
        Reference(name, number=number),
        Reference(name, digest=digest),
    ):
        assert Reference.parse(str(reference)) == reference
    assert Reference.parse(name) == Reference(name, alias="prod")


@given(st.text())
def test_any_text_is_a_reference_or_refused_in_a_line(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except RegistryError as error:
        assert str(error).isprintable()
        return
    path = PurePosixPath(reference.name)
    assert not path.is_absolute() and ".." not in path.parts and len(path.parts) <= 2
    assert reference.name.isascii() and reference.name.isprintable()
    assert bool(reference.alias) + bool(reference.number) + bool(reference.digest) == 1


@pytest.mark.parametrize(
    "text",
    [
        "", "@", "@prod", "a@", "a@v0", "a@v07", "a@v1 ", "a@v1@v2", "a@v1\n",
        "a@sha256:", "a@sha256:" + "a" * 11, "a@sha256:" + "A" * 12, "a@sha256:" + "a" * 65,
        "a@sha256:../../etc/pa", "/a", "a/", "a//b", "./a", "../a", "a/../b", "a/..", "a..b",
        ".a", "a/.b", "a/b/c", "a\\b", "a\0", "~", "~/a", "-a", "a b", "ä", "a%2e%2e", "a" * 65,
        "a/" + "b" * 65, "v\N{ARABIC-INDIC DIGIT ONE}", "a@v\N{ARABIC-INDIC DIGIT ONE}",
    ],
)  # fmt: skip
def test_what_refers_to_nothing(text: str) -> None:
    with pytest.raises(RegistryError):
        Reference.parse(text)


def test_the_longest_names() -> None:
    assert adapter_name("t" * 64 + "/" + "a" * 64)
    assert adapter_name("a.b-c_d")
