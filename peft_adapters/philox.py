"""Philox4x32-10 in integer operations: the same random bits on any device and with any library.

Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".  A framework's own generators
differ between devices, CPUs and versions; these integers do not.  `signs` runs on torch (CPU or
CUDA) in int64, whose products wrap modulo 2^64 and so keep every bit that is needed.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from .kernel_trial import holds

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_SIGNS_PER_CALL = 128
_TRITON = importlib.util.find_spec("triton") is not None


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds over counters (n, 4), 32-bit words in int64; the outputs, likewise."""
    c0, c1, c2, c3 = counter.unbind(1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high >> 32 & _MASK) ^ c1 ^ k0,
            high & _MASK,
            (low >> 32 & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return torch.stack([c0, c1, c2, c3], 1)


def signs(
    seed: int, tensor_id: int, part: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The first `count` signs of a stream: int8 (count,), +1 or -1.

    Counter (call, call >> 32, tensor_id, part), key (seed, seed >> 32); element i is bit i mod 32
    of word i div 32, which is output word mod 4 of call word div 4.  A set bit means -1.
    """
    if _TRITON and torch.device(device).type == "cuda" and _kernel_works():
        from . import philox_triton

        return philox_triton.signs(seed, tensor_id, part, count, device)
    return _signs(seed, tensor_id, part, count, device)


def _signs(seed: int, tensor_id: int, part: int, count: int, device: torch.device | str) -> Tensor:
    """By torch's operations."""
    calls = torch.arange(-(-count // _SIGNS_PER_CALL), device=device)
    constant = torch.ones_like(calls)
    counter = torch.stack([calls & _MASK, calls >> 32, tensor_id * constant, part * constant], 1)
    words = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    bytes_ = words.to(torch.int32).view(torch.uint8).view(-1)
    eights = _eights().to(device).index_select(0, bytes_.int())
    return eights.view(torch.int8)[:count]


@cache
def _kernel_works() -> bool:
    return holds(lambda: kernel_is_right("cuda"), "signs")


def kernel_is_right(device: torch.device | str) -> bool:
    """On a few signs."""
    from . import philox_triton

    few = (1, 2, 3, 200)
    return torch.equal(philox_triton.signs(*few, device).cpu(), _signs(*few, "cpu"))


@cache
def _eights() -> Tensor:
    """Of every byte its eight signs, as the bytes of an int64: (256,).

    Several times faster than shifting each bit into its place.
    """
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (1 - 2 * bits).to(torch.int8).view(torch.int64).view(-1)
