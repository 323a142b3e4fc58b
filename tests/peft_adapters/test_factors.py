"""Products are compared with dense float64 arithmetic; factors never are, they are not unique."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meadow.errors import AdapterError
from meadow.peft_adapters.factors import (
    ProductSum,
    Split,
    align,
    pad,
    refactor,
    relative_error,
    rotate,
    truncate,
    truncated_svd,
    uniform_init,
)

Client = tuple[Tensor, Tensor, float]
splits: list[Split] = ["balanced", "b"]
few = settings(max_examples=40, deadline=None)


def factor(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@st.composite
def cohorts(draw: st.DrawFn) -> list[Client]:
    """Clients of one layer: mixed ranks, uneven weights, some factors rank-deficient or zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    clients = []
    for _ in range(draw(st.integers(1, 6))):
        rank = draw(st.integers(1, min(rows, columns)))
        B, A = factor(generator, rows, rank), factor(generator, rank, columns)
        match draw(st.sampled_from(["full", "full", "repeated", "zero"])):
            case "repeated":
                A = A[:1].repeat(rank, 1)
            case "zero":
                B = torch.zeros_like(B)
        clients.append((B, A, draw(st.floats(0.01, 10))))
    return clients


def dense(clients: list[Client]) -> Tensor:
    return torch.stack([weight * B @ A for B, A, weight in clients]).sum(0)


def summed(clients: list[Client], width: int = 512) -> ProductSum:
    B, A, _ = clients[0]
    total = ProductSum(B.shape[0], A.shape[1], width)
    for B, A, weight in clients:
        total.add(B, A, weight)
    return total


def size(clients: list[Client]) -> float:
    """The scale against which rounding is judged."""
    return sum(weight * float(B.norm() * A.norm()) for B, A, weight in clients) + 1e-300


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = u[:, :rank] * s[:rank] @ vt[:rank]
    return product


def orthonormal(rows: Tensor) -> bool:
    identity = torch.eye(rows.shape[0], dtype=rows.dtype)
    return torch.allclose(rows @ rows.T, identity, atol=1e-12)


# --- sums and best approximations ----------------------------------------------------------------


@few
@given(cohorts(), st.data())
def test_refactored_sum_is_as_good_as_the_dense_svd(
    clients: list[Client], data: st.DataObject
) -> None:
    target = dense(clients)
    rank = data.draw(st.integers(1, min(target.shape)))
    split = data.draw(st.sampled_from(splits))
    B, A = refactor(*summed(clients).factors(), rank, split=split)
    reference = best(target, rank)
    # Where singular values tie, the best product is not unique: then only the residual is.
    residual = float((target - B @ A).norm())
    assert residual == pytest.approx(float((target - reference).norm()), abs=1e-12 * size(clients))
    s = torch.linalg.svdvals(target)
    if rank == len(s) or s[rank - 1] - s[rank] > 1e-3 * s[0]:
        assert torch.allclose(B @ A, reference, atol=1e-10 * size(clients))


@few
@given(cohorts())
def test_product_svd_is_never_worse_than_averaging_the_factors(clients: list[Client]) -> None:
    rank = max(A.shape[0] for _, A, _ in clients)
    whole = sum(weight for *_, weight in clients)
    mean = [(B, A, weight / whole) for B, A, weight in clients]
    grown = [(zeros(B, rank, 1), zeros(A, rank, 0), weight) for B, A, weight in mean]
    naive_b = torch.stack([weight * B for B, _, weight in grown]).sum(0)
    naive_a = torch.stack([weight * A for _, A, weight in grown]).sum(0)
    exact = summed(mean).factors()
    naive = relative_error(exact, (naive_b, naive_a))
    assert relative_error(exact, refactor(*exact, rank)) <= naive + 1e-12


def zeros(tensor: Tensor, rank: int, axis: int) -> Tensor:
    missing = rank - tensor.shape[axis]
    return torch.nn.functional.pad(tensor, (0, missing) if axis == 1 else (0, 0, 0, missing))


@few
@given(cohorts(), st.randoms(use_true_random=False))
def test_order_of_clients_does_not_matter(clients: list[Client], random: Random) -> None:
    shuffled = list(clients)
    random.shuffle(shuffled)
    one, other = summed(clients, width=4), summed(shuffled, width=4)
    bound = math.sqrt(one.discarded) + math.sqrt(other.discarded)
    gap = _product(one) - _product(other)
    assert float(gap.norm()) <= bound + 1e-11 * size(clients)


