"""From a request's body to its answer: one class for completions and chat completions.

It is an ASGI answer of its own, so that a key's place, the model's lease and the jobs in the engine
are held exactly as long as it lasts, however it ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ...errors import MeadowError
from .answers import Answer, ChatAnswer, CompletionAnswer
from .api_keys import ApiKey
from .catalogue import Catalogue
from .chat_prompt import Prompts
from .doorway import Doorway
from .exchange import Backend, Exchange
from .metrics import Meters
from .openai_errors import ApiError, refusal
from .openai_types import ChatRequest, CompletionRequest, parse
from .request_body import read_json_body
from .requests import Event, Failed, Finished, Job, PromptRead, Token
from .served import Served
from .stream import GoneError, send_events, sse_event, unless_gone
from .tenants import Place, Tenants
from .vocabulary import Vocabulary

log = logging.getLogger(__name__)

VERSION_HEADER = "x-adapter-version"
_OPENERS = 4
"""Versions that are verified at once."""
_LARGE = 2**16  # bytes
T = TypeVar("T")
Asked = CompletionRequest | ChatRequest


@dataclass
class Front:
    """What answers are made with."""

    base: str
    """What the base model is called."""
    engine: Backend
    catalogue: Catalogue
    prompts: Prompts
    vocabulary: Vocabulary
    tenants: Tenants
    doorway: Doorway
    meters: Meters
    largest_body: int = 4 * 2**20
    """Bytes."""
    body_seconds: float = 30.0
    """In which a body has to come."""
    head_seconds: float = 30.0
    """And what comes before it."""
    read_seconds: float = 60.0
    """In which a client has to read on, once all buffers are full of its answer."""
    connections: int = 768
    """The most that are open; systems often grant a process 1,024 files."""
    openers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_OPENERS, "meadow-versions")
    )

    async def off_loop(self, look: Callable[[str], T], model: str) -> T:
        """What may read a version from the disk: on threads of its own, so that whoever waits for
        that holds up nobody else."""
        return await asyncio.get_running_loop().run_in_executor(self.openers, look, model)


class Generation(Response):
    """The answer to one request for text."""

    def __init__(self, front: Front, kind: type[CompletionRequest] | type[ChatRequest]) -> None:
        super().__init__()
        self._front, self._kind = front, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, tenants = Request(scope, receive), self._front.tenants
        key = tenants.caller(request.headers.get("authorization"), "inference")
        with tenants.admitted(key) as place:
            try:
                await self._answer(request, key, place, send)
            except (GoneError, ClientDisconnect):
                return
            except MeadowError as error:
                raise _told(error) from error

    async def _answer(self, request: Request, key: ApiKey, place: Place, send: Send) -> None:
        front = self._front
        body = await read_json_body(request, front.largest_body, front.body_seconds)
        asked: Asked = await _parsed(self._kind, body)
        place.take(asked.answers)
        prompts, echoed = await asyncio.to_thread(self._read, asked)
        lease = front.catalogue.ready(asked.model)
        if lease is None:
            lease = await front.off_loop(front.catalogue.acquire, asked.model)
        exchange = Exchange(front.engine, lease, front.meters)
        try:
            exchange.submit(self._jobs(asked, prompts, lease.model, key.id))
            answer = self._shape(asked, prompts, echoed, lease.model)
            headers = {VERSION_HEADER: str(lease.model)}
            if asked.stream:
                lines = _lines(exchange, answer)
                await unless_gone(request.receive, send_events(send, lines, headers))
            else:
                told = await unless_gone(request.receive, _whole(exchange, answer))
                response = JSONResponse(told, headers=headers)
                await response(request.scope, request.receive, send)
        finally:
            exchange.cancel()

    def _jobs(
        self, asked: Asked, prompts: Sequence[Sequence[int]], model: Served, tenant: str
    ) -> list[Job]:
        """`n` of each prompt, in the order of the answer's choices."""
        most = self._front.engine.max_length
        return [
            Job(prompt, sampling, model, tenant)
            for prompt in map(tuple, prompts)  # one for all of its answers
            for sampling in asked.samplings(most - len(prompt))
        ]

    def _read(self, asked: Asked) -> tuple[list[list[int]], list[str]]:
        """The prompts' tokens; and their texts, where they are to be repeated."""
        prompts = self._front.prompts
        repeated = asked.prompt if isinstance(asked, CompletionRequest) and asked.echo else []
        return prompts.of(asked), [prompts.text(prompt) for prompt in repeated]

    def _shape(
        self,
        asked: Asked,
        prompts: Sequence[Sequence[int]],
        echoed: Sequence[str],
        model: Served,
    ) -> Answer:
        vocabulary = self._front.vocabulary
        if isinstance(asked, ChatRequest):
            return ChatAnswer(asked, prompts, model, vocabulary)
        return CompletionAnswer(asked, prompts, model, vocabulary, echoed)


async def _parsed(kind: type[CompletionRequest] | type[ChatRequest], body: bytes) -> Asked:
    """Of a large body on another thread: everybody's streams would stand still meanwhile."""
    if len(body) <= _LARGE:
        return parse(kind, body)
    return await asyncio.to_thread(parse, kind, body)


async def _whole(exchange: Exchange, answer: Answer) -> dict[str, Any]:
    async for index, heard in exchange.events():
        match heard:
            case PromptRead():
                answer.read(index, heard)
            case Token():
                answer.add(index, heard)
            case Finished() | Failed():
                answer.end(index, _ended(heard))
    return answer.whole()


async def _lines(exchange: Exchange, answer: Answer) -> AsyncGenerator[bytes, None]:
    """A fault becomes the stream's last event but `[DONE]`: its head has left long ago."""
    for chunk in answer.opening():
        yield sse_event(chunk)
    try:
        async for index, heard in exchange.events():
            for chunk in _chunks(answer, index, heard):
                yield sse_event(chunk)
    except ApiError as error:
        yield sse_event(error.body())
        return
    for chunk in answer.closing():
        yield sse_event(chunk)


def _chunks(answer: Answer, index: int, heard: Event) -> list[dict[str, Any]]:
    """Raises ApiError where it did not end well."""
    match heard:
        case PromptRead():
            return [answer.read_chunk(index, heard)]
        case Token():
            return answer.token_chunk(index, heard)
        case Finished() | Failed():
            return [answer.end_chunk(index, _ended(heard))]


def _ended(heard: Finished | Failed) -> Finished:
    """Raises ApiError where it did not end well."""
    if isinstance(heard, Failed):
        log.error("a request failed: %s", heard.error)
        raise ApiError(500, "the server could not answer; its log says why")
    if heard.reason == "abort":
        raise ApiError(503, "the server is ending", retry_after=1.0)
    return heard


def _told(error: MeadowError) -> ApiError:
    answer = refusal(error)
    if answer.status >= 500:
        log.error("a request failed: %s", error)
    return answer
