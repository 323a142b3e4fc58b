"""FedKSeed's coordinator by hand: whose bytes move which integers by how much."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fedkseed_rounds import (
    RANK,
    RUN,
    SEED,
    SENT,
    STEPS,
    TURN,
    by_direction,
    own_directions,
    stepped,
    strategy,
    total,
    worked,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import adapter

from meadow.config import ClientsConfig
from meadow.errors import ConfigError, FormatError, UpdateError
from meadow.peft_adapters.pool import LARGEST, directions, drawn_directions
from meadow.strategies.base import State, Update
from meadow.strategies.fedkseed import FedKSeed, probabilities
from meadow.strategies.messages import (
    INTEGERS,
    check_contribution,
    pack_state,
    pack_update,
    unpack_state,
)

# --- the coordinator's half --------------------------------------------------------------------


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
@pytest.mark.parametrize("gain", [0.0, 1.0, 2.5])
def test_a_round_by_hand(gain: float, cores: str) -> None:
    """Q[k] -= gain M sum (n_c / n) byte, with gain 0 standing for the three clients."""
    made = strategy(gain=gain, cores=cores)
    multiplier = round(1e-4 * 2.0 ** (-6 + 30))
    expected = by_direction(
        (k, -(gain or 3) * multiplier * weight / 60 * byte)
        for name, (bytes_, weight) in SENT.items()
        for k, byte in zip(own_directions(name), bytes_, strict=True)
    )
    q = stepped(made, SENT).tensors["q"]
    assert q.dtype == torch.int64 and len(q) == (2 if cores == "per_layer" else 1)
    for core in q:
        assert np.abs(core.flatten().numpy() - expected).max() < 1.0
    assert len({*own_directions("ada"), *own_directions("bob")}) > 4  # of their own


@pytest.mark.parametrize(("scale", "gain"), [(-14, 0.04), (-14, 0.6), (-16, 0.1), (-6, 0.001)])
def test_a_gain_below_one_is_kept_where_the_multiplier_is_small(scale: int, gain: float) -> None:
    """An adaptive scale leads there in mid-run; rounded to a whole number, the step was none."""
    made = strategy(scale=scale, gain=gain)
    full = {
        name: ([127 if b > 0 else -127 for b in bytes_], w) for name, (bytes_, w) in SENT.items()
    }
    plain = stepped(strategy(scale=scale, gain=1000.0), full).tensors["q"].double()
    found = stepped(made, full).tensors["q"].double()
    assert float((found - plain * gain / 1000).abs().max()) < 0.51 + 0.01 * float(found.abs().max())
    assert found.any()


@settings(max_examples=40, deadline=None)
@given(st.permutations(list(SENT)), st.sampled_from(["mean", "median", "trimmed", "clipped"]))
def test_the_order_of_the_clients_does_not_matter(order: list[str], rule: str) -> None:
    made = strategy(combine=rule)
    found = stepped(made, {name: SENT[name] for name in order})
    assert torch.equal(found.tensors["q"], stepped(made, SENT).tensors["q"])


def test_clients_that_claim_nothing_weigh_equally() -> None:
    """As far as they reach the strategy: a total weight of zero changes nothing before."""
    made = strategy()
    zero = {name: (bytes_, 0.0) for name, (bytes_, _) in SENT.items()}
    one = {name: (bytes_, 1.0) for name, (bytes_, _) in SENT.items()}
    assert torch.equal(stepped(made, zero).tensors["q"], stepped(made, one).tensors["q"])


@pytest.mark.parametrize("rule", ["median", "trimmed", "clipped"])
def test_robust_rules_compare_the_same_directions(rule: str) -> None:
    made = strategy(combine=rule)
    k = directions(RUN, b"round 2", 0, STEPS, RANK * RANK).tolist()
    sent = made.broadcast(made.init(SEED), TURN)
    for name in SENT:
        along = made.along(sent, replace(TURN, client=name), 0, STEPS)
        assert along.tolist() == k
    table = np.array([bytes_ for bytes_, _ in SENT.values()])
    middle = np.median(table, axis=0)
    expected = by_direction(zip(k, -1678 * middle, strict=True))
    q = stepped(made, SENT).tensors["q"].flatten().numpy()
    if rule == "clipped":
        assert (np.abs(q) <= 1678 * 127).all() and q.any()
    else:  # of three, the trimmed mean is the median
        assert np.abs(q - expected).max() < 1.0


def test_momentum_by_hand() -> None:
    """v = m v + change, Q += v; m in 256ths."""
    made, plain = strategy(momentum=0.9), strategy()
    change = stepped(plain, SENT).tensors["q"]
    velocity = torch.arange(-4, 5).view(1, 3, 3) * 1000
    found = stepped(made, SENT, velocity=velocity)
    kept = torch.tensor([math.trunc(v * 230 / 256) for v in velocity.flatten().tolist()])
    assert torch.equal(found.tensors["velocity"], kept.view(1, 3, 3) + change)
    assert torch.equal(found.tensors["q"], found.tensors["velocity"])


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.996])
def test_momentum_dies_away_on_both_sides_of_zero(momentum: float) -> None:
    """Rounding down would leave a drift of up to 255 a round for ever."""
    made = strategy(momentum=momentum)
    state = made.init(SEED)
    velocity = torch.tensor([-70000, 70000, -255, 255, -1, 1, 0, 5, -5]).view(1, 3, 3)
    state = State({**state.tensors, "velocity": velocity}, state.data)
    silence = total(made, {"ada": ([0] * STEPS, 1.0)})
    for _ in range(4000):
        state = made.step(state, silence, TURN)
    assert not state.tensors["velocity"].any()
    q = state.tensors["q"].flatten()
    assert torch.equal(q[0::2][:3] + q[1::2][:3], torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("constant", [1, 1, 1]), ("linear", [1, 2 / 3, 1 / 3]), ("cosine", [1, 0.75, 0.25])],
)
def test_schedules(schedule: str, factors: list[float]) -> None:
    made = strategy(schedule=schedule)
    state = made.init(SEED)
    for number, factor in enumerate(factors, start=1):
        notes = made.broadcast(state, replace(TURN, round=number, rounds=3)).notes
        assert notes == {"scale": -6, "multiplier": round(1e-4 * factor * 2**24)}


def test_a_rate_that_falls_below_the_grid_raises_the_scale() -> None:
    made = strategy(schedule="cosine", unit=20)
    state = made.init(SEED)
    notes = [
        made.broadcast(state, replace(TURN, round=number, rounds=1000)).notes
        for number in (1, 500, 999, 1000)
    ]
    assert notes[0] == {"scale": -6, "multiplier": 2}
    assert all(note["multiplier"] >= 1 for note in notes)
    assert notes[-1]["scale"] > -6


def test_the_scale_follows_the_bytes_but_not_off_the_grid() -> None:
    """A thousand silent rounds (all losses were NaN) end neither the run nor its steps."""
    made = strategy(adaptive_scale=True)
    state = made.init(SEED)
    loud, silent = total(made, {"ada": ([127] * 4, 1.0)}), total(made, {"ada": ([0] * 4, 1.0)})
    assert made.step(state, loud, TURN).data["scale"] == -4
    assert made.step(state, silent, TURN).data["scale"] == -9
    for _ in range(1000):
        state = made.step(state, silent, TURN)
    sent = made.broadcast(state, TURN)
    assert sent.notes["multiplier"] >= 1 and -20 < sent.notes["scale"] < -10
    assert made.step(state, loud, TURN).data["scale"] == sent.notes["scale"] + 2
    assert strategy().step(state, silent, TURN).data["scale"] == state.data["scale"]


def test_an_overflow_is_refused_and_never_wraps() -> None:
    made = strategy(gain=2.0**44)  # 1678 * 127 * 2^64: int64 would see nothing
    with pytest.raises(UpdateError, match="out of 32 bits"):
        stepped(made, {"ada": ([127] * STEPS, 1.0)})
    near = torch.full((1, 3, 3), LARGEST)
    with pytest.raises(UpdateError, match="outgrown 32 bits"):
        stepped(strategy(), {"ada": ([-127] * STEPS, 1.0)}, q=near)


# --- FedKSeed-Pro ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 50)), min_size=9, max_size=9))
def test_probabilities_are_fedkseed_pros(history: list[tuple[int, int]]) -> None:
    """softmax((A - min) / (max - min)) of the mean |g| of each direction, 0 where never drawn."""
    sums = [size if count else 0 for size, count in history]
    counts = [count for _, count in history]
    weights = probabilities(torch.tensor(sums), torch.tensor(counts)).double().numpy()
    mean = np.array(sums) / np.maximum(counts, 1)
    normal = (mean - mean.min()) / (mean.max() - mean.min() + 1e-10)
    expected = np.exp(normal) / np.exp(normal).sum()
    assert np.abs(weights / weights.sum() / expected - 1).max() < 0.02
    assert weights.min() == 94 and weights.max() <= 255


def test_the_history_is_what_was_measured() -> None:
    made = strategy(importance=True, scale=-6)
    amplitude, draws = by_direction([]), by_direction([])
    state = made.init(SEED)
    sent = made.broadcast(state, TURN)
    assert sent.tensors["weights"].tolist() == [94] * 9
    state = made.step(state, total(made, SENT), TURN)
    for name, (bytes_, _) in SENT.items():
        weights = np.full(9, 94)
        k = drawn_directions(RUN, name.encode(), STEPS, STEPS, weights).tolist()
        amplitude += by_direction(zip(k, (abs(byte) for byte in bytes_), strict=True))
        draws += by_direction((at, 1) for at in k)
    assert state.tensors["draws"].tolist() == draws.tolist()
    assert (state.tensors["amplitude"].double() / 2**26).tolist() == amplitude.tolist()
    next_sent = made.broadcast(state, replace(TURN, round=3))
    expected = probabilities(state.tensors["amplitude"], state.tensors["draws"])
    assert torch.equal(next_sent.tensors["weights"], expected) and len(set(expected.tolist())) > 2


def test_large_gradients_are_cut_at_a_thousand() -> None:
    """As FedKSeed-Pro does; and sums in whole numbers then cannot wrap."""
    made = strategy(importance=True, scale=10, unit=5, lr=1e-3)
    state = stepped(made, {"ada": ([127, -127, 127, 0], 1.0)})
    assert int(state.tensors["amplitude"].sum()) == 3000 * 2**32
    assert int(state.tensors["draws"].sum()) == STEPS


def test_clients_draw_by_the_weights_they_received() -> None:
    made = strategy(importance=True)
    state = made.init(SEED)
    amplitude = torch.arange(9) * 2**32
    state = State({**state.tensors, "amplitude": amplitude, "draws": torch.ones(9).long()}, {
        **state.data
    })  # fmt: skip
    sent = made.broadcast(state, TURN)
    _, asked = worked(made, sent)
    weights = sent.tensors["weights"].numpy().astype(np.int64)
    k = drawn_directions(RUN, b"ada", STEPS, STEPS, weights)
    assert [probe.directions[0] for probe in asked] == k.tolist()


def test_importance_needs_directions_of_ones_own() -> None:
    for rule in ("median", "trimmed", "clipped"):
        with pytest.raises(ConfigError, match="which a robust rule cannot compare"):
            strategy(importance=True, combine=rule)


# --- bad input ---------------------------------------------------------------------------------


def received(made: FedKSeed, update: Update) -> Update:
    """What the coordinator does with a client's bytes."""
    sent, turn = made.broadcast(made.init(SEED), TURN), replace(TURN, client="eve")
    found = check_contribution(pack_update(update), made.template(sent, turn), "eve", INTEGERS)
    made.validate(found, turn)
    return found


