"""Gossip's bytes: what is written is read, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from gossips import chain, charter_of, identity
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.client import gossip_messages as messages
from meadow.client.gossip_messages import MOST_BYTES, NEVER, Entry, Want
from meadow.errors import RecordError
from meadow.strategies.chain import Outcome
from meadow.strategies.ledger import Item, Kind, Ledger, record_item
from meadow.strategies.peer_keys import peer_of
from meadow.strategies.records import Reason

ALICE = identity("alice")
DIGEST = bytes(range(32))
keys = st.binary(min_size=32, max_size=32)
numbers = st.integers(0, 2**32 - 1)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    low, high = sorted((draw(numbers), draw(numbers)))
    return Entry(draw(keys), high, low, draw(numbers), draw(keys))


def listed(most: int = 6) -> st.SearchStrategy[list[Entry]]:
    unique = st.lists(entries(), max_size=most, unique_by=lambda entry: entry.peer)
    return unique.map(lambda found: sorted(found, key=lambda entry: entry.peer))


def reason(call: Callable[[], Any]) -> str:
    with pytest.raises(RecordError) as caught:
        call()
    return caught.value.reason


@given(st.booleans(), listed())
@settings(deadline=None)
def test_entries_round_trip(same: bool, found: list[Entry]) -> None:
    assert messages.decode_entries(messages.encode_entries(same, found)) == (same, found)


@given(listed(), st.data())
@settings(deadline=None)
def test_comparing_names_what_differs(mine: list[Entry], data: st.DataObject) -> None:
    """Whatever the nonce: only counts, forks and heads matter, not where a checkpoint begins."""
    nonce = data.draw(st.binary(min_size=8, max_size=8))
    changed = {entry.peer for entry in mine if data.draw(st.booleans())}
    theirs = [
        Entry(e.peer, e.count, e.count, e.end, bytes(x ^ 1 for x in e.head))
        if e.peer in changed
        else Entry(e.peer, e.count, e.count, e.end, e.head)
        for e in mine
    ]
    same, found = messages.differing(mine, messages.encode_comparison(theirs, nonce))
    assert same and {entry.peer for entry in found} == changed


@given(listed())
@settings(deadline=None)
def test_another_membership_gets_everything(mine: list[Entry]) -> None:
    asked = messages.encode_comparison([*mine, Entry(b"\xff" * 32)], bytes(8))
    assert messages.differing(mine, asked) == (False, mine)


@given(st.lists(st.tuples(st.sampled_from(Kind), keys, numbers, numbers), max_size=5))
@settings(deadline=None)
def test_wants_round_trip(fields: list[tuple[Kind, bytes, int, int]]) -> None:
    wants = [Want(*each) for each in fields]
    assert messages.decode_wants(messages.encode_wants(wants)) == wants


@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=300)), max_size=8))
@settings(deadline=None)
def test_items_round_trip(pairs: list[tuple[Kind, bytes]]) -> None:
    items = [Item(kind, data, DIGEST) for kind, data in pairs]
    assert messages.decode_items(messages.encode_items(items)) == pairs


def test_pages_fit_and_keep_the_order() -> None:
    items = [Item(Kind.RECORD, bytes([index % 251]) * 1177, DIGEST) for index in range(1500)]
    pages = list(messages.pages(items))
    assert [item for page in pages for item in page] == items and len(pages) == 4
    for page in pages:
        request = messages.seal(DIGEST, messages.encode_items(page))
        assert messages.decode_items(messages.unseal(DIGEST, request))


def test_outcomes_places_and_digests_round_trip() -> None:
    outcomes = list(Outcome)
    assert messages.decode_outcomes(messages.encode_outcomes(outcomes), 4) == outcomes
    assert messages.decode_places(messages.encode_places(DIGEST, [0, 7])) == (DIGEST, [0, 7])
    assert messages.decode_digests(DIGEST + bytes(32), 2) == [DIGEST, bytes(32)]


def test_an_entry_says_what_the_ledger_knows() -> None:
    ledger, made = Ledger(charter_of(ALICE)), chain(ALICE, 3)
    assert Entry.of(ledger, peer_of(ALICE)) == Entry(peer_of(ALICE), 0, 0, NEVER, bytes(32))
    for each in made:
        ledger.add(Kind.RECORD, record_item(each).data)
    assert Entry.of(ledger, peer_of(ALICE)) == Entry(peer_of(ALICE), 3, 0, NEVER, made[-1].digest)


def test_another_version_and_another_charter_are_refused_by_name() -> None:
    request = messages.seal(DIGEST, b"body")
    assert messages.unseal(DIGEST, request) == b"body"
    assert reason(lambda: messages.unseal(DIGEST, b"\2" + request[1:])) == Reason.VERSION
    assert reason(lambda: messages.unseal(DIGEST, b"")) == Reason.VERSION
    assert reason(lambda: messages.unseal(bytes(32), request)) == Reason.CHARTER
    assert reason(lambda: messages.unseal(DIGEST, request[:20])) == Reason.CHARTER
    giant = request + bytes(MOST_BYTES)
    assert reason(lambda: messages.unseal(DIGEST, giant)) == Reason.MALFORMED


ENTRY = Entry(DIGEST, 3, 1).encoded
MALFORMED: dict[str, Callable[[], Any]] = {
    "entries cut": lambda: messages.decode_entries(b"\0" + ENTRY[:-1]),
    "entries without flag": lambda: messages.decode_entries(b""),
    "entries with a wrong flag": lambda: messages.decode_entries(b"\2"),
    "an entry twice": lambda: messages.decode_entries(b"\1" + ENTRY + ENTRY),
    "an entry that contradicts itself": lambda: messages.decode_entries(
        b"\1" + Entry(DIGEST, 1, 3).encoded
    ),
    "too many entries": lambda: messages.decode_entries(
        messages.encode_entries(True, [Entry(n.to_bytes(32, "big")) for n in range(4097)])
    ),
    "a giant answer": lambda: messages.decode_items(bytes(MOST_BYTES + 1)),
    "a comparison cut": lambda: messages.differing([], bytes(39)),
    "a sketch cut": lambda: messages.differing([], bytes(41)),
    "wants cut": lambda: messages.decode_wants(bytes(40)),
    "a want of unknown kind": lambda: messages.decode_wants(b"\x09" + bytes(40)),
    "items cut in the head": lambda: messages.decode_items(b"\0\1"),
    "items cut in the data": lambda: messages.decode_items(b"\0\5\0abcd"),
    "an item of unknown kind": lambda: messages.decode_items(b"\x07\0\0"),
    "too few outcomes": lambda: messages.decode_outcomes(b"\0", 2),
    "an unknown outcome": lambda: messages.decode_outcomes(b"\x09", 1),
    "places cut": lambda: messages.decode_places(DIGEST + b"\0"),
    "no place's peer": lambda: messages.decode_places(b"abc"),
    "too many places": lambda: messages.decode_places(DIGEST + bytes(4 * 33)),
    "digests cut": lambda: messages.decode_digests(bytes(33), 1),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_called_so(name: str) -> None:
    assert reason(MALFORMED[name]) == Reason.MALFORMED
