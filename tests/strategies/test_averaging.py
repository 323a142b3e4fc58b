"""What the averaging strategies share: the start, the request, the client's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import RANK, SITES, ToyClient, ToyFederation, adapter, apart

from meadow.strategies.averaging import fresh_adapter, put, select, under
from meadow.strategies.base import Sgd, State, Strategy, Trained, Turn, Update
from meadow.strategies.registry import make

TURN = Turn(2, 6, 1, steps=3, total_steps=18, client="ada")


def plain(**options: Any) -> Strategy:
    return make("fedavg_lora", {"refine": "none", **options}, SITES, RANK)


def asked(strategy: Strategy, memory: State) -> Sgd:
    request = next(strategy.work(Update(adapter(1)), memory, TURN))
    assert isinstance(request, Sgd)
    return request


def test_a_fresh_adapter_is_loras_start() -> None:
    tree = fresh_adapter(SITES, RANK, 5)
    for site in SITES:
        a, b = tree[f"{site.name}.lora_A"], tree[f"{site.name}.lora_B"]
        assert a.shape == (RANK, site.columns) and b.shape == (site.rows, RANK)
        assert not b.any() and 0 < float(a.abs().max()) <= site.columns**-0.5
    assert apart(tree, fresh_adapter(SITES, RANK, 5)) == 0
    assert apart(tree, fresh_adapter(SITES, RANK, 6)) > 0.1


def test_trees_are_taken_apart_and_put_together() -> None:
    tree = adapter(1)
    assert under("x", {**put("x", tree), **put("xy", adapter(2))}) == tree
    assert set(select(tree, ("lora_A",))) == {f"{site.name}.lora_A" for site in SITES}


def test_a_client_continues_where_it_was() -> None:
    first = asked(plain(proximal=0.25), State())
    later = asked(plain(), State(data={"steps": 7}))
    assert (first.first_step, first.steps, first.total_steps, first.proximal) == (0, 3, 18, 0.25)
    assert (later.first_step, later.proximal) == (7, 0.0)
    assert first.optimizer is None and first.train == ("lora_A", "lora_B")


@pytest.mark.parametrize("keep", [False, True])
def test_optimiser_state_is_kept_only_on_request(keep: bool) -> None:
    strategy = plain(keep_optimizer=keep)
    work = strategy.work(Update(adapter(1)), State(), TURN)
    next(work)
    moments = {"exp_avg/w": torch.ones(2), "step/lora_A": torch.tensor(3.0)}
    with pytest.raises(StopIteration) as stop:
        work.send(Trained(adapter(2), moments, 1.5, 40, 99))
    update, memory = stop.value.value
    assert memory.data == {"steps": 3}
    assert asked(strategy, memory).optimizer == (moments if keep else None)
    assert update.weight == 40 and update.notes == {"loss": 1.5, "examples": 40, "tokens": 99}


@pytest.mark.parametrize("name", ["fedavg_lora", "diloco"])
def test_one_client_that_keeps_its_optimiser_trains_as_if_alone(name: str) -> None:
    """Three rounds of three steps are nine steps: to the bit for averaged factors, and to the
    rounding of x - (x - t) for DiLoCo's deltas."""
    keeps = {"refine": "none", "keep_optimizer": True} if name == "fedavg_lora" else {}
    client = ToyClient("ada", 7)
    strategy = make(name, keeps, SITES, RANK)
    federation = ToyFederation(strategy, clients=[client], steps=3).run(3)
    alone = client.answer(Sgd(fresh_adapter(SITES, RANK, 1), 9))
    assert isinstance(alone, Trained)
    difference = apart(strategy.export(federation.state), alone.adapter)
    assert difference == 0 if name == "fedavg_lora" else difference < 1e-6


def test_without_its_state_the_same_client_ends_elsewhere() -> None:
    client = ToyClient("ada", 7)
    ends = [
        plain(keep_optimizer=keep).export(
            ToyFederation(plain(keep_optimizer=keep), clients=[client]).run(3).state
        )
        for keep in (False, True)
    ]
    assert apart(*ends) > 1e-3


@pytest.mark.parametrize(
    ("kind", "moments"), [("avg", set()), ("avgm", {"m"}), ("adam", {"m", "v"})]
)
def test_moments_are_part_of_the_state(kind: str, moments: set[str]) -> None:
    federation = ToyFederation(plain(server_optimizer=kind)).run(2)
    assert {name.partition("/")[0] for name in federation.state.tensors} == {"x", *moments}
