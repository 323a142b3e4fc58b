"""Averaged factors and their residual are the exact mean, round after round."""

from __future__ import annotations

from typing import Any

import pytest
from toy import RANK, SITES, ToyClient, ToyFederation, apart, dense, mean_product

from meadow.errors import ConfigError
from meadow.strategies.averaging import under
from meadow.strategies.registry import make

STRATEGY = make("fedex_lora", {}, SITES, RANK)


def test_factors_and_side_adapter_are_the_exact_mean() -> None:
    """What clients trained on top of: the mean of their products plus the side adapter they had."""
    federation = ToyFederation(STRATEGY, steps=8)
    for number in (1, 2, 3):
        had = dense(under("side", federation.state.tensors))
        federation.round(number)
        exact = mean_product(federation.updates)
        exact = {name: exact[name] + had[name] for name in exact}
        x, side = (under(part, federation.state.tensors) for part in ("x", "side"))
        assert apart(dense(x, side), exact) < 5e-6
        assert apart(dense(side), had) > 1e-3  # the naive mean alone would not do
        assert apart(dense(STRATEGY.export(federation.state)), exact) < 1e-5
        assert federation.state.data["discarded"] < 1e-6


def test_x_is_the_plain_mean() -> None:
    federation = ToyFederation(STRATEGY).run(2)
    weight = sum(update.weight for update in federation.updates)
    x = under("x", federation.state.tensors)
    parts = [
        {name: update.weight / weight * update.tensors[name].double() for name in x}
        for update in federation.updates
    ]
    assert apart(x, {name: sum(part[name] for part in parts) for name in x}) < 1e-6  # type: ignore[misc]


def test_clients_train_over_the_side_adapter_and_send_only_factors() -> None:
    federation = ToyFederation(STRATEGY).run(2)
    assert set(under("side", federation.sent.tensors)) == set(federation.updates[0].tensors)
    turn = federation.turn(3, "ada")
    own = STRATEGY.own(federation.sent, federation.memories["ada"], turn)
    assert own.side is not None and apart(own.side, under("side", federation.sent.tensors)) == 0


def test_one_client_leaves_no_residual() -> None:
    federation = ToyFederation(STRATEGY, clients=[ToyClient("ada", 3)]).run(2)
    assert apart(dense(under("side", federation.state.tensors)), dense()) == 0


@pytest.mark.parametrize("options", [{"server_optimizer": "adam"}, {"server_lr": 0.5}])
def test_other_server_optimisers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exact for the plain mean only"):
        make("fedex_lora", options, SITES, RANK)
