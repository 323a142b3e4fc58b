"""Peers over a tiny base and real sockets: they agree, go on after faults, and end in the open."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import Crash, Faulty, Numbered
from gossips import identity
from tiny_peers import (
    NAMES,
    PLACE,
    Town,
    acquaint,
    adapter_bytes,
    eventually,
    found,
    introduction,
    key,
    like,
    serving,
    until_equal,
)

from meadow.client import gossip_messages as messages
from meadow.client.peer import Peer
from meadow.client.peer_memory import entry_of, read_ledger
from meadow.client.peer_steps import Made
from meadow.config import Config
from meadow.errors import JournalError, PeerError, StorageError
from meadow.strategies.introductions import Introduction, JoinRequest
from meadow.strategies.ledger import Added, Kind, record_item
from meadow.strategies.records import Head, Record


@pytest.fixture(scope="module")
def founded(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Town:
    return found(tiny, tmp_path_factory.mktemp("nowhere"), outbound="eve")


@pytest.fixture
def town(founded: Town, tmp_path: Path) -> Town:
    return Town(founded.config, founded.bench, founded.charter, tmp_path)


def chain_of(peer: Peer, name: str) -> list[Record]:
    return peer.gossip.ledger.chain(key(name)).counted()


def exchange_until(peer: Peer, check: Callable[[], bool]) -> None:
    for _ in range(50):
        if check():
            return
        peer.exchange()
    raise AssertionError("no exchange led to it")


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


# --- going on ------------------------------------------------------------------------------------


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


def forged(town: Town, name: str, head: Head | None = None) -> Record:
    run = town.charter.run
    return Record.sign(identity(name), run, head or Head(), b"\x01\x02\x03", shift=1)


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


# --- what ends it, and what does not -------------------------------------------------------------


def fails(error: BaseException) -> Callable[..., None]:
    def raises(*_: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize("error", [RuntimeError("a defect"), StorageError("the disk is full")])
def test_a_fault_in_the_gossip_ends_the_peer_with_it(
    town: Town, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with town.peer("ada") as ada:
        monkeypatch.setattr(ada.gossip, "sync", fails(error))
        ada.start()
        with pytest.raises(type(error), match=str(error)):
            ada.work()


def test_what_cannot_be_kept_is_not_acknowledged_and_ends_the_peer(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger is then ahead of the disk; the next start has what the disk has."""
    with town.peer("ada") as ada, town.peer("bob") as bob, serving(ada, bob):
        ada.step()
        monkeypatch.setattr(bob.store, "append", fails(StorageError("the disk is full")))
        with pytest.raises(PeerError, match="the disk is full"):
            ada.gossip.sync(bob.me)
        bob._ready.set()
        with pytest.raises(StorageError):
            bob.work()
    with town.peer("bob") as bob:
        assert bob.status()["records"] == 0


def test_a_silent_peer_is_told_of_once_and_again_when_it_is_back(town: Town) -> None:
    with town.peer("ada") as ada, town.peer("bob") as bob:
        for _ in range(4):
            ada.exchange()
        assert sum("cannot be reached" in text for text in town.notices("ada")) == 1
        with serving(bob):
            contact = bob.book.find(bob.me)
            assert contact is not None
            acquaint(bob, contact.address, ada)
            eventually(lambda: ada._sync(bob.me))
            ada.exchange()
        ada.exchange()
    assert [("answers again" in text) for text in town.notices("ada")] == [False, True, False]


def test_stopping_does_not_wait_for_a_peer_that_gives_no_answer(town: Town) -> None:
    """A call may last ten seconds; here it would last for ever."""
    asked, let_go = threading.Event(), threading.Event()

    def sleepy(caller: bytes, verb: str, body: bytes) -> bytes:
        asked.set()
        let_go.wait()
        return b""

    with town.peer("bob") as bob:
        bob.server._handler = sleepy
        with serving(bob), town.peer("ada") as ada:
            contact = bob.book.find(bob.me)
            assert contact is not None
            acquaint(bob, contact.address, ada)
            ada.start()
            asked.wait()
            ada.__exit__()
            ended = not any(t.name == "meadow-gossip" for t in threading.enumerate())
            let_go.set()
            assert ended and town.notices("ada") == []


def test_who_has_made_all_steps_of_a_run_only_gossips(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record too many would be measured first, and then end the peer at every start."""
    for module in ("client.peer", "strategies.records"):
        monkeypatch.setattr(f"meadow.{module}.LAST_STEP", 5)
    with town.peer("ada") as ada:
        worker = threading.Thread(target=ada.work)
        ada.start()
        worker.start()
        eventually(
            lambda: not worker.is_alive() or any("4 steps" in t for t in town.notices("ada"))
        )
        ada.stop()
        worker.join()
        assert ada._fault is None and len(chain_of(ada, "ada")) == 2
        assert "it only gossips now" in town.notices("ada")[-1]


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_in_use_or_of_somebody_else_is_refused_untouched(town: Town) -> None:
    with town.peer("ada") as ada:
        ada.step()
        with pytest.raises(JournalError, match="another process is working"):
            town.peer("ada")
    before = {name: (ada.folder / name).read_bytes() for name in ("charter.json", "events.jsonl")}
    with pytest.raises(JournalError, match="belongs to another peer"):
        town.peer("bob", town.root / "ada")
    other = town.charter.pool.run_id.replace("7", "8")
    pool = type(town.charter.pool).from_json({**town.charter.pool.to_json(), "run_id": other})
    town.charter = type(town.charter)(pool, town.charter.founders, -10, -6)
    with pytest.raises(JournalError, match="holds another run"):
        town.peer("ada")
    assert {name: (ada.folder / name).read_bytes() for name in before} == before


def test_an_address_that_is_taken_ends_the_start(town: Town) -> None:
    with town.peer("bob") as bob, serving(bob):
        contact = bob.book.find(bob.me)
        assert contact is not None
        with (
            town.peer("ada", listen=contact.address) as ada,
            pytest.raises(PeerError, match="cannot listen"),
        ):
            ada.start()


def test_a_report_is_made_once_for_each_state(town: Town) -> None:
    with town.peer("ada", evaluate_every=1) as ada:
        ada.report()
        ada.report()
        assert len(town.told("ada", "measured")) == 1
        ada.step()
        ada.report()
        assert len(town.told("ada", "measured")) == 2
        shown = json.loads((ada.folder / "status.json").read_text())
        assert shown["loss"] == town.told("ada", "measured")[-1].data["loss"]
        ada.exchange()
        assert json.loads((ada.folder / "status.json").read_text())["loss"] == shown["loss"]


def test_records_of_a_stranger_are_counted_and_change_nothing(town: Town) -> None:
    with town.peer("ada") as ada:
        state = ada.status()["state"]
        added = ada.gossip.publish(Kind.RECORD, forged(town, "joe").encoded)
        assert added.error is not None and ada.status()["state"] == state
        assert ada.status()["counted"] == {f"unknown peer from {ada.me.hex()[:16]}": 1}


def test_refused_calls_are_in_the_status_beside_refused_records(town: Town) -> None:
    """What the server turns away before it is read, and what no ledger counts."""
    with town.peer("ada") as ada, town.peer("bob") as bob, serving(ada, bob):
        for verb in ("nonsense", "cosign"):
            with pytest.raises(PeerError, match="refuses"):
                bob.transport.call(ada.me, verb, b"junk")
        told = ada.status()["counted"]
    who = bob.me.hex()[:16]
    assert told == {f"malformed message from {who}": 1, f"call refused from {who}": 2}
