"""Full-rank directions: sums that no order, chunk or thread count changes, against sums written
out; evaluation that leaves the base as it is; the best adapter against the definition."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meadow.errors import UpdateError
from meadow.peft_adapters.full_rank import LARGEST, FullRank, best_lora, export
from meadow.peft_adapters.full_rank_layers import FullRankLayers
from meadow.peft_adapters.layout import Site
from meadow.peft_adapters.pool import Pool

RUN, BASE = "11" * 32, "22" * 32
SITES = (Site("a", 5, 7), Site("b", 24, 40))
POOL = FullRank(RUN, BASE, SITES, count=1000, unit=20)

states = st.dictionaries(st.integers(0, 999), st.integers(-(2**15), 2**15), max_size=20)


def plain(index: int, integers: dict[int, int]) -> np.ndarray:
    """sum_k I_k z_k, one direction after the other, in int64."""
    site = SITES[index]
    total = np.zeros((site.rows, site.columns), np.int64)
    for k, value in integers.items():
        total += value * POOL.direction(index, k).numpy().astype(np.int64)
    return total


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's own integers, from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 2**32 - 1, a >> 32 ^ c[3] ^ k[1], a & 2**32 - 1]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_signs_are_the_documented_stream() -> None:
    """Part 2 + k of the pool's own seed, row by row."""
    digest = hashlib.sha256(b"meadow/pool/v1\0" + bytes.fromhex(RUN + BASE)).digest()
    key = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]
    z = POOL.direction(1, 17)
    for i, j in ((0, 0), (0, 39), (3, 9), (23, 39)):
        element = i * 40 + j
        word = element >> 5
        bits = philox([word >> 2, 0, 1, 2 + 17], key)[word & 3]
        assert z[i, j] == (-1 if bits >> (element & 31) & 1 else 1)


def test_directions_share_nothing_with_the_pool_of_the_same_run() -> None:
    pool = Pool(RUN, BASE, SITES, rank=24)
    assert POOL.seed == pool.seed
    for other in (pool.left(1), pool.right(1)):
        seen = POOL.direction(1, 0).flatten()[: other.numel()]
        assert not torch.equal(seen, other.flatten()[: len(seen)])


@given(states, st.sampled_from([1, 2, 3, 2048]))
@settings(max_examples=25, deadline=None)
def test_sums_are_exact_whatever_the_chunks_and_the_order(
    integers: dict[int, int], chunk: int
) -> None:
    directions = FullRank(RUN, BASE, SITES, count=1000, unit=20, chunk=chunk)
    shuffled = dict(reversed(integers.items()))
    for index in range(2):
        found = directions.change(index, shuffled)
        assert found.dtype == torch.int32
        assert np.array_equal(found.numpy(), plain(index, integers))


def test_rebuild_rounds_once_and_leaves_the_base() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    integers = {k: (k * 7919) % 60001 - 30000 for k in range(100)}
    exact = before.double().numpy() - plain(1, integers) * 2.0**-20
    assert np.array_equal(POOL.rebuild(1, weight, integers).numpy(), exact.astype(np.float32))
    half = POOL.rebuild(1, weight.bfloat16(), integers)
    assert half.dtype == torch.bfloat16
    assert torch.equal(weight, before)


def test_rebuild_is_the_same_on_any_number_of_threads() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    integers = {k: k - 500 for k in range(1000)}
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(POOL.rebuild(1, weight, integers))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_overflow_is_refused_and_its_border_is_exact() -> None:
    integers = {0: LARGEST - 5, 1: 5}
    assert np.array_equal(POOL.change(0, integers).numpy(), plain(0, integers))
    for broken in ({0: LARGEST, 1: -1}, {3: -LARGEST - 1}):
        with pytest.raises(UpdateError, match="32 bits"):
            POOL.change(0, broken)
        with pytest.raises(UpdateError, match="32 bits"):
            POOL.rebuild(0, torch.zeros(5, 7), broken)


