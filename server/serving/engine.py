"""The engine: one thread that runs the model for all requests in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...closeable import Closeable
from ...peft_adapters.base_model import Base
from .catalogue import Catalogue
from .requests import Event, Job


@dataclass(frozen=True)
class EngineOptions:
    """Bounds of what the engine holds at once."""

    max_length: int = 0  # tokens of a prompt and its answer; 0: what the base was made for
    max_rows: int = 16  # requests in one batch
    max_waiting: int = 256  # requests in the queue; more are refused
    kv_tokens: int = 0  # tokens whose keys and values are held; 0: max_rows * max_length
    prefill_tokens: int = 512  # of prompts in one step
    slots: int = 16  # adapters of each rank bucket that are ready for a batch
    cache_bytes: int = 2**30  # of adapters in memory beside the slots
    pinned: tuple[str, ...] = ()  # names of adapters whose slots are kept


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
    slots: int
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
    finished: Mapping[str, int]  # by reason: stop, length, abort, failed
    adapters: tuple[AdapterLoad, ...]  # only what runs or waits now


class Ticket:
    """A request that was taken."""

    def cancel(self) -> None:
        """Leave the batch at the next step; ends in Finished("abort").  From any thread."""


class Engine(Closeable):
    def __init__(
        self, base: Base, catalogue: Catalogue, options: EngineOptions | None = None
    ) -> None: ...

    max_length: int
    """The most tokens of a prompt and its answer."""

    def submit(self, job: Job, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a request; from any thread.

        `on_event` is called on the engine's thread (and must not block) with Tokens, and last
        with Finished or Failed.  The caller keeps the model's lease until then.  Raises
        TooLongError, OverloadedError and StoppedError.
        """

    def stats(self) -> Stats: ...

    def drain(self, seconds: float) -> bool:
        """Take nothing new, and wait until all is answered; False where time ran out."""

    def close(self) -> None:
        """Abort what is left, and end the thread."""
