"""RoLoRA: alternate, B in odd rounds and A in even ones; the other factor stands still.

Whichever factor moves, the other is shared, so averaging is exact, and both learn in the end.
Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA"
(arXiv 2502.01755).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .averaging import Averaging
from .base import Turn


@dataclass(frozen=True, kw_only=True)
class RoLora(Averaging):
    name: ClassVar[str] = "rolora"
    paper: ClassVar[str] = "arXiv 2502.01755"
    summary: ClassVar[str] = "B and A move in turn: exact averaging, half the bytes up"
    dp: ClassVar[str] = "good"

    def moving(self, turn: Turn) -> tuple[str, ...]:
        return ("lora_B",) if turn.round % 2 else ("lora_A",)

    def check(self) -> None:
        if self.late:
            raise ConfigError(
                "rolora cannot count late answers: they are of the factor that now rests",
                "late = 0",
            )
        if self.keep_optimizer:
            raise ConfigError(
                "rolora cannot keep optimiser state: it is of the factor that now rests",
                "remove keep_optimizer",
            )
