"""Introductions: both sides sign, and neither can speak for the other."""

from __future__ import annotations

import pytest
from gossips import RUN, identity, introduce
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.errors import RecordError
from meadow.strategies.introductions import LARGEST, Introduction, JoinRequest
from meadow.strategies.peer_keys import peer_of
from meadow.strategies.records import Reason

ALICE, BOB, EVE = identity("alice"), identity("bob"), identity("eve")
ID = bytes.fromhex(RUN)


def refusal(data: bytes, run: bytes = ID) -> str:
    with pytest.raises(RecordError) as caught:
        Introduction.decode(data, run)
    return caught.value.reason


@given(st.binary(max_size=2048), st.sampled_from(["", "host:1", "[::1]:65535"]))
@settings(deadline=None)
def test_round_trip(certificate: bytes, address: str) -> None:
    request = JoinRequest.sign(BOB, ID, certificate, address)
    assert JoinRequest.decode(request.encoded, ID) == request
    made = Introduction.sign(ALICE, request)
    read = Introduction.decode(made.encoded, ID)
    assert read == made and len(made.encoded) <= LARGEST
    assert (read.introducer, read.member.peer) == (peer_of(ALICE), peer_of(BOB))
    assert (read.member.certificate, read.member.address) == (certificate, address)


@given(st.data())
@settings(deadline=None)
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    raw = bytearray(introduce(ALICE, BOB))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    assert refusal(bytes(raw)) in set(Reason)


def test_truncated_giant_and_foreign_are_refused_by_name() -> None:
    raw = introduce(ALICE, BOB)
    assert {refusal(raw[:size]) for size in range(len(raw))} <= {Reason.SIZE, Reason.SIGNATURE}
    assert refusal(raw + bytes(LARGEST)) == Reason.SIZE
    assert refusal(raw, run=b"r" * 32) == Reason.RUN
    assert refusal(b"\2" + raw[1:]) == Reason.VERSION


def test_nobody_introduces_a_peer_under_a_certificate_that_it_did_not_choose() -> None:
    honest = JoinRequest.sign(BOB, ID, b"certificate", "host:1")
    stolen = JoinRequest.sign(EVE, ID, b"Eve's certificate", "host:1")
    mixed = JoinRequest(ID, type(honest.member)(peer_of(BOB), b"Eve's certificate"), b"")
    for signature in (honest.signature, stolen.signature):
        request = JoinRequest(ID, mixed.member, signature)
        assert refusal(Introduction.sign(EVE, request).encoded) == Reason.SIGNATURE
