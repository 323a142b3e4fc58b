"""Whatever happens on the way, honest peers end with one state, and it is the union's.

Hypothesis drives honest peers, two that sign conflicting records, a network that loses, duplicates,
reorders and splits, and peers that join and leave.  Then the network heals, everyone makes a few
exchanges, and the states must be equal to each other and to the state by definition.
"""

from __future__ import annotations

from random import Random

import pytest
import torch
from gossips import charter_of, identity, introduce, q_by_definition, record
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meadow.client.gossip import Gossip
from meadow.errors import PeerError
from meadow.identity import Identity
from meadow.simulation.peer_network import PeerNetwork
from meadow.strategies.ledger import Item, Kind, Ledger
from meadow.strategies.peer_keys import peer_of
from meadow.strategies.records import Head, Record

FOUNDERS = [identity(f"founder {number}") for number in range(3)]  # the last one only calls others
CHEATERS = [identity(f"cheater {number}") for number in range(2)]
JOINERS = [identity(f"joiner {number}") for number in range(4)]  # the last one cheats
HONEST = FOUNDERS + JOINERS[:3]
CHARTER = charter_of(*FOUNDERS, *CHEATERS, silent=FOUNDERS[2:])
FORKERS = [*CHEATERS, JOINERS[3]]
STEPS = st.sampled_from([b"\1", b"\2\3", b"\xfe", b"\x7f\x81\0"])
EVERY_ROUND = 8  # exchanges that each peer makes with every other after the network has healed


class GossipMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loss = Random(0)
        self.loss_rate = 0.0
        self.sides: dict[bytes, int] = {}
        self.network = PeerNetwork(self.is_lost)
        self.gossips: dict[bytes, Gossip] = {}
        self.away: dict[bytes, Gossip] = {}
        self.stored: dict[bytes, list[Item]] = {}
        self.made: dict[bytes, list[Record]] = {peer_of(who): [] for who in FORKERS}
        self.accepted: dict[bytes, Record] = {}
        """Every record that any honest peer ever took in, by digest."""
        self.seed = 0

    # --- the world --------------------------------------------------------------------------

    def is_lost(self, sender: bytes, receiver: bytes) -> bool:
        split = self.sides.get(sender, 0) != self.sides.get(receiver, 0)
        return split or self.loss.random() < self.loss_rate

    def settle(self, who: Identity) -> None:
        me = peer_of(who)
        kept = self.stored.setdefault(me, [])
        transport = self.network.transport(me)
        self.seed += 1
        self.gossips[me] = Gossip(
            Ledger(CHARTER), transport, Random(self.seed), me, keep=kept.extend
        )
        self.network.join(me, self.gossips[me].handle)

    def pick(self, data: st.DataObject) -> Gossip:
        return self.gossips[data.draw(st.sampled_from(sorted(self.gossips)))]

    def offer(self, gossip: Gossip, made: Record) -> None:
        """Hand a record to an honest peer, as some other peer's push would."""
        if gossip.publish(Kind.RECORD, made.encoded).kept:
            self.accepted[made.digest] = made

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.loss = Random(data.draw(st.integers(0, 2**16)))
        for who in FOUNDERS:
            self.settle(who)

    # --- what peers do ----------------------------------------------------------------------

    @rule(data=st.data(), steps=STEPS, shift=st.integers(0, 16))
    def honest_step(self, data: st.DataObject, steps: bytes, shift: int) -> None:
        who = data.draw(st.sampled_from([each for each in HONEST if peer_of(each) in self.gossips]))
        gossip = self.gossips[peer_of(who)]
        if gossip.ledger.is_member(peer_of(who)):
            head = gossip.ledger.head(peer_of(who))
            self.offer(gossip, record(who, head, steps, shift))

    @rule(
        data=st.data(),
        who=st.sampled_from(FORKERS),
        lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    )
    def cheat(self, data: st.DataObject, who: Identity, lengths: list[int]) -> None:
        """Go on from records of one's own, or from nowhere; tell each branch to another peer."""
        made = self.made[peer_of(who)]
        for length in lengths:
            heads = [Head(), Head(2, 2, b"nowhere".ljust(32)), *(each.head for each in made)]
            head = data.draw(st.sampled_from(heads[:5] + heads[5:][-5:]))
            for _ in range(length):
                made.append(record(who, head, bytes([len(made) % 128])))
                head = made[-1].head
            self.tell(data, self.branch(made) if data.draw(st.booleans()) else made[-length:])

    def branch(self, made: list[Record]) -> list[Record]:
        """The newest record and all before it, back to the first."""
        by_digest, last = {each.digest: each for each in made}, made[-1]
        found = [last]
        while last.previous in by_digest:
            last = by_digest[last.previous]
            found.append(last)
        return found[::-1]

    @rule(data=st.data(), who=st.sampled_from(FORKERS))
    def hear(self, data: st.DataObject, who: Identity) -> None:
        """Some of all that a cheater ever signed reach someone, old ones too."""
        made = self.made[peer_of(who)]
        self.tell(data, data.draw(st.lists(st.sampled_from(made), max_size=6)) if made else [])

    def tell(self, data: st.DataObject, records: list[Record]) -> None:
        gossip = self.pick(data)
        for each in data.draw(st.permutations(records)):
            self.offer(gossip, each)

    @rule(data=st.data(), fanout=st.integers(1, 3))
    def spread(self, data: st.DataObject, fanout: int) -> None:
        self.pick(data).spread(fanout)

    @rule(data=st.data())
    def sync(self, data: st.DataObject) -> None:
        gossip = self.pick(data)
        for peer in gossip.partners(1):
            self.exchange(gossip, peer)

    def exchange(self, gossip: Gossip, peer: bytes) -> None:
        try:
            gossip.sync(peer)
        except PeerError as fault:
            assert "lost" in str(fault) or "no member" in str(fault), fault

    # --- what befalls them ------------------------------------------------------------------

    @rule(rate=st.sampled_from([0.0, 0.1, 0.5]))
    def weather(self, rate: float) -> None:
        self.loss_rate = rate

    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        self.sides = {peer: data.draw(st.integers(0, 1)) for peer in sorted(self.gossips)}

    @rule()
    def rejoin(self) -> None:
        self.sides = {}

    @rule(data=st.data(), who=st.sampled_from(JOINERS))
    def join(self, data: st.DataObject, who: Identity) -> None:
        """Some member introduces a peer; it comes with the charter and an empty ledger."""
        me = peer_of(who)
        host = self.pick(data)
        introducers = [each for each in HONEST + CHEATERS if host.ledger.is_member(peer_of(each))]
        host.publish(Kind.INTRODUCTION, introduce(data.draw(st.sampled_from(introducers)), who))
        if who in HONEST and me not in self.gossips and me not in self.away:
            self.settle(who)

    @precondition(lambda self: len(self.gossips) > 2)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        peer = data.draw(st.sampled_from(sorted(self.gossips)))
        self.away[peer] = self.gossips.pop(peer)
        self.network.leave(peer)

    @precondition(lambda self: self.away)
    @rule(data=st.data(), remembers=st.booleans())
    def come_back(self, data: st.DataObject, remembers: bool) -> None:
        """With its memory, or from what it had stored, as after a crash."""
        peer = data.draw(st.sampled_from(sorted(self.away)))
        self.return_home(peer, remembers)

    def return_home(self, peer: bytes, remembers: bool = True) -> None:
        gossip = self.gossips[peer] = self.away.pop(peer)
        if not remembers:
            stored, ledger = self.stored[peer], Ledger(CHARTER)
            for item in stored:
                ledger.add(item.kind, item.data)
            assert ledger.heads == gossip.ledger.heads
            assert ledger.excluded == gossip.ledger.excluded
            gossip.ledger = ledger
        self.network.join(peer, gossip.handle)

    # --- what must hold ---------------------------------------------------------------------

    @invariant()
    def every_ledger_is_the_sum_of_what_it_holds(self) -> None:
        for gossip in self.gossips.values():
            assert torch.equal(gossip.ledger.q, gossip.ledger.rebuild())

    def heal(self) -> None:
        self.loss_rate, self.sides = 0.0, {}
        for _ in range(EVERY_ROUND):
            for gossip in self.gossips.values():
                for peer in gossip.partners(99):
                    if peer in self.gossips:
                        self.exchange(gossip, peer)

    def assert_one_state(self) -> None:
        """Of all present, and that of the union of what they hold."""
        ledgers = [gossip.ledger for gossip in self.gossips.values()]
        assert len({each.state_id for each in ledgers}) == 1
        assert len({tuple(each.heads.items()) for each in ledgers}) == 1
        assert len({frozenset(each.members) for each in ledgers}) == 1
        held = {item.data for each in ledgers for item in each.items() if item.kind is Kind.RECORD}
        proofs = [item.data for each in ledgers for item in each.items() if item.kind is Kind.PROOF]
        union = [Record.decode(data, CHARTER.run) for data in held]
        union += [
            made for made in self.accepted.values() for proof in proofs if made.encoded in proof
        ]
        assert torch.equal(ledgers[0].q, q_by_definition(CHARTER, union))

    def teardown(self) -> None:
        """Twice: without those who left, and with them."""
        if self.is_connected():
            self.heal()
            self.assert_one_state()
        for peer in sorted(self.away):
            self.return_home(peer)
        self.heal()
        self.assert_one_state()
        for gossip in self.gossips.values():
            assert torch.equal(gossip.ledger.q, q_by_definition(CHARTER, self.accepted.values()))

    def is_connected(self) -> bool:
        """Whether a peer that all can call knows all that are there."""
        hubs = [self.gossips[peer_of(who)] for who in FOUNDERS[:2] if peer_of(who) in self.gossips]
        return any(self.gossips.keys() <= hub.ledger.members.keys() for hub in hubs)


class LongGossipMachine(GossipMachine):
    """The same, for longer histories and more of them."""


TestGossip = GossipMachine.TestCase
TestGossip.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLongGossip = pytest.mark.long(minutes=2)(LongGossipMachine.TestCase)
TestLongGossip.settings = settings(max_examples=600, stateful_step_count=80, deadline=None)
