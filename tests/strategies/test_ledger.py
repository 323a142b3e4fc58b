"""The ledger: one state for one set, whatever the order, and every refusal counted."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from gossips import (
    chain,
    charter_of,
    counted_by_definition,
    identity,
    introduce,
    q_by_definition,
    record,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.errors import UpdateError
from meadow.strategies import chain as chain_module
from meadow.strategies.chain import Outcome
from meadow.strategies.ledger import Base, Kind, Ledger
from meadow.strategies.peer_keys import peer_of
from meadow.strategies.records import Head, Reason, Record

ALICE, BOB, EVE = identity("alice"), identity("bob"), identity("eve")
CHARTER = charter_of(ALICE, BOB, EVE)


def ledger_of(records: Sequence[Record]) -> Ledger:
    ledger = Ledger(CHARTER)
    for each in records:
        ledger.add(Kind.RECORD, each.encoded)
    return ledger


def counts(ledger: Ledger) -> dict[bytes, int]:
    return {peer: head.count for peer, head in ledger.heads.items()}


def fork(length: int, at: int, longer: int = 3) -> list[Record]:
    """Eve's chain of `length`, and another that leaves it after its first `at` records."""
    one = chain(EVE, length)
    return one + chain(EVE, longer, one[at - 1].head if at else None, salt=1)


@st.composite
def histories(draw: st.DrawFn) -> list[Record]:
    """Honest chains, and Eve's: forks, forks of forks, loose ends; with holes, in disorder."""
    eve = chain(EVE, 5)
    for salt in range(draw(st.integers(0, 4))):
        head = draw(st.sampled_from([None, *(each.head for each in eve)]))
        eve += chain(EVE, draw(st.integers(1, 4)), head, salt + 1)
    for sequence in draw(st.lists(st.integers(1, 6), max_size=3)):
        eve.append(record(EVE, Head(sequence, 2 * sequence, b"nothing".ljust(32))))
    everything = chain(ALICE, 4) + chain(BOB, 3) + eve
    keep = draw(st.lists(st.sampled_from(range(len(everything))), max_size=40))
    return [everything[index] for index in keep]


