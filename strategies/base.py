"""The algorithm seam: a strategy emits statistics on a client and consumes combined ones.

Everything between the two halves (weighing, summing, wire, journal) belongs to others, so that a
strategy's file reads like its paper.  `Strategy.work` is a generator that yields `Request`s and
returns an `Update`; whoever drives it (one client's task, the fused simulation, a test with a
table of answers) trains and measures in its place.

Names: an adapter is a `Tree` of `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r), float32,
where `<module>` is the checkpoint's name of the adapted linear layer.  The weight that it adds is
`scaling * B @ A`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import ClientsConfig
from ..peft_adapters.layout import Site, Tree
from ..peft_adapters.pool import Pool

Json = Any  # what json.dumps takes


def option(default: Any, about: str, least: float | None = None, most: float | None = None) -> Any:
    """A field of a strategy that run.toml may set, with the text that help shows and, for a
    number, the least value allowed."""
    metadata = {"about": about, "least": least, "most": most}
    if isinstance(default, (dict, list)):  # empty ones
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Update:
    """What travels in either direction: tensors that may be summed, and how much they count."""

    tensors: Tree
    weight: float = 1.0
    count: int = 1
    notes: Mapping[str, Json] = field(default_factory=dict)  # never summed
    sender: str = ""  # set by who received it, never read from a message
    parts: tuple[Update, ...] = ()  # in a total: the updates, where the strategy combines them


@dataclass(frozen=True)
class State:
    """What a restart resumes from: named tensors and small JSON."""

    tensors: Tree = field(default_factory=dict)
    data: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """All that a strategy may depend on besides its state; equal on both sides of the wire."""

    round: int  # from 1
    rounds: int
    seed: int
    steps: int = 1  # local steps a round
    total_steps: int = (
        0  # what one client is expected to make in the whole run: its schedule's horizon
    )
    client: str = ""  # empty on the coordinator
    cohort: tuple[str, ...] = ()
    joined: int = 1  # the round in which this client was first seen


@dataclass(frozen=True)
class Sgd:
    """Train an adapter for `steps` optimiser steps on the client's own text."""

    adapter: Tree
    steps: int
    first_step: int = 0  # cumulative steps of this client: places its data cursor and schedule
    total_steps: int = 0  # the schedule's horizon, in this client's steps
    train: tuple[str, ...] = ("lora_A", "lora_B")  # which factors move
    pool: Pool | None = None  # the adapter is this pool's cores, in units of `scale`
    scale: float = 1.0  # with a pool: the weight change that a 1 in a core stands for
    side: Tree | None = None  # a frozen adapter under the trained one
    optimizer: Tree | None = None  # kept AdamW state, as `Trained.optimizer` gave it
    proximal: float = 0.0  # FedProx's mu, towards `adapter`


@dataclass(frozen=True)
class Trained:
    """The answer to `Sgd`."""

    adapter: Tree
    optimizer: Tree  # exp_avg and exp_avg_sq of each moved tensor, and the step
    loss: float  # mean over the steps
    examples: int  # rows in the client's training set
    tokens: int  # response tokens seen in these steps


@dataclass(frozen=True)
class Loss:
    """Measure the mean loss over response tokens on the client's held-out rows."""

    adapter: Tree
    side: Tree | None = None


@dataclass(frozen=True)
class Measured:
    """The answer to `Loss`."""

    loss: float
    tokens: int


@dataclass(frozen=True)
class Probe:
    """Measure the loss at +epsilon and -epsilon along directions of a pool, over one batch.

    The model is W0 + 2^-unit U Q V^T; nothing is written to it.  The batch's rows are dealt evenly
    to the directions (one row each where there are as many directions as rows).
    """

    pool: Pool
    q: Tensor  # int64 (cores, r, r)
    directions: tuple[int, ...]  # k = a * r + b
    epsilon: float  # a power of two
    step: int  # cumulative steps of this client: places its data cursor


@dataclass(frozen=True)
class Probed:
    """The answer to `Probe`."""

    losses: Tensor  # float64 (directions, 2): at +epsilon, at -epsilon; means over their rows
    examples: int  # rows in the client's training set
    tokens: int  # response tokens in the batch


Request = Sgd | Loss | Probe
Answer = Trained | Measured | Probed
Work = Generator[Request, Any, tuple[Update, State]]
"""Yields requests, returns the update to send and the client's memory for its next round."""


class Reducer(ABC):
    """Folds updates one by one, in the cohort's order; memory does not grow with their number."""

    @abstractmethod
    def fold(self, update: Update) -> None: ...

    @abstractmethod
    def total(self) -> Update: ...


class Mean(Reducer):
    """Weighted mean of every tensor, accumulated in float64 and rounded once to float32.

    `total().weight` is the sum of the weights, `total().count` the number of updates.
    """

    def __init__(self) -> None:
        self._sums: Tree = {}
        self._weight = 0.0
        self._count = 0

    def fold(self, update: Update) -> None:
        self._weight += update.weight
        self._count += update.count
        for name, tensor in update.tensors.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
            self._sums[name].add_(tensor.double(), alpha=update.weight)

    def total(self) -> Update:
        if self._weight <= 0:
            return Update({}, 0.0, self._count)
        mean = {name: (total / self._weight).float() for name, total in self._sums.items()}
        return Update(mean, self._weight, self._count)


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """One federated algorithm.  Subclasses are frozen dataclasses whose fields are its options;
    those of this class, which both sides know from the model and the config, are not options."""

    sites: tuple[Site, ...] = ()
    rank: int = 8
    scaling: float = 1.0  # alpha / r of the exported adapter
    base_digest: str = ""

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    mixed_ranks: ClassVar[bool] = False
    secure_sum: ClassVar[bool] = True  # a plain weighted sum is all that the coordinator needs
    personal: ClassVar[bool] = False  # a part of each client's model stays with it
    dp: ClassVar[str] = "noise product"  # what Gaussian noise on its updates does
    customary_rank: ClassVar[int | None] = None  # [model] rank and alpha, where not the default
    integers: ClassVar[bool] = False  # updates are exact integers: neither clipped nor rounded

    @abstractmethod
    def init(self, seed: int) -> State:
        """The state before round 1."""

    @abstractmethod
    def broadcast(self, state: State, turn: Turn) -> Update:
        """What every client of the cohort receives."""

    @abstractmethod
    def work(self, received: Update, memory: State, turn: Turn) -> Work:
        """The client half."""

    @abstractmethod
    def step(self, state: State, total: Update, turn: Turn) -> State:
        """The server half: the next state from the combined updates of one round."""

    @abstractmethod
    def export(self, state: State) -> Tree:
        """The state as one LoRA adapter, whose weight change is `scaling * B @ A`."""

    @abstractmethod
    def own(self, received: Update, memory: State, turn: Turn) -> Loss:
        """What this client itself would use, to be measured on its held-out rows."""

    @abstractmethod
    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the update that `turn.client` has to answer `sent` with."""

    def validate(self, update: Update, turn: Turn) -> None:  # noqa: B027
        """Raise UpdateError for a contribution of the right shapes that cannot be true."""

    def reducer(self, turn: Turn) -> Reducer:
        """How updates are combined."""
        return Mean()

    def check(self) -> None:  # noqa: B027 (not abstract: most have nothing to check)
        """Raise ConfigError, in a sentence, for options that contradict each other."""

    def check_clients(self, clients: ClientsConfig) -> None:  # noqa: B027
        """Raise ConfigError for settings of [clients] that this strategy cannot work with."""

    def report(self, total: Update, turn: Turn) -> dict[str, float]:
        """Figures of this round for the metrics, from the combined update."""
        return {}
