"""FedKSeed: zeroth-order steps along a pool of directions; a byte a step travels.

    client       draws one of the pool's K directions for each local step, measures the projected
                 gradient, rounds it to a byte and applies that to its own Q
    coordinator  Q[k] -= gain * M * sum_c (n_c / n) (sum of c's bytes at k)

Qin et al. 2024, "Federated Full-Parameter Tuning of Billion-Sized Language Models with
Communication Cost under 18 Kilobytes" (arXiv 2312.06353), on rank-one sign directions, whose sum
is a LoRA adapter.  `importance` is FedKSeed-Pro: directions are drawn in proportion to exp of
their normalised mean |g|, cut at 1,000; as there, g is not divided by the probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..peft_adapters.layout import Tree
from ..peft_adapters.pool import Integers, directions, drawn_directions, fold, refuse_overflow
from .base import State, Turn, Update, Work, option
from .pool_strategy import PoolStrategy, of_client, rounded, times
from .robust_bytes import Rule, combine, fixed_weights
from .zeroth_order import next_scale, run_id_of

_MOMENTUM = 256  # the momentum factor's denominator
_GAIN_BITS = 10  # behind the point of multiplier times gain: a small multiplier takes any gain
_AMPLITUDE_BITS = 32  # behind the point of FedKSeed-Pro's |g|
_LARGEST_AMPLITUDE = 1000 << _AMPLITUDE_BITS


@dataclass(frozen=True, kw_only=True)
class FedKSeed(PoolStrategy):
    name: ClassVar[str] = "fedkseed"
    paper: ClassVar[str] = "arXiv 2312.06353"
    summary: ClassVar[str] = "zeroth-order: inference is enough, one byte a step travels"

    schedule: Literal["constant", "linear", "cosine"] = option("constant", "lr over the rounds")
    momentum: float = option(0.0, "the coordinator's, on the state (below 1)", 0, 0.996)
    importance: bool = option(False, "FedKSeed-Pro: draw directions by their mean |g|")
    combine: Rule = option("mean", "mean; or median, trimmed, clipped, on shared directions")
    gain: float = option(
        0.0, "factor of the combined step; 0: the number of clients (1 on shared directions)", 0
    )

    def check(self) -> None:
        super().check()
        if self.importance and self.shared:
            raise ConfigError(
                "importance draws each client's own directions, which a robust rule cannot compare",
                'combine = "mean", or importance = false',
            )

    @property
    def shared(self) -> bool:
        """Whether all clients of a round measure the same directions."""
        return self.combine != "mean"

    def init(self, seed: int) -> State:
        state = super().init(seed)
        tensors = dict(state.tensors)
        if self.momentum:
            tensors["velocity"] = torch.zeros_like(tensors["q"])
        if self.importance:
            tensors |= {name: _history(self.rank) for name in ("amplitude", "draws")}
        return State(tensors, state.data)

    def rate(self, turn: Turn) -> float:
        done = (turn.round - 1) / max(1, turn.rounds)
        if self.schedule == "linear":
            return self.lr * (1 - done)
        return self.lr * (0.5 + 0.5 * math.cos(math.pi * done) if self.schedule == "cosine" else 1)

    def broadcast(self, state: State, turn: Turn) -> Update:
        update = super().broadcast(state, turn)
        if not self.importance:
            return update
        weights = probabilities(state.tensors["amplitude"], state.tensors["draws"])
        return replace(update, tensors={**update.tensors, "weights": weights})

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        return self.bytes_template(turn)

    def along(self, sent: Update, turn: Turn, first: int, count: int) -> Integers:
        if self.shared:
            everyone = b"round %d" % turn.round
            return directions(run_id_of(turn.seed), everyone, first, count, self.rank**2)
        if "weights" in sent.tensors:
            weights = sent.tensors["weights"].numpy().astype(np.int64)
            start = (turn.round - 1) * turn.steps * self.directions + first
            who = turn.client.encode()
            return drawn_directions(run_id_of(turn.seed), who, start, count, weights)
        return super().along(sent, turn, first, count)

    def work(self, received: Update, memory: State, turn: Turn) -> Work:
        return (yield from self.zeroth_order(received, memory, turn))

    def step(self, state: State, total: Update, turn: Turn) -> State:
        sent = self.broadcast(state, turn)
        bytes_ = np.stack([part.tensors["bytes"].numpy() for part in total.parts]).astype(np.int64)
        change = self.change(bytes_, total.parts, sent, turn)
        tensors, scale = dict(state.tensors), state.data["scale"]
        if self.momentum:
            change = tensors["velocity"] = self.slowed(tensors["velocity"]) + change
        tensors["q"] = tensors["q"] + change
        refuse_overflow(tensors["q"])
        if self.importance:
            tensors |= self.history(tensors, total.parts, bytes_, sent, turn)
        if self.adaptive_scale:
            scale = next_scale(sent.notes["scale"], bytes_.ravel())
        return State(tensors, {**state.data, "scale": scale})

    def slowed(self, velocity: Tensor) -> Tensor:
        """What momentum keeps, cut towards zero, so that it dies away on either side of it."""
        kept = round(self.momentum * _MOMENTUM)
        return torch.div(velocity * kept, _MOMENTUM, rounding_mode="trunc")

    def change(self, bytes_: Integers, parts: Sequence[Update], sent: Update, turn: Turn) -> Tensor:
        """What a round's bytes (clients, steps) add to Q: int64 (cores, r, r)."""
        clients, count = bytes_.shape
        weights = [part.weight for part in parts]
        change = torch.zeros_like(sent.tensors["q"], dtype=torch.int64)
        if self.shared:
            fold(change, self.along(sent, turn, 0, count), combine(self.combine, bytes_, weights))
        else:
            for part, weight, row in zip(parts, fixed_weights(weights), bytes_, strict=True):
                k = self.along(sent, of_client(turn, part.sender), 0, count)
                fold(change, k, row * weight)
        gain = self.gain or (1 if self.shared else clients)
        factor = round(sent.notes["multiplier"] * gain * 2**_GAIN_BITS)
        return -rounded(times(change, factor, _GAIN_BITS))

    def history(
        self, tensors: Tree, parts: Sequence[Update], bytes_: Integers, sent: Update, turn: Turn
    ) -> Tree:
        """FedKSeed-Pro's: by direction, the sum of |g| in units of 2^-32, and how many."""
        amplitude, draws = tensors["amplitude"].clone(), tensors["draws"].clone()
        for part, row in zip(parts, bytes_, strict=True):
            along = self.along(sent, of_client(turn, part.sender), 0, len(row))
            k = torch.from_numpy(along)
            size = np.abs(row) * 2.0 ** (sent.notes["scale"] + _AMPLITUDE_BITS)  # exact
            cut = np.minimum(size, _LARGEST_AMPLITUDE).astype(np.int64)
            amplitude.index_add_(0, k, torch.from_numpy(cut))
            draws.index_add_(0, k, torch.ones_like(k))
        return {"amplitude": amplitude, "draws": draws}


def probabilities(amplitude: Tensor, draws: Tensor) -> Tensor:
    """FedKSeed-Pro's softmax of min-max-normalised mean |g|, times 94 to make it whole.

    uint8 (K,), from 94 to 255: the most likely direction is e times as likely as the least.
    """
    mean = amplitude.double() / draws.clamp(min=1)
    normal = (mean - mean.min()) / (mean.max() - mean.min() + 1e-10)
    return (94 * normal.exp()).round().clamp(max=255).to(torch.uint8)


def _history(rank: int) -> Tensor:
    return torch.zeros(rank * rank, dtype=torch.int64)
