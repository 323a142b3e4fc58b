"""The local engine: a whole federation in one process, over the same apps as a deployed one.

`Lab` is what a machine loads once: base model, bank, participants' encoded text.  `simulate`
runs a strategy over it in a run's folder, from the start or from wherever its journal stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flwr.app import Context, RecordDict

from .. import __version__
from ..client.app import build as build_client_app
from ..client.data import silos_of
from ..client.member import Member
from ..client.outbox import Outbox
from ..client.task import Participant, answer
from ..client.trainer import Trainer
from ..client.workbench import Workbench, open_workbench
from ..config import Config, write
from ..errors import ConfigError, DataError, JournalError
from ..events import Event, Observer, tee
from ..identity import own_identity
from ..journal import Journal, RunIdentity
from ..peft_adapters.adapter_reader import load_adapter
from ..peft_adapters.bank import Bank
from ..peft_adapters.base_model import Base
from ..peft_adapters.blueprint import check_shape
from ..peft_adapters.layout import Site
from ..peft_adapters.pool_size import warnings_of
from ..server.app import GridPeers
from ..server.app import build as build_server_app
from ..server.coordinator import Coordinator
from ..server.publishing import open_publishing
from ..server.run_folder import HeldOut, environment, traces
from ..server.run_output import RunOutput
from ..store import Disk
from ..strategies.base import Answer, Loss, Request, Strategy
from ..strategies.registry import strategy_of
from ..strategies.transforms import make_transforms
from .fused import Rendezvous
from .grid import LocalGrid

Progress = Callable[[int], None]
"""Told how many client-steps have been made since it was last told."""


@dataclass(frozen=True)
class Lab:
    """A base model and its participants, loaded and encoded."""

    bench: Workbench
    participants: tuple[Participant, ...]
    truncated: Mapping[str, int]  # rows that were too long, by participant

    @property
    def base(self) -> Base:
        return self.bench.base

    @property
    def bank(self) -> Bank:
        return self.bench.bank

    @property
    def layers(self) -> tuple[Site, ...]:
        return self.bench.layers

    def trainer(self, config: Config, progress: Progress = lambda steps: None) -> Trainer:
        return Trainer(self.bank, config.clients, self.bench.pad, progress)

    def text_digest(self) -> str:
        """SHA-256 of all participants' names and tokens."""
        digest = hashlib.sha256()
        for person in self.participants:
            for side, rows in (("train", person.train), ("held out", person.held_out)):
                digest.update(json.dumps([person.name, side, len(rows)]).encode())
                for row in rows:
                    digest.update(json.dumps([row.ids.tolist(), row.labels.tolist()]).encode())
        return digest.hexdigest()

    def held_out(self) -> HeldOut:
        """The rows that everybody's losses are measured on: how many, and SHA-256 of their tokens
        in an order of their own."""
        rows = [row for person in self.participants for row in person.held_out]
        parts = sorted(json.dumps([row.ids.tolist(), row.labels.tolist()]) for row in rows)
        return HeldOut(len(rows), hashlib.sha256("\n".join(parts).encode()).hexdigest())

    def strategy(self, config: Config) -> Strategy:
        return strategy_of(config, self.layers, self.base.digest)


def open_lab(config: Config) -> Lab:
    """Load everything that `config` names.  Raises ModelError, DataError or ConfigError."""
    made = strategy_of(config)  # mistakes show before long work
    made.check_clients(config.clients)
    silos = silos_of(config)
    check_participants(config, [silo.client for silo in silos])
    bench = open_workbench(config)
    check_shape(config.model.rank, bench.layers, made.integers)
    encoded = [bench.encode(silo, config) for silo in silos]
    participants = tuple(participant for participant, _ in encoded)
    truncated = {participant.name: cut for participant, cut in encoded}
    if not any(participant.held_out for participant in participants):
        raise DataError(
            "no participant has held-out rows, so nothing can be measured", "at least two rows each"
        )
    return Lab(bench, participants, truncated)


def check_participants(config: Config, names: Sequence[str]) -> None:
    """Refuse ranks of participants that do not exist, and a clip of what has no one shape."""
    ranks = config.strategy.options.get("ranks", {})
    for option in ("ranks", "zeroth"):
        unknown = [name for name in config.strategy.options.get(option, ()) if name not in names]
        if unknown:
            raise ConfigError(
                f"[strategy] {option} names {unknown[0]!r}, who is no participant",
                f"participants: {', '.join(names)}",
            )
    if ranks and config.clients.clip_update and config.strategy.name == "fedavg_lora":
        raise ConfigError("clip_update needs equal ranks: a change of shape has no norm")


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    folder: Path
    metrics: tuple[Mapping[str, Any], ...]  # one row a round, from round 0 (the base)
    notices: tuple[str, ...]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def base_loss(self) -> float:
        return float(self.metrics[0]["loss"])

    @property
    def loss(self) -> float:
        return float(self.metrics[-1]["loss"])

    @property
    def losses(self) -> dict[str, float]:
        return dict(self.metrics[-1]["losses"])

    def total(self, key: str) -> int:
        return sum(int(row.get(key, 0)) for row in self.metrics)


