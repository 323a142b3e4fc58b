"""What passes as the one bundle, beside how Flower itself reads the same bytes."""

from __future__ import annotations

import hashlib

from flwr.proto.fab_pb2 import Fab, GetFabResponse
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import example, given
from hypothesis import strategies as st

from meadow.client.bundle_answer import carries_exactly

BUNDLE = b"PK\x03\x04 entry points" * 20
DIGEST = hashlib.sha256(BUNDLE).hexdigest()


def answer(**fields: object) -> bytes:
    made: bytes = GetFabResponse(fab=Fab(**fields)).SerializeToString()  # type: ignore[arg-type]
    return made


GOOD = answer(hash_str=DIGEST, content=BUNDLE)


@given(
    st.binary(min_size=1, max_size=9_000), st.dictionaries(st.text(max_size=9), st.text(max_size=9))
)
def test_exactly_the_bundle_passes(content: bytes, verifications: dict[str, str]) -> None:
    digest = hashlib.sha256(content).hexdigest()
    made = answer(hash_str=digest, content=content, verifications=verifications)
    assert carries_exactly(made, content)
    assert not carries_exactly(made, content + b"x")
    assert not carries_exactly(answer(hash_str=DIGEST, content=content), content + b"x")


@given(st.data())
def test_no_change_of_an_answer_makes_flower_read_other_code(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(GOOD)))
    cut = data.draw(st.integers(0, 3))
    changed = GOOD[:at] + data.draw(st.binary(max_size=8)) + GOOD[at + cut :]
    if carries_exactly(changed, BUNDLE):
        assert GetFabResponse.FromString(changed).fab.content == BUNDLE


@given(st.binary(max_size=60))
@example(b"")
@example(GOOD + GOOD)
@example(GOOD + answer(content=b"code"))
@example(answer(hash_str=DIGEST))
@example(answer(content=BUNDLE))
@example(answer(hash_str="0" * 64, content=BUNDLE))
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(b"\x0a\x80")
def test_everything_else_is_refused(junk: bytes) -> None:
    assert not carries_exactly(junk, BUNDLE)
    try:
        read = GetFabResponse.FromString(junk).fab.content
    except DecodeError:
        return
    assert read != BUNDLE or junk != GOOD


def test_a_second_content_cannot_hide() -> None:
    """Of two contents Flower takes the last."""
    inner = Fab(hash_str=DIGEST, content=BUNDLE).SerializeToString()
    inner += Fab(content=b"code").SerializeToString()
    size = len(inner)
    both = b"\x0a" + bytes([size & 0x7F | 0x80, size >> 7]) + inner
    assert GetFabResponse.FromString(both).fab.content == b"code"
    assert not carries_exactly(both, BUNDLE)
