"""Records: their layout, their bounds, and what each kind of damage is called."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
from gossips import RUN, chain, charter_of, identity, q_by_definition, record
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.errors import RecordError
from meadow.strategies.peer_keys import peer_of
from meadow.strategies.records import LARGEST, LAST_STEP, Head, Quantisation, Reason, Record

ALICE, BOB = identity("alice"), identity("bob")
ID = bytes.fromhex(RUN)


def refusal(data: bytes, run: bytes = ID, largest_shift: int = 16) -> str:
    with pytest.raises(RecordError) as caught:
        Record.decode(data, run, largest_shift).verify()
    assert "\n" not in str(caught.value)
    return caught.value.reason


def forged(**fields: int | bytes) -> bytes:
    """A record signed by Alice with fields that `Record.sign` would refuse."""
    values: dict[str, int | bytes] = {
        "format": 1,
        "run": ID,
        "peer": peer_of(ALICE),
        "sequence": 0,
        "previous": bytes(32),
        "first_step": 0,
        "shift": 0,
        "quantisation": 0,
        "steps": b"\1",
        **fields,
    }
    steps = values.pop("steps")
    assert isinstance(steps, bytes)
    body = struct.pack("<B32s32sI32sQBBH", *values.values(), len(steps)) + steps
    return body + ALICE.private.sign(b"meadow/record/v1\0" + body)


def test_layout_is_the_documented_one() -> None:
    steps = bytes([5, 256 - 3])
    made = Record.sign(ALICE, ID, Head(7, 300, b"p" * 32), steps, 4, Quantisation.FOUR_BIT)
    body = (
        b"\x01"
        + ID
        + peer_of(ALICE)
        + (7).to_bytes(4, "little")
        + b"p" * 32
        + (300).to_bytes(8, "little")
        + b"\x04\x02\x02\x00\x05\xfd"
    )
    assert made.encoded == body + ALICE.private.sign(b"meadow/record/v1\0" + body)
    assert made.digest == hashlib.sha256(body).digest()
    assert made.increments.tolist() == [-5 * 16, 3 * 16]
    assert made.head == Head(8, 302, made.digest)


def test_two_hundred_steps_fit_in_377_bytes() -> None:
    assert len(record(ALICE, steps=bytes(200)).encoded) == 377


@given(
    st.binary(min_size=1, max_size=1000).map(lambda raw: raw.replace(b"\x80", b"\0")),
    st.integers(0, 16),
    st.sampled_from(Quantisation),
    st.integers(0, 1000),
)
@settings(deadline=None)
def test_round_trip(steps: bytes, shift: int, base: Quantisation, sequence: int) -> None:
    head = Head(sequence, 3 * sequence, b"x" * 32) if sequence else Head()
    made = Record.sign(ALICE, ID, head, steps, shift, base)
    read = Record.decode(made.encoded, ID)
    read.verify()
    assert read == made and read.encoded == made.encoded and read.digest == made.digest


@given(st.data())
@settings(deadline=None)
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    raw = bytearray(record(ALICE).encoded)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    assert refusal(bytes(raw)) in set(Reason)


@given(st.binary(max_size=LARGEST + 10))
@settings(deadline=None)
def test_noise_is_refused(noise: bytes) -> None:
    assert refusal(noise) in {Reason.VERSION, Reason.SIZE, Reason.RUN}


def test_truncated_and_giant_are_refused_before_anything_is_read() -> None:
    raw = record(ALICE).encoded
    assert {refusal(raw[:size]) for size in range(len(raw))} == {Reason.SIZE}
    assert refusal(raw + b"\0") == Reason.SIZE
    assert refusal(raw + bytes(10**6)) == Reason.SIZE


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format": 2}, Reason.VERSION),
        ({"run": b"r" * 32}, Reason.RUN),
        ({"steps": b""}, Reason.SIZE),
        ({"steps": bytes(1001)}, Reason.SIZE),
        ({"steps": b"\x80"}, Reason.RANGE),
        ({"shift": 17}, Reason.RANGE),
        ({"quantisation": 3}, Reason.RANGE),
        ({"first_step": 1}, Reason.RANGE),
        ({"previous": b"p" * 32}, Reason.RANGE),
        ({"sequence": 1, "first_step": 5}, Reason.RANGE),
        ({"sequence": 2, "first_step": 1, "previous": b"p" * 32}, Reason.RANGE),
        ({"sequence": 2, "first_step": 2001, "previous": b"p" * 32}, Reason.RANGE),
        ({"sequence": 2**24, "first_step": LAST_STEP, "previous": b"p" * 32}, Reason.RANGE),
        ({"sequence": 2**32 - 1, "first_step": 2**64 - 1, "previous": b"p" * 32}, Reason.RANGE),
        ({"peer": peer_of(BOB)}, Reason.SIGNATURE),
        ({"peer": b"\xff" * 32}, Reason.SIGNATURE),
    ],
)
def test_signed_nonsense_is_refused_by_name(fields: dict[str, int | bytes], reason: Reason) -> None:
    assert refusal(forged(**fields)) == reason


def test_the_untouched_forgery_is_accepted() -> None:
    """So that each case above is refused for its field alone."""
    Record.decode(forged(), ID).verify()


def test_the_charters_largest_shift_binds() -> None:
    raw = record(ALICE, shift=5).encoded
    assert refusal(raw, largest_shift=4) == Reason.RANGE
    Record.decode(raw, ID, 5).verify()


def test_signing_refuses_what_reading_would() -> None:
    for steps in (b"", b"\x80", bytes(1001)):
        with pytest.raises(RecordError):
            record(ALICE, steps=steps)


def test_folding_adds_what_the_definition_says_and_takes_it_out_again() -> None:
    charter = charter_of(ALICE)
    made = chain(ALICE, 6)
    q = charter.pool.zero()
    for each in made:
        each.fold_into(q)
    assert torch.equal(q, q_by_definition(charter, made)) and q.abs().sum() > 0
    for each in made:
        each.fold_into(q, sign=-1)
    assert torch.equal(q, charter.pool.zero())


def test_the_largest_sum_cannot_wrap() -> None:
    """Steps, byte, shift and members at their bounds."""
    assert np.iinfo(np.int64).max > LAST_STEP * 127 * 2**16 * 4096