def _product(total: ProductSum) -> Tensor:
    left, right = total.factors()
    product: Tensor = left @ right
    return product


@few
@given(cohorts(), st.integers(1, 30))
def test_streaming_error_is_within_what_was_discarded(clients: list[Client], width: int) -> None:
    total = summed(clients * 3, width)
    error = float((_product(total) - 3 * dense(clients)).norm())
    assert error <= math.sqrt(total.discarded) + 1e-11 * size(clients)
    if width >= min(dense(clients).shape):
        assert total.discarded == 0


def test_streaming_holds_at_most_twice_the_width_and_loses_nothing_of_low_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    span = factor(generator, 4, 50)  # all clients' rows lie in four directions
    clients = [(factor(generator, 60, 3), factor(generator, 3, 4) @ span, 0.1) for _ in range(40)]
    total = ProductSum(60, 50, width=8)
    for B, A, weight in clients:
        total.add(B, A, weight)
        assert total.factors()[0].shape[1] <= 16
    assert total.discarded == 0
    assert relative_error(total.factors(), (dense(clients), torch.eye(50))) < 1e-13


def test_one_recompression_discards_exactly_the_tail() -> None:
    generator = torch.Generator().manual_seed(1)
    B, A = factor(generator, 20, 9), factor(generator, 9, 20)
    total = ProductSum(20, 20, width=4)
    total.add(B, A)
    tail = torch.linalg.svdvals(B @ A)[4:]
    assert total.discarded == pytest.approx(float((tail**2).sum()))
    total.scale(-3.0)
    assert total.discarded == pytest.approx(9 * float((tail**2).sum()))
    assert torch.allclose(_product(total), -3 * best(B @ A, 4))


def test_weights_that_cancel_leave_exactly_null_directions() -> None:
    generator = torch.Generator().manual_seed(2)
    B, A = factor(generator, 30, 4).float(), factor(generator, 4, 20).float()
    total = ProductSum(30, 20)
    total.add(B, A, 0.7)
    total.add(1e6 * B, 1e-6 * A, -0.7)
    kept_b, kept_a = refactor(*total.factors(), 4)
    assert float((kept_b @ kept_a).norm()) < 1e-5 * float((B @ A).norm())
    total = ProductSum(30, 20)
    total.add(B, A, 0.7)
    total.add(B, A, -0.7)
    assert refactor(*total.factors(), 4)[0].count_nonzero() == 0


def test_an_empty_sum_is_zero() -> None:
    left, right = ProductSum(5, 7).factors()
    u, s, vt = truncated_svd(left, right, 3)
    assert (u.shape, s.shape, vt.shape) == ((5, 0), (0,), (0, 7))
    B, A = refactor(left, right, 3)
    assert B.count_nonzero() == 0 and orthonormal(A)
    assert relative_error((left, right), (B, A)) == 0


@few
@given(cohorts(), st.data())
def test_null_directions_are_orthonormal_in_a_and_zero_in_b(
    clients: list[Client], data: st.DataObject
) -> None:
    B_k, A_k, _ = clients[0]
    rank = data.draw(st.integers(1, min(B_k.shape[0], A_k.shape[1])))
    B, A = refactor(B_k, A_k, rank, split="b")
    assert orthonormal(A)  # all of them: with "b" every row is a unit vector
    B, A = refactor(B_k, A_k, rank)
    null = B.norm(dim=0) == 0
    assert int((~null).sum()) == min(rank, int(torch.linalg.matrix_rank(B_k @ A_k)))
    assert orthonormal(A[null])
    assert torch.allclose(A[null] @ A[~null].T, torch.zeros(()).double(), atol=1e-12)
    # balanced: each live direction has the same share in both factors
    assert torch.allclose(B.norm(dim=0)[~null], A.norm(dim=1)[~null])
    again = refactor(B_k, A_k, rank)
    assert torch.equal(again[0], B) and torch.equal(again[1], A)


def test_singular_triplets_are_those_of_the_dense_matrix() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = factor(generator, 40, 12), factor(generator, 12, 9)
    u, s, vt = truncated_svd(left, right, 5)
    assert torch.allclose(s, torch.linalg.svdvals(left @ right)[:5])
    assert orthonormal(u.T) and orthonormal(vt)
    assert torch.allclose(left @ right @ vt.T, u * s)


