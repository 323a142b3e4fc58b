"""Gossip between a few peers: what one exchange brings, whom it blames, and what it survives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from random import Random

import pytest
from gossips import chain, charter_of, identity, introduce, record
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.client import gossip as gossip_module
from meadow.client import gossip_messages as messages
from meadow.client.gossip import Gossip
from meadow.client.gossip_messages import Entry
from meadow.errors import PeerError, RecordError
from meadow.identity import Identity
from meadow.simulation.peer_network import PeerNetwork
from meadow.strategies.charter import Charter
from meadow.strategies.ledger import Base, Item, Kind, Ledger
from meadow.strategies.peer_keys import peer_of
from meadow.strategies.records import Reason, Record

ALICE, BOB, CAROL, EVE = map(identity, ("alice", "bob", "carol", "eve"))
CHARTER = charter_of(ALICE, BOB, CAROL, EVE)


class Town:
    """Peers of one run on one network."""

    def __init__(self, *people: Identity, charter: Charter = CHARTER) -> None:
        self.network = PeerNetwork()
        self.charter = charter
        self.kept: dict[bytes, list[Item]] = {}
        self.of = {peer_of(who): self.settle(who) for who in people}

    def settle(self, who: Identity, ledger: Ledger | None = None) -> Gossip:
        me = peer_of(who)
        kept = self.kept.setdefault(me, [])
        transport = self.network.transport(me)
        made = Gossip(ledger or Ledger(self.charter), transport, Random(me[0]), me, kept.extend)
        self.network.join(me, made.handle)
        return made

    def __getitem__(self, who: Identity) -> Gossip:
        return self.of[peer_of(who)]


def learn(gossip: Gossip, records: Sequence[Record]) -> None:
    for each in records:
        gossip.ledger.add(Kind.RECORD, each.encoded)


def equal(*gossips: Gossip) -> bool:
    ledgers = [gossip.ledger for gossip in gossips]
    first = ledgers[0]
    return all(
        (each.state_id, each.heads, each.excluded, each.members.keys())
        == (first.state_id, first.heads, first.excluded, first.members.keys())
        for each in ledgers
    )


def test_one_exchange_brings_both_sides_to_the_union() -> None:
    town = Town(ALICE, BOB)
    learn(town[ALICE], chain(ALICE, 5) + chain(CAROL, 2))
    learn(town[BOB], chain(BOB, 3) + chain(CAROL, 4))
    done = town[ALICE].sync(peer_of(BOB))
    assert (done.pulled, done.pushed, done.forks, done.complete) == (5, 5, 0, True)
    assert equal(town[ALICE], town[BOB])
    assert {peer: head.count for peer, head in town[BOB].ledger.heads.items()} == {
        peer_of(ALICE): 5,
        peer_of(BOB): 3,
        peer_of(CAROL): 4,
    }
    assert len(town.kept[peer_of(ALICE)]) == len(town.kept[peer_of(BOB)]) == 5


def test_equal_peers_exchange_one_question_and_one_byte() -> None:
    town = Town(ALICE, BOB)
    for who in (ALICE, BOB):
        learn(town[who], chain(ALICE, 50))
    assert town[ALICE].sync(peer_of(BOB)).complete
    assert town.network.calls == {"compare": 1}
    assert town.network.traffic[peer_of(BOB)] == 33 + 40 + 4 * 4 + 1


def test_an_outbound_only_peer_gives_and_takes_through_whom_it_can_call() -> None:
    town = Town(ALICE, BOB, CAROL, charter=charter_of(ALICE, BOB, CAROL, silent=(ALICE, BOB)))
    learn(town[ALICE], chain(ALICE, 3))
    learn(town[BOB], chain(BOB, 3))
    assert town[CAROL].partners(9) == [] and town[ALICE].partners(9) == [peer_of(CAROL)]
    town[ALICE].sync(peer_of(CAROL))
    town[BOB].sync(peer_of(CAROL))
    town[ALICE].sync(peer_of(CAROL))
    assert equal(town[ALICE], town[BOB], town[CAROL])


def test_introductions_spread_before_the_records_of_those_introduced() -> None:
    town, joiner, friend = Town(ALICE, BOB, CAROL), identity("joiner"), identity("friend")
    for each in (introduce(ALICE, joiner), introduce(joiner, friend)):
        assert town[ALICE].publish(Kind.INTRODUCTION, each).kept
    learn(town[ALICE], chain(friend, 3))
    town[ALICE].sync(peer_of(BOB))  # given
    town[CAROL].sync(peer_of(BOB))  # fetched
    assert equal(town[ALICE], town[BOB], town[CAROL])
    assert town[CAROL].ledger.head(peer_of(friend)).count == 3


def test_a_joiner_meets_the_members_before_it_fetches_records() -> None:
    town, joiner, friend = Town(ALICE), identity("joiner"), identity("friend")
    for each in (introduce(ALICE, joiner), introduce(joiner, friend)):
        town[ALICE].publish(Kind.INTRODUCTION, each)
    learn(town[ALICE], chain(ALICE, 3) + chain(friend, 2))
    newcomer = town.settle(joiner)
    newcomer.meet(peer_of(ALICE))
    assert newcomer.ledger.members.keys() == town[ALICE].ledger.members.keys()
    assert not newcomer.ledger.heads
    assert newcomer.sync(peer_of(ALICE)).complete and equal(newcomer, town[ALICE])


def test_fresh_records_are_pushed_on() -> None:
    town = Town(ALICE, BOB, CAROL)
    town[ALICE].publish(Kind.RECORD, record(ALICE).encoded)
    assert town[ALICE].spread(1) == []
    receiver = BOB if town[BOB].ledger.heads else CAROL
    town[receiver].spread(3)
    assert equal(town[ALICE], town[BOB], town[CAROL])
    calls = town.network.calls.copy()
    town[ALICE].spread(3)
    assert town.network.calls == calls, "once"


def test_who_is_not_reached_is_reported_and_gets_it_later() -> None:
    town = Town(ALICE, BOB)  # Carol and Eve are away
    town[ALICE].publish(Kind.RECORD, record(ALICE).encoded)
    assert len(town[ALICE].spread(3)) == 2
    town.of[peer_of(CAROL)] = town.settle(CAROL)
    town[CAROL].sync(peer_of(BOB))
    assert equal(town[ALICE], town[BOB], town[CAROL])


def forked(at: int, lengths: tuple[int, int]) -> tuple[list[Record], list[Record]]:
    trunk = chain(EVE, at)
    head = trunk[-1].head if trunk else None
    one, other = (chain(EVE, n, head, salt + 1) for salt, n in enumerate(lengths))
    return trunk + one, trunk + other


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=40)
def test_two_long_chains_are_cut_where_they_part(at: int, one: int, other: int, swap: bool) -> None:
    town = Town(ALICE, BOB)
    for who, records in zip((ALICE, BOB), forked(at, (one, other)), strict=True):
        learn(town[who], records)
    caller, called = (BOB, ALICE) if swap else (ALICE, BOB)
    town[caller].sync(peer_of(called))
    assert equal(town[ALICE], town[BOB])
    assert town[ALICE].ledger.excluded == {peer_of(EVE): at}


def test_the_search_for_a_fork_takes_few_questions() -> None:
    town = Town(ALICE, BOB)
    for who, records in zip((ALICE, BOB), forked(777, (1500, 1223)), strict=True):
        learn(town[who], records)
    assert town[BOB].sync(peer_of(ALICE)).forks == 1
    assert town[ALICE].ledger.excluded == town[BOB].ledger.excluded == {peer_of(EVE): 777}
    assert town.network.calls["digests"] == 3  # 32 places each: 32^3 > 2000


def test_a_proof_reaches_those_who_heard_only_one_side() -> None:
    town = Town(ALICE, BOB, CAROL)
    one, other = forked(3, (4, 2))
    learn(town[ALICE], one + other)
    learn(town[BOB], one)
    town[BOB].sync(peer_of(ALICE))
    assert town[BOB].spread(2)  # Eve is away; the proof is pushed on at once
    town[CAROL].sync(peer_of(ALICE))
    assert equal(town[ALICE], town[BOB], town[CAROL])
    assert [item.kind for item in town.kept[peer_of(BOB)]] == [Kind.PROOF]


def test_strangers_and_malformed_requests_are_refused_by_name_and_counted() -> None:
    town = Town(ALICE)
    alice, bob = town[ALICE], peer_of(BOB)
    learn(alice, chain(ALICE, 2))
    before = list(alice.ledger.items())
    with pytest.raises(PeerError, match="introduce"):
        alice.handle(peer_of(identity("stranger")), "compare", b"")
    good = messages.seal(CHARTER.digest, b"")
    for verb, request, reason in [
        ("steal", good, Reason.MALFORMED),
        ("pull", good + b"x", Reason.MALFORMED),
        ("compare", good, Reason.MALFORMED),
        ("push", good + bytes(messages.MOST_BYTES), Reason.MALFORMED),
        ("pull", b"\2" + good[1:], Reason.VERSION),
        ("digests", messages.seal(bytes(32), b""), Reason.CHARTER),
    ]:
        with pytest.raises(RecordError) as caught:
            alice.handle(bob, verb, request)
        assert caught.value.reason == reason
    pushed = messages.seal(CHARTER.digest, messages.encode_items([Item(Kind.RECORD, b"x", bob)]))
    assert alice.handle(bob, "push", pushed) == b"\3"
    assert {key: alice.ledger.tally[key] for key in alice.ledger.tally if key[1] != b""} == {
        (Reason.MALFORMED, bob): 4,
        (Reason.VERSION, bob): 2,
        (Reason.CHARTER, bob): 1,
    }
    assert alice.ledger.tally[Reason.STRANGER, b""] == 1
    assert list(alice.ledger.items()) == before


@given(st.sampled_from(["compare", "pull", "push", "digests"]), st.binary(max_size=200))
@settings(deadline=None)
def test_no_request_does_more_than_be_refused(verb: str, body: bytes) -> None:
    alice = Town(ALICE)[ALICE]
    try:
        answer = alice.handle(peer_of(BOB), verb, messages.seal(CHARTER.digest, body))
    except RecordError as error:
        assert alice.ledger.tally[error.reason, peer_of(BOB)] == 1
    else:
        assert len(answer) <= messages.MOST_BYTES
    assert not list(alice.ledger.items())


class Liar:
    """Answers from a table; what is not in it as an honest peer with `ledger` would."""

    def __init__(self, town: Town, who: Identity, answers: dict[str, bytes]) -> None:
        honest = town.settle(who)
        self.ledger = honest.ledger
        town.network.join(
            peer_of(who),
            lambda caller, verb, body: (
                answers[verb] if verb in answers else honest.handle(caller, verb, body)
            ),
        )


ENTRY = Entry(peer_of(CAROL), count=2**24, head=b"x" * 32)


@pytest.mark.parametrize(
    "answers",
    [
        {"compare": b"\7"},
        {"compare": b"\1" + ENTRY.encoded[:-1]},
        {"compare": b"\1" + ENTRY.encoded, "pull": b"\0"},
        {"compare": b"\1" + ENTRY.encoded, "pull": bytes(messages.MOST_BYTES + 1)},
        {"compare": b"\1" + Entry(peer_of(ALICE)).encoded, "push": b""},
        {"compare": b"\1" + Entry(peer_of(ALICE), 2, head=b"x" * 32).encoded, "digests": b"x"},
    ],
)
def test_answers_that_cannot_be_read_are_counted_and_cost_nothing(
    answers: dict[str, bytes],
) -> None:
    town = Town(ALICE)
    Liar(town, BOB, answers)
    learn(town[ALICE], chain(ALICE, 2))
    before = list(town[ALICE].ledger.items())
    with pytest.raises(PeerError, match="cannot be read"):
        town[ALICE].sync(peer_of(BOB))
    assert town[ALICE].ledger.tally == {("new", b""): 2, (Reason.MALFORMED, peer_of(BOB)): 1}
    assert list(town[ALICE].ledger.items()) == before


@pytest.mark.parametrize("count", [1, 3, 5, 2**32 - 1])
def test_a_peer_that_announces_what_it_has_not_is_left_alone(count: int) -> None:
    """Whether longer or another chain than Alice's: a few calls, and nothing changes."""
    town = Town(ALICE)
    entry = Entry(peer_of(CAROL), count, head=b"x" * 32, end=count)
    Liar(town, BOB, {"compare": b"\1" + entry.encoded})
    learn(town[ALICE], chain(CAROL, 3))
    before = list(town[ALICE].ledger.items())
    done = town[ALICE].sync(peer_of(BOB))
    assert not done.complete and done.pulled == 0
    assert list(town[ALICE].ledger.items()) == before
    assert sum(town.network.calls.values()) < 10


