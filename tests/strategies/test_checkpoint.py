"""Checkpoints: small, signed by those who computed them, and checked against the records later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from gossips import chain, charter_of, identity, introduce, q_by_definition, record
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.config import parse
from meadow.errors import ConfigError, FormatError, IdentityError, UpdateError
from meadow.strategies.charter import Charter
from meadow.strategies.checkpoint import Checkpoint, Verdict, absorb, audit
from meadow.strategies.ledger import Kind, Ledger
from meadow.strategies.peer_keys import peer_of
from meadow.strategies.records import Head, Record

PEOPLE = [identity(f"peer {number}") for number in range(8)]
ALICE, BOB, EVE = PEOPLE[:3]
CHARTER = charter_of(*PEOPLE)
HISTORY = chain(ALICE, 6) + chain(BOB, 4) + chain(EVE, 7)
MEMBERS = Ledger(CHARTER).members.keys()


def ledger_of(records: Sequence[Record], charter: Charter = CHARTER) -> Ledger:
    ledger = Ledger(charter)
    for each in records:
        ledger.add(Kind.RECORD, each.encoded)
    return ledger


def signed(ledger: Ledger) -> Checkpoint:
    checkpoint = Checkpoint.take(ledger)
    for who in PEOPLE[:3]:
        checkpoint = checkpoint.sign(who, ledger)
    return checkpoint


def test_round_trip() -> None:
    checkpoint = signed(ledger_of(HISTORY))
    read = Checkpoint.decode(checkpoint.encoded, CHARTER, MEMBERS)
    read.verify(MEMBERS, threshold=3)
    assert torch.equal(read.q, checkpoint.q) and read.cut == checkpoint.cut
    assert read.signatures == checkpoint.signatures and read.encoded == checkpoint.encoded


@pytest.mark.parametrize(("steps", "shift", "width"), [(b"\1", 0, 1), (b"\x81" * 200, 16, 4)])
def test_it_fits_in_17000_bytes_whatever_the_history(steps: bytes, shift: int, width: int) -> None:
    """At r = 64 with a shared core, for 8 peers that all count and 3 signatures."""
    charter = charter_of(*PEOPLE, rank=64)
    records = []
    for who in PEOPLE:
        head = Head()
        for _ in range(3):
            records.append(record(who, head, steps, shift))
            head = records[-1].head
    data = signed(ledger_of(records, charter)).encoded
    assert len(data) == 13 + 8 * 48 + 4096 * width + 3 * 72 <= 17_000


@given(st.integers(-(2**31) + 1, 2**31 - 1), st.integers(-200, 200))
@settings(deadline=None)
def test_any_q_travels_in_the_least_width(largest: int, other: int) -> None:
    q = CHARTER.pool.zero()
    q[0, 0, 0], q[0, 3, 1] = largest, other
    checkpoint = Checkpoint(CHARTER, {}, q)
    least = min(
        w for w in (1, 2, 3, 4) if all(-(256**w) <= 2 * v < 256**w for v in (largest, other))
    )
    assert len(checkpoint.encoded) == 13 + 16 * least
    assert torch.equal(Checkpoint.decode(checkpoint.encoded, CHARTER, MEMBERS).q, q)


def test_a_cut_far_behind_is_not_worth_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any member may ask for a signature, and the signer takes every later record out of Q."""
    checkpoint, full = Checkpoint.take(ledger_of(HISTORY[:-5])), ledger_of(HISTORY)
    monkeypatch.setattr("meadow.strategies.checkpoint.MOST_BEHIND", 5)
    assert checkpoint.sign(BOB, full).records == len(HISTORY) - 5
    monkeypatch.setattr("meadow.strategies.checkpoint.MOST_BEHIND", 4)
    with pytest.raises(UpdateError, match="over 4 records that follow .*take a newer one"):
        checkpoint.sign(BOB, full)


def test_as_many_witnesses_as_a_config_may_ask_for_can_sign() -> None:
    """And whoever asks them: more could be written down, and be read by nobody."""
    people = [identity(f"witness {number}") for number in range(64)]
    with pytest.raises(ConfigError, match="at most 63"):
        parse("[peer]\nwitnesses = 64")
    charter, most = charter_of(*people), parse("[peer]\nwitnesses = 63").peer.witnesses
    ledger = ledger_of(chain(people[0], 1), charter)
    checkpoint = Checkpoint.take(ledger)
    for who in people[: most + 1]:
        checkpoint = checkpoint.sign(who, ledger)
    read = Checkpoint.decode(checkpoint.encoded, charter, ledger.members)
    read.verify(ledger.members, threshold=most + 1)


def test_an_overflow_is_refused() -> None:
    q = CHARTER.pool.zero()
    q[0, 0, 0] = 2**31
    with pytest.raises(UpdateError, match="32 bits"):
        _ = Checkpoint(CHARTER, {}, q).encoded


def test_a_peer_signs_only_what_it_computed_itself() -> None:
    full = ledger_of(HISTORY)
    checkpoint = Checkpoint.take(full)
    with pytest.raises(UpdateError, match="do not count here"):
        checkpoint.sign(BOB, ledger_of(HISTORY[:-1]))
    with pytest.raises(UpdateError, match="own records"):
        replace(checkpoint, q=checkpoint.q + 1).sign(BOB, full)
    with pytest.raises(UpdateError, match="history"):
        checkpoint.sign(BOB, checkpoint.start(full))
    longer = ledger_of([*HISTORY, record(BOB, HISTORY[9].head)])
    checkpoint.sign(BOB, longer).verify(MEMBERS, threshold=1)