def test_results_have_the_inputs_dtype_and_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(4)
    B, A = factor(generator, 8, 3).float(), factor(generator, 3, 6).float()
    exact = refactor(B.double(), A.double(), 2)
    rounded = refactor(B, A, 2)
    for one, other in zip(rounded, exact, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other.float())
    assert ProductSum(8, 6).factors()[0].dtype == torch.float64


# --- rotations -----------------------------------------------------------------------------------


@st.composite
def two_adapters(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, columns, rank = (draw(st.integers(1, top)) for top in (12, 12, 5))
    shapes = [(rows, rank), (rank, columns)] * 2
    B, A, B_prev, A_prev = (factor(generator, *shape) for shape in shapes)
    return B, A, B_prev, A_prev, generator


def rotations(generator: torch.Generator, rank: int, *, proper: bool = False) -> list[Tensor]:
    """Random orthogonal matrices, of determinant 1 if `proper`."""
    found = [torch.linalg.qr(factor(generator, rank, rank)).Q for _ in range(20)]
    if proper:
        for matrix in found:
            matrix[:, 0] *= torch.linalg.det(matrix).sign()
    return found


@few
@given(two_adapters())
def test_no_rotation_is_nearer_than_the_aligned_factors(
    case: tuple[Tensor, Tensor, Tensor, Tensor, torch.Generator],
) -> None:
    B, A, B_prev, A_prev, generator = case

    def distance(B: Tensor, A: Tensor) -> float:
        return float((A - A_prev).square().sum() + (B - B_prev).square().sum())

    B_new, A_new = align(B, A, B_prev, A_prev)
    assert torch.allclose(B_new @ A_new, B @ A)
    for R in [*rotations(generator, A.shape[0]), torch.eye(A.shape[0]).double()]:
        assert distance(B_new, A_new) <= distance(B @ R, R.T @ A) + 1e-9


def test_align_undoes_any_rotation() -> None:
    generator = torch.Generator().manual_seed(5)
    B, A = factor(generator, 9, 4), factor(generator, 4, 7)
    for R in rotations(generator, 4):
        B_new, A_new = align(B @ R, R.T @ A, B, A)
        assert torch.allclose(B_new, B) and torch.allclose(A_new, A)


@few
@given(two_adapters(), st.booleans(), st.floats(0, 1))
def test_soft_rotation_keeps_the_product(
    case: tuple[Tensor, Tensor, Tensor, Tensor, torch.Generator], odd: bool, amount: float
) -> None:
    B, A, B_ref, A_ref, _ = case
    B_new, A_new = rotate(B, A, B_ref, A_ref, odd, amount)
    assert torch.allclose(B_new @ A_new, B @ A)
    unchanged = rotate(B, A, B_ref, A_ref, odd, 0.0)
    assert torch.allclose(unchanged[0], B) and torch.allclose(unchanged[1], A)


@few
@given(two_adapters(), st.booleans())
def test_hard_rotation_is_the_nearest_proper_one_on_the_matched_factor(
    case: tuple[Tensor, Tensor, Tensor, Tensor, torch.Generator], odd: bool
) -> None:
    B, A, B_ref, A_ref, generator = case

    def distance(B: Tensor, A: Tensor) -> float:
        return float((A - A_ref).norm() if odd else (B - B_ref).norm())

    hard = distance(*rotate(B, A, B_ref, A_ref, odd, 1.0))
    for R in rotations(generator, A.shape[0], proper=True):
        assert hard <= distance(B @ R, R.T @ A) + 1e-9


def test_soft_rotation_goes_half_the_angle() -> None:
    def turn(angle: float) -> Tensor:
        c, s = math.cos(angle), math.sin(angle)
        return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)

    B = A = torch.eye(2, dtype=torch.float64)
    for odd in (True, False):
        B_new, A_new = rotate(B, A, turn(0.8), turn(0.8).T, odd, 0.5)
        assert torch.allclose(B_new, turn(0.4)) and torch.allclose(A_new, turn(-0.4))


# --- sizes of a difference, other ranks ----------------------------------------------------------