def test_a_crowd_of_invented_members_costs_two_calls() -> None:
    town = Town(ALICE)
    crowd = [Entry(number.to_bytes(32, "big"), 5) for number in range(4096)]
    Liar(town, BOB, {"compare": messages.encode_entries(False, crowd)})
    assert not town[ALICE].sync(peer_of(BOB)).complete
    assert town.network.calls["pull"] == 1 and len(town[ALICE].ledger.members) == 4


def test_forged_records_in_an_answer_are_blamed_on_who_gave_them() -> None:
    town = Town(ALICE)
    forged = record(CAROL).body + bytes(64)
    page = messages.encode_items([Item(Kind.RECORD, forged, peer_of(CAROL))])
    Liar(town, BOB, {"compare": b"\1" + ENTRY.encoded, "pull": page})
    assert not town[ALICE].sync(peer_of(BOB)).complete
    assert town[ALICE].ledger.tally == {(Reason.SIGNATURE, peer_of(BOB)): 1}


def test_long_histories_come_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MOST_BYTES", 4000)
    town = Town(ALICE, BOB)
    learn(town[ALICE], chain(ALICE, 90))
    learn(town[BOB], chain(BOB, 90))
    done = town[BOB].sync(peer_of(ALICE))
    assert (done.pulled, done.pushed, done.complete) == (90, 90, True)
    assert equal(town[ALICE], town[BOB])
    assert town.network.calls["pull"] > 3 and town.network.calls["push"] > 3


