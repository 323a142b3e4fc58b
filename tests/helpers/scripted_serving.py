"""A server whose engine says what a script says, on real sockets of loopback.

The engine's thread, its order of calls and its ways to end are those of the real one; only the
model is missing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loopback_server import PATIENCE, Server, running
from tiny import save_base
from transformers import AutoTokenizer

from meadow.errors import OverloadedError, StoppedError, TooLongError, UnknownModelError
from meadow.server.serving.catalogue import Card, Health
from meadow.server.serving.chat_prompt import Prompts
from meadow.server.serving.doorway import Doorway
from meadow.server.serving.engine import AdapterLoad, Stats
from meadow.server.serving.generation import Front
from meadow.server.serving.metrics import Meters
from meadow.server.serving.requests import Event, Failed, Finished, Job, PromptRead, Token
from meadow.server.serving.served import Served
from meadow.server.serving.tenants import Tenants
from meadow.server.serving.vocabulary import Vocabulary

BASE = Served("tiny")
NEWS = Served("news", "v7", "ab" * 32, "prod")
LETTERS = range(2, 28)
"""Ids of a to z in the tiny tokenizer."""

Script = Callable[[Job], Iterator[Event]]


def spelled(job: Job) -> Iterator[Event]:
    """The alphabet from the seed's letter on, as long as it may be, with made-up probabilities."""
    at = (job.sampling.seed or 0) % 26
    if job.sampling.score_prompt:
        first, *rest = job.prompt
        yield PromptRead((Token(first, ""), *(Token(id, "", -0.5, ((id, -0.5),)) for id in rest)))
    for step in range(job.sampling.max_tokens):
        id = LETTERS[(at + step) % 26]
        other = LETTERS[(at + step + 1) % 26]
        wanted = job.sampling.logprobs
        top = ((id, -0.25), (other, -1.5))[: wanted or 0]
        yield Token(id, chr(ord("a") + id - 2), None if wanted is None else -0.25, top)
    yield Finished("length", "", len(job.prompt), 1, job.sampling.max_tokens, 0.25)


class ScriptedTicket:
    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedEngine:
    """One thread that answers jobs in turn; `pace`, where it is set, waits before each event."""

    def __init__(self, script: Script = spelled, max_length: int = 64) -> None:
        self.script, self.max_length = script, max_length
        self.jobs: list[Job] = []
        self.tickets: list[ScriptedTicket] = []
        self.fault = ""
        self.room = 10**6
        """How many jobs more are taken."""
        self.pace: threading.Semaphore | None = None
        self._queue: queue.Queue[tuple[Job, Callable[[Event], None], ScriptedTicket] | None]
        self._queue = queue.Queue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, job: Job, on_event: Callable[[Event], None]) -> ScriptedTicket:
        if self._closed.is_set():
            raise StoppedError("the engine is closed")
        if len(job.prompt) + job.sampling.max_tokens > self.max_length:
            raise TooLongError(f"more than {self.max_length} tokens", self.max_length)
        if not self.room:
            raise OverloadedError("the queue is full", 2.5)
        self.room -= 1
        ticket = ScriptedTicket()
        self.jobs.append(job)
        self.tickets.append(ticket)
        self._queue.put((job, on_event, ticket))
        return ticket

    def stats(self) -> Stats:
        loads = (AdapterLoad("news@v7", 2, 1), AdapterLoad('odd"\\', 1, 0))
        return Stats(
            3, 1, 16, 30, 120, 2, 16, 5, 4, 3, 1000, 2000, 7, 8, 9, 110, 10, 220, 55, 44, False,
            {"stop": 1, "length": 2}, loads,
        )  # fmt: skip

    def close(self) -> None:
        self._closed.set()
        self._queue.put(None)
        if self.pace is not None:
            self.pace.release(10**6)
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            self._answer(*entry)

    def _answer(self, job: Job, on_event: Callable[[Event], None], ticket: ScriptedTicket) -> None:
        made = 0
        for event in self.script(job):
            while self.pace is not None and not self.pace.acquire(timeout=0.01):
                if ticket.cancelled.is_set() or self._closed.is_set():
                    break
            if ticket.cancelled.is_set() or self._closed.is_set():
                on_event(Finished("abort", "", len(job.prompt), 0, made))
                return
            made += isinstance(event, Token)
            on_event(event)


@dataclass
class ScriptedLease:
    model: Served
    released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        assert not self.released.is_set()
        self.released.set()

    def __enter__(self) -> ScriptedLease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class ScriptedCatalogue:
    def __init__(self) -> None:
        self.models = {"tiny": BASE, "news": NEWS, "news@prod": NEWS, "news@v7": NEWS}
        self.leases: list[ScriptedLease] = []
        self.state = Health("", (), 0)

    def acquire(self, model: str) -> ScriptedLease:
        if model not in self.models:
            raise UnknownModelError(f"there is no model {model[:80]!r}")
        lease = ScriptedLease(self.models[model])
        self.leases.append(lease)
        return lease

    def ready(self, model: str) -> ScriptedLease | None:
        return self.acquire(model) if model in ("tiny", "news") else None

    def cards(self) -> list[Card]:
        news = Card("news", "tiny", NEWS.version, NEWS.digest, 1_800_000_000)
        return [Card("tiny", ""), news]

    def health(self) -> Health:
        return self.state


@cache
def tokenizer() -> Any:
    with TemporaryDirectory() as folder:
        return AutoTokenizer.from_pretrained(save_base(Path(folder)))


def scripted_front(
    script: Script = spelled,
    *,
    keys: Path | None = None,
    words: Any = None,
    hosts: frozenset[str] | None = None,
    **options: Any,
) -> Front:
    """`words` is the tokenizer, the tiny base's where none is given."""
    words, meters = words or tokenizer(), Meters()
    catalogue: Any = ScriptedCatalogue()
    return Front(
        base="tiny", engine=ScriptedEngine(script), catalogue=catalogue,
        prompts=Prompts(words, len(words)), vocabulary=Vocabulary(words),
        tenants=Tenants(keys), doorway=Doorway(meters, hosts), meters=meters, **options,
    )  # fmt: skip


@contextmanager
def served(front: Front, drain_seconds: float = PATIENCE) -> Iterator[Server]:
    """A server that answers until the block ends; a lease that is left is an error."""
    with running(front, drain_seconds) as server:
        yield server
    assert all(lease.released.is_set() for lease in server.catalogue.leases)


def failing(text: str = "a defect") -> Script:
    """One token, and then a fault."""

    def script(job: Job) -> Iterator[Event]:
        yield Token(2, "a")
        yield Failed(text)

    return script
