"""Checkpoints among peers, over an in-memory network: gathered, served, started from, audited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from gossips import chain, charter_of, identity, introduce, q_by_definition

from meadow.client.gossip import Gossip
from meadow.client.peer_checkpoints import MOST_BARREN, Checkpoints, History, fetch
from meadow.client.peer_memory import entry_of, recall
from meadow.client.record_store import RecordStore
from meadow.errors import FormatError, PeerError, UpdateError
from meadow.identity import Identity
from meadow.simulation.peer_network import PeerNetwork
from meadow.strategies.checkpoint import _PURPOSE, Checkpoint, Verdict
from meadow.strategies.introductions import Introduction
from meadow.strategies.ledger import Item, Kind, Ledger
from meadow.strategies.peer_keys import peer_of, sign
from meadow.strategies.records import Head, Record

PEOPLE = [identity(f"peer {number}") for number in range(4)]
ALICE, BOB, EVE, MAL = PEOPLE
JOINER = identity("joiner")
CHARTER = charter_of(*PEOPLE)
HISTORY = chain(ALICE, 5) + chain(BOB, 3) + chain(EVE, 4)


class Node:
    """A peer without a trainer."""

    def __init__(self, who: Identity, network: PeerNetwork, folder: Path, stack: ExitStack) -> None:
        self.peer = peer_of(who)
        transport = network.transport(self.peer)
        self.store = stack.enter_context(RecordStore.open(folder, CHARTER.run, self.peer))
        self.gossip = Gossip(Ledger(CHARTER), transport, Random(1), self.peer, self.keep)
        self.transport = transport
        self.checkpoints = Checkpoints(self.gossip, transport, self.store, who, witnesses=2)
        network.join(self.peer, self.handle)

    def keep(self, items: Sequence[Item]) -> None:
        self.store.append([entry_of(item) for item in items])

    def begin(self, checkpoint: Checkpoint) -> History:
        return History.begin(checkpoint, self.gossip, self.transport, self.store, self.peer)

    def handle(self, caller: bytes, verb: str, body: bytes) -> bytes:
        if verb in ("checkpoint", "cosign"):
            return self.checkpoints.answer(caller, verb, body)
        return self.gossip.handle(caller, verb, body)

    def take(self, records: Sequence[Record] = HISTORY) -> None:
        for each in records:
            self.gossip.publish(Kind.RECORD, each.encoded)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    network = PeerNetwork()
    with ExitStack() as stack:
        made = [Node(who, network, tmp_path / str(n), stack) for n, who in enumerate(PEOPLE)]
        yield made


@pytest.fixture
def joiner(nodes: list[Node], tmp_path: Path) -> Iterator[Node]:
    introduction = introduce(ALICE, JOINER)
    for node in nodes:
        node.gossip.publish(Kind.INTRODUCTION, introduction)
    network = nodes[0].transport.network
    with ExitStack() as stack:
        yield Node(JOINER, network, tmp_path / "joiner", stack)


def test_a_checkpoint_needs_witnesses_with_the_same_records(nodes: list[Node]) -> None:
    first = nodes[0]
    first.take()
    assert not first.checkpoints.gather(records=1), "nobody else has the records"
    assert first.checkpoints.served is None
    for node in nodes[1:3]:
        node.take()
    assert any(first.checkpoints.gather(records=1) for _ in range(4))
    served = first.checkpoints.served
    assert served is not None and torch.equal(served.q, q_by_definition(CHARTER, HISTORY))
    assert {first.peer, nodes[1].peer, nodes[2].peer} <= {*served.signatures, nodes[3].peer}
    served.verify(first.gossip.ledger.members, threshold=3)
    assert not first.checkpoints.gather(records=1), "nothing new counts since"


def test_a_served_checkpoint_is_there_after_a_restart(nodes: list[Node]) -> None:
    for node in nodes:
        node.take()
    first = nodes[0]
    assert first.checkpoints.gather(records=1)
    again = Checkpoints(first.gossip, first.transport, first.store, ALICE, witnesses=2)
    assert again.served is not None and first.checkpoints.served is not None
    assert again.served.encoded == first.checkpoints.served.encoded
    assert first.store.count("checkpoint") == 1


def test_a_checkpoint_with_excluded_records_is_replaced_and_not_handed_out(
    nodes: list[Node],
) -> None:
    """Else joiners would start from it until as many other records had been made."""
    first, ask = nodes[0], b"\1" + CHARTER.digest
    for node in nodes:
        node.take([*HISTORY, *chain(MAL, 6)])
    assert first.checkpoints.gather(records=1)
    assert first.checkpoints.answer(nodes[1].peer, "checkpoint", ask)
    first.take([chain(MAL, 2, salt=1)[1]])
    assert first.gossip.ledger.excluded == {peer_of(MAL): 1}
    assert first.checkpoints.answer(nodes[1].peer, "checkpoint", ask) == b""
    for node in nodes[1:]:
        node.gossip.sync(first.peer)
    assert first.checkpoints.gather(records=100)
    served = first.checkpoints.served
    assert served is not None and served.records == len(HISTORY) + 1
    assert not first.checkpoints.gather(records=100)


def test_a_served_checkpoint_that_became_ambiguous_keeps_no_peer_from_starting(
    nodes: list[Node],
) -> None:
    """Two keys that begin alike are a matter of a day's search for who holds both."""
    for node in nodes:
        node.take()
    first = nodes[0]
    assert first.checkpoints.gather(records=1)
    alike = peer_of(BOB)[:8] + bytes(24)
    word = Introduction.decode(introduce(ALICE, JOINER), CHARTER.run)
    first.gossip.ledger._introductions[alike] = word
    again = Checkpoints(first.gossip, first.transport, first.store, ALICE, witnesses=2)
    assert again.served is None


