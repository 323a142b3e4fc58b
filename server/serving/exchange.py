"""One request's prompts in the engine: submitted together, heard together, ended together.

The engine speaks on its own thread; everything here but `_heard` happens on the event loop's.  A
model's lease is kept until the last of its jobs has ended, also where nobody listens any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Protocol

from .catalogue import Lease
from .engine import Stats
from .metrics import Meters
from .requests import Event, Failed, Finished, Job, Token


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Backend(Protocol):
    """What of the engine is needed here; see `engine.Engine`."""

    max_length: int

    @property
    def fault(self) -> str: ...

    def submit(self, job: Job, on_event: Callable[[Event], None]) -> Cancellable: ...

    def stats(self) -> Stats: ...

    def close(self) -> None: ...


class Exchange:
    """Made on the event loop, for one request; `cancel` it in the end, however that comes."""

    def __init__(self, engine: Backend, lease: Lease, meters: Meters) -> None:
        self._engine, self._lease, self._meters = engine, lease, meters
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Cancellable] = []
        self._spoke: list[float] = []  # when each job was last heard of
        self._begun: set[int] = set()  # jobs that have given a token
        self._open = 0  # jobs in the engine
        self._all_are_in = False
        self._began = time.monotonic()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Give all of them to the engine, or none.  Raises what `Engine.submit` raises."""
        try:
            for index, job in enumerate(jobs):
                self._spoke.append(self._began)
                self._tickets.append(self._engine.submit(job, partial(self._heard, index)))
                self._open += 1
        except BaseException:
            self.cancel()
            raise
        finally:
            self._all_are_in = True
            self._release_if_done()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(job, event), as they come, until every job has ended."""
        waiting = len(self._tickets)
        while waiting:
            index, event = await self._queue.get()
            waiting -= isinstance(event, Finished | Failed)
            yield index, event

    def cancel(self) -> None:
        """Let go of what has not ended yet."""
        for ticket in self._tickets if self._open else ():
            ticket.cancel()

    def _heard(self, index: int, event: Event) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._take, index, event, time.monotonic())

    def _take(self, index: int, event: Event, now: float) -> None:
        self._queue.put_nowait((index, event))
        match event:
            case Token():
                self._time(index, now)
            case Finished() | Failed():
                self._end(event, now)

    def _end(self, event: Finished | Failed, now: float) -> None:
        self._open -= 1
        self._meters.ended(_reason(event), now - self._began)
        if isinstance(event, Finished) and event.queued is not None:
            self._meters.queued.observe(event.queued)
        self._release_if_done()

    def _time(self, index: int, now: float) -> None:
        if index in self._begun:
            self._meters.between_tokens.observe(now - self._spoke[index])
        else:
            self._begun.add(index)
            self._meters.first_token.observe(now - self._began)
        self._spoke[index] = now

    def _release_if_done(self) -> None:
        if self._all_are_in and not self._open:
            self._lease.release()


def _reason(event: Finished | Failed) -> str:
    return event.reason if isinstance(event, Finished) else "error"
