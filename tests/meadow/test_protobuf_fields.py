"""What is read of a protobuf message, beside how protobuf itself reads the same bytes."""

from __future__ import annotations

import pytest
from flwr.proto.message_pb2 import Metadata
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from meadow.protobuf_fields import fields, only

NUMBERS = st.integers(0, 2**64 - 1)


@given(NUMBERS, NUMBERS, st.text(max_size=300), st.floats(allow_nan=False))
def test_fields_are_what_was_written(run: int, node: int, text: str, ttl: float) -> None:
    made = Metadata(run_id=run, src_node_id=node, reply_to_message_id=text, ttl=ttl)
    data = made.SerializeToString()
    assert (only(data, 1) or 0, only(data, 3) or 0) == (run, node)
    assert (only(data, 5) or b"") == text.encode()
    assert only(data, 2) is None
    assert {number for number, _ in fields(data)} == {f.number for f, _ in made.ListFields()}


@given(st.binary(max_size=40))
def test_what_is_read_protobuf_reads_alike(junk: bytes) -> None:
    try:
        found = only(junk, 3)
    except ValueError:
        return
    try:
        read = Metadata.FromString(junk)
    except DecodeError:  # a text that is not UTF-8, say: protobuf is the stricter one
        return
    assert read.src_node_id == (found if isinstance(found, int) else 0)


@pytest.mark.parametrize(
    "junk",
    [
        b"\x18", b"\x18\x80", b"\x2a\x05ab", b"\x00\x01", b"\x1b\x1c",
        b"\x18" + b"\xff" * 9 + b"\x02", b"\x80\x80\x80\x80\x80\x01\x01", b"\x39abc",
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(junk: bytes) -> None:
    with pytest.raises(ValueError, match="a field|a number"):
        list(fields(junk))


def test_a_field_that_comes_twice_is_refused() -> None:
    one, other = Metadata(src_node_id=7), Metadata(src_node_id=8)
    both = one.SerializeToString() + other.SerializeToString()
    assert Metadata.FromString(both).src_node_id == 8
    with pytest.raises(ValueError, match="field 3 comes 2 times"):
        only(both, 3)
