"""Refined averages against dense matrices; compared are products, never factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import RANK, SITES, ToyFederation, adapter, apart, dense, mean_product

from meadow.errors import ConfigError
from meadow.peft_adapters.layout import Tree
from meadow.strategies.averaging import under
from meadow.strategies.base import State, Strategy, Turn, Update
from meadow.strategies.fedavg_lora import naive_error
from meadow.strategies.registry import make


def strategy(**options: Any) -> Strategy:
    """product_svd, where the options do not say another refinement."""
    return make("fedavg_lora", {"refine": "product_svd"} | options, SITES, RANK)


def stepped(kind: Strategy, updates: list[Update], previous: Tree) -> tuple[Tree, Update]:
    reducer = kind.reducer(Turn(1, 1, 1))
    for update in updates:
        reducer.fold(update)
    total = reducer.total()
    state = State({f"x/{name}": tensor for name, tensor in previous.items()})
    return under("x", kind.step(state, total, Turn(1, 1, 1)).tensors), total


def best(matrix: torch.Tensor, rank: int = RANK) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    nearest: torch.Tensor = (u[:, :rank] * s[:rank]) @ v[:rank]
    return nearest


UPDATES = [Update(adapter(seed), weight) for seed, weight in ((1, 2.0), (2, 3.0), (3, 7.0))]


def test_product_svd_is_the_best_of_its_rank() -> None:
    """The residual of the dense SVD in float64, and the same product."""
    x, _ = stepped(strategy(), UPDATES, adapter(9))
    got = dense(x)
    for name, exact in mean_product(UPDATES).items():
        assert float((got[name] - best(exact)).abs().max()) < 2e-6
        residual = float((exact - got[name]).norm())
        assert residual == pytest.approx(float((exact - best(exact)).norm()), rel=1e-6)
    assert {tensor.dtype for tensor in x.values()} == {torch.float32}


def test_product_svd_keeps_the_previous_coordinates() -> None:
    """Any rotation of the factors that fits the same product is found again."""
    x, _ = stepped(strategy(), UPDATES, adapter(9))
    turn = torch.linalg.qr(adapter(5)["block.one.lora_A"][:, :RANK]).Q
    turned = {n: t @ turn if n.endswith("lora_B") else turn.T @ t for n, t in x.items()}
    again, _ = stepped(strategy(), UPDATES, turned)
    assert apart(turned, again) < 1e-5 < 0.1 < apart(turned, x)


def test_product_svd_of_one_client_keeps_its_product() -> None:
    x, _ = stepped(strategy(), UPDATES[:1], adapter(9))
    assert apart(dense(x), dense(UPDATES[0].tensors)) < 1e-5


def test_none_averages_the_factors() -> None:
    x, _ = stepped(strategy(refine="none"), UPDATES, adapter(9))
    for name in x:
        mean = sum(u.weight * u.tensors[name].double() for u in UPDATES) / 12
        assert float((x[name] - mean).abs().max()) < 1e-6


@pytest.mark.parametrize("refine", ["none", "product_svd", "rotate"])
def test_the_naive_error_is_that_of_the_dense_matrices(refine: str) -> None:
    _, total = stepped(strategy(refine=refine), UPDATES, adapter(9))
    naive, _ = stepped(strategy(refine="none"), UPDATES, adapter(9))
    squares = [
        float((exact - dense(naive)[name]).norm() / exact.norm()) ** 2
        for name, exact in mean_product(UPDATES).items()
    ]
    expected = (sum(squares) / len(squares)) ** 0.5
    report = strategy(refine=refine).report(total, Turn(1, 1, 1))
    assert expected > 0.1 and report == {"naive_error": pytest.approx(expected, rel=1e-6)}


def test_there_is_no_naive_error_where_a_factor_is_shared() -> None:
    shared = {n: t for n, t in adapter(1).items() if n.endswith("lora_A")}
    updates = [Update({**update.tensors, **shared}, update.weight) for update in UPDATES]
    _, total = stepped(strategy(), updates, adapter(9))
    assert naive_error(total) < 1e-6


def test_svd_is_never_worse_than_averaging() -> None:
    exact = mean_product(UPDATES)
    errors = {}
    for refine in ("none", "product_svd"):
        got = dense(stepped(strategy(refine=refine), UPDATES, adapter(9))[0])
        errors[refine] = [float((exact[name] - got[name]).norm()) for name in exact]
    assert all(a <= b for a, b in zip(errors["product_svd"], errors["none"], strict=True))


@pytest.mark.parametrize("number", [1, 2])
def test_a_rotated_update_keeps_its_product_and_comes_nearer(number: int) -> None:
    federations = {
        refine: ToyFederation(strategy(refine=refine, rotation=0.5), steps=8)
        for refine in ("none", "rotate")
    }
    for federation in federations.values():
        federation.state = State({f"x/{n}": t for n, t in adapter(9).items()})
        federation.round(number)
    factor = "lora_A" if number % 2 else "lora_B"
    reference, nearer = adapter(9), 0.0
    pairs = zip(*(federations[refine].updates for refine in ("none", "rotate")), strict=True)
    for trained, turned in pairs:
        assert apart(dense(trained.tensors), dense(turned.tensors)) < 1e-5
        assert trained.notes == turned.notes and trained.weight == turned.weight
        for name in (name for name in reference if name.endswith(factor)):
            before = float((trained.tensors[name] - reference[name]).norm())
            after = float((turned.tensors[name] - reference[name]).norm())
            assert after <= before + 1e-6
            nearer += before - after
    assert nearer > 1e-3


def test_smaller_ranks_start_from_the_best_of_their_rank() -> None:
    kind = strategy(ranks={"bob": 1})
    turns = {client: Turn(1, 1, 1, client=client) for client in ("ada", "bob")}
    sent = Update(adapter(4))
    assert kind.own(sent, State(), turns["ada"]).adapter == sent.tensors
    small = kind.own(sent, State(), turns["bob"]).adapter
    for name, exact in dense(sent.tensors).items():
        assert small[f"{name}.lora_A"].shape[0] == 1
        assert float((dense(small)[name] - best(exact, 1)).abs().max()) < 1e-5
    assert kind.template(sent, turns["bob"])["block.one.lora_B"] == (7, 1)
    assert kind.template(sent, turns["ada"])["block.one.lora_B"] == (7, RANK)


def test_mixed_ranks_are_combined_exactly() -> None:
    updates = [Update(adapter(seed, rank), 1.0 + seed) for seed, rank in ((1, 1), (2, 3), (3, 2))]
    x, total = stepped(strategy(ranks={"bob": 1}), updates, adapter(9))
    for name, exact in mean_product(updates).items():
        assert float((dense(x)[name] - best(exact)).abs().max()) < 2e-6
    assert strategy(ranks={"bob": 1}).report(total, Turn(1, 1, 1)) == {}


def test_a_client_of_small_rank_can_learn_from_the_first_round() -> None:
    """Its A starts with orthonormal rows, since the product it is cut from is still zero."""
    kind = strategy(ranks={"bob": 1})
    sent = kind.broadcast(kind.init(1), Turn(1, 1, 1))
    start = kind.own(sent, State(), Turn(1, 1, 1, client="bob")).adapter
    assert float(start["block.one.lora_A"].norm()) == pytest.approx(1.0, abs=1e-6)
    assert not start["block.one.lora_B"].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": {"bob": 1}, "refine": "none"}, 'mixed ranks need refine = "product_svd"'),
        ({"ranks": {"bob": 1}, "refine": "rotate"}, 'mixed ranks need refine = "product_svd"'),
        ({"ranks": {"bob": 1}, "keep_optimizer": True}, "no moments can be kept"),
        ({"ranks": {"bob": 1}, "server_optimizer": "adam"}, "no moments can be kept"),
        ({"ranks": {"bob": 0}}, "from 1 to the model's rank, 3"),
        ({"ranks": {"bob": 4}}, "from 1 to the model's rank, 3"),
        ({"ranks": {"bob": "two"}}, r"\[strategy\] ranks.bob is 'two' \(expected int\)"),
        ({"rotation": 1.5}, "rotation is 1.5 .at most 1"),
        ({"width": 0}, r"\[strategy\] width is 0 \(at least 1\)"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        strategy(**options)
