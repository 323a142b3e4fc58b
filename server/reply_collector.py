"""Replies off a grid, of which one that does not come holds up no other.

Flower hands a reply out as soon as it is announced, and then waits in the same call until its last
byte has come: for as long as its sender takes, or for three minutes of silence (Flower 1.41).  So a
call that takes its time is left to a thread of its own, while the others are looked at.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Generic, Protocol, TypeVar

PATIENCE = 4.0
"""Seconds that one reply may take before the others are looked at."""
MOST_SLOW = 2
"""Replies that may come slowly at a time: what they have so far is in memory, however many are to
come.  Those behind them wait, for three minutes of silence at most."""

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Pull = Callable[[str], list[R]]
"""A message's id -> what has been replied to it, if anything."""


class Replies(Protocol[R_co]):
    """Looks for replies."""

    def of(self, message_ids: Iterable[str]) -> Iterator[tuple[str, R_co]]:
        """What has come since the last look, with the id of the message that it answers."""


class Direct(Generic[R]):
    """For a grid whose nodes do their work in the call itself, on this thread."""

    def __init__(self, pull: Pull[R]) -> None:
        self._pull = pull

    def of(self, message_ids: Iterable[str]) -> Iterator[tuple[str, R]]:
        for message_id in sorted(message_ids):
            for reply in self._pull(message_id):
                yield message_id, reply


class Collector(Generic[R]):
    """For a grid whose nodes are elsewhere.  One thread uses it."""

    def __init__(
        self, pull: Pull[R], patience: float = PATIENCE, most_slow: int = MOST_SLOW
    ) -> None:
        self._pull, self._patience, self._most = pull, patience, most_slow
        self._slow: dict[str, tuple[_Puller[R], Future[list[R]]]] = {}
        self._idle: list[_Puller[R]] = []

    def of(self, message_ids: Iterable[str]) -> Iterator[tuple[str, R]]:
        """One at a time is in memory, besides those that come slowly."""
        for message_id in sorted(message_ids):
            for reply in self._look(message_id):
                yield message_id, reply

    def _look(self, message_id: str) -> list[R]:
        if message_id in self._slow:
            puller, found = self._slow.pop(message_id)
            patience = 0.0
        elif len(self._slow) < self._most:
            puller = self._idle.pop() if self._idle else _Puller(self._pull)
            found, patience = puller.begin(message_id), self._patience
        else:
            return []
        if not _is_done(found, patience):
            self._slow[message_id] = puller, found
            return []
        self._idle.append(puller)
        return found.result()


class _Puller(Generic[R]):
    """A thread that pulls for one message at a time, and keeps no process from ending."""

    def __init__(self, pull: Pull[R]) -> None:
        self._pull = pull
        self._jobs: queue.SimpleQueue[tuple[str, Future[list[R]]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def begin(self, message_id: str) -> Future[list[R]]:
        found: Future[list[R]] = Future()
        self._jobs.put((message_id, found))
        return found

    def _work(self) -> None:
        while True:
            message_id, found = self._jobs.get()
            try:
                found.set_result(self._pull(message_id))
            except BaseException as error:  # raised where the result is looked at
                found.set_exception(error)
            del found  # it holds a reply, and the next job may be long in coming


def _is_done(found: Future[list[R]], patience: float) -> bool:
    try:
        found.exception(patience)
    except NotYet:
        return False
    return True
