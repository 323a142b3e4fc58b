"""How strictly the gateway reads a request before anyone looks at what it says.

A request has one form: HTTP/1.1, a target that is byte for byte one of those that exist, no header
twice, a declared length and no other way to delimit a body.  Two programs that read HTTP can then
not disagree about where a request ends or what it asks for.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

from aiohttp import HttpVersion11, web

from .gateway_refusal import Refusal

GRACE_SECONDS = 15.0
SLOWEST = 4096
"""Bytes a second at which a body has to arrive, once the grace is over."""

SMALL = 64 * 1024
"""Bytes that are not worth a file."""

_NEVER = ("Transfer-Encoding", "Content-Encoding", "Upgrade", "Trailer")


def check_form(request: web.BaseRequest) -> None:
    """Raise Refusal for a request in a form that no client of ours uses."""
    if request.version != HttpVersion11:
        raise Refusal(505, "only HTTP/1.1 is spoken here")
    names = Counter(name.lower() for name, _ in request.headers.items())  # keys come once each
    if any(count > 1 for count in names.values()):
        raise Refusal(400, "a header comes twice")
    if any(name in request.headers for name in _NEVER):
        raise Refusal(400, "a header is not accepted here")
    if "Expect" in request.headers:
        raise Refusal(417, "send the body without asking first")


class Body:
    """A body that has arrived.  All but a small one lies in a file without a name."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=SMALL)
        self.length = 0

    def add(self, piece: bytes) -> None:
        self._file.write(piece)
        self.length += len(piece)

    def read(self) -> bytes:
        self._file.seek(0)
        return self._file.read()

    def close(self) -> None:
        self._file.close()


@asynccontextmanager
async def received(
    request: web.BaseRequest, largest: int, grace: float = GRACE_SECONDS
) -> AsyncIterator[Body]:
    """The whole body.  Refusal where it is too large, which is known beforehand, or too slow.

    Who sends slowly costs no memory meanwhile.
    """
    length = _length(request)
    if length > largest:
        raise Refusal(413, f"the body has {length} bytes, {largest} at most are accepted")
    with closing(Body()) as body:
        try:
            async with asyncio.timeout(grace + length / SLOWEST):
                while body.length < length:
                    body.add(await _piece(request))
        except TimeoutError as error:
            raise Refusal(408, "the request's body came too slowly") from error
        except OSError as error:
            raise Refusal(503, "the coordinator cannot hold the request's body") from error
        yield body


async def _piece(request: web.BaseRequest) -> bytes:
    piece = await request.content.read(SMALL)
    if not piece:
        raise Refusal(400, "the request's body is cut off")
    return piece


def _length(request: web.BaseRequest) -> int:
    """The declared length; aiohttp has refused what is no number."""
    if request.method == "GET":
        if request.can_read_body:
            raise Refusal(400, "a GET request carries no body here")
        return 0
    if request.content_length is None:
        raise Refusal(411, "declare the body's length")
    return request.content_length
