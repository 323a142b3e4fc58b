"""What every HTTP request passes first: whose name it came under, and whether we are leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...loopback import without_port
from .metrics import Meters
from .openai_errors import ApiError

_ALWAYS = ("/health", "/metrics")
"""Answered to the end: who watches wants to see us leave."""


class Doorway:
    """Counts what is under way; once `leaving`, refuses what is new.

    A server without keys trusts whoever reaches it.  On loopback that is every program of this
    machine, browsers among them: requests under another name than `hosts` are refused, so that a
    web page cannot bring its own name to point here (DNS rebinding).
    """

    def __init__(self, meters: Meters, hosts: Collection[str] | None = None) -> None:
        """`hosts` are names without port; None allows all."""
        self._meters, self._hosts = meters, hosts
        self.leaving = False
        self.in_flight = 0
        self._empty = asyncio.Event()
        self._empty.set()

    async def wait_until_empty(self) -> None:
        await self._empty.wait()

    async def handle(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; HTTP is all that there is."""
        if scope["type"] != "http":
            return
        try:
            self._check(scope)
        except ApiError as error:
            self._meters.answers[error.status] += 1
            await error.answer()(scope, receive, send)
            return
        self.in_flight += 1
        self._empty.clear()
        try:
            await app(scope, receive, self._counting(send))
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._empty.set()

    def _check(self, scope: Scope) -> None:
        if self._hosts is not None:
            host = without_port(Headers(scope=scope).get("host", ""))
            if host not in self._hosts:
                raise ApiError(421, f"{host[:80]!r} is not this server", close=True)
        if self.leaving and scope["path"] not in _ALWAYS:
            raise ApiError(503, "the server is ending", retry_after=1.0, close=True)

    def _counting(self, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._meters.answers[message["status"]] += 1
            await send(message)

        return counted


class DoorwayMiddleware:
    """A doorway before an application, as Starlette wants it."""

    def __init__(self, app: ASGIApp, doorway: Doorway) -> None:
        self._app, self._doorway = app, doorway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._doorway.handle(self._app, scope, receive, send)
