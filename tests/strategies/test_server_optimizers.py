"""FedAvg, FedAvgM and FedAdam against their formulas in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from meadow.peft_adapters.layout import Tree
from meadow.strategies.server_optimizers import Kind, ServerOptimizer

Array = np.ndarray[Any, np.dtype[np.float64]]


def trajectory(optimizer: ServerOptimizer, x: Array, means: list[Array]) -> list[Array]:
    tree: Tree = {"w": torch.from_numpy(x).float()}
    moments: Tree = {}
    path = []
    for mean in means:
        tree, moments = optimizer.step(tree, {"w": torch.from_numpy(mean).float()}, moments)
        path.append(tree["w"].double().numpy())
    return path


def by_hand(kind: str, lr: float, beta1: float, x: Array, means: list[Array]) -> list[Array]:
    """Reddi et al. 2021 (arXiv 2003.00295), algorithm 2; Hsu et al. 2019 (arXiv 1909.06335)."""
    m, v, path = np.zeros_like(x), np.full_like(x, 1e-3**2), []
    for mean in means:
        delta = mean - x
        if kind == "avg":
            x = x + lr * delta
        elif kind == "avgm":
            m = beta1 * m + delta
            x = x + lr * m
        else:
            m = beta1 * m + (1 - beta1) * delta
            v = 0.99 * v + (1 - 0.99) * delta**2
            x = x + lr * m / (np.sqrt(v) + 1e-3)
        path.append(x)
    return path


@pytest.mark.parametrize("kind", ["avg", "avgm", "adam"])
@pytest.mark.parametrize(("lr", "beta1"), [(0.0, 0.9), (0.3, 0.5), (0.02, 0.0)])
def test_steps_follow_the_papers(kind: Kind, lr: float, beta1: float) -> None:
    generator = np.random.default_rng(3)
    x, *means = (generator.normal(size=(3, 4)) for _ in range(7))
    rate = lr or {"avg": 1.0, "avgm": 1.0, "adam": 1e-3}[kind]
    got = trajectory(ServerOptimizer(kind, lr, beta1), x, means)
    for mine, theirs in zip(got, by_hand(kind, rate, beta1, x, means), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_plain_averaging_takes_the_mean_to_the_bit() -> None:
    x, mean = torch.randn(50) * 1e3, torch.randn(50) * 1e-3
    moved, kept = ServerOptimizer().step({"w": x}, {"w": mean}, {})
    assert torch.equal(moved["w"], mean) and kept == {}


@pytest.mark.parametrize("kind", ["avg", "avgm", "adam"])
def test_only_what_was_averaged_moves(kind: Kind) -> None:
    x = {"a": torch.ones(2), "b": torch.ones(2)}
    moved, kept = ServerOptimizer(kind, 0.5).step(x, {"a": torch.zeros(2)}, {"m/b": torch.ones(2)})
    assert torch.equal(moved["b"], torch.ones(2)) and (moved["a"] < 1).all()
    assert torch.equal(kept["m/b"], torch.ones(2)) and torch.equal(x["a"], torch.ones(2))
    assert set(kept) - {"m/b"} == {"avg": set(), "avgm": {"m/a"}, "adam": {"m/a", "v/a"}}[kind]


def test_a_first_adam_step_is_no_larger_than_the_rate_allows() -> None:
    """(1 - beta1) / sqrt(1 - beta2) = 1 at most, since v starts at tau^2 and is not corrected."""
    moved, _ = ServerOptimizer("adam").step({"w": torch.zeros(3)}, {"w": torch.full((3,), 1e6)}, {})
    assert (moved["w"] <= 1.0001e-3).all() and (moved["w"] > 0.9e-3).all()
