"""Sums, best approximations and rotations of low-rank products, without the matrix they stand for.

A product is a factor pair: `left` (out, c) times `right` (c, in).  A LoRA adapter is the pair
B (out, r), A (r, in) of one adapted layer.  Everything here works through QR of the thin factors
and a small core, in float64 and in O((out + in) c^2); results have the dtype of the first
argument, rounded once.  Nothing draws random numbers.

Singular values below the noise of the arithmetic count as zero.  Their directions are *null*: they
keep an orthonormal row in A and get a zero column in B, so that the product is unchanged and a
gradient can still reach them (with both factors zero it never would).
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterError

Pair = tuple[Tensor, Tensor]
Split = Literal["balanced", "b"]

_NOISE = 8 * torch.finfo(torch.float64).eps


class ProductSum:
    """The weighted sum of B_k A_k, folded one by one and held as one factor pair.

    A recompression keeps at most `width` directions (never more than the matrix has); up to twice
    as many columns are held between two of them, so that its cost is shared by many additions.
    `discarded` bounds the squared Frobenius norm of the error that dropping directions beyond
    `width` has caused; it is 0 while nothing but rounding noise was dropped.
    """

    def __init__(self, rows: int, columns: int, width: int = 512) -> None:
        """An empty sum of shape (rows, columns), that is (out, in)."""
        if width < 1:
            raise AdapterError(f"a product sum of width {width} holds nothing", "use at least 1")
        self._left = torch.zeros(rows, 0, dtype=torch.float64)
        self._right = torch.zeros(0, columns, dtype=torch.float64)
        self._keep = min(width, rows, columns)
        self.discarded = 0.0

    def add(self, B: Tensor, A: Tensor, weight: float = 1.0) -> None:
        """Add weight * B @ A; the weight may be negative.

        Raises AdapterError if the shapes do not fit each other or the sum.
        """
        _check_pair(B, A)
        if (B.shape[0], A.shape[1]) != (self._left.shape[0], self._right.shape[1]):
            here = (self._left.shape[0], self._right.shape[1])
            raise AdapterError(f"product of shape {(B.shape[0], A.shape[1])} in a sum of {here}")
        self._left = torch.cat([self._left, weight * B.double()], dim=1)
        self._right = torch.cat([self._right, A.double()], dim=0)
        if self._left.shape[1] > 2 * self._keep:
            self._recompress()

    def scale(self, factor: float) -> None:
        """Multiply the whole sum by `factor`."""
        self._left = self._left * factor
        self.discarded *= factor**2

    def factors(self) -> Pair:
        """`left` (out, c) and `right` (c, in), float64, c at most twice the width."""
        return self._left, self._right

    def _recompress(self) -> None:
        u, s, vt = truncated_svd(self._left, self._right, self._left.shape[1])
        dropped = float(s[self._keep :].norm())
        # Errors of successive recompressions need not be orthogonal: norms add, squares do not.
        self.discarded = (math.sqrt(self.discarded) + dropped) ** 2
        kept = min(int(s.count_nonzero()), self._keep)
        root = s[:kept].sqrt()
        self._left, self._right = u[:, :kept] * root, root[:, None] * vt[:kept]


def truncated_svd(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of left @ right: U (out, k), S (k,), Vt (k, in).

    k = min(rank, c, out, in).  Columns of U and rows of Vt are orthonormal, those of zero singular
    values too.  Values below the rounding noise of the product, which is judged by the norms of
    its c terms and so does not depend on how they are split, are returned as exactly 0.
    """
    _check_pair(left, right)
    L, R = left.double(), right.double()
    q_left, r_left = torch.linalg.qr(L)
    q_right, r_right = torch.linalg.qr(R.T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    noise = _NOISE * torch.dot(L.norm(dim=0), R.norm(dim=1))
    s = torch.where(s > noise, s, 0.0)
    U, S, Vt = q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T
    return _cast(U, left), _cast(S, left), _cast(Vt, left)


def refactor(left: Tensor, right: Tensor, rank: int, *, split: Split = "balanced") -> Pair:
    """The best rank-`rank` factors B (out, rank), A (rank, in) of left @ right (Eckart-Young).

    `split`: "balanced" shares S as B = U sqrt(S), A = sqrt(S) Vt; "b" puts all of it in B, which
    leaves the rows of A orthonormal (FlexLoRA, arXiv 2402.11505).  Null directions, and those
    that fewer than `rank` columns leave open, have an orthonormal row in A and zeros in B.
    Raises AdapterError if `rank` is not between 1 and min(out, in).
    """
    _check_rank(rank, left.shape[0], right.shape[1])
    u, s, vt = truncated_svd(left.double(), right.double(), rank)
    s = torch.nn.functional.pad(s, (0, rank - s.shape[0]))
    u = torch.nn.functional.pad(u, (0, rank - u.shape[1]))
    in_b = s if split == "b" else s.sqrt()
    in_a = torch.where(s > 0, s / torch.where(s > 0, in_b, 1.0), 1.0)
    return _cast(u * in_b, left), _cast(in_a[:, None] * _complete(vt, rank), left)


def align(B: Tensor, A: Tensor, B_prev: Tensor, A_prev: Tensor) -> Pair:
    """B R and R^T A, for the R in O(r) that brings both factors nearest to the previous ones.

    R minimises |R^T A - A_prev|^2 + |B R - B_prev|^2 (orthogonal Procrustes); the product is
    unchanged.  Momentum and kept optimiser state only make sense in coordinates that are aligned.
    """
    _check_same(B, A, B_prev, A_prev)
    match = A.double() @ A_prev.double().T + B.double().T @ B_prev.double()
    return _turn(B, A, _nearest_orthogonal(match))


def rotate(B: Tensor, A: Tensor, B_ref: Tensor, A_ref: Tensor, odd: bool, amount: float) -> Pair:
    """FedRot-LoRA's soft rotation of a client's factors to the global ones (arXiv 2602.23638).

    The hard rotation R in SO(r) minimises |R^T A - A_ref| in odd rounds and |B R - B_ref| in even
    ones; what is applied is the polar factor of (1 - amount) I + amount R.  The product is
    unchanged; amount 0 changes nothing, amount 1 applies R itself.
    """
    _check_same(B, A, B_ref, A_ref)
    match = A.double() @ A_ref.double().T if odd else B.double().T @ B_ref.double()
    hard = _nearest_orthogonal(match, proper=True)
    soft = torch.lerp(torch.eye(hard.shape[0], dtype=hard.dtype), hard, amount)
    return _turn(B, A, _nearest_orthogonal(soft))


def relative_error(product: Pair, approx: Pair) -> float:
    """|P - Q|_F / |P|_F of two factor pairs; 0 if both products are 0, inf if only P is."""
    (left, right), (other_left, other_right) = product, approx
    difference = _norm(
        torch.cat([left.double(), -other_left.double()], dim=1),
        torch.cat([right.double(), other_right.double()], dim=0),
    )
    if difference == 0:
        return 0.0
    norm = _norm(left.double(), right.double())
    return difference / norm if norm > 0 else math.inf


def pad(B: Tensor, A: Tensor, rank: int) -> Pair:
    """The same product at a larger rank: zero columns in B, rows in A that can still learn.

    The new rows of A are orthonormal and orthogonal to the old ones, so that training starts at
    the same function and no direction is dead.  (On disk, where nothing is learned any more,
    `adapter_writer` pads both factors with zeros.)
    Raises AdapterError if `rank` is below the present one or above min(out, in).
    """
    _check_pair(B, A)
    if rank < A.shape[0]:
        raise AdapterError(f"cannot pad rank {A.shape[0]} to {rank}", "truncate makes it smaller")
    _check_rank(rank, B.shape[0], A.shape[1])
    basis = torch.linalg.qr(A.double().T).Q.T
    new = _complete(basis, rank)[A.shape[0] :]
    wide = torch.nn.functional.pad(B, (0, rank - B.shape[1]))
    return wide, torch.cat([A, _cast(new, A)])


def truncate(B: Tensor, A: Tensor, rank: int) -> Pair:
    """The best factors of B @ A at a rank no larger than the present one, balanced.

    Raises AdapterError if `rank` is above the present one.
    """
    _check_pair(B, A)
    if rank > A.shape[0]:
        raise AdapterError(f"cannot truncate rank {A.shape[0]} to {rank}", "pad makes it larger")
    return refactor(B, A, rank)


def uniform_init(seed: int, name: str, shape: tuple[int, int]) -> Tensor:
    """LoRA's initial A (r, in), float32: uniform in [-1/sqrt(in), 1/sqrt(in)), as PEFT draws it.

    PEFT's `kaiming_uniform_(a=sqrt(5))`, but with the same bits everywhere: element i, in row-major
    order, is the top 53 bits of the i-th word of Philox4x64-10 under the first 16 bytes of
    SHA-256("meadow/init/v1" NUL seed NUL name), scaled in float64 and rounded once.  A smaller
    rank's rows are the first rows of a larger one's.
    """
    digest = hashlib.sha256(f"meadow/init/v1\0{seed}\0{name}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(math.prod(shape))
    signed = (words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0  # exact, in [-1, 1)
    values = signed * (1.0 / math.sqrt(shape[1]))
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def _cast(result: Tensor, like: Tensor) -> Tensor:
    return result.to(like.dtype)


def _turn(B: Tensor, A: Tensor, R: Tensor) -> Pair:
    """B R and R^T A: another factorisation of the same product."""
    return _cast(B.double() @ R, B), _cast(R.T @ A.double(), A)


def _nearest_orthogonal(matrix: Tensor, *, proper: bool = False) -> Tensor:
    """The R in O(r), or in SO(r) if `proper`, that maximises tr(R^T matrix): its polar factor."""
    u, _, vt = torch.linalg.svd(matrix)
    if proper and torch.linalg.det(u @ vt) < 0:
        u = torch.cat([u[:, :-1], -u[:, -1:]], dim=1)  # the direction that costs least
    nearest: Tensor = u @ vt
    return nearest


def _complete(rows: Tensor, count: int) -> Tensor:
    """`count` orthonormal rows, the first of which are the given orthonormal `rows` (k, n).

    The rest is spanned by fixed pseudo-random rows; Householder QR makes them orthonormal even
    where they happen to depend on the given ones.
    """
    missing = count - rows.shape[0]
    if missing <= 0:
        return rows
    fresh = uniform_init(0, "null directions", (missing, rows.shape[1])).double()
    basis = torch.linalg.qr(torch.cat([rows, fresh]).T).Q.T
    return torch.cat([rows, basis[rows.shape[0] :]])


def _norm(left: Tensor, right: Tensor) -> float:
    """|left @ right|_F, from the triangular factors of both."""
    r_left = torch.linalg.qr(left, mode="r").R
    r_right = torch.linalg.qr(right.T, mode="r").R
    return float((r_left @ r_right.T).norm())


def _check_pair(left: Tensor, right: Tensor) -> None:
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
        hint = "expected (out, r) and (r, in)"
        raise AdapterError(f"factors of shapes {shapes} have no product", hint)


def _check_same(B: Tensor, A: Tensor, other_B: Tensor, other_A: Tensor) -> None:
    _check_pair(B, A)
    if B.shape != other_B.shape or A.shape != other_A.shape:
        raise AdapterError(
            f"rank {A.shape[0]} cannot be rotated to factors of rank {other_A.shape[0]}"
            if B.shape[0] == other_B.shape[0] and A.shape[1] == other_A.shape[1]
            else "factors of different layers cannot be rotated to each other"
        )


def _check_rank(rank: int, rows: int, columns: int) -> None:
    if not 1 <= rank <= min(rows, columns):
        raise AdapterError(
            f"rank {rank} does not fit a layer of {rows} x {columns}",
            f"use 1 to {min(rows, columns)}",
        )
