"""Single bytes: no bias, no surprise at the ends, and a scale that settles."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import RUN, random_q, small_pool

from meadow.errors import ConfigError
from meadow.peft_adapters.layout import Site
from meadow.peft_adapters.pool import Integers, directions
from meadow.strategies.base import Probe, Probed
from meadow.strategies.zeroth_order import (
    MOST,
    Header,
    Walked,
    multiplier_of,
    next_scale,
    notes_of_walk,
    run_id_of,
    to_byte,
    walk,
    within_grid,
)

POOL = small_pool((Site("one", 7, 5), Site("two", 4, 6)))
HEADER = Header(epsilon=-6, scale=-3, multiplier=11)


# --- one byte ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(-126 * 64, 126 * 64), st.integers(-6, 6))
def test_rounding_has_no_bias(sixty_fourths: int, scale: int) -> None:
    """The mean over all 64 uniforms that matter is the gradient, exactly."""
    gradient = sixty_fourths / 64 * 2.0**scale
    found = [to_byte(gradient, scale, uniform / 64) for uniform in range(64)]
    assert sum(byte for byte, _ in found) == sixty_fourths
    assert {byte for byte, _ in found} <= {sixty_fourths // 64, sixty_fourths // 64 + 1}
    assert not any(cut for _, cut in found)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(-60, 60),
    st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_a_byte_is_within_one_of_the_truth_or_cut(
    gradient: float, scale: int, uniform: float
) -> None:
    byte, cut = to_byte(gradient, scale, uniform)
    true = Fraction(gradient) / Fraction(2) ** scale
    assert -MOST <= byte <= MOST
    if cut:
        assert abs(true) > MOST - 1e-9 and (byte > 0) == (true > 0)
    else:
        assert abs(byte - true) <= 1


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [(127.0, (127, False)), (128.0, (127, True)), (-127.0, (-127, False)), (-127.5, (-127, True)),
     (1e300, (127, True)), (-1e300, (-127, True)), (0.0, (0, False)), (-0.0, (0, False))],
)  # fmt: skip
def test_the_ends_of_a_byte(gradient: float, expected: tuple[int, bool]) -> None:
    assert to_byte(gradient, 0, 0.0) == expected


# --- a walk ------------------------------------------------------------------------------------


def follow(
    table: list[list[tuple[float, float]]], first: int = 0, header: Header = HEADER
) -> tuple[Walked, list[Probe]]:
    """A walk whose losses come from a table: a row for each step, a pair for each direction."""
    per_step = len(table[0])

    def along(step: int) -> Integers:
        return directions(RUN, b"ada", step * per_step, per_step, POOL.size)

    walking = walk(POOL, random_q(POOL, 1, 99), header, b"ada", first, along, len(table))
    asked = [next(walking)]
    try:
        for row in table:
            losses = torch.tensor(row, dtype=torch.float64)
            asked.append(walking.send(Probed(losses, 12, 34)))
    except StopIteration as stop:
        return stop.value, asked
    raise AssertionError("the walk goes on")


def uniform(step: int) -> float:
    """The rounding's own, by its definition, as a number of 53 bits."""
    start = b"meadow/rounding/v1\0" + bytes.fromhex(RUN) + (3).to_bytes(4, "little") + b"ada"
    digest = hashlib.sha256(start + step.to_bytes(8, "little")).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) / 2**53


@pytest.mark.parametrize("first", [0, 7])
def test_a_walk_by_hand(first: int) -> None:
    table = [[(2.0, 1.0)], [(1.0, 1.5)], [(1.25, 1.25)], [(1.0, 1.001)]]
    walked, asked = follow(table, first)
    k = directions(RUN, b"ada", first, 4, POOL.size)
    q = random_q(POOL, 1, 99)
    for at, ((plus, minus),) in enumerate(table):
        probe = asked[at]
        assert probe.directions == (int(k[at]),) and probe.step == first + at
        assert probe.pool == POOL and probe.epsilon == 2.0**-6
        exact = (plus - minus) / (2 * 2.0**-6) / 2.0**-3
        byte = math.floor(exact + uniform(first + at))
        assert int(walked.bytes[at]) == max(-127, min(127, byte))
        q.view(-1)[int(k[at])] -= int(walked.bytes[at]) * 11
    assert torch.equal(walked.q, q) and walked.bytes.dtype == torch.int8
    assert walked.bytes[:2].tolist() == [127, -127]
    assert (walked.saturated, walked.lost) == (2, 0)
    assert walked.loss == pytest.approx((1.5 + 1.25 + 1.25 + 1.0005) / 4)
    assert (walked.examples, walked.tokens) == (12, 4 * 34)


def test_each_step_is_measured_where_the_last_one_led() -> None:
    """The sender applies its own rounded value before it goes on."""
    walked, asked = follow([[(1.3, 1.0)], [(1.0, 1.2)], [(1.1, 1.0)]])
    q = random_q(POOL, 1, 99)
    for probe, byte in zip(asked, walked.bytes.tolist(), strict=True):
        assert torch.equal(probe.q, q) and byte != 0
        q.view(-1)[probe.directions[0]] -= byte * 11
    assert torch.equal(walked.q, q)


