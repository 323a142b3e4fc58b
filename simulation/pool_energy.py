"""How much of the gradient a pool of directions can see.

The share of the gradient's energy that lies in the span of the directions,

    |P g|^2 / |g|^2,    P the orthogonal projection onto span {(u_a v_b^T of every matrix)}_ab

beside what a random subspace of as many dimensions would catch on average, its dimensions over
the number of adapted weights.  A share far above that is no merit of signs drawn at random; far
below it means that the pool is degenerate.  g comes from backpropagation over one batch, so this
is a diagnostic for a machine that can do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import ModelError
from ..peft_adapters.bank import BankLinear
from ..peft_adapters.pool import Cores, Pool
from ..strategies.zeroth_order import run_id_of
from .batches import batch_of, mean_loss
from .engine import Lab

_TOLERANCE = 1e-10  # relative residual of the conjugate gradient


def energy(lab: Lab, config: Config, rank: int, cores: Cores = "shared") -> dict[str, Any]:
    """The share for a pool of this rank, by one batch of the first participant's text.

    {"rank", "cores", "dimensions", "weights", "share", "expected", "by_matrix"}; `by_matrix` is
    each matrix's own share, where it had a core for itself.  Raises ModelError for a base whose
    weights cannot have a gradient.
    """
    sites = tuple(sorted(lab.layers, key=lambda site: site.name))
    pool = Pool(run_id_of(config.rounds.seed), lab.base.digest, sites, rank, cores)
    gradients = _gradients(lab, config, [site.name for site in sites])
    sides = [_sides(pool, index) for index in range(len(sites))]
    seen = [u @ g @ v.T for g, (u, v) in zip(gradients, sides, strict=True)]
    grams = [(u @ u.T, v @ v.T) for u, v in sides]
    own = [captured([part], [gram]) for part, gram in zip(seen, grams, strict=True)]
    whole = [float(g.square().sum()) for g in gradients]
    found = captured(seen, grams) if cores == "shared" else sum(own)
    weights = sum(site.rows * site.columns for site in sites)
    dimensions = pool.size if cores == "shared" else pool.size * len(sites)
    return {
        "rank": rank,
        "cores": cores,
        "dimensions": dimensions,
        "weights": weights,
        "share": found / sum(whole),
        "expected": dimensions / weights,
        "by_matrix": {
            site.name: part / of for site, part, of in zip(sites, own, whole, strict=True) if of
        },
    }


def captured(seen: Sequence[Tensor], grams: Sequence[tuple[Tensor, Tensor]]) -> float:
    """|P g|^2 for one core shared by these matrices.

    `seen` holds U^T G V, (r, r), and `grams` U^T U and V^T V of each, float64.  With
    t = sum_l U_l^T G_l V_l and the Gram matrix M = sum_l (U_l^T U_l) kron (V_l^T V_l), it is
    t^T M^+ t: conjugate gradients solve M x = t without forming the r^2 x r^2 matrix.
    """
    t = torch.stack(list(seen)).sum(0)
    x, residual = torch.zeros_like(t), t.clone()
    along, size = residual.clone(), residual.square().sum()
    for _ in range(2 * t.numel()):
        if float(residual.norm()) <= _TOLERANCE * float(t.norm()):
            break
        moved = torch.stack([left @ along @ right for left, right in grams]).sum(0)
        length = size / (along * moved).sum()
        x += length * along
        residual -= length * moved
        size, before = residual.square().sum(), size
        along = residual + (size / before) * along
    return float((t * x).sum())


def _sides(pool: Pool, index: int) -> tuple[Tensor, Tensor]:
    """U^T (r, m) and V^T (r, n) of a matrix, float64."""
    return pool.left(index).double(), pool.right(index).double()


def _gradients(lab: Lab, config: Config, names: Sequence[str]) -> list[Tensor]:
    """dL/dW of the named layers over one batch, float64, on the CPU."""
    weights = [_weight(lab.base.model, name) for name in names]
    rows = batch_of(lab.participants[0], config.clients.batch, 0)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(mean_loss(lab, rows), weights)
        return [gradient.double().cpu() for gradient in gradients]
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def _weight(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    weight = layer.base.weight if isinstance(layer, BankLinear) else layer.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ModelError(
            "the energy of a quantised base cannot be measured", 'take [model] quantize = "none"'
        )
    return weight
