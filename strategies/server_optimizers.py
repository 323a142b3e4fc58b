"""Server optimisers: how a coordinator moves its state towards the mean of its clients.

With D = mean - x (the clients' average change, a descent direction):

    avg    x += lr D                                          FedAvg, McMahan et al. 2017
    avgm   m = beta1 m + D;  x += lr m                        FedAvgM, Hsu et al. 2019
    adam   m = beta1 m + (1 - beta1) D                        FedAdam, Reddi et al. 2021
           v = beta2 v + (1 - beta2) D^2;  x += lr m / (sqrt v + tau)

FedAdam's second moment is of D (not of m), v starts at tau^2 and m at 0, without bias correction;
its customary lr = tau = 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..peft_adapters.layout import Tree

Kind = Literal["avg", "avgm", "adam"]

_DEFAULT_RATE: dict[str, float] = {"avg": 1.0, "avgm": 1.0, "adam": 1e-3}


@dataclass(frozen=True)
class ServerOptimizer:
    """One of the rules above; its moments are tensors named `m/<name>` and `v/<name>`."""

    kind: Kind = "avg"
    lr: float = 0.0  # 0: the rule's customary rate
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    @property
    def rate(self) -> float:
        return self.lr or _DEFAULT_RATE[self.kind]

    @property
    def keeps_moments(self) -> bool:
        return self.kind != "avg"

    def step(self, x: Tree, mean: Tree, moments: Tree) -> tuple[Tree, Tree]:
        """The next x (only names in `mean` move) and the next moments."""
        moved, kept = dict(x), dict(moments)
        for name, target in mean.items():
            if self.kind == "avg" and self.rate == 1.0:
                moved[name] = target  # exactly the mean: x + (mean - x) rounds
                continue
            moved[name] = x[name] + self._change(name, target - x[name], kept)
        return moved, kept

    def _change(self, name: str, delta: torch.Tensor, kept: Tree) -> torch.Tensor:
        if self.kind == "avg":
            return self.rate * delta
        m = kept.get(f"m/{name}", torch.zeros_like(delta))
        if self.kind == "avgm":
            kept[f"m/{name}"] = m = self.beta1 * m + delta
            return self.rate * m
        v = kept.get(f"v/{name}", torch.full_like(delta, self.tau**2))
        kept[f"m/{name}"] = m = self.beta1 * m + (1 - self.beta1) * delta
        kept[f"v/{name}"] = v = self.beta2 * v + (1 - self.beta2) * delta.square()
        return self.rate * m / (v.sqrt() + self.tau)
