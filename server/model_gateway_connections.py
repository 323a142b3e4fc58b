"""The gateway's connections: so many at most, and none that only waits keeps others out.

aiohttp bounds neither.  Whoever opened many and said nothing would take all files that the process
may have open, and with them the way to the servers.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

IDLE_SECONDS = 30.0
"""In which a head has to come, once its connection is open or the answer before it was sent."""
_OWN_FILES = 128
"""For the servers' lists, the registry and the process itself."""
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)


def most_connections() -> int:
    """What the system's limit of open files leaves room for: each has one to a server, too."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**16 if files == resource.RLIM_INFINITY else max(8, (files - _OWN_FILES) // 2)


class Connections:
    """Where there are more than `most`, the one that has waited longest for a request is closed;
    where all are busy, the newest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[web.RequestHandler, None] = {}  # in the order in which they began
        self._busy: set[web.RequestHandler] = set()

    @contextmanager
    def busy(self, connection: web.RequestHandler) -> Iterator[None]:
        """A request of a connection is under way."""
        if connection not in self._waiting:  # it was closed, or is none of these
            yield
            return
        del self._waiting[connection]
        self._busy.add(connection)
        try:
            yield
        finally:
            self._busy.remove(connection)
            if connection.transport is not None:
                self._waiting[connection] = None

    def opened(self, connection: web.RequestHandler) -> None:
        self._waiting[connection] = None
        if len(self._waiting) + len(self._busy) > self._most:
            longest = next(iter(self._waiting))
            del self._waiting[longest]
            _turn_away(longest, polite=longest is connection)

    def closed(self, connection: web.RequestHandler) -> None:
        self._waiting.pop(connection, None)


def _turn_away(connection: web.RequestHandler, *, polite: bool) -> None:
    transport = connection.transport
    assert isinstance(transport, asyncio.WriteTransport), "it is open"
    if polite:
        transport.write(_FULL)
        transport.close()
    else:
        transport.abort()


class _Connection(web.RequestHandler):
    def __init__(self, server: web.Server, all_of_them: Connections) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # which aiohttp takes for none
            keepalive_timeout=IDLE_SECONDS,
        )
        self._all_of_them = all_of_them

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._all_of_them.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._all_of_them.closed(self)
        super().connection_lost(exc)


@asynccontextmanager
async def listening(
    app: web.Application,
    connections: Connections,
    host: str,
    port: int,
    rest_seconds: float = 60.0,
) -> AsyncIterator[tuple[str, int]]:
    """Answer clients until the block ends, and what is under way then for `rest_seconds` more; the
    address.  OSError where it is not to be had."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=rest_seconds)
    await runner.setup()
    try:
        assert runner.server is not None, "it was set up"
        server = runner.server
        found = await asyncio.get_running_loop().create_server(
            lambda: _Connection(server, connections), host, port, backlog=128
        )
        try:
            yield found.sockets[0].getsockname()[:2]
        finally:
            found.close()
    finally:
        await runner.cleanup()