def test_the_threshold_counts_members_once() -> None:
    full = ledger_of(HISTORY)
    once = Checkpoint.take(full).sign(ALICE, full)
    with pytest.raises(IdentityError, match="2 are required"):
        once.sign(ALICE, full).verify(MEMBERS, threshold=2)
    stranger = once.sign(identity("stranger"), full)
    with pytest.raises(IdentityError, match="fails"):
        stranger.verify(MEMBERS, threshold=2)


@pytest.mark.parametrize("what", ["q", "cut", "charter", "signer"])
def test_what_was_not_signed_is_refused(what: str) -> None:
    good = signed(ledger_of(HISTORY))
    bob = peer_of(BOB)
    bad = {
        "q": replace(good, q=good.q + 1),
        "cut": replace(good, cut={**good.cut, bob: replace(good.cut[bob], digest=b"x" * 32)}),
        "charter": replace(good, charter=charter_of(*PEOPLE, largest_shift=3)),
        "signer": replace(good, signatures={peer_of(PEOPLE[5]): good.signatures[bob]}),
    }[what]
    good.verify(MEMBERS, threshold=1)
    with pytest.raises(IdentityError, match="fails"):
        bad.verify(MEMBERS, threshold=1)


@given(st.data())
@settings(deadline=None)
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    raw = bytearray(signed(ledger_of(HISTORY)).encoded)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises((FormatError, IdentityError)):
        Checkpoint.decode(bytes(raw), CHARTER, MEMBERS).verify(MEMBERS, threshold=3)


def test_other_files_are_refused() -> None:
    raw = signed(ledger_of(HISTORY)).encoded
    for size in range(len(raw)):
        with pytest.raises(FormatError):
            Checkpoint.decode(raw[:size], CHARTER, MEMBERS)
    with pytest.raises(FormatError, match="format 2"):
        Checkpoint.decode(b"\2" + raw[1:], CHARTER, MEMBERS)
    with pytest.raises(FormatError, match="belongs to run"):
        Checkpoint.decode(raw[:1] + bytes(8) + raw[9:], CHARTER, MEMBERS)
    with pytest.raises(FormatError, match="no known member"):
        Checkpoint.decode(raw, CHARTER, [peer_of(ALICE)])
    twin = peer_of(BOB)[:8] + bytes(24)
    with pytest.raises(FormatError, match="not only one"):
        Checkpoint.decode(raw, CHARTER, [*MEMBERS, twin])


def test_a_joiner_counts_on_and_later_has_it_all() -> None:
    """Introductions and records before, between and after; in the end equal to a full ledger."""
    full, friend = ledger_of(HISTORY), identity("friend")
    full.add(Kind.INTRODUCTION, introduce(BOB, friend))
    checkpoint = signed(full)
    joined = checkpoint.start(full)
    assert joined.state_id == full.state_id and joined.members == full.members
    for each in [*chain(friend, 2), record(BOB, HISTORY[9].head), record(EVE, HISTORY[16].head)]:
        assert joined.add(Kind.RECORD, each.encoded).kept
        full.add(Kind.RECORD, each.encoded)
    assert joined.state_id == full.state_id and joined.heads == full.heads

    history = ledger_of(HISTORY[:-1])
    before = joined.state_id
    assert absorb(joined, history, checkpoint).verdict is Verdict.INCOMPLETE
    assert joined.base is not None and joined.state_id == before
    history.add(Kind.RECORD, HISTORY[-1].encoded)
    assert absorb(joined, history, checkpoint).verdict is Verdict.AGREES
    assert joined.base is None and joined.state_id == full.state_id
    assert set(joined.items()) == set(full.items())
    assert torch.equal(joined.rebuild(), full.q)


def test_an_audit_finds_a_q_that_the_records_do_not_give() -> None:
    full = ledger_of(HISTORY)
    lie = replace(Checkpoint.take(full), q=full.q + 1)
    joined = lie.start(full)
    assert joined.state_id != full.state_id
    assert absorb(joined, ledger_of(HISTORY), lie).verdict is Verdict.DIFFERS
    assert joined.state_id == full.state_id


def test_an_audit_names_the_member_whose_record_is_another() -> None:
    full = ledger_of(HISTORY)
    head = replace(full.head(peer_of(BOB)), digest=b"x" * 32)
    lie = replace(Checkpoint.take(full), cut={**full.heads, peer_of(BOB): head})
    found = audit(full, lie)
    assert (found.verdict, found.peers) == (Verdict.DIFFERS, (peer_of(BOB),))


def test_a_fork_within_the_cut_is_mended_by_the_history() -> None:
    full = ledger_of(HISTORY)
    checkpoint = signed(full)
    joined = checkpoint.start(full)
    fork = record(EVE, HISTORY[12].head, b"\5")  # beside Eve's fourth
    full.add(Kind.RECORD, fork.encoded)
    (proof,) = [item for item in full.items() if item.kind is Kind.PROOF]
    joined.add(Kind.PROOF, proof.data)
    with pytest.raises(UpdateError, match="newer checkpoint"):
        _ = joined.state_id
    with pytest.raises(UpdateError, match="newer checkpoint"):
        Checkpoint.take(joined)
    history = Ledger(CHARTER)
    for item in full.items():
        history.add(item.kind, item.data)
    found = absorb(joined, history, checkpoint)
    assert (found.verdict, found.peers) == (Verdict.OVERTAKEN, (peer_of(EVE),))
    assert joined.state_id == full.state_id and joined.excluded == {peer_of(EVE): 3}
    assert torch.equal(joined.q, q_by_definition(CHARTER, HISTORY[:13]))
