"""A deployed run over people in memory, who train on the tiny base in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from enrolment import new_identity
from gateways import Quick
from homes import blueprint
from safetensors.torch import load_file

from meadow.client.member import Member
from meadow.client.outbox import Outbox
from meadow.client.task import answer
from meadow.client.trainer import Trainer
from meadow.config import Config
from meadow.events import Event
from meadow.journal import Journal
from meadow.server.coordinator import Refusal
from meadow.server.coordinator_home import CoordinatorHome
from meadow.server.deployment import DeployedRun, Inbox
from meadow.server.publishing import Publishing
from meadow.server.roster import Roster
from meadow.server.run_beginning import begin, run_identity
from meadow.simulation.engine import Lab
from meadow.strategies.registry import strategy_of

NAMES = ("ada", "bob", "eve")
OPERATOR = new_identity()


@dataclass
class People:
    """Participants who train on the tiny base in this process; who is present may change."""

    lab: Lab
    config: Config
    folder: Path
    run: str
    present: list[str] = field(default_factory=lambda: list(NAMES))
    silent: set[str] = field(default_factory=set)
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    sent: dict[str, list[bytes]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return sorted(self.present)

    def together(self, cohort: Sequence[str]) -> list[list[str]]:
        return [[name] for name in cohort]

    def ask(
        self,
        verb: str,
        names: Sequence[str],
        payload: Callable[[str], bytes],
        deadline_seconds: float,
        number: int = 0,
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        self.asked.append((verb, tuple(names)))
        for name in names:
            if name in self.present and name not in self.silent:
                member = self._member(name)
                work = member.work if verb == "train" else member.evaluate
                data = work(payload(name))
                if verb == "train":
                    self.sent.setdefault(name, []).append(data)
                yield name, data

    def _member(self, name: str) -> Member:
        lab, config = self.lab, self.config
        person = next(p for p in lab.participants if p.name == name)
        trainer = Trainer(lab.bench.bank, config.clients, lab.bench.pad)
        base = blueprint(config.model.base)
        strategy = strategy_of(config, base.layers, base.digest)
        outbox = Outbox(self.folder / "outbox", name, self.run, Quick())
        return Member(name, strategy, outbox, lambda request: answer(request, person, trainer))


@dataclass
class Stage:
    """A run, its people and what it said."""

    home: CoordinatorHome
    config: Config
    people: People
    journal: Journal
    roster: Roster
    events: list[Event] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    on_sleep: Callable[[int], None] = lambda count: None
    publishing: Publishing | None = None

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        assert len(self.slept) < 200, "it waits for ever"
        self.on_sleep(len(self.slept))

    def run(self) -> DeployedRun:
        inbox = Inbox(self.roster, self.journal, self.events.append)
        base = blueprint(self.config.model.base)
        return DeployedRun(
            self.home, self.config, base, self.journal, self.people, inbox,
            self.events.append, Quick(), self.sleep, self.publishing,
        )  # fmt: skip

    def told(self) -> list[str]:
        return [event.data["text"] for event in self.events if event.kind == "notice"]

    def kinds(self) -> list[tuple[str, int]]:
        return [(event.kind, event.round) for event in self.events]

    def finish(self) -> dict[str, torch.Tensor]:
        run = self.run()
        run.finish(run.rounds())
        tensors: dict[str, torch.Tensor] = load_file(
            self.home.run / "adapter" / "adapter_model.safetensors"
        )
        return tensors


@contextmanager
def opened(folder: Path, config: Config, lab: Lab) -> Iterator[Stage]:
    home, base = CoordinatorHome(folder), blueprint(config.model.base)
    begin(home, config, base, "bb" * 32, OPERATOR, Quick())
    identity = run_identity(config, base)
    with (
        Journal.open(home.run, identity, Quick()) as journal,
        Roster.open(home.roster, Quick()) as roster,
    ):
        people = People(lab, config, folder, journal.run_id)
        yield Stage(home, config, people, journal, roster)


def killed(*arguments: object) -> None:
    """Ctrl-C, or worse, in the middle of whatever this replaces."""
    raise KeyboardInterrupt
