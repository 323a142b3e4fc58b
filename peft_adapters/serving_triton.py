"""Products with many adapters on a CUDA device: two Triton kernels over a group's slots.

`shrink` computes x A^T by each token's adapter, and `expand` adds its product with B^T to y: the
two steps of Punica's SGMV (Chen et al. 2023, arXiv:2310.18547).  Tokens are found through an index,
slot by slot, wherever they lie in the batch, and a program serves a block of one slot's tokens:
where an adapter has no more of them than a block, as in decoding, its numbers are read once a step.

Nothing is added atomically.  `shrink` splits its sums into parts by the layer's width alone, and
`expand` adds these up in order: the same batch gives the same bits each time.

This module needs Triton, which comes with torch's CUDA builds; `ServingSlots` imports it where
there is a CUDA device and Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .slot_tokens import Tokens

_RANKS = (16, 64)  # the least and most ranks of a block
_ROWS = 128  # outputs of a block
_BYTES = 256  # of an input row, in a block
_PART, _PARTS = 512, 8  # the least inputs that a part of a sum has, and the most parts


@triton.jit  # type: ignore[untyped-decorator]
def _dot(left, right, sums, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _block(blocks, order, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's slot, its tokens' places in `order`, which exist, and the tokens, (M)."""
    block = blocks + 3 * tl.program_id(0)
    slot, first, count = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    at = tl.arange(0, M)
    places, mine = (first + at).to(tl.int64), at < count
    return slot.to(tl.int64), places, mine, tl.load(order + places, mask=mine, other=0)


@triton.jit
def _is_empty(blocks):  # type: ignore[no-untyped-def]
    """A recorded step has as many blocks as it ever may need; the rest has no tokens."""
    return tl.load(blocks + 3 * tl.program_id(0) + 2) == 0


@triton.jit(do_not_specialize=["total"])  # type: ignore[untyped-decorator]
def _shrink(  # type: ignore[no-untyped-def]
    x, a, inner, order, blocks, total, x_row, a_slot,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, PART: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """inner[part, place, rank] = sum over the part's columns of x[token, :] A[slot, rank, :]."""
    if _is_empty(blocks):
        return
    slot, places, mine, tokens = _block(blocks, order, M)
    part = tl.program_id(1)
    ranks = tl.program_id(2) * R + tl.arange(0, R)
    known = ranks < RANK
    x_rows = x + tokens.to(tl.int64)[:, None] * x_row
    a_rows = a + slot * a_slot + ranks[None, :] * COLUMNS
    sums = tl.zeros((M, R), tl.float32)
    for start in range(0, PART, K):
        columns = part * PART + start + tl.arange(0, K)
        inside = columns < COLUMNS
        own = tl.load(x_rows + columns[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
        weights = tl.load(
            a_rows + columns[:, None], mask=known[None, :] & inside[:, None], other=0.0
        )
        sums = _dot(own, weights, sums, WIDEN)
    out = inner + (part * total + places)[:, None] * RANK + ranks[None, :]
    tl.store(out, sums, mask=mine[:, None] & known[None, :])


@triton.jit(do_not_specialize=["total"])  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    y, b, inner, order, blocks, total, y_row, b_slot,
    ROWS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y[token, :] += sum over the parts of inner[part, place, :], times B^T[slot, :, :]."""
    if _is_empty(blocks):
        return
    slot, places, mine, tokens = _block(blocks, order, M)
    rows = tl.program_id(1) * N + tl.arange(0, N)
    inside = rows < ROWS
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, RANK, R):
        ranks = start + tl.arange(0, R)
        known = ranks < RANK
        own = inner + places[:, None] * RANK + ranks[None, :]
        shrunk = tl.zeros((M, R), tl.float32)
        for part in range(PARTS):
            shrunk += tl.load(
                own + part * total * RANK, mask=mine[:, None] & known[None, :], other=0.0
            )
        weights = tl.load(
            b + slot * b_slot + ranks[:, None] * ROWS + rows[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
        sums = _dot(shrunk.to(weights.dtype), weights, sums, WIDEN)
    out = y + tokens.to(tl.int64)[:, None] * y_row + rows[None, :]
    mask = mine[:, None] & inside[None, :]
    before = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, (before + sums).to(y.dtype.element_ty), mask=mask)


def add(x: Tensor, y: Tensor, a: Tensor, b: Tensor, tokens: Tokens) -> None:
    """A `Kernel`: x and the slots are of one type."""
    expand(y, b, tokens, shrink(x.contiguous(), a, tokens))


def shrink(x: Tensor, a: Tensor, tokens: Tokens) -> Tensor:
    """x A^T of each token's slot in float32, in parts to be added: (parts, tokens, r).

    x is (all tokens, in) and A (slots, r, in), of one type; rows lie along memory.
    """
    columns, rank = a.shape[2], a.shape[1]
    part, parts = _parts(columns)
    ranks = _ranks(rank)
    inner = torch.empty(parts, len(tokens.order), rank, dtype=torch.float32, device=x.device)
    _shrink[(len(tokens.blocks), parts, -(-rank // ranks))](
        x, a, inner, tokens.order, tokens.blocks, len(tokens.order), x.stride(0), a.stride(0),
        COLUMNS=columns, RANK=rank, PART=part,
        M=tokens.size, K=_BYTES // x.element_size(), R=ranks, WIDEN=_widen(x),
    )  # fmt: skip
    return inner


def expand(y: Tensor, b: Tensor, tokens: Tokens, inner: Tensor) -> None:
    """Add to each token of y (all tokens, out) what `shrink` gave, times B^T (slots, r, out)."""
    parts, total, rank = inner.shape
    rows = b.shape[2]
    _expand[(len(tokens.blocks), -(-rows // _ROWS))](
        y, b, inner, tokens.order, tokens.blocks, total, y.stride(0), b.stride(0),
        ROWS=rows, RANK=rank, PARTS=parts,
        M=tokens.size, N=_ROWS, R=_ranks(rank), WIDEN=_widen(y),
    )  # fmt: skip


def _parts(columns: int) -> tuple[int, int]:
    """How many columns a part of a sum has, and how many parts there are.

    By the layer alone, so that a token's sum does not depend on its neighbours.
    """
    share = max(_PART, -(-columns // _PARTS))
    share = -(-share // _BYTES) * _BYTES  # whole blocks of any type
    return share, -(-columns // share)


def _ranks(rank: int) -> int:
    """Ranks of a block: all are powers of two, padded here to what tensor cores take."""
    return min(max(rank, _RANKS[0]), _RANKS[1])


def _widen(x: Tensor) -> bool:
    """On a CPU only Triton's interpreter runs these, whose products take bfloat16 for integers."""
    return x.device.type == "cpu"
