"""FFA-LoRA: freeze A at its random start, train and average B only.

With A shared, the mean of B A is (mean of B) A: averaging is exact, noise on B stays linear, and
half of the bytes travel.  A is derived on both sides from the seed and never sent.
Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (arXiv 2403.12313).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..peft_adapters.layout import Tree
from .averaging import Averaging, fresh_adapter, select
from .base import State, Turn, Update


@dataclass(frozen=True, kw_only=True)
class FfaLora(Averaging):
    name: ClassVar[str] = "ffa_lora"
    paper: ClassVar[str] = "arXiv 2403.12313"
    summary: ClassVar[str] = "A frozen and shared, B averaged: exact, half the bytes"
    dp: ClassVar[str] = "good"

    def moving(self, turn: Turn) -> tuple[str, ...]:
        return ("lora_B",)

    def broadcast(self, state: State, turn: Turn) -> Update:
        return Update(select(super().broadcast(state, turn).tensors, ("lora_B",)))

    def start(self, received: Update, memory: State, turn: Turn) -> Tree:
        frozen = select(fresh_adapter(self.sites, self.rank, turn.seed), ("lora_A",))
        return {**frozen, **received.tensors}
