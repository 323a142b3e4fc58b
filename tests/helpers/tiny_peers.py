"""Peers over the tiny llama: real stores, real loopback sockets, steps driven by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gossips import identity
from loopback_peers import ANYWHERE

from meadow.client.data import silos_of
from meadow.client.peer import Peer
from meadow.client.peer_steps import Stepper
from meadow.client.peer_terms import draft
from meadow.client.peer_tls import certificate_of
from meadow.client.task import Participant
from meadow.client.workbench import Workbench, open_workbench
from meadow.config import Config
from meadow.events import Event
from meadow.store import Disk
from meadow.strategies.charter import Charter, Member
from meadow.strategies.introductions import Introduction, JoinRequest
from meadow.strategies.records import Head, Record

NAMES = ("ada", "bob", "eve")
RUN = 64 * "7"
PLACE = "127.0.0.1:1"  # in the charter; where a peer really listens, `serving` tells the others


def peer_config(tiny: Config) -> Config:
    """Two steps a record, coarse enough to be seen in the loss."""
    return tiny.replace(
        model={"rank": 4, "alpha": 4.0},
        strategy={"name": "fedkseed", "options": {"scale": -6}},
        peer={"steps": 2, "lr": 1e-3, "sync_seconds": 0.05, "evaluate_every": 0},
    )


def member_of(name: str, address: str = PLACE) -> Member:
    certificate = certificate_of(identity(name))
    return Member(certificate.peer, certificate.der, address)


def key(name: str) -> bytes:
    return certificate_of(identity(name)).peer


@dataclass
class Town:
    """A run, and the people who may take part in it; each works in `root`/name."""

    config: Config
    bench: Workbench
    charter: Charter
    root: Path
    events: dict[str, list[Event]] = field(default_factory=dict)

    @property
    def charter_file(self) -> bytes:
        return self.charter.sign(identity(NAMES[0]))

    def person(self, name: str) -> Participant:
        """The rows of a client of that name; strangers take the first one's."""
        silos = {silo.client: silo for silo in silos_of(self.config)}
        return self.bench.encode(silos.get(name, silos[NAMES[0]]), self.config)[0]

    def stepper(self, name: str, **settings: Any) -> Stepper:
        config = self.config.replace(peer=settings)
        return Stepper(config, self.charter, identity(name), self.bench, self.person(name))

    def peer(
        self, name: str, folder: Path | None = None, disk: Disk | None = None, **settings: Any
    ) -> Peer:
        stepper = self.stepper(name, **settings)
        told = self.events.setdefault(name, [])
        place = folder or self.root / name
        return Peer(
            self.charter_file, identity(name), stepper, self.bench, place, told.append, disk
        )

    def notices(self, name: str) -> list[str]:
        return [each.data["text"] for each in self.events[name] if each.kind == "notice"]

    def told(self, name: str, kind: str) -> list[Event]:
        return [each for each in self.events[name] if each.kind == kind]


def found(tiny: Config, root: Path, founders: Collection[str] = NAMES, outbound: str = "") -> Town:
    """A town whose founders can be called, all but one if so wished."""
    config = peer_config(tiny)
    members = [member_of(name, "" if name == outbound else PLACE) for name in founders]
    bench = open_workbench(config)
    return Town(config, bench, draft(config, bench, members, RUN), root)


def like(town: Town, root: Path) -> Town:
    """The same run with other folders, and a base of its own for another thread."""
    return replace(town, root=root, events={}, bench=open_workbench(town.config))


@contextmanager
def serving(*peers: Peer) -> Iterator[None]:
    """The peers answer, and all know where; nobody gossips unless told to."""
    with ExitStack() as stack:
        for peer in peers:
            listens = peer.gossip.ledger.members[peer.me].reachable
            if listens:
                address = peer.server.start(ANYWHERE)
                stack.callback(peer.server.stop, 0.0)
                acquaint(peer, address, *peers)
        yield


def acquaint(peer: Peer, address: str, *others: Peer) -> None:
    """Tell others where a peer listens."""
    certificate = certificate_of(peer.identity)
    for other in others:
        other.book.put(peer.me, certificate.der, address)


def until_equal(*peers: Peer) -> None:
    """Exchange until all have the same records."""
    for _ in range(50):
        if len({peer.gossip.ledger.state_id for peer in peers}) == 1:
            return
        for peer in peers:
            peer.exchange()
    raise AssertionError("the states stay different")


def introduction(town: Town, introducer: str, joiner: str, address: str = PLACE) -> bytes:
    request = JoinRequest.sign(
        identity(joiner), town.charter.run, certificate_of(identity(joiner)).der, address
    )
    return Introduction.sign(identity(introducer), request).encoded


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}


def eventually(check: Callable[[], bool]) -> None:
    """Wait for what other threads or processes are about to do."""
    for _ in range(3000):
        if check():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to pass")


def chain_of(peer: Peer, name: str) -> list[Record]:
    return peer.gossip.ledger.chain(key(name)).counted()


def exchange_until(peer: Peer, check: Callable[[], bool]) -> None:
    for _ in range(50):
        if check():
            return
        peer.exchange()
    raise AssertionError("no exchange led to it")


def forged(town: Town, name: str, head: Head | None = None) -> Record:
    run = town.charter.run
    return Record.sign(identity(name), run, head or Head(), b"\x01\x02\x03", shift=1)
