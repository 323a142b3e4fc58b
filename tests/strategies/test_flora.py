"""Stacking adds exactly the mean of the products to the global model."""

from __future__ import annotations

import math
from typing import Any

import pytest
from toy import RANK, SITES, ToyFederation, apart, dense, mean_product

from meadow.errors import ConfigError
from meadow.strategies.averaging import under
from meadow.strategies.base import Sgd, State, Turn, Update
from meadow.strategies.registry import make


@pytest.mark.parametrize("ranks", [{}, {"ada": 1, "eve": 2}])
def test_a_round_adds_the_dense_sum_of_products(ranks: dict[str, int]) -> None:
    strategy = make("flora", {"ranks": ranks}, SITES, RANK)
    federation = ToyFederation(strategy)
    before = dense()
    for number in (1, 2, 3):
        federation.round(number)
        after = dense(strategy.export(federation.state))
        gained = {name: after[name] - before[name] for name in after}
        assert apart(gained, mean_product(federation.updates)) < 5e-6
        assert math.isclose(federation.state.data["discarded"], 0.0, abs_tol=1e-6)
        before = after


def test_a_client_starts_anew_over_the_global_model() -> None:
    strategy = make("flora", {"ranks": {"ada": 2}}, SITES, RANK)
    federation = ToyFederation(strategy).run(1)
    sent = strategy.broadcast(federation.state, Turn(2, 6, 1))
    requests = {}
    for client, number in (("ada", 2), ("ada", 3), ("bob", 2)):
        request = next(strategy.work(sent, State(), Turn(number, 6, 1, 4, client=client)))
        assert isinstance(request, Sgd) and request.side is not None
        assert apart(request.side, under("side", sent.tensors)) == 0
        assert apart(dense(request.adapter), dense()) == 0
        requests[client, number] = request.adapter["block.one.lora_A"]
    assert requests["ada", 2].shape[0] == 2 and requests["bob", 2].shape[0] == RANK
    assert not requests["ada", 2].equal(requests["ada", 3])
    assert not requests["ada", 2].equal(requests["bob", 2][:2])


def test_beyond_its_width_the_weakest_directions_go_and_are_counted() -> None:
    strategy = make("flora", {"width": 4}, SITES, RANK)
    federation = ToyFederation(strategy).run(4)
    ranks = {t.shape[0] for n, t in federation.state.tensors.items() if n.endswith("lora_A")}
    assert ranks == {4} and federation.state.data["discarded"] > 0.001


def test_before_the_first_round_there_is_nothing_but_a_start() -> None:
    strategy = make("flora", {}, SITES, RANK)
    assert apart(dense(strategy.export(strategy.init(1))), dense()) == 0
    own = strategy.own(Update({}), State(), Turn(1, 6, 1))
    assert own.side is None and apart(dense(own.adapter), dense()) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": {"ada": RANK + 1}}, "from 1 to the model's rank, 3"),
        ({"width": 0}, r"width is 0 \(at least 1\)"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make("flora", options, SITES, RANK)


def test_a_clipped_update_is_not_measured_against_the_side_adapter() -> None:
    """They have other names: a fresh adapter is its own change, at equal and at mixed ranks."""
    strategy = make("flora", {"ranks": {"ada": 2}}, SITES, RANK)
    sent = strategy.broadcast(ToyFederation(strategy).run(1).state, Turn(2, 6, 1))
    assert not set(sent.tensors) & set(strategy.template(sent, Turn(2, 6, 1, client="bob")))
