"""A frozen and derived on both sides: half of the bytes, and averaging is exact."""

from __future__ import annotations

from toy import RANK, SITES, ToyFederation, apart, dense, mean_product

from meadow.strategies.averaging import fresh_adapter, select
from meadow.strategies.base import Update
from meadow.strategies.registry import make

STRATEGY = make("ffa_lora", {}, SITES, RANK)


def test_only_b_travels_in_either_direction() -> None:
    federation = ToyFederation(STRATEGY).run(2)
    for update in (federation.sent, *federation.updates):
        assert {name.rpartition(".")[2] for name in update.tensors} == {"lora_B"}


def test_a_is_the_seeds_for_ever() -> None:
    federation = ToyFederation(STRATEGY).run(3)
    frozen = select(fresh_adapter(SITES, RANK, 1), ("lora_A",))
    assert apart(select(STRATEGY.export(federation.state), ("lora_A",)), frozen) == 0


def test_the_mean_of_products_is_the_product_of_means() -> None:
    federation = ToyFederation(STRATEGY)
    for number in (1, 2):
        federation.round(number)
        tree = STRATEGY.export(federation.state)
        whole = [
            Update({**select(tree, ("lora_A",)), **update.tensors}, update.weight)
            for update in federation.updates
        ]
        assert apart(dense(tree), mean_product(whole)) < 1e-6
        assert apart(dense(tree), dense()) > 0.01
