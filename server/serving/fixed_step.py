"""A decoding step whose numbers lie in tensors, so that it can be recorded and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kv_rows import KVRows
from .packed_attention import Prompt, mask_of


@dataclass
class FixedStep:
    """A token for each of the first rows, as `packed_attention.Step` has it: token i is row i's.

    For a row that does not decode, a gap, it is a stand-in: at position 0, written to the scratch
    row.  It sees its row's first position, which keeps its sums from being empty, and nobody reads
    what becomes of it.
    """

    kv: KVRows
    positions: Tensor  # (span) of each token in its own text, int64
    rows: Tensor  # (span) to which its key and value go, int64: its own, or the scratch row
    longest: int  # positions that are read; more than any of `positions`
    prompts: Sequence[Prompt] = ()
    where: Tensor = field(init=False)
    prompt_masks: dict[tuple[Prompt, int | None], Tensor] = field(init=False, default_factory=dict)
    _masks: dict[int | None, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.decoding = self.span = len(self.positions)
        self.where = self.kv.places(self.rows, self.positions).flatten()

    def by_row(self, tokens: Tensor) -> Tensor:
        return tokens

    def by_token(self, rows: Tensor) -> Tensor:
        return rows

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self._masks:
            self._masks[window] = mask_of(self.positions + 1, self.longest, window, dtype)
        return self._masks[window]
