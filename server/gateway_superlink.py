"""The gateway's way to the SuperLink: requests that have passed are handed on, answers come back.

Nothing but the headers that Flower needs goes either way, and no redirect is followed or passed on.
A question for messages that finds none is asked again until there is one, so that a participant
learns of its work at once; Flower's SuperNode by itself would ask every three seconds.
"""

from __future__ import annotations

import asyncio
import io
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web
from yarl import URL

from ..fleet_routes import ANSWER_HEADERS, PULL_MESSAGES, REQUEST_HEADERS
from .gateway_refusal import Refusal

HOLD_SECONDS = 20.0
"""A SuperNode gives up after 30."""
ASK_SECONDS = 0.25
MOST_ASKS = 40.0
"""A second, by all that wait together."""

_ANSWER_SECONDS = 25.0
_CONNECTIONS = 16  # each is short: a question that waits for messages holds none
_PIECE = 64 * 1024
_LARGEST_WHOLE = 16 * 2**20  # bytes; a message's description, or a list of its objects


@dataclass(frozen=True)
class Whole:
    """An answer of the SuperLink's, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_empty(self) -> bool:
        """A protobuf message without any field has no bytes."""
        return self.status == 200 and not self.body


class SuperLink:
    """One SuperLink.  Use it in an `async with` statement."""

    def __init__(self, address: str, tls: ssl.SSLContext, hold: float = HOLD_SECONDS) -> None:
        """`address` is "host:port"."""
        self._base, self._tls, self._hold = f"https://{address}", tls, hold
        self._session: aiohttp.ClientSession
        self._stopping = asyncio.Event()
        self._waiting = 0

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls, limit=_CONNECTIONS),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=_ANSWER_SECONDS),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    def stop(self) -> None:
        """Let nobody wait for messages any longer."""
        self._stopping.set()

    async def ask(
        self, path: str, headers: Mapping[str, str], body: bytes
    ) -> aiohttp.ClientResponse:
        """Hand a request on; the answer's body is still to come.  Refusal where none comes."""
        try:
            answer = await self._session.post(
                URL(self._base + path, encoded=True),
                data=io.BytesIO(body) if len(body) > _PIECE else body,  # in pieces, not all at once
                headers=_only(headers, REQUEST_HEADERS),
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _away() from error
        if 300 <= answer.status < 400:
            answer.close()
            raise Refusal(502, "the SuperLink answers with a redirect")
        return answer

    async def pull(
        self, headers: Mapping[str, str], body: bytes, wanted: Callable[[], bool]
    ) -> Whole:
        """The answer to pull-messages; an empty one only after a while.

        `wanted` says whether the participant still waits: a message that is handed out to nobody
        would be lost.
        """
        end = time.monotonic() + self._hold
        self._waiting += 1
        try:
            while True:
                answer = await self.told(PULL_MESSAGES, headers, body)
                late = time.monotonic() >= end or self._stopping.is_set()
                if not answer.is_empty or late or not wanted():
                    return answer
                await self._pause()
        finally:
            self._waiting -= 1

    async def told(self, path: str, headers: Mapping[str, str], body: bytes) -> Whole:
        """Hand a request on and read the answer, which is a small one.  Refusal like `ask`."""
        async with await self.ask(path, headers, body) as answer:
            try:
                data = await _whole(answer.content)
            except (aiohttp.ClientError, TimeoutError) as error:
                raise _away() from error
            return Whole(answer.status, _only(answer.headers, ANSWER_HEADERS), data)

    async def _pause(self) -> None:
        """The more wait, the less often each asks."""
        seconds = max(ASK_SECONDS, self._waiting / MOST_ASKS)
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return


async def pass_back(answer: aiohttp.ClientResponse, request: web.BaseRequest) -> web.StreamResponse:
    """Stream the SuperLink's answer to who asked; where it breaks off, so does ours."""
    response = web.StreamResponse(
        status=answer.status, headers=_only(answer.headers, ANSWER_HEADERS)
    )
    response.content_length = answer.content_length
    await response.prepare(request)
    try:
        async for piece in answer.content.iter_chunked(_PIECE):
            await response.write(piece)
        await response.write_eof()
    except (aiohttp.ClientPayloadError, aiohttp.SocketTimeoutError):
        if request.transport is not None:
            request.transport.abort()
    return response


async def _whole(content: aiohttp.StreamReader) -> bytes:
    data = bytearray()
    async for piece in content.iter_chunked(_PIECE):
        data += piece
        if len(data) > _LARGEST_WHOLE:
            raise Refusal(502, "the SuperLink's answer is too large")
    return bytes(data)


def _only(headers: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: headers[name] for name in names if name in headers}


def _away() -> Refusal:
    return Refusal(503, "the coordinator's SuperLink gives no answer", "ask again later")
