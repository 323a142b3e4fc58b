"""How an adapter is laid out in memory: the names and shapes that all parts share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

Tree = dict[str, Tensor]
"""Named tensors.  An adapter's are `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r)."""

FACTORS = ("lora_A", "lora_B")
CORE = "core"
"""The trained factor of an adapter between fixed sign matrices: (r, r)."""


@dataclass(frozen=True)
class Site:
    """One adapted linear layer: its checkpoint name and the shape of its weight."""

    name: str
    rows: int  # output features
    columns: int  # input features

    def shape(self, factor: str, rank: int) -> tuple[int, int]:
        """The shape of `lora_A` or `lora_B` at this layer."""
        return (rank, self.columns) if factor == "lora_A" else (self.rows, rank)


def modules_of(names: Iterable[str]) -> list[str]:
    """The module names that a tree's tensor names speak of, sorted."""
    return sorted({name.rsplit(".", 1)[0] for name in names})


def rank_of(tree: Tree) -> int:
    """The one rank of an adapter whose ranks are uniform."""
    name = next(name for name in sorted(tree) if name.endswith(".lora_A"))
    return tree[name].shape[0]
