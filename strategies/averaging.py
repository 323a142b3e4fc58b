"""What the averaging strategies share: send factors, train them, average them, step.

A subclass says which factors move in a round (`moving`) and may override a half.  State tensors
are `x/<name>` for the adapter and the server optimiser's moments; the client's memory counts its
steps and, with `keep_optimizer`, holds its AdamW state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..peft_adapters.factors import uniform_init
from ..peft_adapters.layout import FACTORS, Site, Tree
from .base import Loss, Sgd, State, Trained, Turn, Update, Work, option
from .server_optimizers import Kind, ServerOptimizer
from .staleness import Patient


def fresh_adapter(sites: Sequence[Site], rank: int, seed: int) -> Tree:
    """LoRA's start: A uniform in +-1/sqrt(in), the same bits anywhere; B zero."""
    tree = {}
    for site in sites:
        name = f"{site.name}.lora_A"
        tree[name] = uniform_init(seed, name, site.shape("lora_A", rank))
        tree[f"{site.name}.lora_B"] = torch.zeros(site.shape("lora_B", rank))
    return tree


def select(tree: Tree, factors: Sequence[str]) -> Tree:
    """The tensors whose last name part is one of `factors`."""
    return {name: tensor for name, tensor in tree.items() if name.rpartition(".")[2] in factors}


def under(prefix: str, tree: Tree) -> Tree:
    """The tensors below `prefix/`, without it."""
    return {n.removeprefix(f"{prefix}/"): t for n, t in tree.items() if n.startswith(f"{prefix}/")}


def put(prefix: str, tree: Tree) -> Tree:
    """The inverse of `under`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tree.items()}


def notes_of(trained: Trained) -> dict[str, float | int]:
    return {"loss": trained.loss, "examples": trained.examples, "tokens": trained.tokens}


@dataclass(frozen=True, kw_only=True)
class Averaging(Patient):
    """FedAvg over the factors that `moving` names."""

    server_optimizer: Kind = option("avg", "avg, avgm (FedAvgM) or adam (FedAdam)")
    server_lr: float = option(0.0, "0: the server optimiser's customary rate", 0)
    server_momentum: float = option(0.9, "beta1 of avgm and adam (below 1)", 0, 0.9999)
    proximal: float = option(0.0, "FedProx's mu on the clients (0 = off)", 0)
    keep_optimizer: bool = option(False, "clients keep their AdamW state between rounds")

    def moving(self, turn: Turn) -> tuple[str, ...]:
        """The factors that are trained and sent in this round."""
        return FACTORS

    @property
    def optimizer(self) -> ServerOptimizer:
        return ServerOptimizer(self.server_optimizer, self.server_lr, self.server_momentum)

    def init(self, seed: int) -> State:
        return State(put("x", fresh_adapter(self.sites, self.rank, seed)))

    def broadcast(self, state: State, turn: Turn) -> Update:
        return Update(under("x", state.tensors))

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        return {n: tuple(t.shape) for n, t in select(sent.tensors, self.moving(turn)).items()}

    def start(self, received: Update, memory: State, turn: Turn) -> Tree:
        """The adapter that local training starts from."""
        return received.tensors

    def side(self, received: Update) -> Tree | None:
        """The frozen adapter under the trained one, if there is one."""
        return None

    def request(self, received: Update, memory: State, turn: Turn) -> Sgd:
        """Local training of the moving factors, continuing this client's cursor and schedule."""
        kept = under("optimizer", memory.tensors) if self.keep_optimizer else None
        return Sgd(
            self.start(received, memory, turn),
            turn.steps,
            side=self.side(received),
            first_step=memory.data.get("steps", 0),
            total_steps=turn.total_steps,
            train=self.moving(turn),
            optimizer=kept or None,
            proximal=self.proximal,
        )

    def share(self, trained: Trained, turn: Turn) -> Tree:
        """What of the trained adapter is sent."""
        return select(trained.adapter, self.moving(turn))

    def remember(self, trained: Trained, memory: State, turn: Turn) -> State:
        """The memory after this round."""
        kept = put("optimizer", trained.optimizer) if self.keep_optimizer else {}
        return State(kept, {"steps": memory.data.get("steps", 0) + turn.steps})

    def work(self, received: Update, memory: State, turn: Turn) -> Work:
        trained = yield self.request(received, memory, turn)
        update = Update(
            self.share(trained, turn), weight=float(trained.examples), notes=notes_of(trained)
        )
        return update, self.remember(trained, memory, turn)

    def step(self, state: State, total: Update, turn: Turn) -> State:
        x = under("x", state.tensors)
        moments = {n: t for n, t in state.tensors.items() if n.startswith(("m/", "v/"))}
        moved, moments = self.optimizer.step(x, total.tensors, moments)
        return State({**put("x", moved), **moments}, state.data)

    def export(self, state: State) -> Tree:
        return under("x", state.tensors)

    def own(self, received: Update, memory: State, turn: Turn) -> Loss:
        return Loss(self.start(received, memory, turn), self.side(received))
