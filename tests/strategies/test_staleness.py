"""What late answers say and weigh: beside the papers' formulas, and over every strategy that takes
them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import NAMES, RANK, SITES, ToyFederation, adapter, apart

from meadow.errors import ConfigError
from meadow.strategies.base import Strategy, Update
from meadow.strategies.registry import STRATEGIES, make
from meadow.strategies.staleness import Patient, patience_of

PATIENT = ("fedavg_lora", "ffa_lora", "flora", "fedex_lora", "fedsa_lora", "diloco")


def made(name: str, **options: Any) -> Strategy:
    return make(name, options, SITES, RANK)


def test_these_and_no_others_take_late_answers() -> None:
    takers = {name for name, kind in STRATEGIES.items() if issubclass(kind, Patient)}
    assert takers == {*PATIENT, "rolora"}
    assert [patience_of(made(name, late=3)) for name in PATIENT] == [3] * len(PATIENT)
    assert [patience_of(made(name)) for name in PATIENT] == [0] * len(PATIENT)


@given(st.integers(1, 50), st.floats(0, 3), st.floats(0.1, 1e6))
def test_the_weight_is_fedasyncs_polynomial(rounds: int, power: float, weight: float) -> None:
    strategy = made("diloco", late=50, late_power=power)
    assert isinstance(strategy, Patient)
    late = strategy.adopt(Update({}, weight), Update({}), Update({}), rounds)
    assert late.weight == pytest.approx(weight / (1 + rounds) ** power)


@pytest.mark.parametrize("name", ["fedavg_lora", "ffa_lora", "fedex_lora", "fedsa_lora"])
def test_a_state_that_was_sent_counts_as_its_change(name: str) -> None:
    strategy = made(name, late=1)
    assert isinstance(strategy, Patient)
    then, now, end = (adapter(seed) for seed in (1, 2, 3))
    found = strategy.adopt(Update(end, 4.0), Update(then), Update(now), 1)
    expected = {n: now[n].double() + end[n].double() - then[n].double() for n in now}
    assert apart(found.tensors, expected) < 1e-6
    assert all(tensor.dtype == torch.float32 for tensor in found.tensors.values())


@pytest.mark.parametrize("name", ["diloco", "flora"])
def test_a_change_that_was_sent_stays_one(name: str) -> None:
    strategy = made(name, late=1)
    assert isinstance(strategy, Patient)
    change = adapter(3)
    found = strategy.adopt(Update(change, 4.0), Update(adapter(1)), Update(adapter(2)), 1)
    assert all(torch.equal(found.tensors[n], change[n]) for n in change)


@pytest.mark.parametrize("name", PATIENT)
def test_a_client_that_changed_nothing_moves_nothing_however_late(name: str) -> None:
    """What it sends back of round 1 stands, in round 3, where the state is by then."""
    strategy = made(name, late=2)
    assert isinstance(strategy, Patient)
    before, after = ToyFederation(strategy).run(1), ToyFederation(strategy).run(3)
    then, now = before.sent, after.sent
    names = strategy.template(then, before.turn(1, NAMES[0]))
    same = {n: torch.zeros(names[n]) if strategy.sends_changes else then.tensors[n] for n in names}
    found = strategy.adopt(Update(same, 1.0), then, now, 2)
    expected = same if strategy.sends_changes else {n: now.tensors[n] for n in names}
    assert apart(found.tensors, expected) < 1e-6


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("rolora", {}, "of the factor that now rests"),
        ("fedavg_lora", {"refine": "product_svd", "ranks": {"ada": 1}}, "another rank"),
    ],
)
def test_where_late_answers_make_no_sense_that_is_said(
    name: str, options: dict[str, Any], said: str
) -> None:
    made(name, **options)
    with pytest.raises(ConfigError, match=said):
        made(name, late=1, **options)