def test_a_peer_signs_only_what_its_own_records_give(nodes: list[Node]) -> None:
    for node in nodes[:2]:
        node.take()
    taken = Checkpoint.take(nodes[0].gossip.ledger)
    wrong = Checkpoint(CHARTER, taken.cut, taken.q + 1)
    for bad, error in ((wrong, UpdateError), (taken, None)):
        body = b"\1" + CHARTER.digest + bad.encoded
        if error:
            with pytest.raises(error):
                nodes[1].checkpoints.answer(nodes[0].peer, "cosign", body)
        else:
            signature = nodes[1].checkpoints.answer(nodes[0].peer, "cosign", body)
            assert taken.signed_by(nodes[1].peer, signature)
    with pytest.raises(FormatError):
        nodes[1].checkpoints.answer(nodes[0].peer, "cosign", b"\1" + CHARTER.digest + b"\1junk")
    with pytest.raises(PeerError):
        nodes[1].checkpoints.answer(b"s" * 32, "checkpoint", b"\1" + CHARTER.digest)


def test_a_joiner_starts_from_a_checkpoint_and_audits_it(nodes: list[Node], joiner: Node) -> None:
    for node in nodes:
        node.take()
    assert nodes[0].checkpoints.gather(records=1)
    said: list[str] = []
    found = fetch(joiner.gossip, joiner.transport, 2, said.append)
    assert found is not None, said
    history = joiner.begin(found)
    assert joiner.gossip.ledger.base is not None
    assert joiner.gossip.ledger.state_id == nodes[0].gossip.ledger.state_id
    tail = chain(ALICE, 7)[5:]
    nodes[0].take(tail)
    joiner.gossip.sync(nodes[0].peer)
    assert joiner.gossip.ledger.state_id == nodes[0].gossip.ledger.state_id
    found_out = next(filter(None, (history.advance() for _ in range(4))))
    assert Verdict.AGREES.value in found_out and joiner.gossip.ledger.base is None
    rebuilt = joiner.gossip.ledger.rebuild()
    assert torch.equal(rebuilt, q_by_definition(CHARTER, [*HISTORY, *tail]))
    stored_whole = recall(CHARTER, joiner.store)
    assert stored_whole.base is None and torch.equal(stored_whole.rebuild(), rebuilt)


def test_a_false_checkpoint_is_found_out_by_the_audit(nodes: list[Node], joiner: Node) -> None:
    """Even with enough signers: the records are what counts in the end."""
    for node in nodes:
        node.take()
    taken = Checkpoint.take(nodes[0].gossip.ledger)
    false = Checkpoint(CHARTER, taken.cut, taken.q + 1)
    joiner.gossip.meet(nodes[0].peer)
    history = joiner.begin(false)
    assert joiner.gossip.ledger.state_id != nodes[0].gossip.ledger.state_id
    found_out = next(filter(None, (history.advance() for _ in range(4))))
    assert Verdict.DIFFERS.value in found_out
    assert joiner.gossip.ledger.state_id == nodes[0].gossip.ledger.state_id


def test_too_few_signers_or_none_at_all_leave_the_joiner_with_the_records(
    nodes: list[Node], joiner: Node
) -> None:
    said: list[str] = []
    assert fetch(joiner.gossip, joiner.transport, 2, said.append) is None and not said
    for node in nodes:
        node.take()
    assert nodes[0].checkpoints.gather(records=1)
    assert fetch(joiner.gossip, joiner.transport, 4, said.append) is None
    assert any("are required" in text for text in said)


def test_a_restart_before_the_audit_starts_from_the_stored_checkpoint(
    nodes: list[Node], joiner: Node
) -> None:
    for node in nodes:
        node.take()
    assert nodes[0].checkpoints.gather(records=1)
    found = fetch(joiner.gossip, joiner.transport, 2, lambda text: None)
    assert found is not None
    joiner.begin(found)
    again = recall(CHARTER, joiner.store)
    assert again.base is not None and again.state_id == nodes[0].gossip.ledger.state_id


