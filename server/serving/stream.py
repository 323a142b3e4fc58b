"""Answers that take a while: whole or as server-sent events, and only while somebody listens.

A stream is `data: {json}` and an empty line for each event, and `data: [DONE]` at its end
(https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Send

from .openai_types import to_json

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_EVENTS = "text/event-stream; charset=utf-8"


class GoneError(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives.  Where the client hangs up first, it is cancelled: GoneError."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise GoneError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def sse_event(value: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + to_json(value) + b"\n\n"


async def send_events(
    send: Send, events: AsyncGenerator[bytes, None], headers: dict[str, str]
) -> None:
    """Answer with a stream.  GoneError where the connection breaks."""
    told = {"content-type": _EVENTS, "cache-control": "no-store", **headers}
    raw = [(key.encode("latin-1"), text.encode("latin-1")) for key, text in told.items()]
    try:
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        async with contextlib.aclosing(events) as all_of_them:
            async for body in all_of_them:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": DONE})
    except OSError as error:
        raise GoneError from error
