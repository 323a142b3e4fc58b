"""Every strategy, driven through several rounds on a toy: learning, wire, restart, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import NAMES, RANK, SITES, ToyClient, ToyFederation, apart, dense

from meadow.peft_adapters.adapter_reader import load_adapter
from meadow.peft_adapters.adapter_writer import save_adapter
from meadow.peft_adapters.layout import modules_of
from meadow.strategies.averaging import under
from meadow.strategies.base import Strategy
from meadow.strategies.registry import STRATEGIES, make

POOLS: dict[str, dict[str, Any]] = {  # options that suit the toy's size
    "fedkseed": {"lr": 0.01, "scale": 0},
    "pool_lora": {"core_scale": -2},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, POOLS.get(name, {})) for name in STRATEGIES),
    ("fedavg_lora", {"refine": "none", "keep_optimizer": True}),
    ("fedavg_lora", {"refine": "rotate"}),
    ("fedavg_lora", {"server_optimizer": "avgm", "server_momentum": 0.5, "server_lr": 0.5}),
    ("fedavg_lora", {"server_optimizer": "adam", "server_lr": 0.05, "proximal": 0.1}),
    ("fedavg_lora", {"refine": "product_svd", "ranks": {"bob": 1, "eve": 2}}),
    ("fedavg_lora", {"refine": "product_svd", "server_optimizer": "avgm"}),
    ("ffa_lora", {"keep_optimizer": True, "server_optimizer": "avgm", "server_lr": 0.3}),
    ("rolora", {"server_optimizer": "avgm", "server_lr": 0.7}),
    ("fedsa_lora", {"keep_optimizer": True}),
    ("flora", {"ranks": {"ada": 1}}),
    ("diloco", {"outer": "sgd"}),
    ("diloco", {"outer": "nesterov", "outer_lr": 0.3, "ramp": 4}),
    ("diloco", {"freeze_a": True}),
    ("fedkseed", {**POOLS["fedkseed"], "momentum": 0.5, "importance": True}),
    ("fedkseed", {**POOLS["fedkseed"], "combine": "median", "gain": 3.0, "schedule": "cosine"}),
    ("fedkseed", {**POOLS["fedkseed"], "cores": "per_layer", "directions": 2}),
    ("pool_lora", {"lr": 0.01, "scale": 0, "zeroth": ["bob"], **POOLS["pool_lora"]}),
    ("pool_lora", {"lr": 0.01, "scale": 0, "zeroth": [*NAMES], "zeroth_gain": 3.0}),
    ("pool_lora", {"cores": "per_layer", **POOLS["pool_lora"]}),
]


POOL_RANK = 8
"""64 directions for the toy's 59 numbers."""


def types(strategy: Strategy, *more: torch.dtype) -> set[torch.dtype]:
    """Of what travels; with `more`, of what is kept."""
    return {torch.int8, torch.int32, *more} if strategy.integers else {torch.float32}


def named(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


@pytest.fixture(params=CASES, ids=named)
def strategy(request: pytest.FixtureRequest) -> Strategy:
    name, options = request.param
    return make(name, options, SITES, POOL_RANK if name in POOLS else RANK)


def test_rounds_lower_the_loss(strategy: Strategy) -> None:
    federation = ToyFederation(strategy)
    before = federation.loss(0)
    assert federation.run(5).loss(5) < 0.9 * before


def test_what_is_sent_is_what_the_template_says(strategy: Strategy) -> None:
    """`ToyFederation` refuses names and shapes that differ; what is left is the type."""
    federation = ToyFederation(strategy)
    for number in range(1, 4):
        federation.round(number)
        assert len(federation.updates) == len(NAMES)
        for tensors in (federation.sent.tensors, *(u.tensors for u in federation.updates)):
            found = {tensor.dtype for tensor in tensors.values()}
            assert found <= types(strategy, torch.uint8)
        for update in federation.updates:
            assert {"loss", "examples", "tokens"} <= update.notes.keys()


def test_a_restart_after_every_round_changes_no_bit(strategy: Strategy) -> None:
    whole, torn = ToyFederation(strategy), ToyFederation(strategy, restart=True)
    for number in range(1, 4):
        whole.round(number)
        torn.round(number)
        assert whole.state.tensors.keys() == torn.state.tensors.keys()
        for name, tensor in whole.state.tensors.items():
            assert tensor.dtype in types(strategy, torch.int64)
            assert torch.equal(tensor, torn.state.tensors[name]), name
        assert whole.state.data == torn.state.data
        assert whole.figures == torn.figures


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_export_is_an_adapter_that_can_be_served(
    strategy: Strategy, rounds: int, tmp_path: Path
) -> None:
    tree = strategy.export(ToyFederation(strategy).run(rounds).state)
    assert modules_of(tree) == [site.name for site in SITES]
    save_adapter(tmp_path / "adapter", tree, scaling=2.0, base="toy")
    assert apart(dense(load_adapter(tmp_path / "adapter").tree), dense(tree)) < 1e-6


def test_the_export_is_what_clients_use(strategy: Strategy) -> None:
    """The same loss, unless a part of the model is each client's own."""
    federation = ToyFederation(strategy).run(3)
    tree = strategy.export(federation.state)
    received = strategy.broadcast(federation.state, federation.turn(3))
    client = federation.clients[0]
    own = strategy.own(received, federation.memories[client.name], federation.turn(3, client.name))
    used = dense(own.adapter, *([own.side] if own.side else []))
    small = dict(strategy.ranks) if hasattr(strategy, "ranks") else {}
    if not strategy.personal and not small:
        assert apart(used, dense(tree)) < 1e-5
    if strategy.personal:
        assert apart(dense(tree), dense()) == 0 and apart(used, dense()) > 0.01


def test_nothing_received_or_kept_is_written_to(strategy: Strategy) -> None:
    federation = ToyFederation(strategy).run(2)
    before = {name: tensor.clone() for name, tensor in federation.state.tensors.items()}
    held = federation.state
    federation.round(3)
    assert all(torch.equal(held.tensors[name], tensor) for name, tensor in before.items())


def test_the_seed_decides_the_start(strategy: Strategy) -> None:
    if strategy.integers:  # starts at zero, along directions that are the seed's
        start = {s: strategy.export(strategy.init(s)) for s in (1, 2)}
        assert apart(start[1], strategy.export(strategy.init(1))) == 0
        assert apart(start[1], start[2]) == 2 and apart(dense(start[1]), dense()) == 0
        return
    first, again, other = (under("x", strategy.init(seed).tensors) for seed in (1, 1, 2))
    assert first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first)
    assert not first or apart(first, other) > 0.01


def test_one_client_alone_is_a_federation(strategy: Strategy) -> None:
    federation = ToyFederation(strategy, clients=[ToyClient("ada", 4)])
    before = federation.loss(0)
    assert federation.run(3).loss(3) < before
