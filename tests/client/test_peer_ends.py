"""What ends a peer, what does not, and what it leaves in its folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest
from tiny_peers import (
    Town,
    acquaint,
    chain_of,
    eventually,
    forged,
    serving,
)

from meadow.errors import JournalError, PeerError, StorageError
from meadow.strategies.ledger import Kind

pytest_plugins = ("peer_fixtures",)


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