def test_sound_bytes_pass() -> None:
    update = received(strategy(), Update({"bytes": torch.tensor([127, -127, 0, 1]).char()}, 3.0))
    assert update.sender == "eve" and update.tensors["bytes"].tolist() == [127, -127, 0, 1]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"bytes": torch.tensor([1, 2, -128, 3]).char()}, "^eve: a byte is out of range"),
        ({"bytes": torch.tensor([1, 2, 3, 4]).int()}, "^eve: a byte is out of range"),
        ({"bytes": torch.tensor([1, 2, 3, 4]).byte()}, "^eve: only int8 and int32"),
        ({"bytes": torch.tensor([1.0, 2, 3, 4])}, "^eve: only int8 and int32"),
        ({"bytes": torch.tensor([1, 2, 3, 4])}, "^eve: only int8 and int32"),
        ({"bytes": torch.tensor([1, 2, 3]).char()}, r"shape \(3,\), expected \(4,\)"),
        ({"bytes": torch.ones(5).char()}, r"shape \(5,\), expected \(4,\)"),
        ({"core": torch.ones(1, 3, 3).int()}, "'bytes' is missing"),
        (adapter(1), "is"),
        ({}, "'bytes' is missing"),
    ],
)
def test_other_bytes_are_refused(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(UpdateError, match=said):
        received(strategy(), Update(tensors, 3.0))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 1e10])
