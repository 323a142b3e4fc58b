"""The captured energy against a dense least-squares projection, and when a run is warned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meadow.client.encode import batch_indices
from meadow.config import Config
from meadow.errors import ModelError
from meadow.peft_adapters.layout import Site
from meadow.peft_adapters.pool import Cores, Pool
from meadow.peft_adapters.pool_size import warnings_of
from meadow.simulation.engine import Lab
from meadow.simulation.pool_energy import captured, energy
from meadow.strategies.zeroth_order import run_id_of


def spanned(columns: np.ndarray, g: np.ndarray) -> float:
    """|P g|^2 by an orthonormal basis of the columns' span."""
    basis, values, _ = np.linalg.svd(columns, full_matrices=False)
    return float(np.square(basis[:, values > 1e-9 * values[0]].T @ g).sum())


def directions(sides: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Every direction, written out over all matrices: (weights, r^2)."""
    rank = sides[0][0].shape[0]
    found = [
        np.concatenate([np.outer(u[a], v[b]).ravel() for u, v in sides])
        for a in range(rank)
        for b in range(rank)
    ]
    return np.stack(found, 1)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_conjugate_gradients_project(rank: int, matrices: int, seed: int) -> None:
    """Also where directions depend on each other (ranks above a matrix's own)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3 + 2 * index, 2 + index) for index in range(matrices)]
    sides, gradients = [], []
    for m, n in shapes:
        u, v = (2.0 * torch.randint(0, 2, (rank, d), generator=generator) - 1 for d in (m, n))
        sides.append((u.double(), v.double()))
        gradients.append(torch.randn(m, n, generator=generator).double())
    seen = [u @ g @ v.T for g, (u, v) in zip(gradients, sides, strict=True)]
    found = captured(seen, [(u @ u.T, v @ v.T) for u, v in sides])
    g = np.concatenate([part.numpy().ravel() for part in gradients])
    assert found == pytest.approx(spanned(directions(sides), g), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
def test_a_models_energy_is_that_of_its_gradient(lab: Lab, tiny: Config, cores: Cores) -> None:
    """The gradient by torch's own loss, row by row; the projection by least squares."""
    found = energy(lab, tiny, 2, cores)
    sites = tuple(sorted(lab.layers, key=lambda site: site.name))
    pool = Pool(run_id_of(tiny.rounds.seed), lab.base.digest, sites, 2, cores)
    gradients = [g.double() for g in by_torch(lab, tiny, [site.name for site in sites])]
    sides = [(pool.left(i).double(), pool.right(i).double()) for i in range(len(sites))]
    if cores == "shared":
        flat = np.concatenate([g.numpy().ravel() for g in gradients])
        inside = spanned(directions(sides), flat)
    else:
        pairs = zip(sides, gradients, strict=True)
        inside = sum(spanned(directions([s]), g.numpy().ravel()) for s, g in pairs)
    whole = sum(float(g.square().sum()) for g in gradients)
    assert found["share"] == pytest.approx(inside / whole, rel=1e-4)
    assert found["dimensions"] == (4 if cores == "shared" else 4 * len(sites))
    assert found["expected"] == found["dimensions"] / sum(g.numel() for g in gradients)
    assert 0 < found["share"] < 1 and set(found["by_matrix"]) == {site.name for site in sites}


def by_torch(lab: Lab, config: Config, names: list[str]) -> list[Tensor]:
    model, person = lab.base.model, lab.participants[0]
    parameters = dict(model.named_parameters())
    weights = [parameters[f"{name}.base.weight"] for name in names]  # under the bank's layers
    chosen = batch_indices(len(person.train), config.clients.batch, 0, person.seed, person.name)
    rows = [person.train[index] for index in chosen]
    tokens = [int((row.labels[1:] != -100).sum()) for row in rows]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        losses = [
            model(input_ids=row.ids[None], labels=row.labels[None]).loss * count / sum(tokens)
            for row, count in zip(rows, tokens, strict=True)
        ]
        return list(torch.autograd.grad(sum(losses), weights))
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def test_measuring_leaves_the_base_frozen(lab: Lab, tiny: Config) -> None:
    before = [p.clone() for p in lab.base.model.parameters()]
    energy(lab, tiny, 2)
    assert not any(p.requires_grad or p.grad is not None for p in lab.base.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(lab.base.model.parameters(), before, strict=True))


def test_a_quantised_base_is_refused(lab: Lab, tiny: Config) -> None:
    class Packed(nn.Module):
        weight = torch.zeros(4, dtype=torch.uint8)

    model = nn.Module()
    model.layer = Packed()
    base = replace(lab.base, model=model)
    blueprint = replace(lab.bench.blueprint, layers=(Site("layer", 8, 8),))
    bench = replace(lab.bench, base=base, blueprint=blueprint)
    packed = replace(lab, bench=bench)
    with pytest.raises(ModelError, match="quantised"):
        energy(packed, tiny, 2)


@pytest.mark.parametrize(
    ("rank", "hidden", "said"),
    [
        (64, 256, []),  # nano: exactly a quarter
        (65, 256, ["quarter"]),
        (64, 384, []),
        (16, 64, ["few"]),
        (8, 64, ["few"]),
        (64, 64, ["quarter"]),
        (17, 64, ["quarter", "few"]),
        (64, 4096, ["few"]),
    ],
)
def test_warnings_follow_the_measured_bounds(rank: int, hidden: int, said: list[str]) -> None:
    shapes = {"q": (hidden, hidden), "k": (hidden // 2, hidden), "up": (3 * hidden, hidden)}
    sites = [Site(name, *shape) for name, shape in shapes.items()]
    found = warnings_of(rank, sites)
    assert len(found) == len(said)
    assert all(word in text for word, text in zip(said, found, strict=True))


def test_the_rank_that_a_warning_names_has_enough_directions() -> None:
    for hidden in (64, 256, 384, 4096):
        sites = [Site("q", hidden, hidden)]
        named = int(warnings_of(2, sites)[-1].rpartition(" ")[2])
        assert not any("few" in text for text in warnings_of(named, sites))