def test_one_exchange_is_bounded_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MOST_BYTES", 4000)
    monkeypatch.setattr(gossip_module, "MOST_PAGES", 2)
    town = Town(ALICE, BOB)
    learn(town[ALICE], chain(ALICE, 90))
    learn(town[BOB], chain(BOB, 90))
    exchanges = 1
    while not town[ALICE].sync(peer_of(BOB)).complete:
        exchanges += 1
    assert 1 < exchanges < 10 and equal(town[ALICE], town[BOB])


def test_a_peer_that_answers_late_holds_nobody_up_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each call within its time, and one record in each answer: there is no end of it."""
    monkeypatch.setattr(messages, "MOST_BYTES", 500)
    town, seconds = Town(ALICE, BOB, CAROL, EVE), [0.0]
    learn(town[BOB], chain(BOB, 90))
    learn(town[CAROL], chain(CAROL, 1))
    alice, call = town[ALICE], town.network.deliver

    def late(caller: bytes, peer: bytes, verb: str, body: bytes) -> bytes:
        seconds[0] += 9.0 * (peer == peer_of(BOB))
        return call(caller, peer, verb, body)

    monkeypatch.setattr(town.network, "deliver", late)
    alice._clock = lambda: seconds[0]
    with pytest.raises(PeerError, match="is slow: an exchange took over 120 s"):
        alice.sync(peer_of(BOB))
    assert seconds[0] < 140 and 5 < alice.ledger.head(peer_of(BOB)).count < 40
    assert alice.sync(peer_of(CAROL)).complete, "whoever else is asked has all its time"
    alice.publish(Kind.RECORD, record(ALICE).encoded)
    assert alice.spread(3) == []


def test_a_ledger_from_a_checkpoint_gossips_what_it_has() -> None:
    """It takes the tail and gives its own; what lies before the checkpoint it cannot give."""
    town = Town(ALICE, CAROL)
    records = chain(ALICE, 8)
    learn(town[ALICE], records)
    cut = {peer_of(ALICE): records[4].head}
    base = Base(cut, town[ALICE].ledger.q_at(cut))
    town.of[peer_of(BOB)] = town.settle(BOB, Ledger(CHARTER, base))
    learn(town[BOB], chain(BOB, 2))
    assert town[BOB].sync(peer_of(ALICE)).complete and equal(town[ALICE], town[BOB])
    town[CAROL].sync(peer_of(BOB))
    assert town[CAROL].ledger.heads == {peer_of(BOB): chain(BOB, 2)[-1].head}
    town[CAROL].sync(peer_of(ALICE))
    assert equal(town[ALICE], town[CAROL])


@pytest.mark.parametrize(("base", "forks"), [(3, 1), (7, 0)])
def test_a_fork_is_searched_down_to_the_checkpoint_and_no_further(base: int, forks: int) -> None:
    """Below it Bob cannot prove anything; who has the records can, and then he hears of it."""
    town = Town(ALICE, CAROL)
    one, other = forked(5, (5, 6))
    learn(town[ALICE], one)
    learn(town[CAROL], other)
    cut = {peer_of(EVE): other[base - 1].head}
    bob = town.settle(BOB, Ledger(CHARTER, Base(cut, town[CAROL].ledger.q_at(cut))))
    learn(bob, other[base:])
    assert bob.sync(peer_of(ALICE)).forks == forks
    assert bool(bob.ledger.excluded) == bool(forks)
    town[CAROL].sync(peer_of(ALICE))
    bob.sync(peer_of(ALICE))
    assert bob.ledger.excluded == town[ALICE].ledger.excluded == {peer_of(EVE): 5}
    assert bob.ledger.overtaken == ([] if forks else [peer_of(EVE)])


def test_peers_that_sync_with_each_other_at_once_do_not_wait_for_each_other() -> None:
    """The lock is not held while the other side is called."""
    town = Town(ALICE, BOB)
    learn(town[ALICE], chain(ALICE, 30))
    learn(town[BOB], chain(BOB, 30))
    threads = [
        threading.Thread(target=town[one].sync, args=(peer_of(other),), daemon=True)
        for one, other in ((ALICE, BOB), (BOB, ALICE)) * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert equal(town[ALICE], town[BOB])
