"""What a federated run is compared with: training alone, and training on all text in one place.

"Local-only" gives each participant the steps that it makes in the federated run, without the
others.  "Centralised" is the better of two ways to spend the federation's work on the pooled
text: (rounds x steps) at the summed batch, and (clients x rounds x steps) at one client's batch.
All losses are means over response tokens on the union of all participants' held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..client.task import Participant
from ..client.trainer import Job
from ..config import Config
from ..peft_adapters.layout import Tree
from ..strategies.averaging import fresh_adapter
from ..strategies.base import Loss, Sgd
from .engine import Lab, Progress

GRID = (1 / 3, 1.0, 3.0)
"""The shared grid: factors of the config's learning rate that every arm chooses from."""


def grid_of(config: Config) -> list[float]:
    """The three learning rates of the grid, to three digits."""
    return [float(f"{config.clients.lr * factor:.3g}") for factor in GRID]


def share(base: float, federated: float, centralised: float) -> float:
    """How much of centralised training's improvement the federation reached."""
    return (base - federated) / (base - centralised)


def cohort_size(lab: Lab, config: Config) -> int:
    return max(1, math.ceil(config.rounds.fraction * len(lab.participants) - 1e-9))


def union(lab: Lab) -> Participant:
    """All participants' text in one place."""
    seed = lab.participants[0].seed
    train = [example for person in lab.participants for example in person.train]
    held_out = [example for person in lab.participants for example in person.held_out]
    return Participant("union", train, held_out, seed)


@dataclass(frozen=True)
class LocalOnly:
    """Each participant alone."""

    loss: float  # mean over the participants of their models' losses on the union
    own_loss: float  # each on its own held-out rows, mean over tokens
    losses: dict[str, float]  # on the union, by participant
    own_losses: dict[str, float]


def local_only(lab: Lab, config: Config, progress: Progress = lambda steps: None) -> LocalOnly:
    """Train every participant alone, for the steps that it makes in the federated run."""
    trainer, whole = lab.trainer(config, progress), union(lab)
    steps = math.ceil(config.rounds.count * config.rounds.fraction) * config.clients.steps
    losses, own, tokens = {}, {}, {}
    for person in lab.participants:
        request = Sgd(_start(lab, config), steps, total_steps=steps)
        adapter = trainer.sgd([person.job(request)])[0].adapter
        losses[person.name] = trainer.loss(Loss(adapter), whole.held_out).loss
        measured = trainer.loss(Loss(adapter), person.held_out)
        own[person.name], tokens[person.name] = measured.loss, measured.tokens
    mean = sum(own[name] * tokens[name] for name in own) / sum(tokens.values())
    return LocalOnly(sum(losses.values()) / len(losses), mean, losses, own)


@dataclass(frozen=True)
class Centralised:
    """The best of the grid and of both ways to spend the work."""

    loss: float
    lr: float
    way: str  # "summed batch" or "more steps"
    tried: dict[str, float]  # loss by "<way>, lr <rate>"
    adapter: Tree


def centralised(
    lab: Lab, config: Config, rates: Sequence[float], progress: Progress = lambda steps: None
) -> Centralised:
    """Train on the pooled text in both ways at each learning rate; the best."""
    clients, steps = cohort_size(lab, config), config.rounds.count * config.clients.steps
    batch = config.clients.batch
    ways = {"summed batch": (steps, clients * batch), "more steps": (clients * steps, batch)}
    tried: dict[str, float] = {}
    best: Centralised | None = None
    for way, (count, rows) in ways.items():
        for lr in rates:
            clients_config = replace(config.clients, lr=lr, batch=rows, micro_batch=batch)
            loss, adapter = _pooled(lab, replace(config, clients=clients_config), count, progress)
            tried[f"{way}, lr {lr:g}"] = loss
            if best is None or loss < best.loss:
                best = Centralised(loss, lr, way, tried, adapter)
    assert best is not None
    return best


def _pooled(lab: Lab, config: Config, steps: int, progress: Progress) -> tuple[float, Tree]:
    weight = config.clients.batch // config.clients.micro_batch  # in steps of one client
    trainer, whole = lab.trainer(config, lambda done: progress(done * weight)), union(lab)
    request = Sgd(_start(lab, config), steps, total_steps=steps)
    adapter = trainer.sgd([Job(request, whole.train, whole.name, whole.seed)])[0].adapter
    return trainer.loss(Loss(adapter), whole.held_out).loss, adapter


def _start(lab: Lab, config: Config) -> Tree:
    return fresh_adapter(lab.layers, config.model.rank, config.rounds.seed)
