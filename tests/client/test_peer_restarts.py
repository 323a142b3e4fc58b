"""A peer that stopped goes on with its chain: no crash and no copy of its folder forks it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_disk import Crash, Faulty, Numbered
from tiny_peers import (
    Town,
    acquaint,
    chain_of,
    eventually,
    exchange_until,
    forged,
    key,
    serving,
    until_equal,
)

from meadow.client import gossip_messages as messages
from meadow.client.peer import Peer
from meadow.client.peer_memory import entry_of, read_ledger
from meadow.client.peer_steps import Made
from meadow.errors import JournalError, StorageError
from meadow.strategies.ledger import Added, Kind, record_item
from meadow.strategies.records import Head, Record

pytest_plugins = ("peer_fixtures",)


def test_a_peer_that_was_stopped_continues_its_chain(town: Town) -> None:
    with town.peer("ada") as ada:
        first = [ada.step().record for _ in range(2)]
        state = ada.status()["state"]
    with town.peer("ada") as again:
        assert again.status()["state"] == state and again.status()["own_records"] == 2
        third = again.step().record
    assert (third.sequence, third.previous) == (2, first[-1].digest)
    assert third.first_step == sum(len(each.steps) for each in first)


def make_one(town: Town, disk: Numbered, sent: dict[int, bytes], lr: float) -> None:
    """Open, make one record, report; what may have left the machine is in `sent`."""
    with town.peer("ada", disk.root / "ada", disk, lr=lr) as peer:
        publish = peer.gossip.publish

        def watched(kind: Kind, data: bytes) -> Added:
            spread(sent, Record.decode(data, town.charter.run))
            return publish(kind, data)

        peer.gossip.publish = watched  # type: ignore[method-assign]
        for each in chain_of(peer, "ada"):
            spread(sent, each)  # others can ask for it
        peer.step()
        peer.report()


def spread(sent: dict[int, bytes], each: Record) -> None:
    assert sent.setdefault(each.sequence, each.digest) == each.digest, "two records of one number"


def faults(town: Town, folder: Path, way: str) -> list[int]:
    """The steps of the disk at which this kind of fault is possible."""
    count = Numbered(folder)
    make_one(town, count, {}, 1e-3)
    return count.tearable if way == "torn" else list(range(1, count.count + 1))


def interrupted(town: Town, disk: Faulty, sent: dict[int, bytes]) -> Path:
    """Work until the fault; the folder in which the next start finds itself."""
    try:
        make_one(town, disk, sent, 1e-3)
    except Crash:
        return disk.survivor
    except StorageError:
        return disk.root
    raise AssertionError(f"step {disk.at} did not end the peer")


@pytest.mark.parametrize("way", ["before", "torn", "power", "full"])
def test_a_fault_at_any_step_of_the_disk_never_leads_to_a_second_record(
    town: Town, roots: Iterator[Path], tmp_path_factory: pytest.TempPathFactory, way: str
) -> None:
    """Another rate after the fault: a record made anew would differ from the lost one."""
    places = faults(town, tmp_path_factory.mktemp("count"), way)
    assert len(places) >= 3
    for at, root in zip(places, roots, strict=False):
        sent: dict[int, bytes] = {}
        root = interrupted(town, Faulty(root, at, way), sent)
        before = dict(sent)
        make_one(town, Numbered(root), sent, 5e-4)
        ledger = read_ledger(town.charter, root / "ada")
        kept = ledger.chain(key("ada")).counted()
        assert {each.sequence: each.digest for each in kept} == sent
        assert before.items() <= sent.items() and not ledger.excluded


def test_a_peer_that_sends_first_would_be_noticed(
    town: Town,
    roots: Iterator[Path],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The proof has teeth."""

    def send(peer: Peer, made: Made) -> None:
        peer.gossip.publish(Kind.RECORD, made.record.encoded)
        peer.store.append([entry_of(record_item(made.record))])

    places = faults(town, tmp_path_factory.mktemp("count"), "torn")
    monkeypatch.setattr(Peer, "send", send)
    noticed = 0
    for at, root in zip(places, roots, strict=False):
        sent: dict[int, bytes] = {}
        try:
            make_one(town, Numbered(interrupted(town, Faulty(root, at, "torn"), sent)), sent, 5e-4)
        except AssertionError:
            noticed += 1
    assert noticed