def simulate(
    config: Config,
    folder: Path,
    lab: Lab | None = None,
    observer: Observer = lambda event: None,
    disk: Disk | None = None,
    progress: Progress = lambda steps: None,
) -> Result:
    """Run, or go on with, the federation that `config` describes; its traces are in `folder`.

    Raises JournalError where the folder belongs to another run, QuorumError where a round cannot
    close, StorageError where the disk is full; the same call then continues.
    """
    lab = lab or open_lab(config)
    disk = disk or Disk()
    disk.folder(folder)
    if (folder / "run.toml").exists() and not (folder / "journal.db").exists():
        raise JournalError(f"{folder} holds a run.toml but no run", "choose another --out")
    identity = RunIdentity(config.digest(), lab.base.digest, environment())
    with Journal.open(folder, identity, disk) as journal:
        _check_text(journal, lab, folder)
        disk.write(folder / "run.toml", write(config).encode())
        with traces(journal, folder, disk) as keep:
            _run(config, folder, lab, journal, tee(keep, observer), disk, progress)
        return Result(folder, tuple(journal.metrics()), tuple(journal.notices))


def _check_text(journal: Journal, lab: Lab, folder: Path) -> None:
    """A run belongs to its participants' text: refuse to continue it with another."""
    found = lab.text_digest()
    known = journal.get("text")
    if known is None:
        journal.note("text", found)
    elif known != found:
        raise JournalError(
            f"{folder} holds a run on other text: rows or participants have changed",
            "choose another --out, or delete that folder to start anew",
        )


def _run(
    config: Config,
    folder: Path,
    lab: Lab,
    journal: Journal,
    observer: Observer,
    disk: Disk,
    progress: Progress,
) -> None:
    observer(
        Event(
            "run_started",
            0,
            {"run": journal.run_id, "truncated": dict(lab.truncated), "meadow": __version__},
        )
    )
    advice = warnings_of(config.model.rank, lab.layers) if lab.strategy(config).integers else []
    for notice in (*journal.notices, *advice):
        observer(Event("notice", 0, {"text": notice}))
    signer = own_identity()  # before the long work
    strategy, trainer = lab.strategy(config), lab.trainer(config, progress)
    transforms = make_transforms(config.clients.clip_update, config.clients.wire)
    group = config.simulation.group if config.simulation.engine == "fused" else 1
    meeting = Rendezvous(trainer)
    members = []
    for person in lab.participants:
        outbox = Outbox(folder / "clients", person.name, journal.run_id, disk)
        respond = meeting.responder(person) if group > 1 else partial(_alone, person, trainer)
        members.append(Member(person.name, strategy, outbox, respond, transforms, group > 1))
    grid = LocalGrid(build_client_app(lambda node: members[node - 1]), len(members), group, meeting)

    def main(peers: GridPeers) -> None:
        coordinator = Coordinator(
            config, strategy, journal, peers, transforms, observer, output.settle
        )
        output.settle(coordinator.rounds_done, coordinator.state)
        state = coordinator.run()
        output.finish(state)
        for member in members if strategy.personal else ():
            sent = strategy.broadcast(state, coordinator.turn(config.rounds.count))
            own = member.own(sent, coordinator.turn(config.rounds.count, client=member.name))
            place = personal_folder(folder, member.name)
            lab.bench.blueprint.export(config, own.adapter, place, journal.run_id, disk)

    def groups(cohort: Sequence[str]) -> list[list[str]]:
        return [list(cohort[start : start + group]) for start in range(0, len(cohort), group)]

    nodes = {member.name: node for node, member in enumerate(members, 1)}
    publishes = open_publishing(config, lab.bench.blueprint, signer, observer, disk)
    with publishes or nullcontext() as publishing:
        output = RunOutput(
            *(config, folder, strategy, lab.bench.blueprint, journal, signer),
            *(publishing, disk, lab.held_out()),
        )
        build_server_app(main, lambda: nodes, groups)(grid, Context(1, 0, {}, RecordDict(), {}))
    observer(Event("run_finished", config.rounds.count, {"adapter": str(folder / "adapter")}))


def personal_folder(folder: Path, name: str) -> Path:
    """Where a participant's own adapter goes; any name is a safe and short one there."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return folder / "personal" / f"{quote(name, safe='')[:40]}-{digest}"


def _alone(person: Participant, trainer: Trainer, request: Request) -> Answer:
    return answer(request, person, trainer)


def measure(lab: Lab, config: Config, adapter: Path) -> dict[str, Any]:
    """Held-out losses of the base and of a PEFT adapter, by participant and over all tokens.

    Raises AdapterError for an adapter that is malformed, not finite or made for other layers.
    """
    adapted = lab.bench.tree(load_adapter(adapter, sites=lab.layers))
    blank = lab.bench.blank()
    trainer, losses, sums, tokens = lab.trainer(config), {}, [0.0, 0.0], 0
    for person in lab.participants:
        if person.held_out:
            found = [trainer.loss(Loss(tree), person.held_out) for tree in (blank, adapted)]
            losses[person.name] = [answer.loss for answer in found]
            tokens += found[0].tokens
            sums = [total + f.loss * f.tokens for total, f in zip(sums, found, strict=True)]
    return {"base_loss": sums[0] / tokens, "loss": sums[1] / tokens, "losses": losses}
