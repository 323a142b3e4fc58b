"""Exact sums of products: what strategies use that need mean(B A), not mean(B) mean(A).

Folding keeps the weighted mean of every tensor and, for each adapted layer, sum_k w_k B_k A_k as
one compressed pair of factors, so memory does not grow with the number of clients.
"""

from __future__ import annotations

from ..errors import ConfigError
from ..peft_adapters.factors import ProductSum, truncated_svd
from ..peft_adapters.layout import Tree, modules_of
from ..peft_adapters.peft_format import SERVABLE_RANKS
from .base import Mean, Reducer, Update


class FactorSum(Reducer):
    """`total()` holds `product.left/<module>` (out, c) and `product.right/<module>` (c, in), whose
    product is the weighted mean of B A, and, with `means`, the plain means of the factors, whose
    shapes then have to agree.  Its note `discarded` bounds the Frobenius norm, over all layers, of
    the error that the cut to `width` columns has caused."""

    def __init__(self, width: int, means: bool = True) -> None:
        self._means = Mean() if means else None
        self._products: dict[str, ProductSum] = {}
        self._width, self._weight, self._count = width, 0.0, 0

    def fold(self, update: Update) -> None:
        if self._means is not None:
            self._means.fold(update)
        self._weight += update.weight
        self._count += update.count
        for module in modules_of(update.tensors):
            b, a = update.tensors[f"{module}.lora_B"], update.tensors[f"{module}.lora_A"]
            if module not in self._products:
                self._products[module] = ProductSum(b.shape[0], a.shape[1], self._width)
            self._products[module].add(b, a, update.weight)

    def total(self) -> Update:
        if self._weight <= 0:
            return Update({}, 0.0, self._count)
        tensors: Tree = {} if self._means is None else dict(self._means.total().tensors)
        for module, product in self._products.items():
            left, right = product.factors()
            tensors[f"product.left/{module}"] = left / self._weight
            tensors[f"product.right/{module}"] = right
        lost = sum(product.discarded for product in self._products.values()) ** 0.5
        return Update(tensors, self._weight, self._count, {"discarded": lost / self._weight})

    @staticmethod
    def product(total: Update) -> Tree:
        """The exact mean product in a total, as an adapter of varying rank."""
        tree: Tree = {}
        for name, tensor in total.tensors.items():
            side, _, module = name.partition("/")
            if side == "product.left":
                tree[f"{module}.lora_B"] = tensor
            elif side == "product.right":
                tree[f"{module}.lora_A"] = tensor
        return tree


def check_width(width: int) -> None:
    """Refuse a side adapter that no server could load, before any training."""
    if width > SERVABLE_RANKS[-1]:
        raise ConfigError(
            f"[strategy] width = {width} cannot be exported", f"at most {SERVABLE_RANKS[-1]}"
        )


def add_products(parts: list[tuple[Tree, float]], width: int) -> tuple[Tree, float]:
    """sum_i w_i B_i A_i as one adapter of at most min(width, in, out) columns a layer, and the
    Frobenius norm that the cut to `width` discarded (0 where the sum is exact)."""
    tree: Tree = {}
    lost = 0.0
    for module in modules_of(name for part, _ in parts for name in part):
        pairs = [
            (t[f"{module}.lora_B"], t[f"{module}.lora_A"], w)
            for t, w in parts
            if f"{module}.lora_B" in t
        ]
        product = ProductSum(pairs[0][0].shape[0], pairs[0][1].shape[1], width)
        for b, a, weight in pairs:
            product.add(b, a, weight)
        left, right = product.factors()
        u, s, vt = truncated_svd(left, right, min(left.shape[1], left.shape[0], right.shape[1]))
        kept = max(1, min(int(s.count_nonzero()), width))
        lost += product.discarded + float(s[kept:].square().sum())
        root = s[:kept].sqrt()
        tree[f"{module}.lora_B"] = (u[:, :kept] * root).float()
        tree[f"{module}.lora_A"] = (root[:, None] * vt[:kept]).float()
    return tree, lost**0.5
