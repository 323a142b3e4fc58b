"""The outer rules against torch's optimisers, and which rule is taken when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import RANK, SITES, ToyFederation, adapter, apart

from meadow.errors import ConfigError
from meadow.peft_adapters.layout import Tree
from meadow.strategies.averaging import select, under
from meadow.strategies.base import Sgd, State, Strategy, Turn, Update
from meadow.strategies.diloco import DiLoCo, outer_rate
from meadow.strategies.registry import make

DELTAS = [adapter(seed) for seed in range(2, 9)]


def diloco(**options: Any) -> DiLoCo:
    strategy = make("diloco", options, SITES, RANK)
    assert isinstance(strategy, DiLoCo)
    return strategy


def outer_path(strategy: Strategy, rounds: int = 7, clients: int = 4) -> list[Tree]:
    """The state after each of the outer gradients DELTAS."""
    state, path = State({f"x/{name}": t for name, t in adapter(1).items()}), []
    for number, delta in enumerate(DELTAS, 1):
        state = strategy.step(
            state, Update(delta, float(clients), clients), Turn(number, rounds, 1)
        )
        path.append(under("x", state.tensors))
    return path


def torch_path(lr: float, momentum: list[float]) -> list[Tree]:
    """torch.optim.SGD(nesterov=True) over the same gradients, its momentum set anew each step."""
    tree = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in adapter(1).items()}
    optimizer = torch.optim.SGD(tree.values(), lr=lr, momentum=0.5, nesterov=True)
    path = []
    for mu, delta in zip(momentum, DELTAS, strict=True):
        optimizer.param_groups[0]["momentum"] = mu
        for name, parameter in tree.items():
            parameter.grad = delta[name].clone()
        optimizer.step()
        path.append({name: parameter.detach().clone() for name, parameter in tree.items()})
    return path


def same(got: list[Tree], expected: list[Tree]) -> bool:
    return all(apart(a, b) < 2e-5 for a, b in zip(got, expected, strict=True))


def test_nesterov_is_torchs() -> None:
    got = outer_path(diloco(outer="nesterov", outer_lr=0.3, outer_momentum=0.9, ramp=0))
    assert same(got, torch_path(0.3, [0.9] * 7))


def test_momentum_ramps_from_the_first_round() -> None:
    got = outer_path(diloco(outer="nesterov", outer_lr=0.3, outer_momentum=0.8, ramp=4))
    assert same(got, torch_path(0.3, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8]))
    assert not same(got, torch_path(0.3, [0.8] * 7))


def test_sgd_and_average_have_no_momentum() -> None:
    x = adapter(1)
    for strategy, lr in ((diloco(outer="sgd", outer_lr=0.25), 0.25), (diloco(outer="average"), 1)):
        expected, now = [], {name: tensor.double() for name, tensor in x.items()}
        for delta in DELTAS:
            now = {name: now[name] - lr * delta[name] for name in now}
            expected.append(now)
        assert same(outer_path(strategy), expected)


@pytest.mark.parametrize(
    ("clients", "rate"), [(1, 0.4), (2, 0.6), (4, 0.6), (5, 0.8), (8, 0.8), (300, 0.8)]
)
def test_the_scaling_laws_table(clients: int, rate: float) -> None:
    assert outer_rate(clients) == rate
    got = outer_path(diloco(outer="sgd"), clients=clients)
    assert same(got, outer_path(diloco(outer="sgd", outer_lr=rate), clients=clients))


def test_auto_averages_in_short_runs_and_takes_nesterov_in_long_ones() -> None:
    auto = diloco(long_run=20, ramp=3)
    assert same(outer_path(auto, rounds=19), outer_path(diloco(outer="average")))
    long = outer_path(auto, rounds=20)
    assert same(long, outer_path(diloco(outer="nesterov", ramp=3), rounds=20))
    assert not same(long, outer_path(diloco(outer="average")))


def test_a_delta_is_what_the_client_moved_by() -> None:
    federation = ToyFederation(diloco()).run(1)
    for update in federation.updates:
        assert update.notes["delta"] is True and update.weight == 1.0
    trained = [
        {name: federation.sent.tensors[name] - t for name, t in update.tensors.items()}
        for update in federation.updates
    ]
    mean = {name: sum(tree[name].double() for tree in trained) / 3 for name in trained[0]}
    assert apart(under("x", federation.state.tensors), mean) < 1e-6  # type: ignore[arg-type]


def test_the_inner_optimiser_stays_with_the_client() -> None:
    strategy = diloco()
    federation = ToyFederation(strategy).run(2)
    memory = federation.memories["ada"]
    assert memory.data == {"steps": 6}
    request = next(strategy.work(federation.sent, memory, federation.turn(3, "ada")))
    assert isinstance(request, Sgd) and request.optimizer == under("inner", memory.tensors)
    assert request.first_step == 6
    assert not any("exp_avg" in name for u in federation.updates for name in u.tensors)


@pytest.mark.parametrize(("joined", "weights"), [(1, [1, 1, 1]), (2, [1, 0, 1]), (3, [1, 1, 0])])
def test_a_joiners_first_round_weighs_nothing(joined: int, weights: list[float]) -> None:
    """Bob's weights in rounds 1 to 3; who is there from the start counts at once."""
    federation, got = ToyFederation(diloco(), joined={"bob": joined}), []
    for number in (1, 2, 3):
        federation.round(number)
        assert [federation.updates[at].weight for at in (0, 2)] == [1, 1]
        got.append(federation.updates[1].weight)
    assert got == weights


def test_a_joiner_does_not_move_the_state_but_warms_up() -> None:
    with_joiner = ToyFederation(diloco(), joined={"bob": 2}).run(1)
    with_joiner.round(2)
    others = [update for update in with_joiner.updates if update.weight]
    total = diloco().reducer(with_joiner.turn(2))
    for update in others:
        total.fold(update)
    moved = diloco().step(
        State({f"x/{n}": t for n, t in with_joiner.sent.tensors.items()}), total.total(),
        with_joiner.turn(2),
    )  # fmt: skip
    assert apart(with_joiner.state.tensors, moved.tensors) == 0
    assert under("inner", with_joiner.memories["bob"].tensors)


def test_a_frozen_a_stands_still_and_is_not_sent() -> None:
    strategy = diloco(freeze_a=True)
    federation = ToyFederation(strategy).run(2)
    assert all(n.endswith("lora_B") for u in federation.updates for n in u.tensors)
    start = select(strategy.export(strategy.init(1)), ("lora_A",))
    assert apart(select(strategy.export(federation.state), ("lora_A",)), start) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outer_momentum": 1.0}, "at least 0 and below 1"),
        ({"outer_momentum": -0.1}, r"outer_momentum is -0.1 \(at least 0\)"),
        ({"outer_lr": -1.0}, r"outer_lr is -1.0 \(at least 0\)"),
        ({"outer": "adam"}, "one of 'auto', 'average', 'sgd', 'nesterov'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        diloco(**options)
