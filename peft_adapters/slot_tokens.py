"""Which of a batch's tokens use which slots of a group, as kernels read it.

Tokens are listed slot by slot, wherever they lie in the batch, and a slot's tokens are cut into
blocks: a kernel's programs take a block each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SHORT, LONG = 16, 64
"""Tokens of a block; 16 is the least that tensor cores take."""


class Tokens(NamedTuple):
    """The tokens of a group's slots in a batch."""

    order: Tensor  # (tokens), int32: those of one slot after those of another
    blocks: Tensor  # (blocks, 3), int32: slot, first in the order, count; one of 0 does nothing
    size: int  # the most tokens of a block


class Listed(NamedTuple):
    """`Tokens` before they are on a device."""

    order: list[int]
    blocks: list[tuple[int, int, int]]
    size: int

    def on(self, device: torch.device) -> Tokens:
        """As kernels read it."""
        order = torch.tensor(self.order, dtype=torch.int32, device=device)
        blocks = torch.tensor(self.blocks, dtype=torch.int32, device=device).view(-1, 3)
        return Tokens(order, blocks, self.size)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tokens], None]
"""Given x (all tokens, in), y (all tokens, out), A (slots, r, in), B^T (slots, r, out) with its
scaling, and tokens: adds B A x of their slots to y."""


class SlotWork(NamedTuple):
    """What a layer does for the tokens of a group."""

    kernel: Kernel
    tokens: Tokens
    a: Tensor  # (slots, r, in)
    b: Tensor  # (slots, r, out), scaling folded in

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add B A x to y; x is (tokens, in), y (tokens, out)."""
        self.kernel(x, y, self.a, self.b, self.tokens)


@dataclass(frozen=True)
class SlotTokens:
    """The tokens of a batch whose adapters are in one group."""

    kernel: Kernel
    tokens: Tokens
    a_of: Sequence[Tensor]  # by layer, (slots, r, in)
    b_of: Sequence[Tensor]
    modules: frozenset[str]  # outside of which all of these adapters are zero

    def at(self, site: int) -> SlotWork:
        """The work of a layer."""
        return SlotWork(self.kernel, self.tokens, self.a_of[site], self.b_of[site])


def listed(tokens_of: Mapping[int, Sequence[int]], size: int | None = None) -> Listed:
    """Each slot's tokens (positions in the batch), of which a token is in one slot at most.

    Blocks are of at most `size` tokens; None: by how many a slot has.
    """
    longest = max((len(tokens) for tokens in tokens_of.values()), default=0)
    size = size or (SHORT if longest <= SHORT else LONG)
    order: list[int] = []
    blocks: list[tuple[int, int, int]] = []
    for slot, tokens in sorted(tokens_of.items()):
        for start in range(0, len(tokens), size):
            own = tokens[start : start + size]
            blocks.append((slot, len(order), len(own)))
            order += own
    return Listed(order, blocks, size)