@given(histories(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_state_is_that_of_the_set(records: list[Record], random: random.Random) -> None:
    """Against the definition, in two orders, with duplicates."""
    ledger = ledger_of(records)
    shuffled = records * 2
    random.shuffle(shuffled)
    other = ledger_of(shuffled)
    by_definition = q_by_definition(CHARTER, records)
    assert torch.equal(ledger.q, by_definition) and torch.equal(other.q, by_definition)
    lengths = {p: len(found) for p, found in counted_by_definition(records).items() if found}
    assert counts(ledger) == counts(other) == lengths
    assert ledger.state_id == other.state_id == CHARTER.pool.state_id(by_definition)
    assert torch.equal(ledger.rebuild(), by_definition)


@given(histories())
@settings(deadline=None)
def test_what_a_ledger_holds_makes_the_same_ledger(records: list[Record]) -> None:
    ledger = ledger_of(records)
    copy = Ledger(CHARTER)
    for item in ledger.items():
        assert copy.add(item.kind, item.data).kept
    assert copy.state_id == ledger.state_id and copy.excluded == ledger.excluded
    assert list(copy.items()) == list(ledger.items())


def test_outcomes_and_their_tally() -> None:
    one, two, three = chain(ALICE, 3)
    ledger = Ledger(CHARTER)
    outcomes = [
        ledger.add(Kind.RECORD, each.encoded, b"sender").outcome for each in (one, three, one, two)
    ]
    assert outcomes == [Outcome.NEW, Outcome.PENDING, Outcome.KNOWN, Outcome.NEW]
    assert ledger.tally == {
        ("new", b"sender"): 2,
        ("pending", b"sender"): 1,
        ("known", b"sender"): 1,
    }
    assert ledger.head(peer_of(ALICE)) == three.head


def test_a_signature_made_anew_is_no_second_record() -> None:
    """And known bytes with a broken signature change nothing."""
    made = record(ALICE)
    ledger = ledger_of([made])
    assert ledger.add(Kind.RECORD, made.body + bytes(64)).outcome is Outcome.KNOWN
    assert not ledger.excluded and [item.data for item in ledger.items()] == [made.encoded]


def test_refusals_are_counted_by_reason_and_sender() -> None:
    stranger = identity("stranger")
    good = record(ALICE).encoded
    ledger = Ledger(charter_of(ALICE, largest_shift=2))
    for data, kind in [
        (b"\2" + good, Kind.RECORD),
        (good[:50], Kind.RECORD),
        (good[:-1] + bytes([good[-1] ^ 1]), Kind.RECORD),
        (record(ALICE, shift=3).encoded, Kind.RECORD),
        (record(stranger).encoded, Kind.RECORD),
        (good[:1] + bytes(32) + good[33:], Kind.RECORD),
        (introduce(stranger, BOB), Kind.INTRODUCTION),
        (good + good, Kind.PROOF),
        (good, Kind.PROOF),
        (good + record(ALICE, steps=b"\3").encoded[:-64] + bytes(64), Kind.PROOF),
    ]:
        added = ledger.add(kind, data, b"sender")
        assert added.outcome is Outcome.REFUSED and added.error is not None and not added.kept
    assert ledger.tally == {
        (Reason.VERSION, b"sender"): 1,
        (Reason.SIZE, b"sender"): 2,
        (Reason.SIGNATURE, b"sender"): 2,
        (Reason.RANGE, b"sender"): 1,
        (Reason.STRANGER, b"sender"): 2,
        (Reason.RUN, b"sender"): 1,
        (Reason.PROOF, b"sender"): 1,
    }
    assert not list(ledger.items()) and torch.equal(ledger.q, CHARTER.pool.zero())


def test_a_stranger_becomes_a_member_by_a_chain_of_introductions() -> None:
    first, second = identity("first"), identity("second")
    ledger = Ledger(CHARTER)
    made = record(second).encoded
    assert ledger.add(Kind.RECORD, made).outcome is Outcome.REFUSED
    assert ledger.add(Kind.INTRODUCTION, introduce(first, second)).outcome is Outcome.REFUSED
    assert ledger.add(Kind.INTRODUCTION, introduce(BOB, first)).kept
    assert ledger.add(Kind.INTRODUCTION, introduce(first, second)).kept
    assert ledger.add(Kind.INTRODUCTION, introduce(ALICE, second)).outcome is Outcome.KNOWN
    assert ledger.add(Kind.RECORD, made).outcome is Outcome.NEW
    assert peer_of(second) in ledger.members and len(ledger.members) == 5


def test_membership_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meadow.strategies.ledger.MOST_MEMBERS", 4)
    ledger = Ledger(CHARTER)
    assert ledger.add(Kind.INTRODUCTION, introduce(ALICE, identity("fourth"))).kept
    refused = ledger.add(Kind.INTRODUCTION, introduce(ALICE, identity("fifth")))
    assert refused.error is not None and refused.error.reason is Reason.FULL


def test_a_record_that_reveals_a_fork_is_passed_on_as_its_proof() -> None:
    records = fork(3, 1, longer=1)
    ledger = ledger_of(records[:3])
    added = ledger.add(Kind.RECORD, records[3].encoded)
    assert added.item is not None and added.item.kind is Kind.PROOF
    assert Ledger(CHARTER).add(Kind.PROOF, added.item.data).outcome is Outcome.NEW


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_fork_excludes_from_its_point_on(at: int) -> None:
    records = fork(6, at)
    ledger = ledger_of(records)
    assert ledger.excluded == {peer_of(EVE): at}
    assert counts(ledger).get(peer_of(EVE), 0) == at
    assert torch.equal(ledger.q, q_by_definition(CHARTER, records[:at]))
    after = ledger.add(Kind.RECORD, records[5].encoded)
    assert after.outcome is (Outcome.KNOWN if at == 5 else Outcome.REFUSED)


def test_a_smaller_proof_replaces_a_larger_one() -> None:
    main = chain(EVE, 8)
    late, early = record(EVE, main[5].head, b"\5"), record(EVE, main[2].head, b"\6")
    ledger = ledger_of([*main, late])
    assert ledger.excluded[peer_of(EVE)] == 6
    ledger.add(Kind.RECORD, early.encoded)
    assert ledger.excluded[peer_of(EVE)] == 3
    proof = main[6].encoded + late.encoded
    assert ledger.add(Kind.PROOF, proof).outcome is Outcome.KNOWN
    assert ledger.excluded[peer_of(EVE)] == 3
    assert torch.equal(ledger.q, q_by_definition(CHARTER, main[:3]))


def test_a_proof_is_taken_however_far_ahead_and_however_much_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chain_module, "MOST_PENDING", 2)
    main = chain(EVE, 9)
    ledger = ledger_of([main[2], main[4]])
    proof = main[8].encoded + record(EVE, main[7].head, b"\5").encoded
    assert ledger.add(Kind.PROOF, proof).outcome is Outcome.NEW
    for each in main:
        ledger.add(Kind.RECORD, each.encoded)
    assert counts(ledger) == {peer_of(EVE): 8}


def test_what_waits_is_bounded_and_the_furthest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "MOST_PENDING", 3)
    records = chain(ALICE, 8)
    ledger = ledger_of([records[index] for index in (2, 4, 6)])
    refused = ledger.add(Kind.RECORD, records[7].encoded)
    assert refused.error is not None and refused.error.reason is Reason.AHEAD
    assert ledger.add(Kind.RECORD, records[1].encoded).outcome is Outcome.PENDING
    assert [item.sequence for item in ledger.items()] == [1, 2, 4]
    for each in records:
        ledger.add(Kind.RECORD, each.encoded)
    assert counts(ledger) == {peer_of(ALICE): 8}