def test_several_directions_share_a_step() -> None:
    walked, asked = follow([[(1.5, 1.0), (1.0, 1.25)], [(1.1, 1.0), (1.0, 1.0)]])
    assert [len(probe.directions) for probe in asked] == [2, 2]
    k = directions(RUN, b"ada", 0, 4, POOL.size)
    assert [*asked[0].directions, *asked[1].directions] == k.tolist()
    assert walked.bytes.shape == (4,) and walked.bytes[0] > 0 > walked.bytes[1]
    q = random_q(POOL, 1, 99)
    for direction, byte in zip(k.tolist(), walked.bytes.tolist(), strict=True):
        q.view(-1)[direction] -= byte * 11
    assert torch.equal(walked.q, q)


BAD = [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf), (math.inf, math.inf)]


@pytest.mark.parametrize("losses", BAD)
def test_a_loss_that_is_not_finite_is_a_byte_of_zero(losses: tuple[float, float]) -> None:
    walked, _ = follow([[(1.5, 1.0)], [losses], [(1.5, 1.0)]])
    assert walked.bytes[1] == 0 and walked.lost == 1
    assert walked.bytes[0] != 0 and walked.bytes[2] != 0
    assert walked.loss == 1.25
    assert notes_of_walk(walked) == {
        "examples": 12, "tokens": 102, "saturated": 2, "lost": 1, "loss": 1.25,
    }  # fmt: skip


def test_a_walk_without_any_loss_says_none() -> None:
    walked, _ = follow([[BAD[0]], [BAD[2]]])
    assert walked.bytes.tolist() == [0, 0] and walked.lost == 2 and math.isnan(walked.loss)
    assert "loss" not in notes_of_walk(walked)
    assert torch.equal(walked.q, random_q(POOL, 1, 99))


# --- scale and multiplier ----------------------------------------------------------------------


def sent(gradients: np.ndarray, scale: int) -> Integers:
    return np.clip(np.round(gradients * 2.0**-scale), -MOST, MOST).astype(np.int64)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(-60, 40), st.integers(-20, 20),
    st.sampled_from(["normal", "laplace", "uniform", "constant"]),
)  # fmt: skip
def test_the_scale_settles_from_anywhere(seed: int, start: int, size: int, kind: str) -> None:
    dice = np.random.default_rng(seed)
    shapes = {
        "normal": dice.normal(size=2000), "laplace": dice.laplace(size=2000),
        "uniform": dice.uniform(-1, 1, size=2000), "constant": np.full(2000, 0.7),
    }  # fmt: skip
    gradients, scale = shapes[kind] * 2.0**size, start
    for _ in range(60):
        scale = next_scale(scale, sent(gradients, scale))
    bytes_ = sent(gradients, scale)
    assert next_scale(scale, bytes_) == scale
    assert 12 <= np.abs(bytes_).mean() <= 64 and (np.abs(bytes_) == MOST).mean() <= 0.02


@pytest.mark.parametrize(
    ("bytes_", "change"),
    [([], 0), ([0, 0], -3), ([1, -1], -3), ([5, 5], -2), ([12, -12], -1), ([13, 13], 0),
     ([64, -64], 0), ([65, 65], 1), ([127] * 3 + [0] * 97, 2), ([127] * 2 + [20] * 98, 0)],
)  # fmt: skip
def test_how_the_scale_follows(bytes_: list[int], change: int) -> None:
    assert next_scale(-5, np.array(bytes_, np.int64)) == -5 + change


def test_the_multiplier_is_the_rate_on_the_grid() -> None:
    assert multiplier_of(1e-4, -6, 30) == round(1e-4 * 2**24) == 1678
    assert multiplier_of(2.0**-4, 4, 0) == 1 and multiplier_of(2.0**-2, 0, 30) == 2**28


@pytest.mark.parametrize(
    ("lr", "scale", "unit", "hint"),
    [(1e-4, -30, 30, "a larger"), (2.0**-31, 0, 30, "a larger"), (1.0, 0, 30, "a smaller")],
)
def test_a_rate_that_the_grid_cannot_hold_is_refused(
    lr: float, scale: int, unit: int, hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        multiplier_of(lr, scale, unit)


@settings(max_examples=200, deadline=None)
@given(st.integers(-200, 200), st.floats(1e-12, 1e3), st.integers(0, 48))
def test_a_scale_within_the_grid_always_has_a_multiplier(scale: int, lr: float, unit: int) -> None:
    found = within_grid(scale, lr, unit)
    assert 1 <= multiplier_of(lr, found, unit) <= 2**28
    assert within_grid(found, lr, unit) == found
    if found != scale:  # only where the wanted one has none, or half of one
        assert not 1 <= lr * 2.0 ** (scale + unit) < 2**27


def test_run_ids_are_known_and_differ() -> None:
    assert run_id_of(1) == hashlib.sha256(b"meadow/zeroth-order/1").hexdigest() != run_id_of(2)
