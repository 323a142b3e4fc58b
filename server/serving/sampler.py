"""Choosing a request's next token, by its own rules and its own random numbers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

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

_SEEDS = 2**63


class Chooser:
    """The tokens that it draws depend on the request's seed and the logits, and on no neighbour."""

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature == 0
        if not self.greedy:
            seed = secrets.randbelow(_SEEDS) if sampling.seed is None else sampling.seed
            self._random = torch.Generator().manual_seed(seed % _SEEDS)
            self._filters = _filters(sampling)

    def draw(self, logits: Tensor) -> int:
        """One token from float32 logits (vocabulary)."""
        filtered = self._filters(torch.empty(0), logits.cpu().unsqueeze(0))
        drawn = torch.multinomial(filtered.softmax(-1), 1, generator=self._random)
        return int(drawn)


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[int | None]:
    """The next token of each row of logits (n, vocabulary); None where they are not finite."""
    highest, likeliest = logits.max(-1)  # which is NaN where anything is
    rows = zip(logits, highest.isfinite().tolist(), likeliest.tolist(), choosers, strict=True)
    return [
        (best if chooser.greedy else chooser.draw(row)) if finite else None
        for row, finite, best, chooser in rows
    ]


def log_probabilities(
    logits: Tensor, token: int, alternatives: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The token's log probability, and the likeliest tokens with theirs."""
    found = logits.log_softmax(-1)
    values, tokens = found.topk(min(alternatives, len(found)))
    return float(found[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def _filters(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own, in the order in which `generate` applies them."""
    filters = LogitsProcessorList()
    if sampling.temperature != 1:
        filters.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        filters.append(TopPLogitsWarper(max(sampling.top_p, 1e-9)))
    if sampling.min_p > 0:
        filters.append(MinPLogitsWarper(sampling.min_p))
    return filters
