"""The streaming mean against numpy, and that it forgets what it has folded."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.strategies.base import Mean, Update

weights = st.floats(0.0, 1e6, allow_subnormal=False)
values = st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False)
rows = st.tuples(weights, st.lists(values, min_size=4, max_size=4))


def mean_of(cohort: list[tuple[float, list[float]]]) -> Update:
    mean = Mean()
    for weight, numbers in cohort:
        mean.fold(Update({"w": torch.tensor(numbers).reshape(2, 2)}, weight))
    return mean.total()


@settings(max_examples=150, deadline=None)
@given(st.lists(rows, min_size=1, max_size=6))
def test_mean_is_numpys_weighted_average(cohort: list[tuple[float, list[float]]]) -> None:
    total = mean_of(cohort)
    scale = [weight for weight, _ in cohort]
    assert total.count == len(cohort) and total.weight == pytest.approx(sum(scale))
    if sum(scale) == 0:
        assert total.tensors == {}
        return
    table = np.array([numbers for _, numbers in cohort], dtype=np.float32).astype(np.float64)
    expected = np.average(table, axis=0, weights=scale).reshape(2, 2)
    largest = float(np.abs(table).max())
    np.testing.assert_allclose(
        total.tensors["w"].numpy(), expected, rtol=2**-23, atol=largest * 1e-14 + 1e-45
    )
    assert total.tensors["w"].dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**6), st.lists(values, min_size=4, max_size=4))
def test_the_mean_of_one_is_itself_to_the_bit(weight: int, numbers: list[float]) -> None:
    total = mean_of([(float(weight), numbers)])
    assert torch.equal(total.tensors["w"], torch.tensor(numbers).reshape(2, 2))


def test_many_small_parts_are_summed_in_float64() -> None:
    """In float32 a sum of 2^24 stops growing by ones."""
    mean = Mean()
    mean.fold(Update({"w": torch.tensor([float(2**24)])}))
    for _ in range(64):
        mean.fold(Update({"w": torch.tensor([1.0])}))
    assert float(mean.total().tensors["w"]) == pytest.approx((2**24 + 64) / 65, rel=1e-7)


def test_a_weight_of_zero_counts_but_does_not_weigh() -> None:
    total = mean_of([(3.0, [1.0, 2.0, 3.0, 4.0]), (0.0, [9.0, 9.0, 9.0, 9.0])])
    assert total.count == 2 and total.weight == 3.0
    assert total.tensors["w"].flatten().tolist() == [1.0, 2.0, 3.0, 4.0]


def test_half_precision_is_summed_wide() -> None:
    mean = Mean()
    for _ in range(3):
        mean.fold(Update({"w": torch.tensor([1.0, 2.0]).bfloat16()}))
    assert mean.total().tensors["w"].dtype == torch.float32


def test_folded_updates_are_not_kept() -> None:
    mean, seen = Mean(), []
    for number in range(5):
        tensor = torch.full((3,), float(number))
        mean.fold(Update({"w": tensor}))
        seen.append(weakref.ref(tensor))
    del tensor
    gc.collect()
    assert [reference() for reference in seen] == [None] * 5