@pytest.mark.parametrize("count", [0, 2**32 - 1])
def test_a_part_is_a_32_bit_word(count: int) -> None:
    with pytest.raises(ValueError, match="directions"):
        FullRank(RUN, BASE, SITES, count=count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_signs_in_one_batch_are_the_merged_models(dtype: torch.dtype) -> None:
    model, x = two_layers(dtype), torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    before = [p.clone() for p in model.parameters()]
    layers = FullRankLayers(model, FullRank(RUN, BASE, CHAIN, unit=10))
    layers.load({4: 3, 9: -2})
    layers.step(9, 5)
    with layers.attached(12, epsilon=0.25), torch.no_grad():
        found = model(x.to(dtype))
    for half, sign in ((slice(0, 3), 1), (slice(3, 6), -1)):
        merged = two_layers(torch.float32)
        for index, weight in enumerate(merged.parameters()):
            z = [layers.directions.direction(index, k).float() for k in (4, 9, 12)]
            weight.data = before[index].float() - (3 * z[0] + 3 * z[1]) / 2**10
            weight.data += sign * 0.25 * z[2]
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(
            found[half].float(), merged(x[half]).detach(), rtol=tolerance, atol=10 * tolerance
        )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        assert torch.equal(model(x.to(dtype)), two_layers(dtype)(x.to(dtype))), "detached"


def test_steps_one_by_one_are_the_state_loaded_whole() -> None:
    layers, other = (FullRankLayers(two_layers(torch.float32), CHAINED) for _ in range(2))
    for k, increment in ((5, 3), (5, -4), (0, 7)):
        layers.step(k, increment)
    other.load(layers.state)
    assert layers.state == {5: -1, 0: 7}
    assert all(torch.equal(layers.offset(i), other.offset(i)) for i in range(2))
    with pytest.raises(UpdateError):
        layers.step(1, LARGEST)
    assert all(torch.equal(layers.offset(i), other.offset(i)) for i in range(2)), "untouched"


def test_a_batch_without_two_halves_is_refused() -> None:
    layers = FullRankLayers(two_layers(torch.float32), CHAINED)
    with layers.attached(0, 0.5), pytest.raises(ValueError, match="halves"):
        layers.model(torch.zeros(3, 7))


@given(st.integers(1, 5), st.floats(0.1, 4))
@settings(max_examples=20, deadline=None)
def test_the_best_adapter_and_its_residual(rank: int, scaling: float) -> None:
    change = torch.randn(5, 7, generator=torch.Generator().manual_seed(rank)).double()
    a, b, residual = best_lora(change, rank, scaling)
    assert a.shape == (rank, 7) and b.shape == (5, rank)
    left = (change - scaling * b.double() @ a.double()).norm() / change.norm()
    tail = np.linalg.svd(change.numpy(), compute_uv=False)[rank:]  # Eckart and Young
    assert residual == pytest.approx(float(left), abs=1e-6)
    assert residual == pytest.approx(np.linalg.norm(tail) / np.linalg.norm(change), abs=1e-9)


def test_an_exported_adapter_of_full_rank_is_the_state() -> None:
    integers = {3: 500, 8: -200}
    tree, residuals = export(FullRank(RUN, BASE, SITES[:1], unit=10), integers, 5, scaling=2.0)
    product = 2.0 * tree["a.lora_B"] @ tree["a.lora_A"]
    assert np.allclose(product.numpy(), -plain(0, integers) / 2**10, atol=1e-6)
    assert residuals == {"a": pytest.approx(0, abs=1e-7)}
    assert best_lora(torch.zeros(3, 4), 2)[2] == 0.0


CHAIN = (Site("0", 7, 7), Site("1", 4, 7))
CHAINED = FullRank(RUN, BASE, CHAIN, unit=10)


def two_layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 7, bias=False), nn.Linear(7, 4, bias=False))
    return model.requires_grad_(False).to(dtype)
