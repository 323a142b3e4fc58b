"""What an engine says of itself, and how long its queue will take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .batcher import Batcher


@dataclass(frozen=True)
class AdapterLoad:
    """How many requests of one model run and wait."""

    model: str  # "name@v7", or the base's name
    running: int
    waiting: int


@dataclass(frozen=True)
class Stats:
    """The engine as of its last step.  Totals count from its start."""

    running: int
    waiting: int
    max_rows: int
    kv_used: int  # tokens reserved by what runs
    kv_tokens: int
    slots_used: int  # that hold an adapter
    slots: int  # of all ranks that occurred
    slot_hits: int
    slot_misses: int
    slot_evictions: int
    cache_bytes: int
    cache_limit: int
    cache_hits: int
    cache_misses: int
    cache_evictions: int
    prompt_tokens: int
    cached_tokens: int  # of the prompts' tokens
    generation_tokens: int
    steps: int
    replayed_steps: int  # of those, what was replayed
    recording_failed: bool  # a step could not be recorded, and no other will be
    finished: Mapping[str, int]  # by reason: stop, length, abort, failed
    adapters: tuple[AdapterLoad, ...]  # only what runs or waits now


def snapshot(batcher: Batcher) -> Stats:
    """An engine's figures as they are now; called on its thread."""
    slots, cache, waiting = batcher.slots, batcher.cache.stats(), batcher.waiting
    graphs = batcher.runner.graphs
    return Stats(
        running=len(batcher.running),
        waiting=len(waiting),
        max_rows=len(batcher.runner.kv.rows),
        kv_used=batcher.kv_used,
        kv_tokens=batcher.kv_tokens,
        slots_used=slots.used,
        slots=slots.total,
        slot_hits=slots.hits,
        slot_misses=slots.misses,
        slot_evictions=slots.evictions,
        cache_bytes=cache.bytes,
        cache_limit=batcher.cache.limit,
        cache_hits=cache.hits,
        cache_misses=cache.misses,
        cache_evictions=cache.evictions,
        prompt_tokens=batcher.totals["prompt"],
        cached_tokens=batcher.totals["cached"],
        generation_tokens=batcher.totals["generation"],
        steps=batcher.totals["steps"],
        replayed_steps=graphs.replayed if graphs else 0,
        recording_failed=graphs is not None and graphs.failed,
        finished=dict(batcher.finished),
        adapters=_loads(
            Counter(str(request.job.model) for request in batcher.running),
            Counter(str(request.job.model) for request in waiting),
        ),
    )


def _loads(running: Counter[str], waiting: Counter[str]) -> tuple[AdapterLoad, ...]:
    models = sorted(running.keys() | waiting.keys())
    return tuple(AdapterLoad(model, running[model], waiting[model]) for model in models)


class Pace:
    """How fast answers are finished, to tell who is refused when to come again."""

    _KEPT = 0.9  # of the mean so far, at each new answer
    _BOUNDS = 1.0, 60.0  # seconds

    def __init__(self) -> None:
        self._mean = 0.0  # seconds between two answers, while there is work
        self._since = time.monotonic()
        self._finished = 0

    def saw(self, finished: int, *, busy: bool) -> None:
        """So many answers were finished in all."""
        now, new = time.monotonic(), finished - self._finished
        if new and busy:
            each = (now - self._since) / new
            self._mean = each if not self._mean else self._KEPT * self._mean + 0.1 * each
        if new or not busy:
            self._since, self._finished = now, finished

    def seconds(self, waiting: int) -> float:
        """When about so many will have been answered."""
        low, high = self._BOUNDS
        return min(high, max(low, waiting * self._mean))
