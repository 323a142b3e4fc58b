"""uvicorn on a socket of ours, and how it ends: what is under way is answered first.

The first SIGTERM or SIGINT refuses what is new with 503 and waits for what is under way, at most
`drain_seconds`; then the engine is closed, which ends the rest, and whoever still does not read
what it asked for is hung up on.  A second one does not wait.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn

from ...errors import ConfigError
from .api import application
from .bounded_connections import bounded
from .generation import Front

log = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 30
_REST_SECONDS = 5.0
"""For answers that were cut short to reach their readers."""


class HttpServer(uvicorn.Server):
    """Answers requests from `run` until it is told to leave."""

    def __init__(self, front: Front, drain_seconds: float, opened: Callable[[], None]) -> None:
        """`opened` is called once connections are taken."""
        super().__init__(
            uvicorn.Config(
                application(front),
                lifespan="off",
                ws="none",
                # h11 bounds what comes before a body; httptools takes headers of any size
                http=bounded(front.head_seconds, front.read_seconds, front.connections),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            )
        )
        self.cut_short = False
        self._front, self._drain_seconds, self._opened = front, drain_seconds, opened
        self._leaving: asyncio.Task[None] | None = None

    async def run_on(self, listening: socket.socket) -> bool:
        """Answer what comes to a bound socket; whether everything under way could be answered."""
        self._loop = asyncio.get_running_loop()
        try:
            await self.serve([listening])
        except OSError as error:  # somebody else listens there since we have bound
            raise ConfigError(f"cannot listen: {error.strerror or error}") from error
        finally:
            if self._leaving is not None:
                self._leaving.cancel()
            await asyncio.to_thread(self._front.engine.close)
            self._front.openers.shutdown(wait=False, cancel_futures=True)
            await asyncio.sleep(0)  # what the engine said last is heard
        return not self.cut_short

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._opened()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which would wait for ever for a client that does not read."""
        waiting = self._loop.call_later(_REST_SECONDS, self._hang_up)
        try:
            await super().shutdown(sockets)
        finally:
            waiting.cancel()

    def _hang_up(self) -> None:
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self._front.doorway.leaving:
            self.should_exit = self.force_exit = self.cut_short = True
        else:
            self._loop.call_soon_threadsafe(self.leave)

    def leave(self) -> None:
        """Take nothing new, and end when nothing is under way; on the loop's thread."""
        self._front.doorway.leaving = True
        self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        doorway = self._front.doorway
        if not await _within(self._drain_seconds, doorway.wait_until_empty()):
            log.warning("%d requests are cut short", doorway.in_flight)
            self.cut_short = True
            await asyncio.to_thread(self._front.engine.close)
            await _within(_REST_SECONDS, doorway.wait_until_empty())
        self.should_exit = True


async def _within(seconds: float, what: Awaitable[None]) -> bool:
    """Whether it came about in time."""
    try:
        await asyncio.wait_for(what, seconds)
    except TimeoutError:
        return False
    return True
