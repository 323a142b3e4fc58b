"""Choosing requests' next tokens, each by its own rules and its own random numbers.

All rows are chosen from where their logits are: on a GPU a vocabulary's numbers, and sorting them,
would take longer on the host than a step of the model.  Only the tokens leave it, together.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .requests import Sampling

_SEEDS = 2**64
_CHANCES = 2**48  # so that a chance times a sum in float64 stays below the sum
_COLDEST = 1e-5
"""A temperature at which the likeliest token is as good as certain.  Quotients by much less leave
float32's range."""


class Rules(NamedTuple):
    """From which distribution tokens are drawn."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


class Chooser:
    """The tokens that it draws depend on the request's seed and the logits, and on no neighbour."""

    def __init__(self, sampling: Sampling) -> None:
        self.rules: Rules | None = None  # None: the likeliest token
        if sampling.temperature != 0:
            seed = secrets.randbelow(_SEEDS) if sampling.seed is None else sampling.seed
            self._random = random.Random(seed % _SEEDS)  # torch's would read 32 bits of it
            self.rules = Rules(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)

    def chance(self) -> float:
        """The next of its random numbers, in [0, 1)."""
        return self._random.randrange(_CHANCES) / _CHANCES


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[int | None]:
    """The next token of each row of float32 logits (n, vocabulary); None where they are not
    finite."""
    highest, tokens = logits.max(-1, keepdim=True)  # NaN where anything is
    tokens = tokens[:, 0]
    for rules, rows in _by_rules(choosers).items():
        chances = torch.tensor([choosers[row].chance() for row in rows], dtype=torch.float64)
        at = torch.tensor(rows).to(logits.device, non_blocking=True)
        own = logits[at] - highest[at]
        tokens[at] = _drawn(own, rules, chances.to(logits.device, non_blocking=True))
    found: list[int] = tokens.where(highest[:, 0].isfinite(), -1).tolist()
    return [token if token >= 0 else None for token in found]


def _by_rules(choosers: Sequence[Chooser]) -> dict[Rules, list[int]]:
    """Which rows are drawn from one distribution; the likeliest token's are in none."""
    rows: dict[Rules, list[int]] = {}
    for row, chooser in enumerate(choosers):
        if chooser.rules is not None:
            rows.setdefault(chooser.rules, []).append(row)
    return rows


def _drawn(logits: Tensor, rules: Rules, chances: Tensor) -> Tensor:
    """A token for each row of logits (n, vocabulary), by inverting its distribution's sums at its
    chance (n), float64.

    The highest logit is 0, so that whatever the temperature some probability is left.
    """
    left = _filters(rules)(torch.empty(0), logits)
    sums = left.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, chances.unsqueeze(1) * sums[:, -1:], right=True)[:, 0]


def log_probabilities(
    logits: Tensor, tokens: Sequence[int], alternatives: int
) -> Iterator[tuple[float, tuple[tuple[int, float], ...]]]:
    """Of each row of logits (n, vocabulary) its token's log probability, and the likeliest tokens
    with theirs."""
    total = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(-1, torch.tensor(tokens, device=logits.device).unsqueeze(-1)) - total
    values, likeliest = logits.topk(min(alternatives, logits.shape[-1]))
    rows = own[:, 0].tolist(), likeliest.tolist(), (values - total).tolist()
    for found, ids, others in zip(*rows, strict=True):
        yield found, tuple(zip(ids, others, strict=True))


def _filters(rules: Rules) -> LogitsProcessorList:
    """transformers' own, in the order in which `generate` applies them."""
    filters = LogitsProcessorList()
    if rules.temperature != 1:
        filters.append(TemperatureLogitsWarper(max(rules.temperature, _COLDEST)))
    if rules.top_k:
        filters.append(TopKLogitsWarper(rules.top_k))
    if rules.top_p < 1:
        filters.append(TopPLogitsWarper(max(rules.top_p, 1e-9)))
    if rules.min_p > 0:
        filters.append(MinPLogitsWarper(rules.min_p))
    return filters