def test_without_a_peer() -> None:
    records = chain(ALICE, 3) + chain(BOB, 2)
    ledger = ledger_of(records)
    assert torch.equal(ledger.without(peer_of(BOB)), q_by_definition(CHARTER, records[:3]))
    assert torch.equal(ledger.q, q_by_definition(CHARTER, records))


def test_q_at_a_cut() -> None:
    records = chain(ALICE, 4) + chain(BOB, 2)
    ledger = ledger_of(records)
    cut = {peer_of(ALICE): records[1].head}
    assert torch.equal(ledger.q_at(cut), q_by_definition(CHARTER, records[:2]))
    assert torch.equal(ledger.q_at(ledger.heads), ledger.q)
    with pytest.raises(UpdateError, match="do not count here"):
        ledger.q_at({peer_of(ALICE): record(ALICE).head})


def test_overflow_is_refused_and_never_wraps() -> None:
    """2^31 is not reached by wrapping: the integers stay exact beyond it."""
    steps = b"\x81" * 1000  # -127
    records, head = [], Head()
    for _ in range(60):
        records.append(record(ALICE, head, steps, shift=16))
        head = records[-1].head
    ledger = ledger_of(records)
    assert int(ledger.q.sum()) == 60 * 1000 * 127 * 2**16
    with pytest.raises(UpdateError, match="32 bits"):
        _ = ledger.state_id


def test_a_ledger_from_a_base_counts_on_from_it() -> None:
    records = chain(EVE, 6) + chain(BOB, 2)
    full = ledger_of(records)
    cut = {peer_of(EVE): records[3].head}
    short = Ledger(CHARTER, Base(cut, full.q_at(cut)))
    assert counts(short) == {peer_of(EVE): 4}
    past = short.add(Kind.RECORD, records[1].encoded)
    assert past.error is not None and past.error.reason is Reason.PAST
    for each in reversed(records[4:]):
        assert short.add(Kind.RECORD, each.encoded).kept
    assert short.state_id == full.state_id and short.heads == full.heads
    with pytest.raises(UpdateError, match="history"):
        short.rebuild()
    with pytest.raises(UpdateError, match="before the checkpoint"):
        short.q_at({peer_of(EVE): records[1].head})


def test_a_fork_below_the_base_makes_its_state_unknown() -> None:
    records = chain(EVE, 6)
    cut = {peer_of(EVE): records[3].head}
    short = Ledger(CHARTER, Base(cut, ledger_of(records).q_at(cut)))
    short.add(Kind.RECORD, records[4].encoded)
    proof = records[1].encoded + record(EVE, records[0].head, b"\5").encoded
    assert short.add(Kind.PROOF, proof).outcome is Outcome.NEW
    assert short.overtaken == [peer_of(EVE)]
    with pytest.raises(UpdateError, match="newer checkpoint"):
        _ = short.state_id
