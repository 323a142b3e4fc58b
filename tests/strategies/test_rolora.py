"""One factor moves at a time, so that averaging is exact in every round."""

from __future__ import annotations

import pytest
from toy import RANK, SITES, ToyFederation, apart, dense, mean_product

from meadow.errors import ConfigError
from meadow.strategies.averaging import select
from meadow.strategies.base import Update
from meadow.strategies.registry import make


def test_factors_take_turns_and_products_average_exactly() -> None:
    strategy = make("rolora", {}, SITES, RANK)
    federation = ToyFederation(strategy)
    for number in (1, 2, 3, 4):
        before = strategy.export(federation.state)
        federation.round(number)
        after = strategy.export(federation.state)
        moves, rests = ("lora_B", "lora_A") if number % 2 else ("lora_A", "lora_B")
        assert apart(select(before, (rests,)), select(after, (rests,))) == 0
        assert apart(select(before, (moves,)), select(after, (moves,))) > 1e-3
        updates = federation.updates
        assert all(name.endswith(moves) for update in updates for name in update.tensors)
        whole = [Update({**select(after, (rests,)), **u.tensors}, u.weight) for u in updates]
        assert apart(dense(after), mean_product(whole)) < 1e-6


def test_kept_optimiser_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="rolora cannot keep optimiser state"):
        make("rolora", {"keep_optimizer": True}, SITES, RANK)
