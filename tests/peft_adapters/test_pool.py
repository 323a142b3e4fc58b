"""The pool: its adapter is the sum of its directions, exactly; its sums know no order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import BASE, RUN, along, dense, factors, random_q, small_pool

from meadow.errors import FormatError, UpdateError
from meadow.peft_adapters.layout import Site
from meadow.peft_adapters.pool import (
    LARGEST,
    Pool,
    directions,
    drawn_directions,
    draws,
    fold,
)

SITES = (Site("block.one", 7, 5), Site("block.two", 4, 6))
STEPS = st.lists(st.tuples(st.integers(0, 8), st.integers(-(2**40), 2**40)), max_size=30)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_signs_lie_where_the_definition_says(rank: int) -> None:
    pool = small_pool(SITES, rank)
    for index in range(len(SITES)):
        u, v = factors(pool, index)
        assert np.array_equal(pool.left(index).T.numpy(), u)
        assert np.array_equal(pool.right(index).T.numpy(), v)


def test_the_seed_is_a_known_one() -> None:
    digest = hashlib.sha256(b"meadow/pool/v1\0" + b"\xaa" * 32 + b"\xbb" * 32).digest()
    assert small_pool(SITES).seed == int.from_bytes(digest[:8], "little")
    assert f"{small_pool(SITES).seed:016x}" == "aaa7d25addb9ef75"


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
@pytest.mark.parametrize("largest", [1, 2**10, 2**20])
def test_the_adapter_is_the_model_exactly(cores: Any, largest: int) -> None:
    """U Q below 2^24 loses nothing in float32, and scaling by two nothing either."""
    pool = small_pool(SITES, cores=cores)
    q = random_q(pool, 1, largest)
    tree, expected = pool.adapter(q, scaling=2.0), dense(pool, q)
    assert q.shape[0] == (2 if cores == "per_layer" else 1)
    for site in SITES:
        b, a = tree[f"{site.name}.lora_B"], tree[f"{site.name}.lora_A"]
        assert torch.equal(2.0 * b.double() @ a.double(), expected[site.name])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 2.0, 3.0, 0.7]))
def test_large_states_are_rounded_once(seed: int, scaling: float) -> None:
    """To the float32 next to the true value, which is computed in whole numbers."""
    pool = small_pool(SITES)
    q = random_q(pool, seed, LARGEST)
    tree = pool.adapter(q, scaling)
    for index, site in enumerate(SITES):
        whole = factors(pool, index)[0] @ q[0].numpy()
        found = tree[f"{site.name}.lora_B"]
        for exact, got in zip(whole.ravel().tolist(), found.flatten().tolist(), strict=True):
            true = Fraction(exact) / 2**pool.unit / Fraction(scaling)
            spacing = Fraction(float(np.spacing(np.float32(abs(got)))))
            assert abs(Fraction(got) - true) <= spacing * Fraction(501, 1000)


def test_one_number_moves_every_matrix_along_one_direction() -> None:
    pool = small_pool(SITES, unit=3)
    for k in range(pool.size):
        q = pool.zero()
        fold(q, np.array([k]), [5])
        expected = {name: 5 * change / 8 for name, change in along(pool, k).items()}
        found = dense(pool, q)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_known_state_id() -> None:
    pool = small_pool(SITES)
    q = torch.arange(9).view(1, 3, 3) - 4
    assert pool.state_id(q) == "8faf60ffd777f7197fed930662fb29aa2b87edd339108ae391c12a465cc9e076"
    specification = json.dumps(pool.to_json(), sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(b"meadow/state/v1\0" + len(specification).to_bytes(8, "little"))
    digest.update(specification + bytes.fromhex(BASE))
    digest.update(np.arange(-4, 5, dtype="<i8").tobytes())
    assert pool.state_id(q) == digest.hexdigest()


def test_a_state_id_depends_on_all_that_makes_the_model() -> None:
    pool, q = small_pool(SITES), torch.arange(9).view(1, 3, 3)
    other = q.clone()
    other[0, 2, 1] += 1
    changes: list[dict[str, Any]] = [
        {"run_id": 64 * "c"}, {"base_digest": 64 * "c"}, {"unit": 25}, {"cores": "per_layer"},
        {"sites": SITES[:1]}, {"sites": (Site("block.one", 7, 6), SITES[1])},
    ]  # fmt: skip
    pools = [pool, *(dataclasses.replace(pool, **change) for change in changes)]
    ids = {pool.state_id(other), pool.state_id(q.mT), *(p.state_id(q) for p in pools)}
    assert len(ids) == len(pools) + 2
    assert pool.state_id(q.mT.contiguous().mT) == pool.state_id(q)  # strides are not the state


@pytest.mark.parametrize("value", [LARGEST + 1, -LARGEST - 1, 2**62])
def test_an_overflow_is_refused(value: int) -> None:
    pool = small_pool(SITES)
    q = pool.zero()
    q[0, 1, 2] = value
    for use in (pool.adapter, pool.state_id):
        with pytest.raises(UpdateError, match="outgrown 32 bits"):
            use(q)
    q[0, 1, 2] = LARGEST
    assert pool.adapter(q) and pool.state_id(q)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.randoms(use_true_random=False), st.integers(1, 7))
def test_any_order_and_any_chunks_give_the_same_sum(
    steps: list[tuple[int, int]], dice: Any, chunk: int
) -> None:
    pool = small_pool(SITES, cores="per_layer")
    q, shuffled = pool.zero(), list(steps)
    dice.shuffle(shuffled)
    for start in range(0, len(shuffled), chunk):
        k, increments = zip(*shuffled[start : start + chunk], strict=True)
        fold(q, np.array(k), list(increments))
    expected = [sum(value for k, value in steps if k == at) for at in range(9)]
    assert all(core.flatten().tolist() == expected for core in q)


# --- directions --------------------------------------------------------------------------------


def test_known_directions() -> None:
    start = b"meadow/direction/v1\0" + b"\xaa" * 32 + (3).to_bytes(4, "little") + b"ada"
    digests = [hashlib.sha256(start + step.to_bytes(8, "little")).digest() for step in (5, 6, 7)]
    expected = [int.from_bytes(digest[:8], "little") % 4096 for digest in digests]
    assert directions(RUN, b"ada", 5, 3, 4096).tolist() == expected == [3344, 3326, 1332]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 20), st.integers(0, 20))
def test_a_walk_may_be_cut_anywhere(first: int, one: int, two: int) -> None:
    whole = directions(RUN, b"ada", first, one + two, 9).tolist()
    parts = [*directions(RUN, b"ada", first, one, 9), *directions(RUN, b"ada", first + one, two, 9)]
    assert whole == parts and all(0 <= k < 9 for k in whole)


def test_participants_runs_and_labels_have_directions_of_their_own() -> None:
    found = [
        draws(b"a", RUN, b"ada", 0, 8), draws(b"b", RUN, b"ada", 0, 8),
        draws(b"a", BASE, b"ada", 0, 8), draws(b"a", RUN, b"bob", 0, 8),
    ]  # fmt: skip
    assert len({tuple(numbers) for numbers in found}) == 4


def test_directions_are_drawn_evenly() -> None:
    """Chi squared with 15 degrees of freedom: 37.7 is passed once in a thousand."""
    counts = np.bincount(directions(RUN, b"ada", 0, 4000, 16), minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 37.7


def test_directions_are_drawn_in_proportion_to_their_weights() -> None:
    weights = np.array([0, 1, 3, 0, 4], np.int64)
    k = drawn_directions(RUN, b"ada", 0, 4000, weights)
    found = draws(b"meadow/direction/v1\0", RUN, b"ada", 0, 4000)
    table = [1, 2, 2, 2, 4, 4, 4, 4]
    assert k.tolist() == [table[value % 8] for value in found]
    assert np.bincount(k, minlength=5)[[0, 3]].tolist() == [0, 0]
    assert np.abs(np.bincount(k, minlength=5)[[1, 2, 4]] - [500, 1500, 2000]).max() < 120


# --- as JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
def test_a_pool_comes_back(cores: Any) -> None:
    pool = small_pool(SITES, cores=cores, unit=30)
    back = Pool.from_json(json.loads(json.dumps(pool.to_json())))
    assert back == pool and back.seed == pool.seed
    assert back.specification() == pool.specification()


BAD: list[dict[str, Any]] = [
    {"format": 2}, {"format": None}, {"format": "x" * 999}, {"run_id": "abc"},
    {"run_id": 63 * "a", "base_digest": 65 * "b"}, {"run_id": 64 * "A"}, {"run_id": 7},
    {"base_digest": 64 * "g"}, {"base_digest": 62 * "b" + "  "}, {"rank": 0}, {"rank": -3},
    {"rank": 2**20}, {"rank": "3"}, {"rank": None}, {"rank": 2.5}, {"rank": float("inf")},
    {"unit": -1}, {"unit": 61}, {"cores": "both"}, {"cores": ["shared"]}, {"sites": []},
    {"sites": [["b", 2, 2], ["a", 2, 2]]}, {"sites": [["a", 2, 2], ["a", 2, 2]]},
    {"sites": [["a", 0, 2]]}, {"sites": [["a", 2, -2]]}, {"sites": [["a", 2]]},
    {"sites": [["a", 2**40, 2]]}, {"sites": [[3, 2, 2]]}, {"sites": 5}, {"surprise": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD, ids=lambda change: str(change)[:40])
def test_what_is_no_pool_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as refused:
        Pool.from_json({**small_pool(SITES).to_json(), **change})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@pytest.mark.parametrize("key", sorted(small_pool(SITES).to_json()))
def test_a_pool_that_lacks_a_field_is_refused(key: str) -> None:
    fields = small_pool(SITES).to_json()
    del fields[key]
    with pytest.raises(FormatError):
        Pool.from_json(fields)


def test_sites_are_sorted() -> None:
    with pytest.raises(ValueError, match="sorted by name"):
        small_pool(SITES[::-1])
