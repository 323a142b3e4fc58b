"""A server whose engine says what a script says, on real sockets of loopback.

The engine's thread, its order of calls and its ways to end are those of the real one; only the
model is missing.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tiny import save_base
from transformers import AutoTokenizer

from meadow.errors import OverloadedError, StoppedError, TooLongError, UnknownModelError
from meadow.server.serving.catalogue import Card, Health
from meadow.server.serving.chat_prompt import Prompts
from meadow.server.serving.doorway import Doorway
from meadow.server.serving.engine import AdapterLoad, Stats
from meadow.server.serving.generation import Front
from meadow.server.serving.http_server import HttpServer
from meadow.server.serving.metrics import Meters
from meadow.server.serving.requests import Event, Failed, Finished, Job, Token
from meadow.server.serving.served import Served
from meadow.server.serving.tenants import Tenants
from meadow.server.serving.vocabulary import Vocabulary

BASE = Served("tiny")
NEWS = Served("news", "v7", "ab" * 32, "prod")
LETTERS = range(2, 28)
"""Ids of a to z in the tiny tokenizer."""
PATIENCE = 60.0

Script = Callable[[Job], Iterator[Event]]


def spelled(job: Job) -> Iterator[Event]:
    """The alphabet from the seed's letter on, as long as it may be, with made-up probabilities."""
    at = (job.sampling.seed or 0) % 26
    for step in range(job.sampling.max_tokens):
        id = LETTERS[(at + step) % 26]
        other = LETTERS[(at + step + 1) % 26]
        wanted = job.sampling.logprobs
        top = ((id, -0.25), (other, -1.5))[: wanted or 0]
        yield Token(id, chr(ord("a") + id - 2), None if wanted is None else -0.25, top)
    yield Finished("length", "", len(job.prompt), 1, job.sampling.max_tokens)


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
            3, 1, 16, 30, 120, 2, 16, 5, 4, 3, 1000, 2000, 7, 8, 9, 110, 10, 220, 55,
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


class Server:
    """A front that is being served."""

    def __init__(self, front: Front, drain_seconds: float) -> None:
        self.front, self.failure = front, list[BaseException]()
        self._opened = threading.Event()
        self.http = HttpServer(front, drain_seconds, self._opened.set)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self.finished: bool | None = None
        """What `run_on` gave."""
        self.thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def engine(self) -> ScriptedEngine:
        engine: Any = self.front.engine
        return engine  # type: ignore[no-any-return]

    @property
    def catalogue(self) -> ScriptedCatalogue:
        catalogue: Any = self.front.catalogue
        return catalogue  # type: ignore[no-any-return]

    def start(self) -> None:
        self.thread.start()
        assert self._opened.wait(PATIENCE), self.failure

    def leave(self) -> None:
        """As a first SIGTERM does."""
        self.http.handle_exit(15, None)

    def join(self) -> None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive() and not self.failure, self.failure

    def _run(self) -> None:
        try:
            with self._socket:
                self.finished = asyncio.run(self.http.run_on(self._socket))
        except BaseException as error:  # shown where the thread is joined
            self.failure.append(error)

    # As a caller

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        key: str = "",
        raw: bytes | None = None,
        method: str = "",
        headers: dict[str, str] | None = None,
    ) -> Reply:
        data = json.dumps(body).encode() if raw is None and body is not None else raw
        told = {"Content-Type": "application/json"} if data is not None else {}
        told |= {"Authorization": f"Bearer {key}"} if key else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            method = method or ("GET" if data is None else "POST")
            connection.request(method, path, data, told | (headers or {}))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())
        finally:
            connection.close()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        assert found.keys() == {"message", "type", "param", "code"}
        assert found["code"] == self.status
        return found

    @property
    def events(self) -> list[Any]:
        """A stream's events; it has to end as one."""
        assert self.headers["content-type"].startswith("text/event-stream")
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == "" and parts.pop() == "data: [DONE]"
        assert all(part.startswith("data: ") and "\n" not in part for part in parts)
        return [json.loads(part[6:]) for part in parts]


@contextmanager
def served(front: Front, drain_seconds: float = PATIENCE) -> Iterator[Server]:
    """A server that answers until the block ends; what it left open is an error."""
    server = Server(front, drain_seconds)
    server.start()
    try:
        yield server
    finally:
        if server.thread.is_alive():
            server.leave()
        server.join()
    assert all(lease.released.is_set() for lease in server.catalogue.leases)
    assert front.doorway.in_flight == 0


def failing(text: str = "a defect") -> Script:
    """One token, and then a fault."""

    def script(job: Job) -> Iterator[Event]:
        yield Token(2, "a")
        yield Failed(text)

    return script
