"""The loop's body: who joins, one step of the model for all that run, and who leaves.

Requests join and leave between any two steps.  A step computes one token of every row that
generates and, so that long prompts do not hold those up, at most so many tokens of prompts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Protocol

import torch

from ...errors import AdapterError
from ...peft_adapters.serving_slots import Packed, Place
from ..registry_names import PROD
from .adapter_cache import CacheStats
from .fair_queue import FairQueue, kv_peak
from .live_request import LiveRequest
from .model_runner import ModelRunner, Work
from .sampler import choose
from .served import Served
from .slot_table import SlotTable

_LOG = logging.getLogger(__name__)
_MOST_SCORED = 128
"""Tokens of prompts in one step after which a whole vocabulary's logits are held."""


class Adapters(Protocol):
    """Adapters in memory, as `AdapterCache` keeps them."""

    limit: int

    def hold(self, model: Served) -> bool: ...
    def get(self, model: Served) -> Packed: ...
    def peek(self, model: Served) -> Packed | None: ...
    def give(self, model: Served) -> None: ...
    def stats(self) -> CacheStats: ...


class Batcher:
    """All requests of an engine; used by its thread alone."""

    def __init__(
        self,
        runner: ModelRunner,
        cache: Adapters,
        slots: SlotTable,
        *,
        kv_tokens: int,
        prefill_tokens: int,
        pinned: frozenset[str],
    ) -> None:
        self.runner, self.cache, self.slots = runner, cache, slots
        self.kv_tokens, self.prefill_tokens = kv_tokens, prefill_tokens
        self.queue: FairQueue[LiveRequest] = FairQueue()
        self.running: list[LiveRequest] = []
        self.loading: dict[str, list[LiveRequest]] = {}  # by the digest that they wait for
        self.totals: Counter[str] = Counter()  # prompt, cached, generation (tokens); steps
        self.finished: Counter[str] = Counter()  # by reason
        self._pinned = pinned
        self._pins: dict[str, str] = {}  # the digest that is pinned for a name

    @property
    def waiting(self) -> list[LiveRequest]:
        loading = (request for own in self.loading.values() for request in own)
        return [*self.queue, *(request for request in loading if not request.reason)]

    @property
    def kv_used(self) -> int:
        """Tokens that what runs may come to hold."""
        return sum(request.length + request.remaining for request in self.running)

    # Arrival

    def arrive(self, request: LiveRequest) -> None:
        """Queue a request, at once or when its adapter is in memory."""
        model = request.job.model
        if model.is_base or self.cache.hold(model):
            self.queue.arrive(request)
        else:
            self.loading.setdefault(model.digest, []).append(request)

    def loaded(self, model: Served, error: str) -> None:
        """The cache holds an adapter for the first that waits for it, unless there is an error."""
        if model.digest not in self.loading:
            return  # the engine is ending
        requests = self.loading[model.digest]
        request = requests.pop(0)
        if not requests:
            del self.loading[model.digest]
        if request.reason:  # it was aborted meanwhile
            if not error:
                self.cache.give(model)
        elif error:
            self._ended(request, error)
        else:
            self.queue.arrive(request)

    def warmed(self, model: Served) -> None:
        """Fill a slot before the first request needs it, if there is one to spare."""
        packed = self.cache.peek(model)
        if packed is not None and self.slots.has_room(model.digest, packed.rank):
            try:
                self._fill_slot(model, packed)
            except AdapterError as error:  # who asks for it will hear that
                _LOG.error("%s: %s", model, error)
            else:
                self.slots.give(model.digest)

    # A step

    @torch.inference_mode()
    def step(self) -> bool:
        """Let requests join, compute, and let them leave; False where there was nothing to do."""
        self._drop_aborted()
        for request in self.queue.admit(self._fits):
            self._begin(request)
        if not self.running:
            return False
        decode = [request for request in self.running if not request.unread]
        for request in decode:
            self.queue.charge(request.tenant)
        works = {_work(request, 1): request for request in decode}
        works |= {_work(request, length): request for request, length in self._prompts()}
        in_order, logits = self.runner.run(*_halves(list(works), len(decode)))
        self.totals["steps"] += 1
        if any(work.every for work in in_order):
            in_order, logits = self._score(works, in_order, logits)
        self._answer([works[work] for work in in_order], logits)
        return True

    def _prompts(self) -> Iterator[tuple[LiveRequest, int]]:
        """Whose prompts this step reads on, and how many tokens of each."""
        left, scored = self.prefill_tokens, _MOST_SCORED
        for request in self.running:
            length = min(left, request.unread, *([scored] if request.is_scored else []))
            if length:
                left -= length
                scored -= length if request.is_scored else 0
                yield request, length

    def _score(
        self, works: Mapping[Work, LiveRequest], in_order: list[Work], logits: torch.Tensor
    ) -> tuple[list[Work], torch.Tensor]:
        """Tell those whose prompts are scored; what is left is to be chosen from."""
        left = []
        for work, same in groupby(range(len(in_order)), key=in_order.__getitem__):
            first, *others = same
            last = others[-1] if others else first
            if work.every and not works[work].score(logits[first : last + 1]):
                self._leave(works[work], error=_not_finite(works[work]))
            elif work.last:
                left.append(last)
        return [in_order[at] for at in left], logits[left]

    def _answer(self, requests: list[LiveRequest], logits: torch.Tensor) -> None:
        tokens = choose(logits, [request.chooser for request in requests])
        for request, token, row in zip(requests, tokens, logits, strict=True):
            if token is None:
                self._leave(request, error=_not_finite(request))
            elif not request.remaining:
                request.end_unasked()
                self._leave(request)
            else:
                self.totals["generation"] += 1
                if request.accept(token, row):
                    self._leave(request)

    # Joining and leaving

    def _fits(self, request: LiveRequest) -> bool:
        pairs = [(own.length, own.remaining) for own in [*self.running, request]]
        unread = sum(own.unread for own in self.running)
        return (
            bool(self.runner.kv.free)
            and (not unread or unread + request.input_length <= self.prefill_tokens)
            and kv_peak(iter(pairs)) <= self.kv_tokens
            and self._has_slot(request.job.model)
        )

    def _has_slot(self, model: Served) -> bool:
        return model.is_base or self.slots.has_room(model.digest, self.cache.get(model).rank)

    def _begin(self, request: LiveRequest) -> None:
        model, place, prompt = request.job.model, None, request.job.prompt
        if not model.is_base:
            packed = self.cache.get(model)
            self.cache.give(model)
            try:
                place = self._fill_slot(model, packed)
            except AdapterError as error:
                self._ended(request, str(error))
                return
        row = self.runner.kv.take(request.owner, prompt, reuse=not request.is_scored)
        request.begin(row, place)
        self.totals["prompt"] += request.input_length
        self.totals["cached"] += request.cached
        self.running.append(request)

    def _fill_slot(self, model: Served, packed: Packed) -> Place:
        """Refer to an adapter's slot, which is filled if it was not there.  Raises AdapterError."""
        place, new = self.slots.take(model.digest, packed.rank)
        if new:
            try:
                self.runner.write(place, packed)
            except AdapterError:
                self.slots.drop(model.digest)
                raise
        if model.alias == PROD and model.name in self._pinned:
            self.slots.pin(self._pins.get(model.name, ""), False)
            self.slots.pin(model.digest)
            self._pins[model.name] = model.digest
        return place

    def _leave(self, request: LiveRequest, error: str = "") -> None:
        """A running request has had its last token, was aborted, or failed."""
        assert request.row is not None
        self.running.remove(request)
        self.runner.kv.give(request.row, keep=not error and request.generated > 0)
        if request.place is not None:
            self.slots.give(request.job.model.digest)
        self._ended(request, error)

    def _ended(self, request: LiveRequest, error: str = "") -> None:
        if error:
            request.fail(error)
        elif not request.reason:
            request.abort()
        self.finished[request.reason] += 1

    def _drop_aborted(self) -> None:
        for request in [request for request in self.running if request.aborted]:
            self._leave(request)
        for request in self.queue.drop():
            if not request.job.model.is_base:
                self.cache.give(request.job.model)
            self._ended(request)
        for request in self.waiting:
            if request.aborted:  # its adapter is being loaded; see `loaded`
                self._ended(request)

    def end(self, error: str) -> None:
        """Nothing goes on: all fail with an error, or are aborted without one."""
        for request in [*self.running, *self.waiting]:
            self._ended(request, error)
        self.running, self.queue, self.loading = [], FairQueue(), {}


def _work(request: LiveRequest, limit: int) -> Work:
    assert request.row is not None
    tokens = request.next_tokens(limit)
    every = request.is_scored and request.unread > 0
    last = len(tokens) >= request.unread
    return Work(request.row, request.place, tuple(tokens), last, every)


def _not_finite(request: LiveRequest) -> str:
    return f"{request.job.model} gives numbers that are not finite"


def _halves(works: list[Work], first: int) -> tuple[list[Work], list[Work]]:
    return works[:first], works[first:]
