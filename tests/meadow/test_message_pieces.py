"""Payloads in pieces: whole again, small enough to travel, and nothing else passes for one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meadow.fleet_routes import LARGEST_BODY
from meadow.message_pieces import PIECE, cut, joined


@given(st.binary(max_size=40), st.integers(1, 9))
def test_pieces_join_to_what_was_cut(payload: bytes, piece: int) -> None:
    records = cut(payload, piece)
    assert joined(records) == payload
    assert joined(dict(reversed(records.items()))) == payload, "whatever their order"
    assert all(len(record["payload"]) <= piece for record in records.values())


def test_a_small_payload_is_one_record() -> None:
    assert cut(b"few") == {"meadow": {"payload": b"few"}}
    assert cut(b"") == {"meadow": {"payload": b""}}


def test_the_gateway_takes_every_piece() -> None:
    records = cut(bytes(2 * LARGEST_BODY + 1))
    assert len(records) == 9 and PIECE + 2**16 < LARGEST_BODY


def test_what_is_no_payload_is_none() -> None:
    whole = cut(b"abcdef", 2)
    assert joined({}) is None
    assert joined({name: whole[name] for name in ("meadow", "meadow/2")}) is None, "a gap"
    assert joined({name: whole[name] for name in ("meadow/1", "meadow/2")}) is None
    assert joined({**whole, "other": {"payload": b"x"}}) is None
    assert joined({"meadow": {"payload": "text"}}) is None
    assert joined({"meadow": {}}) is None
