"""What one row has computed in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...peft_adapters.serving_slots import Place
from .kv_rows import Row


@dataclass(frozen=True)
class Work:
    """New tokens of a row in a step: one that decodes, or a segment of its prompt."""

    row: Row
    place: Place | None  # of its adapter; None: the base
    tokens: Sequence[int]
    last: bool = True  # whether what follows the last of them is asked for
    every: bool = False  # whether what follows each of them is
