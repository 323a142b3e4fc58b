"""Choosing a request's next token, by its own rules and its own random numbers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

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
_COLDEST = 1e-5
"""A temperature at which the likeliest token is as good as certain.  Quotients by much less leave
float32's range."""


class Chooser:
    """The tokens that it draws depend on the request's seed and the logits, and on no neighbour."""

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature == 0
        if not self.greedy:
            seed = secrets.randbelow(_SEEDS) if sampling.seed is None else sampling.seed
            self._random = torch.Generator().manual_seed(seed % _SEEDS)
            self._filters = _filters(sampling)

    def draw(self, logits: Tensor) -> int:
        """One token from float32 logits (vocabulary), of which the highest is finite.

        That is made 0 first, so that whatever the temperature some probability is left.
        """
        own = logits.cpu()
        filtered = self._filters(torch.empty(0), (own - own.max()).unsqueeze(0))
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


def _filters(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own, in the order in which `generate` applies them."""
    filters = LogitsProcessorList()
    if sampling.temperature != 1:
        filters.append(TemperatureLogitsWarper(max(sampling.temperature, _COLDEST)))
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        filters.append(TopPLogitsWarper(max(sampling.top_p, 1e-9)))
    if sampling.min_p > 0:
        filters.append(MinPLogitsWarper(sampling.min_p))
    return filters