def test_a_record_that_was_kept_and_not_sent_is_sent_by_the_next_start(town: Town) -> None:
    with town.peer("ada") as ada:
        ada.gossip.publish = _dies  # type: ignore[method-assign,assignment]
        with pytest.raises(Crash):
            ada.step()
    with town.peer("ada") as ada, town.peer("bob") as bob, serving(ada, bob):
        assert [each.sequence for each in chain_of(ada, "ada")] == [0]
        until_equal(ada, bob)
        assert [each.sequence for each in chain_of(bob, "ada")] == [0]


def _dies(kind: Kind, data: bytes) -> None:
    raise Crash


def test_a_store_that_lost_an_own_record_is_refused(town: Town) -> None:
    with town.peer("ada") as ada:
        ada.step()
        ada.step()
        last = next(e for e in ada.store.entries("record") if e.sequence == 1)
        ada.store.replace([last.key])
    with pytest.raises(JournalError, match="signed 2 records and 1 of them are here"):
        town.peer("ada")


@pytest.mark.parametrize("left", [0, 1])
def test_an_old_copy_of_a_folder_is_noticed_before_it_forks_the_chain(
    town: Town, left: int
) -> None:
    """Also where the folder was deleted: others tell, and the next start goes on from there."""
    old = town.root / "old"
    with town.peer("ada") as ada, town.peer("bob") as bob, serving(ada, bob):
        for number in range(3):
            if number == left and left:
                shutil.copytree(ada.folder, old)
            ada.step()
        until_equal(ada, bob)
    with town.peer("bob") as bob, serving(bob):
        ada = restarted(town, old, bob)
        with ada, pytest.raises(JournalError, match=f"hold record {left} of this peer"):
            ada.start()
            ada.work()
        with restarted(town, old, bob) as ada:
            assert ada.step().record.sequence == 3
            until_equal(ada, bob)
            assert len(chain_of(bob, "ada")) == 4 and not bob.gossip.ledger.excluded


def test_an_old_copy_that_hears_of_its_newest_record_first_goes_on_as_well(town: Town) -> None:
    """A fresh record is pushed, whatever lies before it; the rest comes by comparing."""
    old = town.root / "old"
    with town.peer("ada") as ada, town.peer("bob") as bob, serving(ada, bob):
        ada.step()
        shutil.copytree(ada.folder, old)
        newest = [ada.step() for _ in range(2)][-1].record
        until_equal(ada, bob)
    with town.peer("ada", old) as ada:
        ada.gossip.handle(key("bob"), "push", pushed(town, newest))
        with pytest.raises(JournalError, match="hold record 2 of this peer"):
            ada._ready.set()
            ada.work()
    with town.peer("ada", old) as ada:
        ada.start()
        eventually(lambda: any("waits for records 1 to 2" in t for t in town.notices("ada")))
        with pytest.raises(JournalError, match="waits for records"):
            ada.step()
        assert not ada._ready.is_set()
    with town.peer("bob") as bob, serving(bob), restarted(town, old, bob) as ada:
        exchange_until(ada, lambda: ada.status()["own_records"] == 3)
        assert not ada.stopping
        assert ada.step().record.sequence == 3
        until_equal(ada, bob)
        assert not bob.gossip.ledger.excluded


def test_a_record_between_the_disk_and_the_ledger_is_nothing_to_wait_for(town: Town) -> None:
    """The gossip looks while the training keeps one."""
    with town.peer("ada") as ada:
        ada._begin()
        made = ada.stepper.make(ada.gossip.ledger.q, Head(), 1)
        ada.store.append_own(entry_of(record_item(made.record)))
        ada._begin()
        assert ada._ready.is_set() and town.notices("ada") == []


def pushed(town: Town, record: Record) -> bytes:
    return messages.seal(town.charter.digest, messages.encode_items([record_item(record)]))


def restarted(town: Town, folder: Path, other: Peer) -> Peer:
    """Ada's peer in a folder, which knows where the other listens."""
    ada = town.peer("ada", folder)
    contact = other.book.find(other.me)
    assert contact is not None
    acquaint(other, contact.address, ada)
    return ada


def test_a_proven_fork_of_its_own_ends_a_peer_and_refuses_the_next_start(town: Town) -> None:
    """Somebody works with a copy of the identity at the same time."""
    with town.peer("ada") as ada, town.peer("bob") as bob, serving(ada, bob):
        ada.step()
        twin = forged(town, "ada")
        bob.gossip.publish(Kind.RECORD, twin.encoded)
        ada.start()
        with pytest.raises(JournalError, match="two different records 0 of this peer"):
            ada.work()
    with pytest.raises(JournalError, match="two different records 0 .*another identity"):
        town.peer("ada")
