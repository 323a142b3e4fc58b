"""Ledger and store: everything comes back, in whatever order it came, and damage is named."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gossips import chain, charter_of, identity, introduce, q_by_definition
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meadow.client.peer_memory import awaited, entry_of, read_ledger, recall, refuse_lost_records
from meadow.client.record_store import Entry, RecordStore
from meadow.errors import JournalError
from meadow.store import digest_of
from meadow.strategies.chain import Outcome
from meadow.strategies.ledger import Kind, Ledger
from meadow.strategies.peer_keys import peer_of

ALICE, BOB, EVE, JOE = (identity(name) for name in ("alice", "bob", "eve", "joe"))
CHARTER = charter_of(ALICE, BOB, EVE)
Offer = tuple[Kind, bytes]

RECORDS = [*chain(ALICE, 4), *chain(BOB, 3), *chain(EVE, 4), *chain(EVE, 4, salt=1), *chain(JOE, 2)]
OFFERS: list[Offer] = [(Kind.RECORD, each.encoded) for each in RECORDS]
OFFERS += [(Kind.INTRODUCTION, introduce(BOB, JOE))]


def live(folder: Path, offers: Sequence[Offer]) -> Ledger:
    """A ledger that takes in what it is offered, and keeps it as a peer does."""
    ledger = Ledger(CHARTER)
    with RecordStore.open(folder, CHARTER.run, peer_of(ALICE)) as store:
        for kind, data in offers:
            added = ledger.add(kind, data)
            if added.kept and added.item:
                store.append([entry_of(added.item)])
    return ledger


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(offers=st.permutations(OFFERS))
def test_a_ledger_is_recalled_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, offers: list[Offer]
) -> None:
    """Forks, gaps, strangers' records that were refused, introductions: all as before."""
    folder = tmp_path_factory.mktemp("peer")
    before = live(folder, offers)
    again = read_ledger(CHARTER, folder)
    assert again.state_id == before.state_id and again.members == before.members
    assert again.excluded == before.excluded == {peer_of(EVE): 0}
    assert again.heads == before.heads and not again.tally
    counted = [each for each in RECORDS if again.chain(each.peer).head.count > each.sequence]
    assert torch.equal(again.q, q_by_definition(CHARTER, counted))
    taken = {again.add(kind, data).outcome for kind, data in offers[:4]}
    assert taken <= {Outcome.KNOWN, Outcome.REFUSED, Outcome.NEW, Outcome.PENDING}


def test_a_record_signed_twice_is_one_entry() -> None:
    (each,) = chain(ALICE, 1)
    entry = entry_of(Ledger(CHARTER).add(Kind.RECORD, each.encoded).item or pytest.fail("refused"))
    assert entry.digest == each.digest == bytes.fromhex(digest_of(each.body))
    assert (entry.kind, entry.peer, entry.sequence) == ("record", peer_of(ALICE), 0)


def test_a_record_that_is_not_the_runs_is_refused_by_name(tmp_path: Path) -> None:
    """Whoever writes into the store by hand needs a signature."""
    (each,) = chain(BOB, 1)
    forged = each.encoded[:-1] + bytes([each.encoded[-1] ^ 1])
    with RecordStore.open(tmp_path, CHARTER.run, peer_of(ALICE)) as store:
        store.append([Entry("record", each.digest, each.peer, 0, forged)])
        with pytest.raises(JournalError, match="holds a record that is refused: .*not signed by"):
            recall(CHARTER, store)


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    live(tmp_path, OFFERS)
    with sqlite3.connect(tmp_path / "records.db") as database:
        database.execute("UPDATE entries SET data = zeroblob(120) WHERE place = 2")
    database.close()
    with pytest.raises(JournalError, match="damaged at entry 2"):
        read_ledger(CHARTER, tmp_path)


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="holds no records .*name the folder of a peer"):
        read_ledger(CHARTER, tmp_path)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_gap_among_own_records_is_refused_or_waited_for(tmp_path: Path, missing: int) -> None:
    """Of the newest, another might be signed; of what it follows, none ever is."""
    own = chain(ALICE, 3)
    live(tmp_path, [(Kind.RECORD, each.encoded) for each in own])
    with RecordStore.open(tmp_path, CHARTER.run, peer_of(ALICE)) as store:
        ledger = recall(CHARTER, store)
        refuse_lost_records(ledger, store, peer_of(ALICE))
        assert not awaited(ledger, store, peer_of(ALICE))
        store.replace([("record", own[missing].digest)])
        ledger = recall(CHARTER, store)
        assert awaited(ledger, store, peer_of(ALICE)) == range(missing, 3)
        if missing == 2:
            with pytest.raises(JournalError, match="signed 3 records and 2 of them are here"):
                refuse_lost_records(ledger, store, peer_of(ALICE))
        else:
            refuse_lost_records(ledger, store, peer_of(ALICE))
            ledger.add(Kind.RECORD, own[1].encoded)
            assert not awaited(ledger, store, peer_of(ALICE))


def test_a_fork_of_ones_own_is_refused_and_anothers_is_not(tmp_path: Path) -> None:
    live(tmp_path, OFFERS)
    with RecordStore.open(tmp_path, CHARTER.run, peer_of(ALICE)) as store:
        ledger = recall(CHARTER, store)
        refuse_lost_records(ledger, store, peer_of(ALICE))
        with pytest.raises(JournalError, match="two different records 0 of this peer"):
            refuse_lost_records(ledger, store, peer_of(EVE))
