"""Pools of directions by their definition: numpy, elements one by one, nothing of the product's."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meadow.peft_adapters.layout import Site
from meadow.peft_adapters.pool import Pool

RUN, BASE = 64 * "a", 64 * "b"
Array = np.ndarray[Any, Any]


def philox(counter: Array, key: tuple[int, int]) -> Array:
    """Philox4x32-10 over counters (n, 4), in uint64, from the paper's round function."""
    c = [column.astype(np.uint64) for column in counter.T]
    k = [np.uint64(word) for word in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = [first >> np.uint64(32), second >> np.uint64(32)]
        c = [high[1] ^ c[1] ^ k[0], second & low, high[0] ^ c[3] ^ k[1], first & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, 1)


def sign(seed: int, tensor_id: int, part: int, element: int) -> int:
    """One sign of a stream, found alone."""
    word, bit = divmod(element, 32)
    call, output = divmod(word, 4)
    counter = np.array([[call & 0xFFFFFFFF, call >> 32, tensor_id, part]], np.uint64)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return 1 - 2 * (int(words[0, output]) >> bit & 1)


@cache
def factors(pool: Pool, index: int) -> tuple[Array, Array]:
    """U (m, r) and V (n, r) of a matrix, int64: element (i, a) is bit a * rows + i."""
    text = b"meadow/pool/v1\0" + bytes.fromhex(pool.run_id) + bytes.fromhex(pool.base_digest)
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
    site = pool.sites[index]
    u, v = (
        np.array(
            [[sign(seed, index, part, a * rows + i) for a in range(pool.rank)] for i in range(rows)]
        )
        for part, rows in ((0, site.rows), (1, site.columns))
    )
    return u, v


def dense(pool: Pool, q: Tensor) -> dict[str, Tensor]:
    """2^-unit U Q V^T of every matrix, exact in int64, then float64."""
    change = {}
    for index, site in enumerate(pool.sites):
        u, v = factors(pool, index)
        core = q[index if pool.cores == "per_layer" else 0].numpy()
        change[site.name] = torch.from_numpy(u @ core @ v.T).double() * 2.0**-pool.unit
    return change


def along(pool: Pool, k: int) -> dict[str, Tensor]:
    """u_a v_b^T of every matrix, float64."""
    a, b = divmod(k, pool.rank)
    found = {}
    for index, site in enumerate(pool.sites):
        u, v = factors(pool, index)
        found[site.name] = torch.from_numpy(np.outer(u[:, a], v[:, b])).double()
    return found


def random_q(pool: Pool, seed: int, largest: int) -> Tensor:
    """Integers up to +-largest in every core."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, pool.zero().shape, generator=generator)


def small_pool(sites: tuple[Site, ...], rank: int = 3, **more: Any) -> Pool:
    return Pool(RUN, BASE, sites, rank, **more)
