"""FLoRA: clients train fresh adapters; the coordinator stacks them, which sums products exactly.

Each round a client starts from its own new A and B = 0 over the global model, and the global model
gains sum_k p_k B_k A_k.  The paper merges that into the base; here it grows a side adapter, so
that the base stays untouched and quantised bases work.  Mixed ranks need nothing special.
Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations" (arXiv 2409.05976).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..peft_adapters.layout import FACTORS, Tree
from .averaging import fresh_adapter, notes_of, put, under
from .base import Loss, Reducer, Sgd, State, Turn, Update, Work, option
from .factor_sum import FactorSum, add_products, check_width
from .staleness import Patient


@dataclass(frozen=True, kw_only=True)
class FLora(Patient):
    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = "arXiv 2409.05976"
    summary: ClassVar[str] = "fresh adapters stacked into a side adapter: exact, mixed ranks"
    mixed_ranks: ClassVar[bool] = True
    secure_sum: ClassVar[bool] = False
    sends_changes: ClassVar[bool] = True  # a fresh adapter each round

    ranks: dict[str, int] = option({}, "smaller ranks of some participants, by name")
    width: int = option(
        128, "largest rank of the side adapter; beyond it the weakest directions go", 1
    )

    def check(self) -> None:
        check_width(self.width)
        if any(not 0 < rank <= self.rank for rank in self.ranks.values()):
            raise ConfigError(
                f"ranks of participants must be from 1 to the model's rank, {self.rank}"
            )

    def init(self, seed: int) -> State:
        return State()

    def broadcast(self, state: State, turn: Turn) -> Update:
        return Update(put("side", under("side", state.tensors)))

    def side(self, received: Update) -> Tree | None:
        """The global model so far, under a client's fresh adapter; None before the first round."""
        return under("side", received.tensors) or None

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        rank = self.ranks.get(turn.client, self.rank)
        return {
            f"{site.name}.{factor}": site.shape(factor, rank)
            for site in self.sites
            for factor in FACTORS
        }

    def fresh(self, turn: Turn) -> Tree:
        """This client's start of this round: the seed is of (run, round, client)."""
        digest = hashlib.sha256(f"{turn.seed}/{turn.round}/{turn.client}".encode()).digest()
        rank = self.ranks.get(turn.client, self.rank)
        return fresh_adapter(self.sites, rank, int.from_bytes(digest[:8], "little"))

    def work(self, received: Update, memory: State, turn: Turn) -> Work:
        done = memory.data.get("steps", 0)
        trained = yield Sgd(
            self.fresh(turn), turn.steps, done, turn.total_steps, side=self.side(received)
        )
        update = Update(trained.adapter, weight=float(trained.examples), notes=notes_of(trained))
        return update, State(data={"steps": done + turn.steps})

    def reducer(self, turn: Turn) -> Reducer:
        return FactorSum(self.width, means=False)

    def step(self, state: State, total: Update, turn: Turn) -> State:
        parts = [(under("side", state.tensors), 1.0), (FactorSum.product(total), 1.0)]
        side, lost = add_products(parts, self.width)
        return State(put("side", side), {"discarded": lost})

    def export(self, state: State) -> Tree:
        return under("side", state.tensors) or fresh_adapter(self.sites, self.rank, 0)

    def own(self, received: Update, memory: State, turn: Turn) -> Loss:
        return Loss(fresh_adapter(self.sites, 1, 0), side=self.side(received))
