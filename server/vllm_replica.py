"""One vLLM server, as its API shows it: which adapters it has, to load one, to drop one, to ask it.

vLLM 0.33 with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.  `load_inplace` is never used: it switches the
weights of answers under way, and leaves stale prefixes in the cache.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..errors import ReplicaError
from .canaries import Canary

_LARGEST_ANSWER = 2**24  # bytes
_SHOWN = 200


@dataclass(frozen=True)
class Card:
    """What a server says of a model: where an adapter was loaded from, and onto which base."""

    root: str
    parent: str | None
    """None for a base."""


class Replica:
    """A server at `url`, and what it was last seen to have."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        key: str = "",
        seconds: float = 60.0,
        look_seconds: float = 10.0,
    ) -> None:
        """`key` is the server's own API key; `seconds` is how long an answer may take, and
        `look_seconds` the list of its models, which costs it nothing."""
        self.url, self.session = url.rstrip("/"), session
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=5)
        self._look_timeout = aiohttp.ClientTimeout(total=min(look_seconds, seconds), sock_connect=5)
        self._lost = asyncio.Event()
        self.cards: Mapping[str, Card] | None = None
        """By name, as of the last look; None while it cannot be reached."""
        self.ready: set[str] = set()
        """Adapters that it has and that have passed their prompts since they were loaded."""
        self.in_flight = 0

    @property
    def bases(self) -> set[str]:
        return {name for name, card in (self.cards or {}).items() if card.parent is None}

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A client's request is under way there."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def card(self, name: str) -> Card | None:
        """What it was last seen to say of a model."""
        return (self.cards or {}).get(name)

    async def look(self) -> None:
        """See what it has now; nothing of what it lost, in a restart perhaps, stays ready."""
        try:
            self.cards = _cards(await self._ask("GET", "/v1/models", timeout=self._look_timeout))
        except ReplicaError:
            self.gone()
            raise
        self.ready &= self.cards.keys()

    def gone(self) -> None:
        """It cannot be reached: what it has, the next look shows."""
        self.cards = None
        self.ready.clear()
        self._lost.set()
        self._lost = asyncio.Event()

    async def lost(self) -> None:
        """Returns once it could not be reached."""
        await self._lost.wait()

    async def load(self, name: str, path: str) -> None:
        """Load an adapter under a name that it does not have.  Raises ReplicaError."""
        await self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload(self, name: str) -> None:
        """Drop a name; answers under way end on its weights.  Raises ReplicaError."""
        self.ready.discard(name)
        try:
            await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except ReplicaError as error:
            if error.status != 404:  # it is gone already
                raise

    async def answer(self, name: str, canary: Canary) -> str:
        """What a model says, greedily.  Raises ReplicaError, also where another one answers."""
        said = await self._complete(name, canary)
        try:
            choice, model = said["choices"][0], said["model"]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            tokens = said["usage"]["completion_tokens"]
        except (KeyError, IndexError, TypeError) as error:
            raise ReplicaError(f"{self.url} answers {name} with no completion") from error
        if model != name or not isinstance(tokens, int) or tokens < 1:
            raise ReplicaError(f"{self.url} answers {name} with {tokens} tokens of {model!r}")
        if not isinstance(text, str | None):
            raise ReplicaError(f"{self.url} answers {name} with what is no text")
        return text or ""

    async def _complete(self, name: str, canary: Canary) -> Any:
        asked = {"model": name, "temperature": 0.0, "max_tokens": canary.tokens, "seed": 0}
        if canary.prompt:
            messages = [{"role": "user", "content": canary.prompt}]
            try:
                return await self._ask(
                    "POST", "/v1/chat/completions", {**asked, "messages": messages}
                )
            except ReplicaError as error:
                if error.status != 400:  # 400: the tokenizer has no chat template
                    raise
        return await self._ask("POST", "/v1/completions", {**asked, "prompt": canary.plain})

    async def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout: aiohttp.ClientTimeout | None = None,
    ) -> Any:
        """The answer's JSON, or its text where it is none.  Raises ReplicaError."""
        try:
            async with self.session.request(
                method,
                self.url + path,
                json=body,
                headers=self.headers,
                timeout=timeout or self._timeout,
                allow_redirects=False,
            ) as answer:
                data, status = await self._read(answer), answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ReplicaError(f"{self.url} gives no answer: {_reason(error)}") from error
        found = _parsed(data)
        if status != 200:
            hint = "is its API key right?" if status == 401 else ""
            raise ReplicaError(
                f"{self.url} refuses {path} ({status}): {_said(found)}", hint, status
            )
        return found

    async def _read(self, answer: aiohttp.ClientResponse) -> bytes:
        """All of a body, in however many pieces it comes.  Raises ReplicaError for a large one."""
        data = bytearray()
        async for piece in answer.content.iter_any():
            data += piece
            if len(data) > _LARGEST_ANSWER:
                raise ReplicaError(f"{self.url} answers with more than {_LARGEST_ANSWER} bytes")
        return bytes(data)


def _cards(answer: Any) -> dict[str, Card]:
    match answer:
        case {"data": [*rows]}:
            return dict(card for row in rows for card in _card(row))
    raise ReplicaError("the list of models is none", "is a vLLM server at this address?")


def _card(row: Any) -> Iterator[tuple[str, Card]]:
    match row:
        case {"id": str(name)}:
            parent = row.get("parent")
            yield name, Card(str(row.get("root")), None if parent is None else str(parent))


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode(errors="replace")


def _said(found: Any) -> str:
    """The message of an error in OpenAI's shape, or whatever was said, in one short line."""
    match found:
        case {"error": {"message": str(message)}} | {"message": str(message)}:
            found = message
    return " ".join(str(found).split())[:_SHOWN]


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
