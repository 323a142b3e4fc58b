"""Combining the bytes of clients that measured the same directions: integers in, integers out.

The rules compare clients step by step, so that all have to share a round's directions.  Results
are in fixed point, `FRACTION` bits behind the point.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..peft_adapters.pool import Integers

Rule = Literal["mean", "median", "trimmed", "clipped"]

FRACTION = 20  # the weight of one client in a thousand is right to 0.1 %
_ONE = 1 << FRACTION
_TRIM = 5  # one in so many of the clients is cut on either side


def fixed_weights(weights: list[float]) -> Integers:
    """Weights as shares of their sum, in fixed point; equal ones where the sum is zero."""
    total = math.fsum(weights)  # whatever their order
    shares = [w / total for w in weights] if total > 0 else [1 / len(weights)] * len(weights)
    return np.array([round(share * _ONE) for share in shares], np.int64)


def combine(rule: Rule, bytes_: Integers, weights: list[float]) -> Integers:
    """One number for each step from bytes (clients, steps): fixed point, int64 (steps,).

    mean      weighted by `weights`
    median    of the clients' values, each counting once
    trimmed   mean without the smallest and the largest fifth, of three clients at least one
    clipped   mean of the clients' vectors, none longer than their median length
    """
    if rule == "mean":
        return fixed_weights(weights) @ bytes_
    clients = len(bytes_)
    if rule == "clipped":
        return _clipped(bytes_)
    cut = (clients - 1) // 2  # all but the one or two in the middle
    if rule == "trimmed":
        cut = min(cut, max(1, clients // _TRIM))
    middle: Integers = np.sort(bytes_, axis=0)[cut : clients - cut]
    total: Integers = middle.sum(0) * _ONE // len(middle)
    return total


def _clipped(bytes_: Integers) -> Integers:
    lengths = np.array([math.isqrt(int((row * row).sum())) for row in bytes_], np.int64)
    bound = int(np.sort(lengths)[(len(lengths) - 1) // 2])
    factors = np.array([min(_ONE, bound * _ONE // max(1, int(n))) for n in lengths], np.int64)
    return factors @ bytes_ // len(bytes_)
