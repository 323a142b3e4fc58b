"""A request's body: JSON, of bounded size, in bounded time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from .openai_errors import ApiError

_PATIENCE = 4
"""How many times the limit is read, and dropped, so that a client that is still sending hears why
it is refused."""


async def read_json_body(request: Request, largest: int, seconds: float) -> bytes:
    """Raises ApiError: 415 for what is declared as something else (which a web page may send
    anywhere without being asked), 413 for too many bytes, 408 for too slow ones."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the body as `Content-Type: application/json`", close=True)
    too_large = ApiError(413, f"the body has more than {largest} bytes", close=True)
    if "expect" in request.headers and int(request.headers.get("content-length", 0)) > largest:
        raise too_large  # it asks before it sends
    try:
        async with asyncio.timeout(seconds):
            body = await _read(request, largest)
    except TimeoutError:
        raise ApiError(408, f"the body did not come in {seconds:g} s", close=True) from None
    if body is None:
        raise too_large
    return body


async def _read(request: Request, largest: int) -> bytes | None:
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= largest:
            body += chunk
        elif size > largest * _PATIENCE:
            break
    return bytes(body) if size <= largest else None
