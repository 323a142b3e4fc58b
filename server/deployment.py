"""The server app's job in a deployed run: rounds over Flower's grid, from wherever the journal is.

Whatever ends this process, the next one goes on: the journal holds every contribution, and the
participants' outboxes hold what had not arrived.  A round that finds no quorum is not the end of a
run: it waits, and asks whoever can be asked then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from ..config import Config
from ..errors import MeadowError, QuorumError, StorageError
from ..events import Event, EventLog, Observer
from ..journal import Journal
from ..peft_adapters.blueprint import Blueprint, open_blueprint
from ..store import Disk, locked
from ..strategies.registry import strategy_of
from ..strategies.staleness import patience_of
from ..strategies.transforms import make_transforms
from .app import GridPeers, Nodes
from .coordinator import Coordinator, Peers
from .coordinator_home import CoordinatorHome
from .publishing import Publishing, open_publishing
from .roster import Note, Roster
from .run_beginning import run_identity
from .run_folder import traces
from .run_output import RunOutput

POLL_SECONDS = 0.2
_APPROVED = "approved"
_READ = "inbox"  # the journal's key for the last note that was acted upon

PeersOf = Callable[[Nodes, int], GridPeers]
"""Who may be asked, and for how many deadlines a question can be answered -> those peers."""


def serve(folder: Path, peers_of: PeersOf, sleep: Callable[[float], None] = time.sleep) -> None:
    """Work on the run in a coordinator's folder until it is finished."""
    home, disk = CoordinatorHome(folder), Disk()
    config = home.config()
    torch.set_num_threads(config.simulation.threads or torch.get_num_threads())
    # claimed first: to look through a large base takes minutes, in which it is taken for dead
    with _claimed(home, disk), _told(home):
        _work(home, config, open_blueprint(config.model), peers_of, disk, sleep)


def _work(
    home: CoordinatorHome,
    config: Config,
    blueprint: Blueprint,
    peers_of: PeersOf,
    disk: Disk,
    sleep: Callable[[float], None],
) -> None:
    with (
        Journal.open(home.run, run_identity(config, blueprint), disk) as journal,
        Roster.open(home.roster) as roster,
        traces(journal, home.run, disk) as observer,
    ):
        peers = peers_of(lambda: nodes_of(roster), 1 + patience_of(strategy_of(config)))
        observer(Event("run_started", 0, {"run": journal.run_id}))
        for notice in journal.notices:
            observer(Event("notice", 0, {"text": notice}))
        inbox = Inbox(roster, journal, observer)
        publishes = open_publishing(config, blueprint, home.identity(), observer, disk)
        with publishes or nullcontext() as publishing:
            run = DeployedRun(
                *(home, config, blueprint, journal, peers, inbox, observer, disk, sleep),
                publishing,
            )
            run.finish(run.rounds())


