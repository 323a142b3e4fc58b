"""The way to vLLM servers for everybody else: a few paths, known models, and the servers' key kept.

vLLM's own ports stay closed to the world: with its API key or without, whoever reaches them can
load adapters from any path.  Here only the paths below exist; a request's `model` is looked up and
replaced by the name of the version that the alias means at that moment, and the answer, streamed or
not, is passed through with the header `x-adapter-version`.

    GET  /v1/models             aliases and bases, without paths
    POST /v1/completions        and /v1/chat/completions
    GET  /health                200 where some model can answer
"""

from __future__ import annotations

import asyncio
import hmac
import io
import json
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import aiohttp
from aiohttp import web

from ..loopback import without_port
from .model_gateway_connections import Connections, most_connections
from .model_routes import ModelRoutes, Target
from .vllm_replica import Replica

log = logging.getLogger(__name__)

LARGEST_BODY = 8 * 2**20  # bytes
_BODY_SECONDS = 30.0
"""In which a body has to come."""
VERSION_HEADER = "x-adapter-version"
_FORWARDED = ("/v1/completions", "/v1/chat/completions")
_LONGEST_NAME = 200
_LOST = (404, 502, 503)
"""How a server answers for a model that it had: it was restarted."""
_RETRY_SECONDS = 1
_PIECE = 2**16  # bytes
_AS_IT_IS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
"""Answers are passed on with the length that their servers say."""
_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError",
          405: "MethodNotAllowedError", 408: "RequestTimeoutError", 413: "RequestTooLargeError",
          415: "UnsupportedMediaTypeError", 421: "MisdirectedRequestError",
          503: "ServiceUnavailableError"}  # fmt: skip

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ModelGateway:
    """Answers clients out of the servers that `routes` knows.

    `keys` are the API keys of those who may ask; without any, everybody may who calls it by one of
    `hosts`, names without port; None allows all.
    """

    def __init__(
        self,
        routes: ModelRoutes,
        keys: Collection[str] = (),
        hosts: Collection[str] | None = None,
        body_seconds: float = _BODY_SECONDS,
    ) -> None:
        self._routes, self._keys, self._hosts = routes, [key.encode() for key in keys], hosts
        self._body_seconds = body_seconds
        self.connections = Connections(most_connections())

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._guarded], client_max_size=LARGEST_BODY)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        for path in _FORWARDED:
            app.router.add_post(path, self._forward)
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every refusal in OpenAI's shape; /health is for everybody."""
        host = request.headers.get("Host", "")
        if self._hosts is not None and without_port(host) not in self._hosts:
            return refusal(421, f"{host[:80]!r} is not this gateway")
        if request.path != "/health" and not self._is_known(request):
            return refusal(401, "no valid API key was given")
        try:
            with self.connections.busy(request.protocol):
                return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return refusal(413, f"a request has at most {LARGEST_BODY} bytes")
        except web.HTTPException as error:
            return refusal(error.status, error.reason)

    def _is_known(self, request: web.Request) -> bool:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        known = scheme.lower() == "bearer"
        given = key.strip().encode(errors="surrogateescape") if known else b""
        return not self._keys or any(hmac.compare_digest(given, own) for own in self._keys)

    async def _health(self, request: web.Request) -> web.Response:
        names = {served.name for served in self._routes.aliases().values()} | self._routes.bases()
        able = any(self._routes.having(name) for name in names)
        return web.Response(status=200 if able else 503)

    async def _models(self, request: web.Request) -> web.Response:
        cards = [_card(name, "", "") for name in sorted(self._routes.bases())]
        base = min(self._routes.bases(), default="")
        for name, served in sorted(self._routes.aliases().items()):
            cards.append(_card(name, base, served.version.id))
        return web.json_response({"object": "list", "data": cards})

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "application/json":  # a web page may send other kinds unasked
            return refusal(415, "send the body as `Content-Type: application/json`")
        try:
            async with asyncio.timeout(self._body_seconds):
                read = await request.read()
            body = json.loads(read)
        except TimeoutError:
            return refusal(408, f"the body did not come in {self._body_seconds:g} s", close=True)
        except (ValueError, RecursionError, web.RequestPayloadError):
            return refusal(400, "the body is not JSON")
        model = body.get("model") if isinstance(body, dict) else None
        if not isinstance(model, str):
            return refusal(400, "the body names no model", "model")
        if is_path(model):
            return refusal(400, "a model is named by an alias, never by a path", "model")
        target = self._routes.target(model)
        if target is None:
            return refusal(404, f"the model {model!r} does not exist", "model")
        with self._routes.request(target.name):  # from here on its version stays loaded
            renamed = json.dumps({**body, "model": target.name}).encode()
            return await self._answer(request, target, renamed)

    async def _answer(
        self, request: web.Request, target: Target, body: bytes
    ) -> web.StreamResponse:
        """The answer of the first server that has one: before it, nothing was sent back."""
        tried: list[Replica] = []
        while (replica := self._routes.having(target.name, tried)) is not None:
            tried.append(replica)
            with replica.busy():
                answer = await self._ask(replica, target, tried, request.path, body)
                if answer is None or answer.status in _LOST:
                    replica.ready.discard(target.name)  # until the publisher has seen to it
                    if answer is not None:
                        answer.close()
                    continue
                async with answer:
                    return await _pass_back(request, target, answer)
        response = refusal(503, f"no server has {target.name} now")
        response.headers["Retry-After"] = str(_RETRY_SECONDS)
        return response

    async def _ask(
        self, replica: Replica, target: Target, tried: Collection[Replica], path: str, body: bytes
    ) -> aiohttp.ClientResponse | None:
        """A server's answer; None where it cannot be reached, or is found to have stopped answering
        before it began and another one can be asked."""
        asking = asyncio.create_task(_post(replica, path, body))
        losing = asyncio.create_task(replica.lost())
        try:
            await asyncio.wait({asking, losing}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done() and self._routes.having(target.name, tried) is None:
                await asyncio.wait({asking})
            return await asking if asking.done() else None
        except asyncio.CancelledError:  # who asked has gone
            if asking.done() and (answer := asking.result()) is not None:
                answer.close()
            raise
        finally:
            asking.cancel()
            losing.cancel()


async def _post(replica: Replica, path: str, body: bytes) -> aiohttp.ClientResponse | None:
    """Hand a request on, with nothing of its sender but the body, and with the server's own key;
    None where the server cannot be reached."""
    try:
        return await replica.session.post(
            replica.url + path,
            data=io.BytesIO(body) if len(body) > _PIECE else body,  # in pieces, not all at once
            headers={**replica.headers, **_AS_IT_IS},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            allow_redirects=False,
        )
    except (aiohttp.ClientError, TimeoutError) as error:
        log.warning("%s: %s", replica.url, error)
        replica.gone()
        return None


async def _pass_back(
    request: web.Request, target: Target, answer: aiohttp.ClientResponse
) -> web.StreamResponse:
    """Stream an answer to who asked; where it breaks off, or is not wanted any more, it ends."""
    kind = answer.headers.get("Content-Type", "application/json")
    headers = {"Content-Type": kind, VERSION_HEADER: target.version or target.name}
    response = web.StreamResponse(status=answer.status, headers=headers)
    response.content_length = answer.content_length
    await response.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
    except aiohttp.ClientError:
        if request.transport is not None:
            request.transport.abort()
    return response


def is_path(model: str) -> bool:
    """Whether a name could be taken for a place on a disk or in a network."""
    parts = model.split("/")
    strange = "\\" in model or "~" in model or ":" in model.partition("@")[0] or "\0" in model
    empty = any(part in ("", ".", "..") for part in parts)
    return len(model) > _LONGEST_NAME or strange or empty


def refusal(
    status: int, message: str, param: str | None = None, *, close: bool = False
) -> web.Response:
    """An error in OpenAI's shape; with `close`, the connection ends with it."""
    kind = _TYPES.get(status, "InvalidRequestError")
    error = {"message": message, "type": kind, "param": param, "code": status}
    response = web.json_response({"error": error}, status=status)
    if close:
        response.force_close()
    return response


def _card(name: str, parent: str, version: str) -> dict[str, Any]:
    own = {"root": name, "parent": parent or None, "adapter_version": version or None}
    return {"id": name, "object": "model", "created": 0, "owned_by": "meadow", **own}
