"""The engine: one thread that runs the model for all requests in flight.

Callers hand it tasks through an inbox; everything else of the engine is touched by its own thread
alone.  Adapters are read from disk on a third one.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from ...closeable import Closeable
from ...errors import ConfigError, OverloadedError, ServingError, StoppedError, TooLongError
from ...peft_adapters.base_model import Base
from ...peft_adapters.serving_slots import Packed, pack
from .adapter_cache import AdapterCache
from .batcher import Batcher
from .catalogue import Catalogue
from .cuda_recorder import CudaRecorder, check_recording
from .engine_stats import AdapterLoad, Pace, Stats, snapshot
from .live_request import LiveRequest
from .model_runner import ModelRunner, number_type
from .requests import Event, Job
from .served import Served
from .slot_table import SlotTable

__all__ = ["AdapterLoad", "Engine", "EngineOptions", "Stats", "Ticket"]

_LOG = logging.getLogger(__name__)
_PATIENCE = 0.5  # seconds
_LONGEST = 4096  # tokens, where nobody says how long a text may be


@dataclass(frozen=True)
class EngineOptions:
    """Bounds of what the engine holds at once."""

    max_length: int = (
        0  # tokens of a prompt and its answer; 0: what the base was made for, at most 4096
    )
    max_rows: int = 16  # requests in one batch
    max_waiting: int = 256  # requests in the queue; more are refused
    kv_tokens: int = 0  # tokens whose keys and values are held; 0: max_rows * max_length
    prefill_tokens: int = 512  # of prompts in one step
    slots: int = 16  # adapters of each rank bucket that are ready for a batch
    cache_bytes: int = 2**30  # of adapters in memory beside the slots
    pinned: tuple[str, ...] = ()  # names of adapters whose slots are kept
    cuda_graphs: bool = False  # decoding steps are recorded and replayed, on a GPU


class Ticket:
    """A request that was taken."""

    def __init__(self, request: LiveRequest, wake: Callable[[], None]) -> None:
        self._request, self._wake = request, wake

    def cancel(self) -> None:
        """Leave the batch at the next step; ends in Finished("abort").  From any thread."""
        self._request.aborted = True
        self._wake()


class Engine(Closeable):
    """Runs a base model, which it owns until it is closed, for all requests in flight."""

    def __init__(
        self, base: Base, catalogue: Catalogue, options: EngineOptions | None = None
    ) -> None:
        """Raises ModelError for a base that cannot be served, ConfigError for bad options."""
        self.options = options or EngineOptions()
        self._base, self._catalogue = base, catalogue
        self.max_length, kv_tokens = _lengths(base, self.options)
        self._runner = ModelRunner(
            base,
            rows=self.options.max_rows,
            length=self.max_length,
            slots=self.options.slots,
            recorder=_recorder(base) if self.options.cuda_graphs else None,
        )
        self._changed = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()  # what the engine's thread is to do
        self._waiting: Counter[str] = Counter()  # by tenant, requests as of `_stats`
        self._queued: Counter[str] = Counter()  # that were taken and are not in `_stats` yet
        self._arrived: Counter[str] = Counter()  # of those, what the engine's thread has seen
        self._open, self._stopping, self._busy = True, False, False
        self._ends = _ends(base)
        self._fault = ""  # why the engine cannot go on
        self._warming: dict[str, threading.Event] = {}  # digests that are being loaded early
        self._pace = Pace()
        self._cache = AdapterCache(self._read, self.options.cache_bytes, self._on_loaded)
        self._batcher = Batcher(
            self._runner,
            self._cache,
            SlotTable(self.options.slots),
            kv_tokens=kv_tokens,
            prefill_tokens=self.options.prefill_tokens,
            pinned=frozenset(self.options.pinned),
        )
        self._stats = snapshot(self._batcher)
        catalogue.warm = self._warm
        self._thread = threading.Thread(target=self._run, name="meadow-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a request; from any thread.

        `on_event` is called on the engine's thread, and must not block, with Tokens, and last
        with Finished or Failed.  The caller keeps the model's lease until then.  Raises
        TooLongError, OverloadedError and StoppedError.
        """
        self._check_length(job)
        request = LiveRequest(job, on_event, self._base.tokenizer, self._ends)
        with self._changed:
            self._check_open(job.tenant)
            self._queued[job.tenant] += 1
            self._inbox.append(lambda: self._arrive(request))
            self._changed.notify_all()
        return Ticket(request, self._wake)

    def stats(self) -> Stats:
        """From any thread."""
        with self._changed:
            return self._stats

    @property
    def fault(self) -> str:
        """Why it cannot go on; "" while it can.  From any thread."""
        with self._changed:
            return self._fault

    def drain(self, seconds: float) -> bool:
        """Take nothing new, and wait until all is answered; False where time ran out."""
        with self._changed:
            self._stopping = True
            return self._changed.wait_for(self._is_idle, seconds)

    def close(self) -> None:
        """Abort what is left, end the thread, and give the base back as it was."""
        with self._changed:
            self._open, self._stopping = False, True
            self._changed.notify_all()
        self._thread.join()
        self._cache.close()
        self._catalogue.warm = None
        self._runner.close()

    # On the callers' threads

    def _check_length(self, job: Job) -> None:
        limit, wanted = self.max_length, len(job.prompt) + job.sampling.max_tokens
        if not job.prompt or job.sampling.max_tokens < 0:
            raise ServingError("a prompt has at least one token, and an answer not fewer than none")
        if wanted > limit:
            raise TooLongError(
                f"{len(job.prompt)} tokens of the prompt and {job.sampling.max_tokens} of the"
                f" answer are more than {limit}",
                limit,
                "shorten the prompt or ask for fewer tokens",
            )

    def _check_open(self, tenant: str) -> None:
        """A tenant who has a name leaves as much room as it takes, so that no other finds the queue
        full: dynamic thresholds (Choudhury and Hahne, IEEE/ACM Trans. Netw. 6(2), 1998), alpha 1.
        """
        if self._stopping:
            raise StoppedError(self._fault or "the server is ending and takes no new requests")
        waiting = self._stats.waiting + self._queued.total()
        own, room = self._waiting[tenant] + self._queued[tenant], self.options.max_waiting - waiting
        if room <= 0:
            seconds = self._pace.seconds(waiting)
            raise OverloadedError(f"{waiting} requests are waiting", seconds, "try again later")
        if tenant and own > room:
            seconds = self._pace.seconds(own)
            raise OverloadedError(f"{own} of your requests wait", seconds, "try again later")

    def _is_idle(self) -> bool:
        return not (self._queued or self._stats.running or self._stats.waiting)

    def _wake(self) -> None:
        with self._changed:
            self._inbox.append(lambda: None)
            self._changed.notify_all()

    def _do(self, task: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(task)
            self._changed.notify_all()

    def _warm(self, model: Served) -> None:
        """Wait a little for a version to be ready before an alias moves to it."""
        done = self._warming.setdefault(model.digest, threading.Event())
        self._cache.warm(model)
        done.wait(_PATIENCE)
        self._warming.pop(model.digest, None)

    # On the loader's thread

    def _read(self, model: Served) -> Packed:
        adapter = self._catalogue.read(model)
        slots = self._runner.slots
        return pack(adapter.tree, adapter.scaling, adapter.rank, slots.sites, slots.dtype)

    def _on_loaded(self, model: Served, held: bool, error: str) -> None:
        if held:
            self._do(lambda: self._batcher.loaded(model, error))
        else:
            self._do(lambda: self._warmed(model))

    # On the engine's own thread

    def _run(self) -> None:
        try:
            while self._do_tasks():
                worked = self._batcher.step()
                self._pace.saw(self._batcher.finished.total(), busy=worked)
                self._publish(worked)
            self._batcher.end("")
        except Exception as error:  # a defect, or memory ran out: everybody is told
            _LOG.exception("the engine broke down")
            self._break_down(f"the engine broke down: {error}")

    def _do_tasks(self) -> bool:
        """Do what callers asked for, once there is that or more to compute; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._busy or not self._open)
            tasks = list(self._inbox)
            self._inbox.clear()
        for task in tasks:
            task()
        return self._open

    def _arrive(self, request: LiveRequest) -> None:
        self._batcher.arrive(request)
        self._arrived[request.tenant] += 1

    def _warmed(self, model: Served) -> None:
        self._batcher.warmed(model)
        if done := self._warming.get(model.digest):
            done.set()

    def _publish(self, busy: bool) -> None:
        stats, waiting = snapshot(self._batcher), Counter(r.tenant for r in self._batcher.waiting)
        with self._changed:
            self._stats, self._waiting, self._busy = stats, waiting, busy
            self._queued, self._arrived = self._queued - self._arrived, Counter()
            self._changed.notify_all()

    def _break_down(self, error: str) -> None:
        with self._changed:
            self._stopping, self._fault = True, error
        self._batcher.end(error)
        self._publish(busy=False)
        while self._do_tasks():
            self._batcher.end(error)
            self._publish(busy=False)


def _lengths(base: Base, options: EngineOptions) -> tuple[int, int]:
    """The longest text, and how many tokens are held at once.  Raises ConfigError."""
    config: Any = base.model.config
    made_for = getattr(config.get_text_config(), "max_position_embeddings", _LONGEST)
    length = options.max_length or min(made_for, _LONGEST)
    tokens = options.kv_tokens or options.max_rows * length
    if length > made_for:
        raise ConfigError(f"max_length = {length}: {base.name} reads at most {made_for} tokens")
    if not 2 <= length <= tokens:
        raise ConfigError(
            f"max_length = {length} and kv_tokens = {tokens}: a text must have room",
            "at least 2, and no more than all tokens together",
        )
    least = {"max_rows": 1, "max_waiting": 1, "prefill_tokens": 1, "slots": len(options.pinned) + 1}
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise ConfigError(f"{name} = {getattr(options, name)} is less than {bound}")
    return length, tokens


def _recorder(base: Base) -> CudaRecorder:
    """Raises ConfigError where nothing can be recorded."""
    check_recording(base.device, number_type(base.model))
    return CudaRecorder()


def _ends(base: Base) -> Collection[int]:
    """The tokens that end an answer."""
    own = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return frozenset(end for end in [*named, base.tokenizer.eos_token_id] if end is not None)
