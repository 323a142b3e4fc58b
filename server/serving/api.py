"""The routes: OpenAI's, vLLM's health and metrics, and the operator's."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ...errors import MeadowError
from . import metrics
from .catalogue import Card
from .doorway import DoorwayMiddleware
from .generation import Front, Generation
from .openai_errors import ApiError, refusal
from .openai_types import ChatRequest, CompletionRequest


def application(front: Front) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="meadow",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        middleware=[Middleware(DoorwayMiddleware, doorway=front.doorway)],
        exception_handlers={ApiError: _refused, HTTPException: _no_route, Exception: _defect},
    )
    _add_answers(app, front)
    _add_models(app, front)
    _add_health(app, front)
    _add_upkeep(app, front)
    return app


def _add_answers(app: FastAPI, front: Front) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions() -> Response:
        return Generation(front, CompletionRequest)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions() -> Response:
        return Generation(front, ChatRequest)


def _add_models(app: FastAPI, front: Front) -> None:
    @app.get("/v1/models", response_model=None)
    async def models(request: Request) -> Response:
        key = front.tenants.caller(request.headers.get("authorization"), "inference")
        with front.tenants.admitted(key):
            cards = await asyncio.to_thread(front.catalogue.cards)
        return JSONResponse({"object": "list", "data": [_model(card) for card in cards]})

    @app.get("/v1/models/{model:path}", response_model=None)
    async def model(request: Request, model: str) -> Response:
        key = front.tenants.caller(request.headers.get("authorization"), "inference")
        try:
            with front.tenants.admitted(key):
                card = await front.off_loop(partial(_card, front), model)
        except MeadowError as error:
            raise refusal(error) from error
        return JSONResponse(_model(card))


def _card(front: Front, name: str) -> Card:
    """A model of the list, or another version that can be named."""
    for card in front.catalogue.cards():
        if card.id == name:
            return card
    with front.catalogue.acquire(name) as lease:
        served = lease.model
    return Card(name, "" if served.is_base else front.base, served.version, served.digest)


def _model(card: Card) -> dict[str, Any]:
    """As OpenAI and vLLM show it, without any path; and which version it is now."""
    name = card.id.partition("@")[0]
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "meadow",
        "root": f"{name}@{card.version}" if card.version else card.id,
        "parent": card.parent or None,
        "version": card.version or None,
        "digest": card.digest or None,
    }


def _add_health(app: FastAPI, front: Front) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Empty is well; 503 while we are leaving, and once the engine broke down."""
        if front.doorway.leaving:
            raise ApiError(503, "the server is ending", retry_after=1.0)
        if front.engine.fault:
            raise ApiError(503, "the engine broke down; the server's log says why")
        found = front.catalogue.health()
        if not found.registry and not found.behind:
            return Response()
        registry = "cannot be read" if found.registry else "ok"
        return JSONResponse({"registry": registry, "aliases_behind": len(found.behind)})


def _add_upkeep(app: FastAPI, front: Front) -> None:
    @app.get("/metrics", response_model=None)
    async def prometheus(request: Request) -> Response:
        front.tenants.caller(request.headers.get("authorization"), "admin")
        text = metrics.page(
            front.base,
            front.engine.stats(),
            front.catalogue.health(),
            front.meters,
            front.doorway.in_flight,
        )
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    @app.get("/admin/status", response_model=None)
    async def status(request: Request) -> Response:
        """What the operator wants to know, reasons and places included."""
        front.tenants.caller(request.headers.get("authorization"), "admin")
        cards = await asyncio.to_thread(front.catalogue.cards)
        told = {
            "models": [asdict(card) for card in cards],
            "catalogue": asdict(front.catalogue.health()),
            "engine": asdict(front.engine.stats()),
            "in_flight": front.doorway.in_flight,
            "leaving": front.doorway.leaving,
        }
        return JSONResponse(told)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.answer()


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path}"[:200]
    return ApiError(error.status_code, f"{place}: {error.detail}").answer()


async def _defect(request: Request, error: Exception) -> Response:
    """The traceback is in the log: uvicorn writes it there."""
    return ApiError(500, "the server could not answer; its log says why").answer()
