"""FedEx-LoRA: average the factors and add what the average misses.

The residual sum_k p_k B_k A_k - mean(B) mean(A) makes every round exact.  The paper adds it to the
base weights; here it is a side adapter, so that the base stays untouched and versions stay small.
Singhal et al. 2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning"
(arXiv 2410.09432).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..peft_adapters.layout import FACTORS, Tree
from .averaging import Averaging, put, under
from .base import Reducer, State, Turn, Update, option
from .factor_sum import FactorSum, add_products, check_width


@dataclass(frozen=True, kw_only=True)
class FedExLora(Averaging):
    name: ClassVar[str] = "fedex_lora"
    paper: ClassVar[str] = "arXiv 2410.09432"
    summary: ClassVar[str] = "averaged factors plus the exact residual in a side adapter"
    secure_sum: ClassVar[bool] = False

    width: int = option(128, "largest rank of the residual; beyond it the weakest directions go", 1)

    def check(self) -> None:
        check_width(self.width)
        if self.optimizer.keeps_moments or self.optimizer.rate != 1.0:
            raise ConfigError(
                "fedex_lora's residual is exact for the plain mean only",
                'server_optimizer = "avg", server_lr = 0',
            )

    def broadcast(self, state: State, turn: Turn) -> Update:
        side = put("side", under("side", state.tensors))
        return Update({**under("x", state.tensors), **side})

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        return {
            f"{s.name}.{factor}": s.shape(factor, self.rank)
            for s in self.sites
            for factor in FACTORS
        }

    def start(self, received: Update, memory: State, turn: Turn) -> Tree:
        return {name: t for name, t in received.tensors.items() if not name.startswith("side/")}

    def side(self, received: Update) -> Tree | None:
        return under("side", received.tensors) or None

    def reducer(self, turn: Turn) -> Reducer:
        return FactorSum(self.width)

    def step(self, state: State, total: Update, turn: Turn) -> State:
        x = {name: total.tensors[name] for name in under("x", state.tensors)}
        parts = [(under("side", state.tensors), 1.0), (FactorSum.product(total), 1.0), (x, -1.0)]
        side, lost = add_products(parts, self.width)
        return State({**put("x", x), **put("side", side)}, {"discarded": lost})

    def export(self, state: State) -> Tree:
        parts = [(under("side", state.tensors), 1.0), (under("x", state.tensors), 1.0)]
        return add_products(parts, self.width)[0]