class DeployedRun:
    """A run's rounds, with waiting wherever a person or a network may need time."""

    def __init__(
        self,
        home: CoordinatorHome,
        config: Config,
        blueprint: Blueprint,
        journal: Journal,
        peers: Peers,
        inbox: Inbox,
        observer: Observer,
        disk: Disk,
        sleep: Callable[[float], None] = time.sleep,
        publishing: Publishing | None = None,
    ) -> None:
        self.home, self.config, self.blueprint = home, config, blueprint
        self.journal, self.peers, self.inbox, self.observer = journal, peers, inbox, observer
        self.disk, self.sleep = disk, sleep
        self.strategy = strategy_of(config, blueprint.layers, blueprint.digest)
        self.output = RunOutput(
            *(config, home.run, self.strategy, blueprint, journal, home.identity()),
            *(publishing, disk),
        )

    def rounds(self) -> Coordinator:
        """All rounds that are left."""
        self._wait_while_paused()
        self._wait_for(self._least())
        clients = self.config.clients
        coordinator = Coordinator(
            self.config,
            self.strategy,
            self.journal,
            self.peers,
            make_transforms(clients.clip_update, clients.wire),
            self.observer,
            self.output.settle,
            self.inbox.read,
        )
        self.output.settle(coordinator.rounds_done, coordinator.state)
        while coordinator.rounds_done < self.config.rounds.count:
            self._round(coordinator)
        return coordinator

    def finish(self, coordinator: Coordinator) -> None:
        """Write and publish the adapter with its manifest and, last, that the run is finished."""
        self.inbox.read()
        self.output.finish(coordinator.state)
        folder, count = self.home.run, self.config.rounds.count
        self.observer(Event("run_finished", count, {"adapter": str(folder / "adapter")}))
        self.disk.write(self.home.finished, json.dumps({"rounds": count}).encode())

    def _round(self, coordinator: Coordinator) -> None:
        self._wait_while_paused()
        self._wait_for(1)
        self.inbox.read()
        number = coordinator.rounds_done + 1
        try:
            coordinator.round(number)
        except QuorumError as error:
            pause = self.config.coordinator.retry_seconds
            self._notice(number, f"{error}; again in {pause:g} s")
            self.sleep(pause)
            self._wait_for(1)
            self.inbox.read()
            coordinator.recast()

    def _least(self) -> int:
        """How many have to be online.  Only a run's beginning waits for all: whoever left since is
        waited for by no restart, and a run whose rounds are done needs nobody."""
        last = self.journal.last()
        if last is None:
            return self.config.coordinator.least
        return 1 if last[0] < self.config.rounds.count else 0

    def _wait_for(self, least: int) -> None:
        """Until so many participants are online."""
        told = -1
        while (online := len(self.peers.names())) < least:
            if online != told:
                self._notice(0, f"{online} of {least} participants are online")
                told = online
            self.sleep(POLL_SECONDS)

    def _wait_while_paused(self) -> None:
        """A round that is open is finished first, also by a server app that was started anew."""
        if self.home.paused.exists() and self.journal.current() is None:
            self._notice(0, "paused")
            while self.home.paused.exists():
                self.sleep(POLL_SECONDS)
            self._notice(0, "resumed")

    def _notice(self, number: int, text: str) -> None:
        self.observer(Event("notice", number, {"text": text}))


class Inbox:
    """What participants have written to the coordinator, acted upon between rounds, and in a round
    before anything is combined."""

    def __init__(self, roster: Roster, journal: Journal, observer: Observer) -> None:
        self._roster, self._journal, self._observer = roster, journal, observer

    def read(self) -> None:
        """Act on what is new.  A crash in between repeats what changes nothing a second time."""
        last = int(self._journal.get(_READ) or 0)
        for note in self._roster.notes(last):
            if note.kind == "withdraw":
                self._withdraw(note)
            last = note.id
        self._journal.note(_READ, last)

    def _withdraw(self, note: Note) -> None:
        """Forget a participant's contributions, and ask it no more."""
        name = note.name
        rounds = self._journal.retract(name, "withdrawn by the participant")
        self._journal.sweep()  # its payloads too
        person = self._roster.by_name(name)
        joined_anew = person is not None and person.enrolled > note.time
        if person is not None and not joined_anew and person.status != "revoked":
            self._roster.revoke(name)
        told = ", ".join(map(str, rounds)) or "none"
        text = f"{name} withdrew; its contributions are deleted (rounds: {told})"
        self._observer(Event("notice", 0, {"text": text}))


def read_inbox(home: CoordinatorHome, observer: Observer) -> None:
    """Act on what participants have written, while no server app does: after a run's end, say."""
    disk, config = Disk(), home.config()
    identity = run_identity(config, open_blueprint(config.model))
    with (
        _claimed(home, disk),
        Journal.open(home.run, identity, disk) as journal,
        Roster.open(home.roster) as roster,
    ):
        Inbox(roster, journal, observer).read()


def nodes_of(roster: Roster) -> dict[str, int]:
    """Flower's node of every participant that may be asked."""
    return {
        person.name: person.node_id
        for person in roster.participants()
        if person.status == _APPROVED
    }


def alone(cohort: Sequence[str]) -> list[list[str]]:
    """Participants on machines of their own: nobody computes together."""
    return [[name] for name in cohort]


@contextmanager
def _told(home: CoordinatorHome) -> Iterator[None]:
    """What ends the work is an event: the operator hears why, and not only that it goes on anew."""
    try:
        yield
    except MeadowError as error:
        with suppress(StorageError), closing(EventLog(home.run / "events.jsonl")) as log:
            log(Event("notice", 0, {"text": f"the server app ends: {error}"}))
        raise


@contextmanager
def _claimed(home: CoordinatorHome, disk: Disk) -> Iterator[None]:
    """Hold what says that somebody works on the run; whoever watches over it sees that."""
    with locked(home.server_app_lock, "its server app runs already"):
        disk.write(home.server_app, str(os.getpid()).encode())
        try:
            yield
        finally:
            home.server_app.unlink(missing_ok=True)
