"""Peers over a tiny base and real sockets: they agree, whoever joins when."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from gossips import identity
from tiny_peers import (
    NAMES,
    PLACE,
    Town,
    acquaint,
    adapter_bytes,
    chain_of,
    eventually,
    exchange_until,
    introduction,
    key,
    like,
    serving,
    until_equal,
)

from meadow.errors import PeerError
from meadow.strategies.introductions import Introduction, JoinRequest
from meadow.strategies.ledger import Kind

pytest_plugins = ("peer_fixtures",)


# --- agreement -----------------------------------------------------------------------------------


def test_three_peers_end_with_equal_states_and_equal_adapters(town: Town) -> None:
    """Eve has no address: she calls the others, and what she has reaches them through that."""
    with town.peer("ada") as ada, town.peer("bob") as bob, town.peer("eve") as eve:
        with serving(ada, bob, eve):
            for peer in (ada, bob, eve, ada):
                peer.step()
                peer.exchange()
            eve.step()
            until_equal(ada, bob, eve)
        for peer in (ada, bob, eve):
            peer.report()
        records = [each for name in NAMES for each in chain_of(bob, name)]
        assert [len(chain_of(bob, name)) for name in NAMES] == [2, 1, 2]
        q = bob.gossip.ledger.q
    by_hand = town.charter.pool.zero()
    for each in records:
        each.fold_into(by_hand)
    assert torch.equal(q, by_hand) and bool(q.any())
    first, *others = (adapter_bytes(town.root / name) for name in NAMES)
    assert len(first) == 2 and others == [first, first]


def test_own_settings_of_scale_do_not_change_the_adapter(town: Town) -> None:
    """Whoever has the same state has the same files, whatever alpha says in its run.toml."""
    wide = Town(
        town.config.replace(model={"alpha": 64.0}), town.bench, town.charter, town.root / "wide"
    )
    with town.peer("ada") as ada, wide.peer("bob") as bob:
        bob.gossip.publish(Kind.RECORD, ada.step().record.encoded)
        ada.report()
        bob.report()
    assert adapter_bytes(town.root / "ada") == adapter_bytes(wide.root / "bob")


def test_peers_work_by_themselves_until_they_are_stopped(town: Town, tmp_path: Path) -> None:
    """Training, gossip and server in their threads; status.json is whole whenever it is read."""
    towns = {"ada": town, "bob": like(town, tmp_path / "b")}
    settings: dict[str, Any] = {"records": 3, "evaluate_every": 1, "listen": "127.0.0.1:0"}
    peers = {name: its.peer(name, **settings) for name, its in towns.items()}
    threads = [threading.Thread(target=peer.work) for peer in peers.values()]
    with peers["ada"], peers["bob"]:
        for name, peer in peers.items():
            peer.start()
            address = towns[name].told(name, "listening")[0].data["address"]
            acquaint(peer, address, *peers.values())
        for thread in threads:
            thread.start()

        def agreed() -> bool:
            found = [peer.folder / "status.json" for peer in peers.values()]
            seen = [json.loads(each.read_text()) for each in found if each.exists()]
            return len(seen) == 2 and all(each["records"] == 6 for each in seen)

        eventually(agreed)
        eventually(lambda: all(t.told(n, "measured")[-1].data["records"] == 6
                               for n, t in towns.items()))  # fmt: skip
        for peer in peers.values():
            peer.stop()
        for thread in threads:
            thread.join()
        states = {
            json.loads((p.folder / "status.json").read_text())["state"] for p in peers.values()
        }
    assert len(states) == 1
    assert adapter_bytes(peers["ada"].folder) == adapter_bytes(peers["bob"].folder)
    for name, its in towns.items():
        assert any("only gossips now" in text for text in its.notices(name))
        assert [event.round for event in its.told(name, "record")] == [0, 1, 2]
        losses = [event.data["loss"] for event in its.told(name, "measured")]
        assert len(losses) >= 2 and len(set(losses)) > 1


# --- membership ----------------------------------------------------------------------------------


def test_a_late_joiner_starts_from_a_checkpoint_and_audits_it(town: Town) -> None:
    """One message to begin with; the records come behind it and take its place."""
    with town.peer("ada", witnesses=1) as ada, town.peer("bob", witnesses=1) as bob:
        with serving(ada, bob):
            for _ in range(2):
                ada.step()
                bob.step()
                until_equal(ada, bob)
            exchange_until(ada, lambda: ada.checkpoints.served is not None)
            ada.gossip.publish(Kind.INTRODUCTION, introduction(town, "ada", "joe", ""))
            ada.exchange()
            with town.peer("joe", witnesses=1) as joe:
                for other in (ada, bob):
                    contact = ada.book.find(other.me) or bob.book.find(other.me)
                    assert contact is not None
                    acquaint(other, contact.address, joe)
                exchange_until(joe, lambda: town.told("joe", "checkpoint") != [])
                exchange_until(joe, lambda: joe.gossip.ledger.base is None)
                until_equal(ada, bob, joe)
                assert any("the records give the checkpoint" in t for t in town.notices("joe"))
            assert town.told("joe", "checkpoint")[0].data["records"] >= 3
            with town.peer("joe", witnesses=1) as again:
                assert again.gossip.ledger.base is None
                assert again.status()["state"] == ada.status()["state"]


def test_a_late_joiner_that_is_introduced_through_an_inbox_converges(town: Town) -> None:
    with town.peer("ada") as ada, town.peer("bob") as bob, town.peer("joe") as joe:
        with serving(ada, bob):
            for peer in (ada, bob):
                peer.step()
                contact = peer.book.find(peer.me)
                assert contact is not None
                acquaint(peer, contact.address, joe)
            with pytest.raises(PeerError, match="a member has to introduce it"):
                joe.step()
            joe.exchange()  # nobody knows it
            (ada.folder / "inbox" / "joe.introduction").write_bytes(
                introduction(town, "ada", "joe", "")
            )
            until_equal(ada, bob)
            eventually(lambda: any(joe._sync(peer.me) for peer in (ada, bob)))
            assert joe._is_member()
            joe.step()
            until_equal(ada, bob, joe)
        assert ada.status()["members"] == joe.status()["members"] == 4
        assert joe.status()["records"] == 3 and list((ada.folder / "inbox").iterdir()) == []
        assert sum("cannot be reached" in t or "closed" in t for t in town.notices("joe")) <= 2
    with town.peer("joe") as joe:
        assert joe.status()["members"] == 4 and joe.status()["own_records"] == 1


def test_a_peer_that_nobody_introduced_waits_and_signs_nothing(town: Town) -> None:
    with town.peer("joe", records=1) as joe:
        worker = threading.Thread(target=joe.work)
        joe.start()
        worker.start()
        eventually(lambda: any("waits until a member" in text for text in town.notices("joe")))
        joe.stop()
        worker.join()
        assert joe.store.signed() is None


def test_a_member_with_a_false_certificate_is_told_and_stays_one(town: Town) -> None:
    request = JoinRequest.sign(identity("joe"), town.charter.run, b"no certificate", PLACE)
    with town.peer("ada") as ada:
        ada.gossip.publish(Kind.INTRODUCTION, Introduction.sign(identity("bob"), request).encoded)
        assert ada.status()["members"] == 4 and ada.book.find(key("joe")) is None
    assert "cannot be read" in town.notices("ada")[-1]
