"""Full-rank directions evaluated without being merged: base weights are never written.

While `FullRankLayers` is attached, half of a batch's rows sees W + epsilon z_k and the other half
W - epsilon z_k.  Each adapted layer adds the product with what has moved, a matrix that lives for
the length of that product: so any base will do, 16-bit or quantised, at the price of a second
product (a pool's directions cost a column).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .full_rank import FullRank, refuse_overflow


class FullRankLayers:
    """A full-rank state over a model's layers; `state` maps direction to integer."""

    def __init__(self, model: nn.Module, directions: FullRank) -> None:
        self.model, self.directions = model, directions
        self.device = next(model.parameters()).device
        self.state: dict[int, int] = {}
        self._sums: list[Tensor] = []  # sum_k I_k z_k of each matrix, int32
        self.load({})

    def load(self, state: Mapping[int, int]) -> None:
        """Take over a state.  Raises UpdateError where it has outgrown 32 bits."""
        self._sums = [
            self.directions.change(index, state).to(self.device)
            for index in range(len(self.directions.sites))
        ]
        self.state = dict(state)

    def step(self, k: int, increment: int) -> None:
        """Add `increment` to I_k.  Raises UpdateError where the state has outgrown 32 bits."""
        moved = {**self.state, k: self.state.get(k, 0) + increment}
        refuse_overflow(moved)
        for index, total in enumerate(self._sums):
            total.add_(self.directions.direction(index, k, self.device), alpha=increment)
        self.state = moved

    @contextmanager
    def attached(self, k: int | None = None, epsilon: float = 0.0) -> Iterator[None]:
        """Within this block the model answers with the state added; with a direction k, the first
        half of a batch's rows at +epsilon along it and the second at -epsilon."""
        handles = []
        try:
            for index, site in enumerate(self.directions.sites):
                layer = self.model.get_submodule(site.name)
                hook = _Moved(self, index, k, epsilon)
                handles.append(layer.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def offset(self, index: int) -> Tensor:
        """What the state adds to matrix `index`: float32 (m, n)."""
        return (self._sums[index].double() * -(2.0**-self.directions.unit)).float()


class _Moved:
    """A forward hook that gives what the layer would answer with its weight moved."""

    def __init__(self, layers: FullRankLayers, index: int, k: int | None, epsilon: float) -> None:
        self._layers, self._index, self._k, self._epsilon = layers, index, k, epsilon

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        (x,) = args
        if self._k is not None and len(x) % 2:
            raise ValueError(f"{len(x)} rows have no two halves")
        moved = self._layers.offset(self._index)
        if self._k is None:
            return y + nn.functional.linear(x.to(moved.dtype), moved).to(y.dtype)
        z = self._layers.directions.direction(self._index, self._k, self._layers.device).float()
        halves = zip(x.chunk(2), (self._epsilon, -self._epsilon), strict=True)
        parts = [
            nn.functional.linear(rows.to(moved.dtype), moved + epsilon * z)
            for rows, epsilon in halves
        ]
        return y + torch.cat(parts).to(y.dtype)
