"""Integers that combine bytes, against numpy's floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.strategies.robust_bytes import FRACTION, Rule, combine, fixed_weights

ONE = 2**FRACTION
TABLES = st.integers(1, 12).flatmap(
    lambda clients: st.lists(
        st.lists(st.integers(-127, 127), min_size=clients, max_size=clients),
        min_size=1, max_size=6,
    )
)  # fmt: skip


def reference(rule: Rule, table: np.ndarray[Any, Any], weights: list[float]) -> Any:
    """What the rule means, in floats: bytes (clients, steps) to (steps,)."""
    clients = len(table)
    if rule == "mean":
        return np.average(table, axis=0, weights=weights)
    if rule == "median":
        return np.median(table, axis=0)
    if rule == "trimmed":
        cut = min(max(1, clients // 5), (clients - 1) // 2)
        return np.sort(table, axis=0)[cut : clients - cut].mean(0)
    lengths = np.sqrt((table.astype(float) ** 2).sum(1))
    bound = np.sort(lengths)[(clients - 1) // 2]
    return (table * np.minimum(1, bound / np.maximum(lengths, 1e-9))[:, None]).mean(0)


@settings(max_examples=150, deadline=None)
@given(TABLES, st.sampled_from(["mean", "median", "trimmed", "clipped"]), st.data())
def test_rules_are_what_they_are_called(rows: list[list[int]], rule: Rule, data: Any) -> None:
    """Lengths are rounded to whole numbers, of which a short vector has few: hence `clipped`'s
    wider bound; the other rules are right to a thousandth of a byte."""
    table = np.array(rows, np.int64).T
    weights = data.draw(st.lists(st.integers(1, 500), min_size=len(table), max_size=len(table)))
    found = combine(rule, table, [float(weight) for weight in weights])
    assert found.dtype == np.int64 and found.shape == (table.shape[1],)
    expected = reference(rule, table, weights)
    lengths = np.sqrt((table.astype(float) ** 2).sum(1))
    bound = (
        1e-3
        if rule != "clipped"
        else 1e-3 + 2 * float((np.abs(table) / np.maximum(1, lengths)[:, None]).max())
    )
    assert np.abs(found / ONE - expected).max() <= bound


@settings(max_examples=60, deadline=None)
@given(TABLES, st.sampled_from(["mean", "median", "trimmed", "clipped"]), st.randoms())
def test_the_order_of_the_clients_does_not_matter(
    rows: list[list[int]], rule: Rule, dice: Any
) -> None:
    table = np.array(rows, np.int64).T
    weights = [0.1 * (at + 1) for at in range(len(table))]
    order = list(range(len(table)))
    dice.shuffle(order)
    shuffled = combine(rule, table[order], [weights[at] for at in order])
    assert combine(rule, table, weights).tolist() == shuffled.tolist()


@pytest.mark.parametrize("rule", ["median", "trimmed", "clipped"])
def test_one_liar_among_three_does_not_decide(rule: Rule) -> None:
    honest = np.array([[10, -20, 30], [12, -18, 33]])
    for lie in ([127, 127, 127], [-127, 127, -127]):
        found = combine(rule, np.array([*honest, lie]), [1.0, 1.0, 1e9]) / ONE
        if rule == "clipped":  # its length is no more than an honest one's
            assert np.linalg.norm(found - honest.sum(0) / 3) <= np.linalg.norm(honest[1]) / 3 + 1
        else:
            assert (found >= np.minimum(honest.min(0), 33)).all()
            assert (found <= honest.max(0)).all()


def test_clipping_long_vectors_is_exact_to_a_hundredth() -> None:
    dice = np.random.default_rng(1)
    drawn = dice.normal(size=(9, 200)) * [[4 * n] for n in range(1, 10)]
    table = np.clip(drawn, -127, 127).round().astype(np.int64)
    found = combine("clipped", table, [1.0] * 9) / ONE
    assert np.abs(found - reference("clipped", table, [])).max() < 0.2
    assert np.abs(found - table.mean(0)).max() > 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
def test_weights_are_shares(weights: list[int]) -> None:
    found = fixed_weights([float(weight) for weight in weights])
    total = sum(weights)
    shares = [w / total for w in weights] if total else [1 / len(weights)] * len(weights)
    assert np.abs(found - np.array(shares) * ONE).max() <= 0.5 + 1e-6


def test_a_thousand_equal_clients_weigh_as_much_as_they_should() -> None:
    found = combine("mean", np.full((1000, 2), 100), [7.0] * 1000)
    assert np.abs(found / ONE - 100).max() < 0.1