@few
@given(two_adapters())
def test_relative_error_is_that_of_the_dense_products(
    case: tuple[Tensor, Tensor, Tensor, Tensor, torch.Generator],
) -> None:
    B, A, other_B, other_A, _ = case
    P, Q = B @ A, other_B @ other_A
    assert relative_error((B, A), (other_B, other_A)) == pytest.approx(
        float((P - Q).norm() / P.norm())
    )
    assert relative_error((B, A), (2 * B, A / 2)) < 1e-14


def test_relative_error_of_nothing() -> None:
    B, A = torch.zeros(3, 2), torch.ones(2, 4)
    assert relative_error((B, A), (B, A)) == 0
    assert relative_error((B, A), (B + 1, A)) == math.inf


@few
@given(cohorts(), st.data())
def test_padding_keeps_the_function_and_can_learn(
    clients: list[Client], data: st.DataObject
) -> None:
    B, A, _ = clients[0]
    rank = data.draw(st.integers(A.shape[0], min(B.shape[0], A.shape[1])))
    wide_B, wide_A = pad(B, A, rank)
    assert wide_A.shape[0] == wide_B.shape[1] == rank
    assert torch.allclose(wide_B @ wide_A, B @ A)
    new = wide_A[A.shape[0] :]
    assert orthonormal(new) and float((new @ A.T).abs().sum()) < 1e-9 * (1 + float(A.norm()))
    narrow = truncate(wide_B, wide_A, A.shape[0])
    assert torch.allclose(narrow[0] @ narrow[1], B @ A, atol=1e-10)


def test_impossible_shapes_are_refused() -> None:
    B, A = torch.ones(6, 2), torch.ones(2, 5)
    other = torch.ones(6, 3), torch.ones(3, 5)
    refused: list[Callable[[], object]] = [
        lambda: refactor(B, A, 6),
        lambda: refactor(B, A, 0),
        lambda: refactor(B, other[1], 2),
        lambda: pad(B, A, 1),
        lambda: pad(B, A, 6),
        lambda: truncate(B, A, 3),
        lambda: align(B, A, *other),
        lambda: rotate(B, A, torch.ones(7, 2), A, True, 0.5),
        lambda: ProductSum(6, 4).add(B, A),
        lambda: ProductSum(6, 5, width=0),
    ]
    for call in refused:
        with pytest.raises(AdapterError) as error:
            call()
        assert "\n" not in str(error.value)


# --- initial values ------------------------------------------------------------------------------


def philox4x64(key: int, count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al., SC 2011) in plain integers; the counter starts at 1."""
    mask, words = 2**64 - 1, []
    for counter in range(1, -(-count // 4) + 1):
        c, k = [counter, 0, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            one, two = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [(two >> 64) ^ c[1] ^ k[0], two & mask, (one >> 64) ^ c[3] ^ k[1], one & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += c
    return words[:count]


def test_initial_values_are_philox_in_plain_integers() -> None:
    digest = hashlib.sha256(b"meadow/init/v1\x007\x00model.layers.0.self_attn.q_proj").digest()
    words = philox4x64(int.from_bytes(digest[:16], "little"), 15)
    expected = [((word >> 11) / 2**52 - 1) * (1 / math.sqrt(5)) for word in words]
    values = uniform_init(7, "model.layers.0.self_attn.q_proj", (3, 5))
    assert torch.equal(values, torch.tensor(expected, dtype=torch.float64).float().reshape(3, 5))


def test_initial_values_known_answer() -> None:
    raw = uniform_init(2024, "model.layers.0.self_attn.q_proj", (4, 6)).numpy().astype("<f4")
    assert hashlib.sha256(raw.tobytes()).hexdigest()[:16] == "1fefa24785a84943"


def test_initial_values_are_those_of_peft_in_distribution() -> None:
    values = uniform_init(0, "layer", (64, 100))
    assert values.dtype == torch.float32 and values.shape == (64, 100)
    assert -0.1 <= float(values.min()) < -0.099 and 0.099 < float(values.max()) <= 0.1
    assert abs(float(values.mean())) < 0.003
    assert float(values.var()) == pytest.approx(0.01 / 3, rel=0.05)
    assert torch.equal(uniform_init(0, "layer", (8, 100)), values[:8])
    assert not torch.equal(uniform_init(1, "layer", (64, 100)), values)
    assert not torch.equal(uniform_init(0, "other", (64, 100)), values)
