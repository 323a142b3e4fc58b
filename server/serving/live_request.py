"""A request between its arrival and its last event."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ...peft_adapters.serving_slots import Place
from .detokenizer import Detokenizer, StopStrings
from .kv_rows import Owner, Row
from .requests import Event, Failed, Finished, Job, PromptRead, Token
from .sampler import Chooser, log_probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


class LiveRequest:
    """Its job, its row, and its answer so far.  Of the engine's thread, but for `aborted`."""

    def __init__(
        self,
        job: Job,
        on_event: Callable[[Event], None],
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
    ) -> None:
        self.job, self.tenant = job, job.tenant
        self.aborted = False
        self.row: Row | None = None  # while it runs
        self.place: Place | None = None  # of its adapter, while it runs
        self.cached = self.generated = 0
        self.reason = ""  # how it ended, once it has
        self._arrived = time.monotonic()
        self._queued: float | None = None  # seconds until it began
        self._scored = [Token(job.prompt[0], "")]  # tokens of the prompt, where it is scored
        self.chooser = Chooser(job.sampling)
        self._last = -1  # the newest token, which is not computed yet
        self._ends = () if job.sampling.ignore_eos else ends
        self._on_event = on_event
        self._detokenizer = Detokenizer(tokenizer, job.prompt)
        self._stops = StopStrings(job.sampling.stop)

    def begin(self, row: Row, place: Place | None) -> None:
        """It has joined the batch: its row, and its adapter's slot."""
        self.row, self.place, self.cached = row, place, len(row.tokens)
        self._queued = time.monotonic() - self._arrived

    @property
    def owner(self) -> Owner:
        return Owner(self.job.model.digest, self.tenant)

    @property
    def input_length(self) -> int:
        return len(self.job.prompt)

    @property
    def length(self) -> int:
        """Tokens of its prompt and of its answer so far."""
        return self.input_length + self.generated

    @property
    def remaining(self) -> int:
        """Tokens that it may still become."""
        return self.job.sampling.max_tokens - self.generated

    @property
    def unread(self) -> int:
        """Tokens of its prompt that are not computed yet, once it runs."""
        assert self.row is not None
        return self.input_length - min(len(self.row.tokens), self.input_length)

    def next_tokens(self, limit: int) -> list[int]:
        """What is to be computed next: at most `limit` tokens of the prompt, or the newest one."""
        assert self.row is not None
        done = len(self.row.tokens)
        if done < self.input_length:
            return list(self.job.prompt[done : done + limit])
        return [self._last]

    @property
    def is_scored(self) -> bool:
        """Whether what follows each token of its prompt is asked for."""
        return self.job.sampling.score_prompt

    def score(self, logits: Tensor) -> bool:
        """Report the prompt's tokens, once all are known, by what followed each of those that were
        just read: logits (tokens, vocabulary).  False where those are no numbers."""
        assert self.row is not None
        first = len(self.row.tokens) - len(logits) + 1
        tokens = self.job.prompt[first : first + len(logits)]
        alternatives = self.job.sampling.logprobs or 0
        for token, found in zip(
            tokens, log_probabilities(logits[: len(tokens)], tokens, alternatives), strict=True
        ):
            if math.isnan(found[0]):
                return False
            self._scored.append(Token(token, "", *found))
        if not self.unread:
            self._tell(PromptRead(tuple(self._scored)))
        return True

    def accept(self, token: int, logits: Tensor) -> bool:
        """Report a generated token; whether it was the last one, which is reported then too."""
        self._last, self.generated = token, self.generated + 1
        ended = token in self._ends
        text = "" if ended else self._stops.add(self._detokenizer.add(token))
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if self.job.sampling.logprobs is not None:
            wanted = self.job.sampling.logprobs
            ((logprob, top),) = log_probabilities(logits.unsqueeze(0), [token], wanted)
        self._tell(Token(token, text, logprob, top))
        if not (ended or self._stops.found or not self.remaining):
            return False
        rest = self._stops.add(self._detokenizer.rest()) + self._stops.rest()
        self._finish("stop" if ended or self._stops.found else "length", rest)
        return True

    def end_unasked(self) -> None:
        """Its prompt was to be read, and nothing to be generated."""
        self._finish("length", "")

    def abort(self) -> None:
        self._finish("abort", "")

    def fail(self, error: str) -> None:
        self.reason = "failed"
        self._tell(Failed(error))

    def _finish(self, reason: Literal["stop", "length", "abort"], text: str) -> None:
        self.reason = reason
        counts = self.input_length, self.cached, self.generated
        self._tell(Finished(reason, text, *counts, self._queued))

    def _tell(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:  # a listener's fault must not end its neighbours' requests
            _LOG.exception(
                "who asked for %s cannot be told; the request is dropped", self.job.model
            )
            self.aborted = True
