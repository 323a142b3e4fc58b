"""FedIT: clients train LoRA factors, the coordinator averages them; then the product is repaired.

The mean of the factors is not the mean of the products: mean(B) mean(A) differs from mean(B A) by
a covariance.  `refine` says what to do about it:

    none         nothing (FedIT, Zhang et al. 2023, arXiv 2305.05644)
    product_svd  the best rank-r factors of the exact mean product, by QR of the stacked factors and
                 a small SVD (FlexLoRA's aim, Bai et al. 2024, arXiv 2402.11505, without forming
                 the full matrix), turned by Procrustes towards the previous factors; mixed ranks
    rotate       each client turns its factors towards the global ones before sending (FedRot-LoRA,
                 arXiv 2602.23638): products unchanged, a plain sum suffices

Every round reports the relative error of naive averaging against the exact product; where the
exact product itself is not needed, it is estimated (product_sketch), in memory that does not grow
with the number of clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import ConfigError
from ..peft_adapters.factors import align, refactor, relative_error, rotate
from ..peft_adapters.layout import Tree, modules_of
from .averaging import Averaging, under
from .base import Reducer, State, Turn, Update, Work, option
from .factor_sum import FactorSum
from .product_sketch import SketchedMean
from .product_sketch import naive_error as sketched_error


@dataclass(frozen=True, kw_only=True)
class FedAvgLora(Averaging):
    name: ClassVar[str] = "fedavg_lora"
    paper: ClassVar[str] = "arXiv 2305.05644"
    summary: ClassVar[str] = "factors averaged; exact product by QR + SVD, or rotation, on top"
    mixed_ranks: ClassVar[bool] = True
    secure_sum: ClassVar[bool] = False  # product_svd, the default, needs each client's product

    refine: Literal["none", "product_svd", "rotate"] = option("none", "none, product_svd or rotate")
    rotation: float = option(0.5, "rotate: how far towards the global factors", 0, 1)
    ranks: dict[str, int] = option({}, "product_svd: smaller ranks of some participants, by name")
    width: int = option(512, "product_svd: columns of the streaming product once compressed", 1)

    def check(self) -> None:
        if self.ranks and self.refine != "product_svd":
            raise ConfigError(
                'mixed ranks need refine = "product_svd": factors of unequal shape have no mean'
            )
        if self.ranks and self.late:
            raise ConfigError(
                "late answers of another rank cannot be told as a change of the adapter: late = 0"
            )
        if self.ranks and (self.keep_optimizer or self.optimizer.keeps_moments):
            raise ConfigError(
                "mixed ranks change a client's coordinates each round: no moments can be kept",
                'server_optimizer = "avg" and keep_optimizer = false',
            )
        if self.keep_optimizer and self.refine != "none":
            raise ConfigError(
                f"keep_optimizer contradicts refine = {self.refine!r}: AdamW's moments are of the "
                "factors as the client left them, which the refinement turns and rescales",
                'refine = "none"',
            )
        if any(not 0 < rank <= self.rank for rank in self.ranks.values()):
            raise ConfigError(
                f"ranks of participants must be from 1 to the model's rank, {self.rank}"
            )

    def start(self, received: Update, memory: State, turn: Turn) -> Tree:
        rank = self.ranks.get(turn.client, self.rank)
        if rank == self.rank:
            return received.tensors
        return refactored(received.tensors, rank)

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        rank = self.ranks.get(turn.client, self.rank)
        return {
            f"{site.name}.{factor}": site.shape(factor, rank)
            for site in self.sites
            for factor in self.moving(turn)
        }

    def work(self, received: Update, memory: State, turn: Turn) -> Work:
        update, after = yield from super().work(received, memory, turn)
        if self.refine == "rotate":
            turned = rotated(update.tensors, received.tensors, turn.round % 2 == 1, self.rotation)
            update = Update(turned, update.weight, update.count, update.notes)
        return update, after

    def reducer(self, turn: Turn) -> Reducer:
        if self.refine == "product_svd":
            return FactorSum(self.width, means=not self.ranks)
        return SketchedMean()

    def step(self, state: State, total: Update, turn: Turn) -> State:
        x = under("x", state.tensors)
        target = {name: tensor for name, tensor in total.tensors.items() if name in x}
        if self.refine == "product_svd":
            target = exact_factors(total, x, self.rank)
        return super().step(state, Update(target, total.weight, total.count), turn)

    def report(self, total: Update, turn: Turn) -> dict[str, float]:
        if self.ranks:
            return {}
        exact = self.refine == "product_svd"
        return {"naive_error": naive_error(total) if exact else sketched_error(total)}


def exact_factors(total: Update, previous: Tree, rank: int) -> Tree:
    """The best rank-r factors of the exact mean product, in the previous factors' coordinates."""
    tree = {}
    for module in modules_of(previous):
        left, right = (
            total.tensors[f"product.left/{module}"],
            total.tensors[f"product.right/{module}"],
        )
        b, a = refactor(left, right, rank)
        b, a = align(b, a, previous[f"{module}.lora_B"], previous[f"{module}.lora_A"])
        tree[f"{module}.lora_A"], tree[f"{module}.lora_B"] = a.float(), b.float()
    return tree


def refactored(adapter: Tree, rank: int) -> Tree:
    """The best factors of a smaller rank."""
    tree = {}
    for module in modules_of(adapter):
        b, a = refactor(adapter[f"{module}.lora_B"], adapter[f"{module}.lora_A"], rank)
        tree[f"{module}.lora_A"], tree[f"{module}.lora_B"] = a, b
    return tree


def rotated(adapter: Tree, reference: Tree, odd: bool, amount: float) -> Tree:
    """Each layer's factors turned towards the reference's; products unchanged."""
    tree = {}
    for module in modules_of(adapter):
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        tree[b], tree[a] = rotate(adapter[b], adapter[a], reference[b], reference[a], odd, amount)
    return tree


def naive_error(total: Update) -> float:
    """Root mean square, over the layers, of |mean(B A) - mean(B) mean(A)| / |mean(B A)|."""
    errors = []
    for module in sorted(
        n.removeprefix("product.left/") for n in total.tensors if n.startswith("product.left/")
    ):
        exact = (total.tensors[f"product.left/{module}"], total.tensors[f"product.right/{module}"])
        naive = (total.tensors[f"{module}.lora_B"], total.tensors[f"{module}.lora_A"])
        errors.append(relative_error(exact, naive) ** 2)
    return float((sum(errors) / max(len(errors), 1)) ** 0.5)