def started(nodes: list[Node], joiner: Node) -> History:
    """The joiner counts on from a checkpoint of the history that all others hold."""
    for node in nodes:
        node.take()
    assert nodes[0].checkpoints.gather(records=1)
    found = fetch(joiner.gossip, joiner.transport, 2, pytest.fail)
    assert found is not None
    return joiner.begin(found)


def test_more_records_after_the_checkpoint_than_can_wait_are_recalled_after_the_audit(
    nodes: list[Node], joiner: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in the store before those that the checkpoint stood for."""
    monkeypatch.setattr("meadow.strategies.chain.MOST_PENDING", 4)
    history = started(nodes, joiner)
    for node in nodes:
        node.take(chain(ALICE, 15)[5:])
    joiner.gossip.sync(nodes[0].peer)
    assert any(history.advance() for _ in range(4))
    again = recall(CHARTER, joiner.store)
    assert again.state_id == joiner.gossip.ledger.state_id == nodes[0].gossip.ledger.state_id
    assert again.head(peer_of(ALICE)).count == 15


def test_what_came_before_the_checkpoint_is_kept_beside_it(nodes: list[Node], joiner: Node) -> None:
    """Pushed to a joiner that has not asked for anything yet: a record that the checkpoint is
    about to stand for, one that will follow it, and a proof."""
    early, late = chain(ALICE, 7)[3], chain(ALICE, 7)[6]
    one, other = chain(MAL, 1)[0], chain(MAL, 1, salt=1)[0]
    joiner.take([early, late, one, other])
    assert joiner.gossip.publish(Kind.RECORD, b"\1junk").error is not None
    started(nodes, joiner)
    for ledger in (joiner.gossip.ledger, recall(CHARTER, joiner.store)):
        assert ledger.excluded == {peer_of(MAL): 0}
        assert ledger.head(peer_of(ALICE)).count == 5
        assert [each.sequence for each in ledger.chain(peer_of(ALICE)).kept()] == [6]
        assert ledger.state_id == nodes[0].gossip.ledger.state_id
    assert joiner.gossip.ledger.tally["truncated or too large", joiner.peer] == 1, "still counted"


def false_checkpoint(nodes: list[Node], who: bytes, head: Head) -> Checkpoint:
    """Three members vouch for records of `who` that do not exist."""
    ledger = nodes[0].gossip.ledger
    false = Checkpoint(CHARTER, {**ledger.heads, who: head}, ledger.q)
    signed = {peer_of(each): sign(each, _PURPOSE, false.body) for each in (ALICE, BOB, EVE)}
    return replace(false, signatures=signed)


def test_for_its_own_records_a_joiner_takes_nobodys_word(
    nodes: list[Node], joiner: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would sign record 3 on top of what was never there, and could never sign record 0."""
    monkeypatch.setattr(Checkpoints, "_stands", lambda self: True)  # whoever lies hands it out
    for node in nodes:
        node.take()
        node.checkpoints._served = false_checkpoint(nodes, joiner.peer, Head(3, 9, b"x" * 32))
    said: list[str] = []
    assert fetch(joiner.gossip, joiner.transport, 2, said.append) is None
    assert len(said) == 4 and all("counts records of this peer" in text for text in said)
    joiner.gossip.sync(nodes[0].peer)
    assert joiner.gossip.ledger.head(joiner.peer) == Head()


def test_a_checkpoint_of_records_that_nobody_has_is_given_up(
    nodes: list[Node], joiner: Node
) -> None:
    """Its signers say that they added them up; every other peer has all records but those."""
    started(nodes, joiner)
    false = false_checkpoint(nodes, peer_of(MAL), Head(3, 9, b"x" * 32))
    history = joiner.begin(false)
    assert joiner.gossip.ledger.heads != nodes[0].gossip.ledger.heads
    said = [history.advance() for _ in range(1 + MOST_BARREN)]
    assert set(said[:-1]) == {""} and Verdict.INCOMPLETE.value in said[-1]
    assert joiner.gossip.ledger.base is None
    assert joiner.gossip.ledger.state_id == nodes[0].gossip.ledger.state_id
    assert recall(CHARTER, joiner.store).state_id == nodes[0].gossip.ledger.state_id


def test_a_checkpoint_is_not_given_up_while_only_other_joiners_answer(
    nodes: list[Node], joiner: Node
) -> None:
    """Who started from a checkpoint itself has no records to give, and that proves nothing."""
    history = started(nodes, joiner)
    for node in nodes:
        node.gossip.ledger = Checkpoint.take(node.gossip.ledger).start(node.gossip.ledger)
    assert {history.advance() for _ in range(2 * MOST_BARREN)} == {""}
    assert joiner.gossip.ledger.base is not None
