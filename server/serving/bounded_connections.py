"""Connections that keep their place only while they use it.

uvicorn bounds how large a request's head may be, and how long a connection may be silent after an
answer; not how long a head may take to come, nor an answer to be read, nor how many connections
there are.  Whoever opens many and says nothing, or a byte now and then, or asks and does not read,
would take all that the system has to give.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)


class BoundedConnection(H11Protocol):
    """One client's connection.  Where there are too many, the one that has waited longest for a
    request is closed; where all are busy, the newest."""

    head_seconds: ClassVar[float]
    """In which a head has to come, once its connection is open or its first byte is there."""
    read_seconds: ClassVar[float]
    """In which a client has to read some of an answer, once all buffers are full of it."""
    most: ClassVar[int]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._due: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self._idle_since = self.loop.time()

    @property
    def idle(self) -> bool:
        """Whether no request is under way; a part of its head may be."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self.idle:
            self._wait_for_head()
        super().data_received(data)
        if not self.idle:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        self._stop_watching_reader()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching_reader()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._due is None:
            self._due = self.loop.call_later(self.head_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _give_up(self) -> None:
        self._due = None
        if self.idle:
            self.transport.abort()

    def _wait_for_reader(self) -> None:
        left = self.transport.get_write_buffer_size()  # bytes, of which none are added meanwhile
        self._stuck = self.loop.call_later(self.read_seconds, self._look_at_reader, left)

    def _look_at_reader(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._wait_for_reader()
        else:
            self.transport.abort()

    def _stop_watching_reader(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _make_room(self) -> None:
        others = (one for one in self.connections if isinstance(one, BoundedConnection))
        idle = [one for one in others if one.idle and not one.transport.is_closing()]
        idle.remove(self)
        if idle:
            min(idle, key=lambda one: one._idle_since).transport.abort()
        else:
            self.transport.write(_FULL)
            self.transport.close()


def bounded(head_seconds: float, read_seconds: float, most: int) -> type[BoundedConnection]:
    """What uvicorn makes of each connection under these bounds."""
    bounds = {"head_seconds": head_seconds, "read_seconds": read_seconds, "most": most}
    return type("Bounded", (BoundedConnection,), bounds)
