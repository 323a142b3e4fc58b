"""FedSA-LoRA: share A, keep B personal.

A learns what is general, B what is particular; B never leaves its client.  What the coordinator
can export is the shared A with B = 0, the start for a newcomer; each client's own adapter is its
memory's.  Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning"
(arXiv 2410.01463).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..peft_adapters.layout import Tree
from .averaging import Averaging, put, select, under
from .base import State, Trained, Turn, Update


@dataclass(frozen=True, kw_only=True)
class FedSaLora(Averaging):
    name: ClassVar[str] = "fedsa_lora"
    paper: ClassVar[str] = "arXiv 2410.01463"
    summary: ClassVar[str] = "A averaged, B stays with its client: personal models, half the bytes"
    personal: ClassVar[bool] = True
    dp: ClassVar[str] = "noise on A only"

    def broadcast(self, state: State, turn: Turn) -> Update:
        return Update(select(under("x", state.tensors), ("lora_A",)))

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in sent.tensors.items()}

    def start(self, received: Update, memory: State, turn: Turn) -> Tree:
        own = under("own", memory.tensors) or {
            f"{site.name}.lora_B": torch.zeros(site.shape("lora_B", self.rank))
            for site in self.sites
        }
        return {**received.tensors, **own}

    def share(self, trained: Trained, turn: Turn) -> Tree:
        return select(trained.adapter, ("lora_A",))

    def remember(self, trained: Trained, memory: State, turn: Turn) -> State:
        state = super().remember(trained, memory, turn)
        return replace(
            state, tensors={**state.tensors, **put("own", select(trained.adapter, ("lora_B",)))}
        )