def test_weights_that_cannot_be_true_are_refused(weight: float) -> None:
    with pytest.raises((UpdateError, FormatError, ValueError)):
        received(strategy(), Update({"bytes": torch.ones(4).char()}, weight))


@pytest.mark.parametrize(
    ("options", "clients", "said"),
    [
        ({"directions": 3}, {"batch": 8}, "batch = 8 cannot be dealt evenly to 3 directions"),
        ({}, {"clip_update": 1.0}, "fedkseed sends integers, which are neither clipped"),
        ({}, {"wire": "bfloat16"}, "fedkseed sends integers, which are neither clipped"),
    ],
)
def test_clients_that_do_not_fit_are_refused(
    options: dict[str, Any], clients: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        strategy(**options).check_clients(ClientsConfig(**clients))
    strategy(**{**options, "directions": 2}).check_clients(ClientsConfig())


@pytest.mark.parametrize(
    "options", [{"lr": 1e-12}, {"unit": 0}, {"lr": 100.0}, {"scale": -40}, {"directions": 2**30}]
)
def test_a_rate_that_the_grid_cannot_hold_is_found_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="on a grid of"):
        strategy(**options)


# --- going on ----------------------------------------------------------------------------------


def test_a_state_comes_back_to_the_bit() -> None:
    made = strategy(momentum=0.9, importance=True)
    state = stepped(made, SENT)
    back = unpack_state(pack_state(state))
    assert back.data == state.data
    assert {"q", "velocity", "amplitude", "draws"} == back.tensors.keys()
    assert all(torch.equal(back.tensors[name], t) for name, t in state.tensors.items())
    one, other = (made.step(s, total(made, SENT), TURN) for s in (state, back))
    assert all(torch.equal(one.tensors[name], t) for name, t in other.tensors.items())


def test_figures_of_a_round() -> None:
    made = strategy()
    assert made.report(total(made, SENT), TURN) == {"saturated": 1, "silent": 1, "steps": 12}
