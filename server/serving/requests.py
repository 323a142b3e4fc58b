"""What the HTTP front asks of the engine, and what it hears back: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .served import Served


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen; `temperature` 0 takes the likeliest."""

    max_tokens: int  # 0: only the prompt is read
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # of the likeliest token's probability
    seed: int | None = None  # None: a fresh one
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # how many alternatives to report; None: no log probabilities
    ignore_eos: bool = False
    score_prompt: bool = False  # log probabilities of the prompt's own tokens, too


@dataclass(frozen=True)
class Job:
    """One prompt to be continued by one adapter version, for one tenant."""

    prompt: tuple[int, ...]
    sampling: Sampling
    model: Served
    tenant: str


@dataclass(frozen=True)
class Token:
    """One generated token.

    `text` is what may be shown now: "" while a character or a possible stop string is incomplete.
    Log probabilities are of the model's distribution, before temperature and filters.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptRead:
    """Comes before the first `Token` where the prompt is scored: its own tokens, without text.
    What nothing comes before has no log probability."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finished:
    """The last event of a request that was served; `text` was held back and may be shown."""

    reason: Literal["stop", "length", "abort"]
    text: str
    prompt_tokens: int
    cached_tokens: int  # of the prompt, whose keys and values were there already
    completion_tokens: int
    queued: float | None = field(default=None, compare=False)
    """Seconds from its arrival until it joined the batch; None where it never did."""


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be served."""

    error: str


Event = PromptRead | Token | Finished | Failed
