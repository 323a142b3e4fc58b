"""What averaging factors does to their product, measured in memory that one update fits in.

mean(B A) itself has a rank that grows with the number of clients.  How far mean(B) mean(A) is from
it can be told from both products times a few fixed columns of random signs: the squared Frobenius
norm of M S is, in the mean over such S, that of M times the number of columns (Hutchinson's
estimator).  For a layer with no more inputs than columns the identity takes their place: exact.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..peft_adapters.factors import uniform_init
from ..peft_adapters.layout import Tree, modules_of
from .base import Mean, Reducer, Update

PROBES = 16
"""Columns.  One layer's figure is then right within about a sixth, that of many layers closer."""
_SKETCH = "sketch/"


class SketchedMean(Reducer):
    """`total()` holds the mean of every tensor, and `sketch/<module>`: mean(B A) times the probes,
    float64, (out, probes)."""

    def __init__(self) -> None:
        self._mean, self._weight = Mean(), 0.0
        self._sketches: Tree = {}

    def fold(self, update: Update) -> None:
        self._mean.fold(update)
        self._weight += update.weight
        for module in modules_of(update.tensors):
            b, a = update.tensors[f"{module}.lora_B"], update.tensors[f"{module}.lora_A"]
            seen = update.weight * _probed(b, a)
            known = self._sketches.get(module)
            self._sketches[module] = seen if known is None else known.add_(seen)

    def total(self) -> Update:
        total = self._mean.total()
        if self._weight <= 0:
            return total
        sketches = {f"{_SKETCH}{m}": s / self._weight for m, s in self._sketches.items()}
        return Update({**total.tensors, **sketches}, total.weight, total.count)


def naive_error(total: Update) -> float:
    """Root mean square, over the layers, of |mean(B A) - mean(B) mean(A)| / |mean(B A)|, of a
    `SketchedMean`'s total."""
    errors = []
    for name, exact in total.tensors.items():
        if name.startswith(_SKETCH):
            module = name.removeprefix(_SKETCH)
            b, a = total.tensors[f"{module}.lora_B"], total.tensors[f"{module}.lora_A"]
            errors.append(_relative(exact, _probed(b, a)) ** 2)
    return float((sum(errors) / max(len(errors), 1)) ** 0.5)


def _probed(b: Tensor, a: Tensor) -> Tensor:
    """B A S, float64, without B A."""
    product: Tensor = b.double() @ (a.double() @ probes(a.shape[1]))
    return product


@lru_cache(maxsize=64)
def probes(columns: int) -> Tensor:
    """S (columns, at most PROBES), float64: fixed signs, or the identity."""
    if columns <= PROBES:
        return torch.eye(columns, dtype=torch.float64)
    drawn = uniform_init(0, "probes", (PROBES, columns))
    return torch.where(drawn < 0, -1.0, 1.0).double().T.contiguous()


def _relative(exact: Tensor, naive: Tensor) -> float:
    """|exact - naive| / |exact|; 0 where they are equal."""
    difference, norm = float((exact - naive).norm()), float(exact.norm())
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 else math.inf
