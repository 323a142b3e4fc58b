"""The baselines against the papers' formulas on a quadratic, whose projected gradient is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from meadow.simulation.mezo import Draw, FedKSeed, Mezo, borrowed, gaussian, rank_one_signs, signs


def quadratic() -> tuple[dict[str, nn.Parameter], Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = {
        name: torch.randn(3, 4, generator=generator, dtype=torch.float64)
        for name in ("up.weight", "up.bias")
    }
    parameters = {name: nn.Parameter(value.clone(), False) for name, value in start.items()}
    return parameters, torch.cat([value.flatten() for value in start.values()])


def flat(parameters: dict[str, nn.Parameter]) -> Tensor:
    return torch.cat([parameter.data.flatten() for parameter in parameters.values()])


def direction(draw: Draw, seed: int) -> Tensor:
    generator, like = torch.Generator().manual_seed(seed), torch.empty(3, 4, dtype=torch.float64)
    return torch.cat([draw(generator, like).flatten() for _ in range(2)])


@pytest.mark.parametrize("kind", [Mezo, FedKSeed])
@pytest.mark.parametrize("draw", [gaussian, signs, rank_one_signs])
def test_a_step_follows_the_projected_gradient(kind: type[Mezo], draw: Draw) -> None:
    parameters, start = quadratic()
    loss = lambda: float(flat(parameters).square().sum() / 2)  # noqa: E731
    gradient = kind(parameters, lr=0.1, epsilon=1e-3, draw=draw).step(5, loss)
    z = direction(draw, 5)
    assert gradient == pytest.approx(float(start @ z), rel=1e-9)
    torch.testing.assert_close(flat(parameters), start - 0.1 * gradient * z)


def test_weights_decay_and_biases_do_not() -> None:
    parameters, start = quadratic()
    Mezo(parameters, lr=0.5, epsilon=1e-3, weight_decay=0.2).update(1, 0.0)
    torch.testing.assert_close(flat(parameters)[:12], start[:12] * 0.9)
    assert torch.equal(flat(parameters)[12:], start[12:])


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    parameters, start = quadratic()
    Mezo(parameters, lr=0.5, epsilon=1e-3).step(1, lambda: float("nan"))
    torch.testing.assert_close(flat(parameters), start)


def test_a_rebuild_repeats_the_steps() -> None:
    walked, start = quadratic()
    mezo = FedKSeed(walked, lr=0.1, epsilon=1e-3)
    loss = lambda: float(flat(walked).square().sum() / 2)  # noqa: E731
    history = [(seed, mezo.step(seed, loss)) for seed in range(4)]
    rebuilt, _ = quadratic()
    FedKSeed(rebuilt, lr=0.1, epsilon=1e-3).rebuild(history)
    torch.testing.assert_close(flat(rebuilt), flat(walked))
    assert not torch.allclose(flat(rebuilt), start)


@pytest.mark.parametrize("seed", [-1, 2**32, (1 << 32) + 5])
def test_a_seed_that_the_generator_would_cut_is_refused(seed: int) -> None:
    parameters, start = quadratic()
    with pytest.raises(ValueError, match="32 bits"):
        Mezo(parameters, lr=0.5, epsilon=1e-3).step(seed, lambda: 1.0)
    assert torch.equal(flat(parameters), start)


def test_a_borrowed_model_comes_back_bit_for_bit() -> None:
    parameters, start = quadratic()
    with borrowed(parameters):
        Mezo(parameters, lr=0.5, epsilon=1e-3).step(1, lambda: 1.0)
        Mezo(parameters, lr=0.5, epsilon=1e-3).update(1, 1.0)
        assert not torch.equal(flat(parameters), start)
    assert torch.equal(flat(parameters), start)


def test_signs_are_balanced_and_rank_one() -> None:
    generator, like = torch.Generator().manual_seed(3), torch.empty(40, 50)
    drawn, outer = signs(generator, like), rank_one_signs(generator, like)
    assert set(drawn.flatten().tolist()) == set(outer.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(drawn.mean())) < 0.1
    assert int(torch.linalg.matrix_rank(outer)) == 1
