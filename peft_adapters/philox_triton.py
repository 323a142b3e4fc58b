"""Philox signs on a CUDA device, in one kernel: the same bits as `philox.signs`.

The torch form makes some 150 passes over int64 tensors; this one keeps a call's counter in
registers and writes only the signs.  This module needs Triton, which comes with torch's CUDA
builds; `philox.signs` imports it where there is a CUDA device and Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SIGNS = 128  # of one call
_BLOCK = 32  # calls of one program


@triton.jit
def _rounds(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Philox4x32-10 (Salmon et al. 2011); all arguments uint32."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        low0 = c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        high1 = tl.umulhi(c2, tl.full(c0.shape, 0xCD9E8D57, tl.uint32))
        low1 = c2 * tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full(c0.shape, 0x9E3779B9, tl.uint32)
        k1 += tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit  # type: ignore[untyped-decorator]
def _store(out, words, calls, count, WORD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The signs of output word WORD of each call, of which `count` exist in all."""
    bit = tl.arange(0, 32)
    place = calls[:, None] * 128 + WORD * 32 + bit[None, :]
    negative = (words[:, None] >> bit[None, :].to(tl.uint32)) & 1
    tl.store(out + place, (1 - 2 * negative.to(tl.int32)).to(tl.int8), mask=place < count)


@triton.jit(do_not_specialize=["seed", "tensor_id", "part", "count"])  # type: ignore[untyped-decorator]
def _kernel(out, seed, tensor_id, part, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    calls = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = calls * 0
    c0, c1, c2, c3 = _rounds(
        (calls & 0xFFFFFFFF).to(tl.uint32),
        (calls >> 32).to(tl.uint32),
        (zero + tensor_id).to(tl.uint32),
        (zero + part).to(tl.uint32),
        ((zero + seed) & 0xFFFFFFFF).to(tl.uint32),
        ((zero + seed) >> 32 & 0xFFFFFFFF).to(tl.uint32),
    )
    _store(out, c0, calls, count, 0)
    _store(out, c1, calls, count, 1)
    _store(out, c2, calls, count, 2)
    _store(out, c3, calls, count, 3)


def signs(seed: int, tensor_id: int, part: int, count: int, device: torch.device | str) -> Tensor:
    """As `philox.signs`: int8 (count,) on `device`, +1 or -1."""
    out = torch.empty(count, dtype=torch.int8, device=device)
    programs = -(-count // (_SIGNS * _BLOCK))
    if count:
        signed = seed - (seed >> 63 << 64)  # 64 bits as the kernel's int64
        _kernel[(programs,)](out, signed, tensor_id, part, count, BLOCK=_BLOCK)
    return out
