"""Zeroth-order steps along a pool's directions, a signed byte each.

    g = (L(W + eps z) - L(W - eps z)) / (2 eps),    byte = round(g / 2^scale),    Q[k] -= byte * M

The rounding is stochastic, so that it has no bias, and the sender applies its own rounded value.
Everything that turns a byte into a change of Q is an integer of the round's header: whoever has
the header and the bytes has the same Q.  MeZO (Malladi et al. 2023, arXiv 2305.17333) with
FedKSeed's pool of seeds (Qin et al. 2024, arXiv 2312.06353), on rank-one signs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..peft_adapters.pool import Integers, Pool, draws, fold
from .base import Probe, Probed

MOST = 127
"""Largest magnitude of a byte; -128 never occurs."""

_MULTIPLIER_BITS = 28
_FAR = 4 * MOST
_ROUNDING = b"meadow/rounding/v1\0"


@dataclass(frozen=True)
class Header:
    """What turns bytes into changes of Q; pinned for a round, or for a whole run of peers."""

    epsilon: int  # exponent: how far to either side the loss is measured
    scale: int  # exponent: the projected gradient that a byte of 1 stands for
    multiplier: int  # what a byte of 1 takes from Q


@dataclass(frozen=True)
class Walked:
    """What some local steps led to."""

    bytes: Tensor  # int8 (steps * directions,)
    q: Tensor  # int64 (cores, r, r), after them
    loss: float  # mean of the finite losses at both signs
    saturated: int  # bytes that had to be cut to +-127
    lost: int  # steps whose loss was not finite: a byte of zero
    examples: int
    tokens: int


def multiplier_of(lr: float, scale: int, unit: int) -> int:
    """What a byte of 1 takes from Q at learning rate lr.

    Raises ConfigError where the grid is too coarse for it, or so fine that Q would overflow.
    """
    found = round(lr * 2.0 ** (scale + unit))
    if not 0 < found <= 2**_MULTIPLIER_BITS:
        raise ConfigError(
            f"lr = {lr:g} at scale = {scale} is {found} on a grid of 2^-{unit}",
            "a larger [strategy] unit or lr" if not found else "a smaller [strategy] unit or lr",
        )
    return found


def within_grid(scale: int, lr: float, unit: int) -> int:
    """`scale`, or the nearest one at which `multiplier_of` has an answer.

    A scale that follows the bytes, or a rate that falls, may leave the grid in mid-run.
    """
    exponent = math.frexp(lr)[1] + unit  # lr is in [2^(exponent - 1), 2^exponent) units
    return max(1 - exponent, min(scale, _MULTIPLIER_BITS - exponent))


def run_id_of(seed: int) -> str:
    """The pool's run id of a run that has a seed and a coordinator: its figures then reproduce."""
    return hashlib.sha256(f"meadow/zeroth-order/{seed}".encode()).hexdigest()


def to_byte(gradient: float, scale: int, uniform: float) -> tuple[int, bool]:
    """The gradient in units of 2^scale, rounded up with the probability that its fraction says
    (`uniform` is in [0, 1)), and whether it had to be cut to a byte."""
    exact = max(-_FAR, min(_FAR, gradient * 2.0**-scale))  # an infinity has no floor
    value = math.floor(exact + uniform)
    return max(-MOST, min(MOST, value)), abs(value) > MOST


def walk(
    pool: Pool,
    q: Tensor,
    header: Header,
    participant: bytes,
    first_step: int,
    along: Callable[[int], Integers],
    steps: int,
) -> Generator[Probe, Probed, Walked]:
    """Local steps from Q on; `along(step)` names the directions of a cumulative step.

    Several directions in one step share its batch, and the step is their mean.
    """
    epsilon = 2.0**header.epsilon
    found: list[int] = []
    losses: list[float] = []
    saturated = lost = tokens = examples = 0
    for step in range(first_step, first_step + steps):
        k = along(step)
        probed = yield Probe(pool, q, tuple(k.tolist()), epsilon, step)
        uniforms = draws(_ROUNDING, pool.run_id, participant, step * len(k), len(k))
        bytes_ = []
        for (plus, minus), bits in zip(probed.losses.tolist(), uniforms, strict=True):
            gradient = (plus - minus) / (2 * epsilon)
            if not math.isfinite(gradient):
                bytes_.append(0)
                lost += 1
                continue
            byte, cut = to_byte(gradient, header.scale, (bits >> 11) / 2**53)
            bytes_.append(byte)
            saturated += cut
            losses.append((plus + minus) / 2)
        q = q.clone()  # the probe keeps its own
        fold(q, k, [-byte * header.multiplier for byte in bytes_])
        found += bytes_
        tokens += probed.tokens
        examples = probed.examples
    loss = sum(losses) / len(losses) if losses else math.nan
    sent = torch.tensor(found, dtype=torch.int8)
    return Walked(sent, q, loss, saturated, lost, examples, tokens)


def next_scale(scale: int, bytes_: Integers) -> int:
    """The scale for the next round: bytes of 12 to 64 in the mean, far from both 0 and 127.

    In integers, so that it is the same on any machine.
    """
    count = len(bytes_)
    magnitude = int(np.abs(bytes_).sum())
    if count == 0:
        return scale
    saturated = int((np.abs(bytes_) == MOST).sum())
    if saturated * 50 > count:
        return scale + 2
    for change in (-3, -2, -1):
        if magnitude * 2**-change <= 24 * count:  # well below 32: Laplace's tail begins to be cut
            return scale + change
    return scale + 1 if magnitude > 64 * count else scale


def notes_of_walk(walked: Walked) -> dict[str, Any]:
    """What a client says of its steps besides the bytes."""
    told: dict[str, Any] = {
        "examples": walked.examples,
        "tokens": walked.tokens,
        "saturated": walked.saturated,
        "lost": walked.lost,
    }
    return told | ({"loss": walked.loss} if math.isfinite(walked.loss) else {})
