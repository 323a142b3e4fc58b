"""The sketch of a mean product: exact for few columns, near for many, of one size for ever."""

from __future__ import annotations

import pytest
import torch
from toy import adapter, mean_product

from meadow.peft_adapters.layout import Site, Tree
from meadow.strategies.base import Mean, Turn, Update
from meadow.strategies.product_sketch import PROBES, SketchedMean, naive_error, probes
from meadow.strategies.registry import make

WIDE = (Site("wide", 40, 300), Site("tall", 300, 40))


def wide(seed: int, rank: int = 4) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    tree = {}
    for site in WIDE:
        for factor in ("lora_A", "lora_B"):
            shape = site.shape(factor, rank)
            tree[f"{site.name}.{factor}"] = torch.randn(shape, generator=generator)
    return tree


def folded(updates: list[Update]) -> Update:
    reducer = SketchedMean()
    for update in updates:
        reducer.fold(update)
    return reducer.total()


def dense_error(updates: list[Update], tree: Tree) -> float:
    """The same figure of whole matrices."""
    weight, squares = sum(u.weight for u in updates), []
    for site in WIDE:
        a, b = f"{site.name}.lora_A", f"{site.name}.lora_B"
        exact = sum(u.weight * u.tensors[b].double() @ u.tensors[a].double() for u in updates)
        exact = torch.as_tensor(exact) / weight
        naive = tree[b].double() @ tree[a].double()
        squares.append(float((exact - naive).norm() / exact.norm()) ** 2)
    return float((sum(squares) / len(squares)) ** 0.5)


def test_means_are_those_of_a_plain_mean() -> None:
    updates = [Update(adapter(seed), weight) for seed, weight in ((1, 2.0), (2, 5.0))]
    mean = Mean()
    for update in updates:
        mean.fold(update)
    total, plain = folded(updates), mean.total()
    assert all(total.tensors[name].equal(tensor) for name, tensor in plain.tensors.items())
    assert (total.weight, total.count) == (plain.weight, plain.count)


def test_few_inputs_are_kept_whole() -> None:
    updates = [Update(adapter(seed), 1.0 + seed) for seed in range(3)]
    total = folded(updates)
    for name, exact in mean_product(updates).items():
        assert exact.shape[1] <= PROBES
        assert float((total.tensors[f"sketch/{name}"] - exact).abs().max()) < 1e-9


@pytest.mark.parametrize("seed", range(0, 50, 10))
def test_many_inputs_are_estimated(seed: int) -> None:
    """Clients that drifted a little from one adapter, as they do: neither figure is near 0 or 1."""
    common = wide(99)
    updates = [
        Update({n: common[n] + 0.4 * t for n, t in wide(seed + k).items()}, 1.0 + k)
        for k in range(6)
    ]
    total = folded(updates)
    exact = dense_error(updates, total.tensors)
    assert 0.05 < exact < 0.5
    assert naive_error(total) == pytest.approx(exact, rel=0.25)


def test_its_size_does_not_grow() -> None:
    def size(count: int) -> int:
        total = folded([Update(wide(seed)) for seed in range(count)])
        return sum(tensor.numel() * tensor.itemsize for tensor in total.tensors.values())

    assert size(1) == size(40)


def test_one_client_has_no_error_and_none_that_weighs_no_total() -> None:
    assert naive_error(folded([Update(wide(1))])) < 1e-6
    nothing = folded([Update(wide(1), 0.0)])
    assert (nothing.tensors, nothing.weight, nothing.count) == ({}, 0.0, 1)


def test_the_signs_are_fixed_and_even() -> None:
    """Part of the metrics' meaning, so known answers."""
    signs = probes(4000)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0} and signs.shape == (4000, PROBES)
    assert abs(float(signs.mean())) < 0.02
    gram = signs.T @ signs / 4000
    assert float((gram - torch.eye(PROBES)).abs().max()) < 0.08


@pytest.mark.parametrize("refine", ["none", "rotate"])
def test_the_strategy_sums_in_bounded_memory(refine: str) -> None:
    strategy = make("fedavg_lora", {"refine": refine}, WIDE, 4)
    assert type(strategy.reducer(Turn(1, 1, 1))) is SketchedMean
