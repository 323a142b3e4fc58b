"""The streaming sum of products against dense matrices."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SITES, adapter, apart, dense, mean_product

from meadow.strategies.base import Mean, Update
from meadow.strategies.factor_sum import FactorSum, add_products

cohorts = st.lists(
    st.tuples(st.integers(0, 99), st.integers(1, 4), st.floats(0.01, 100.0)), min_size=1, max_size=9
)


def folded(updates: list[Update], width: int = 64, means: bool = False) -> Update:
    reducer = FactorSum(width, means)
    for update in updates:
        reducer.fold(update)
    return reducer.total()


@settings(max_examples=40, deadline=None)
@given(cohorts)
def test_the_product_is_the_dense_mean_of_products(cohort: list[tuple[int, int, float]]) -> None:
    """With mixed ranks, and with more columns than the matrices have."""
    updates = [Update(adapter(seed, rank), weight) for seed, rank, weight in cohort]
    total = folded(updates)
    assert apart(dense(FactorSum.product(total)), mean_product(updates)) < 1e-12
    assert total.count == len(cohort) and total.weight == pytest.approx(sum(w for *_, w in cohort))
    assert total.notes["discarded"] < 1e-10


def test_means_of_the_factors_come_beside_the_product() -> None:
    updates = [Update(adapter(seed), weight) for seed, weight in ((1, 2.0), (2, 5.0))]
    mean = Mean()
    for update in updates:
        mean.fold(update)
    total = folded(updates, means=True)
    assert all(total.tensors[n].equal(t) for n, t in mean.total().tensors.items())
    assert not any(name.startswith(SITES[0].name) for name in folded(updates).tensors)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_what_a_narrow_sum_loses_is_within_its_note(width: int) -> None:
    updates = [Update(adapter(seed), 1.0 + seed) for seed in range(8)]
    total = folded(updates, width)
    exact, got = mean_product(updates), dense(FactorSum.product(total))
    error = sum(float((exact[name] - got[name]).square().sum()) for name in exact) ** 0.5
    assert 0.01 < error <= total.notes["discarded"] * (1 + 1e-9)


def test_nothing_that_weighs_gives_nothing() -> None:
    total = folded([Update(adapter(1), 0.0)])
    assert (total.tensors, total.weight, total.count) == ({}, 0.0, 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 3), st.floats(-2, 2)), min_size=1,
                max_size=4))  # fmt: skip
def test_added_products_are_the_dense_sum(parts: list[tuple[int, int, float]]) -> None:
    trees = [(adapter(seed, rank), weight) for seed, rank, weight in parts]
    tree, lost = add_products(trees, 64)
    shares = [(dense(tree), weight) for tree, weight in trees]
    exact = {s.name: sum(w * part[s.name] for part, w in shares) for s in SITES}
    assert apart(dense(tree), exact) < 3e-5  # type: ignore[arg-type]  # factors are float32
    assert lost < 1e-6


def test_added_products_that_cancel_leave_one_null_direction() -> None:
    tree, lost = add_products([(adapter(1), 1.0), (adapter(1), -1.0)], 64)
    assert apart(dense(tree), dense()) == 0 and lost < 1e-12
    assert {tuple(tensor.shape) for tensor in tree.values()} == {(7, 1), (1, 5), (4, 1), (1, 6)}


def test_a_cut_sum_is_the_best_of_its_rank_and_says_what_it_lost() -> None:
    parts = [(adapter(1), 1.0), (adapter(2), 0.5)]
    tree, lost = add_products(parts, 2)
    exact = dense(*(adapter(seed) for seed in (1,)))
    exact = {name: exact[name] + 0.5 * dense(adapter(2))[name] for name in exact}
    best = sum(float(m.svd().S[2:].square().sum()) for m in exact.values()) ** 0.5
    error = sum(float((m - dense(tree)[n]).square().sum()) for n, m in exact.items()) ** 0.5
    assert error == pytest.approx(best, rel=1e-5) and lost == pytest.approx(best, rel=1e-5)
    assert {tensor.shape[0] for n, tensor in tree.items() if n.endswith("lora_A")} == {2}


def test_a_part_may_lack_a_layer() -> None:
    one = {n: t for n, t in adapter(1).items() if n.startswith("block.one")}
    tree, _ = add_products([({}, 1.0), (one, 1.0), (adapter(2), 1.0)], 64)
    assert apart(dense(tree), dense(one, adapter(2))) < 1e-5
