"""The ways to train that `meadow bench zo` compares: from a lab, a config and a rate to a loss.

Every client makes `rounds * steps` steps of the config.  Arms without a federation train one
client that holds all text, and read the same batches in the same order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Config
from ..peft_adapters.adapter_reader import load_adapter
from ..peft_adapters.bank import BankLinear
from ..peft_adapters.full_rank import FullRank
from ..peft_adapters.full_rank_layers import FullRankLayers
from ..peft_adapters.layout import Tree
from ..strategies.averaging import fresh_adapter
from ..strategies.base import Loss
from ..strategies.zeroth_order import run_id_of
from .baselines import union
from .batches import batch_of, mean_loss, token_losses
from .engine import Lab, simulate
from .mezo import Draw, Mezo, borrowed, gaussian, rank_one_signs

EPSILON = 2.0**-10
_UNIT = 30
_SCALING = 2.0  # alpha / rank, of every arm: so one lab serves all ranks


@dataclass(frozen=True)
class Outcome:
    """Held-out losses before and after, and bytes that all clients sent (None: nothing is sent)."""

    base: float
    loss: float
    bytes_up: int | None = None

    @property
    def gain(self) -> float:
        return self.base - self.loss


Train = Callable[[Lab, Config, float], Outcome]
"""Of a lab, a config and a learning rate."""


@dataclass(frozen=True)
class Arm:
    """One line of a table, and the learning rates that it may choose from."""

    name: str
    train: Train
    rates: tuple[float, ...]


def ranked(config: Config, rank: int) -> Config:
    """The config with an adapter of this rank, under the one scaling that all arms share."""
    return config.replace(model={"rank": rank, "alpha": _SCALING * rank})


def single(lab: Lab) -> Lab:
    """The same base with one participant, who holds everybody's text."""
    return replace(lab, participants=(union(lab),))


def federated(strategy: str, rank: int, **options: Any) -> Train:
    """A strategy through the engine; the rate is the clients'."""

    def train(lab: Lab, config: Config, lr: float) -> Outcome:
        return _simulated(lab, ranked(config, rank), strategy, options, lr)

    return train


def zeroth(rank: int, stands_for: int = 0, **options: Any) -> Train:
    """`fedkseed` through the engine; the rate is the strategy's.

    With `stands_for` one client holds all text and makes the steps of so many.
    """

    def train(lab: Lab, config: Config, lr: float) -> Outcome:
        if stands_for:
            steps = config.clients.steps * stands_for
            config, lab = config.replace(clients={"steps": steps}), single(lab)
        own = {"lr": lr, "unit": _UNIT, **options}
        return _simulated(lab, ranked(config, rank), "fedkseed", own, config.clients.lr)

    return train


def mezo(draw: Draw = gaussian) -> Train:
    """MeZO with fresh directions, independent of all that meadow trains with."""

    def train(lab: Lab, config: Config, lr: float) -> Outcome:
        lab = single(lab)
        weights, base = _weights(lab), _held_out(lab, config)
        with borrowed(weights), torch.no_grad():
            walker = Mezo(weights, lr, EPSILON, draw=draw)
            for step, seed in enumerate(mezo_seeds(config)):
                rows = batch_of(lab.participants[0], config.clients.batch, step)
                walker.step(seed, lambda rows=rows: float(mean_loss(lab, rows)))  # type: ignore[misc]
            return Outcome(base, _held_out(lab, config))

    return train


def mezo_seeds(config: Config) -> list[int]:
    """A seed for each step, drawn as MeZO draws them: below 10^9."""
    drawn = np.random.default_rng(config.rounds.seed).integers(10**9, size=_steps(config))
    return [int(seed) for seed in drawn]


def rank_one() -> Train:
    """MeZO along fresh rank-one signs."""
    return mezo(rank_one_signs)


def full_rank() -> Train:
    """Fresh full-rank signs, evaluated unmerged: FedKSeed's form as meadow has it."""

    def train(lab: Lab, config: Config, lr: float) -> Outcome:
        lab = single(lab)
        sites = tuple(sorted(lab.layers, key=lambda site: site.name))
        run_id, steps = run_id_of(config.rounds.seed), _steps(config)
        layers = FullRankLayers(
            lab.base.model, FullRank(run_id, lab.base.digest, sites, steps, _UNIT)
        )
        base = _held_out(lab, config)
        for step in range(steps):
            rows = batch_of(lab.participants[0], config.clients.batch, step)
            with layers.attached(step, EPSILON), torch.no_grad():
                plus, minus = _halves(*token_losses(lab, [*rows, *rows]))
            # W = W0 - 2^-unit * sum of I z, so that a step down the gradient adds to I
            layers.step(step, round(lr * (plus - minus) / (2 * EPSILON) * 2.0**_UNIT))
        with layers.attached():
            return Outcome(base, _held_out(lab, config))

    return train


def domain(name: str, kind: str, rank: int, **options: Any) -> Train:
    """`pool_lora` in which the participant `name` is "absent", "zeroth" or "first" order; losses
    are those on its held-out rows, and the rate is that of its zeroth-order steps."""

    def train(lab: Lab, config: Config, lr: float) -> Outcome:
        own = {"lr": lr, "unit": _UNIT, "zeroth": [name] if kind == "zeroth" else [], **options}
        holder = tuple(person for person in lab.participants if person.name == name)
        others = tuple(person for person in lab.participants if person.name != name)
        present = replace(lab, participants=others) if kind == "absent" else lab
        measured = replace(lab, participants=holder)
        outcome, adapter = _with_adapter(present, ranked(config, rank), "pool_lora", own)
        base, loss = (_held_out(measured, config, tree) for tree in (None, adapter))
        return Outcome(base, loss, outcome.bytes_up)

    return train


def _simulated(
    lab: Lab, config: Config, strategy: str, options: dict[str, Any], lr: float
) -> Outcome:
    config = config.replace(clients={"lr": lr})
    return _with_adapter(lab, config, strategy, options)[0]


def _with_adapter(
    lab: Lab, config: Config, strategy: str, options: dict[str, Any]
) -> tuple[Outcome, Tree]:
    """A run of the engine in a folder that does not stay, and the adapter it left."""
    run = config.replace(strategy={"name": strategy, "options": options})
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(run, Path(folder) / "run", lab)
        tree = load_adapter(result.adapter, sites=lab.layers).tree
    return Outcome(result.base_loss, result.loss, result.total("bytes_up")), tree


def _steps(config: Config) -> int:
    return config.rounds.count * config.clients.steps


def _weights(lab: Lab) -> dict[str, nn.Parameter]:
    """The adapted matrices, which are under the bank's layers."""
    found = {}
    for site in lab.layers:
        layer = lab.base.model.get_submodule(site.name)
        assert isinstance(layer, BankLinear)
        weight = layer.base.weight
        assert isinstance(weight, nn.Parameter)
        found[site.name] = weight
    return found


def _held_out(lab: Lab, config: Config, tree: Tree | None = None) -> float:
    """The mean loss over all held-out rows of the model as it stands, plus a tree."""
    adapter = fresh_adapter(lab.layers, 1, 0) if tree is None else tree  # its B is zero
    return lab.trainer(config).loss(Loss(adapter), union(lab).held_out).loss


def _halves(losses: Tensor, counted: Tensor) -> list[float]:
    """Means over response tokens of the first and of the second half of the rows."""
    sums = losses.double().sum(1).view(2, -1).sum(1)
    return (sums / counted.double().sum(1).view(2, -1).sum(1).clamp(min=1)).tolist()
