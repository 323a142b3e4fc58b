"""A vLLM server as vLLM 0.33 behaves, as far as a publisher and a gateway can see it.

Adapters are loaded at run time under names; a name twice is 400, a path that is not there 404, and
a model that is neither base nor loaded 404.  `/v1/models` shows paths.  The API key guards /v1
alone: `/adapters` and `/invocations` are open.  What a model says is a function of the bytes that
were at its path when it was loaded, so that an answer tells which version gave it.

Faults: `strange` and `says` (nonsense), `slow` (seconds a load takes), `refuses` (status of a
load), `mute` (no completion comes), `hangs` (answers nothing as long as it is set), `held` (streams
stand still); who clears `adapters` makes it lose them, and `stop` and `start` are a restart on the
same port, which loses them too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from aiohttp import web

KEY = "vllm-secret"
BASE = "base"


def words_of(weights: bytes, prompt: str, count: int) -> list[str]:
    """What a version says to a prompt: each word names the version."""
    mark = hashlib.sha256(weights).hexdigest()[:8]
    return [f"{mark}.{len(prompt)}.{number} " for number in range(count)]


@dataclass
class FakeVllm:
    """One server; `async with` starts it."""

    port: int = 0
    slow: float = 0.0
    refuses: int = 0
    mute: bool = False
    hangs: bool = False
    pace: float = 0.0
    """Seconds between two words of a stream."""
    held: asyncio.Event | None = None
    """Streams stop after their first word until this is set."""
    strange: Any = None
    """What it lists as its models in place of what it has."""
    says: Any = None
    """And what it says in place of words."""
    adapters: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Path and weights by name."""
    log: list[tuple[str, str, Any]] = field(default_factory=list)
    """Method, path and body of each request."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(middlewares=[self._logged])
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/adapters", self._open_door)
        app.router.add_post("/invocations", self._open_door)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def stop(self) -> None:
        await self._runner.cleanup()
        self.adapters.clear()

    def loads(self) -> list[str]:
        """The names that were asked to be loaded, in order."""
        return [
            body["lora_name"] for _, path, body in self.log if path.endswith("/load_lora_adapter")
        ]

    @web.middleware
    async def _logged(self, request: web.Request, handler: Any) -> web.StreamResponse:
        text = await request.text()
        self.log.append((request.method, request.path, json.loads(text) if text else None))
        while self.hangs:
            await asyncio.sleep(0.01)
        guarded = request.path.startswith("/v1")
        if guarded and request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _models(self, request: web.Request) -> web.Response:
        if self.strange is not None:
            return web.json_response({"object": "list", "data": self.strange})
        cards = [{"id": BASE, "object": "model", "root": "/models/tiny", "parent": None}]
        cards += [
            {"id": name, "object": "model", "root": path, "parent": BASE}
            for name, (path, _) in self.adapters.items()
        ]
        return web.json_response({"object": "list", "data": cards})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        await asyncio.sleep(self.slow)
        if self.refuses:
            return _error(self.refuses, "LoRA rank 64 is greater than max_lora_rank 8")
        if name in self.adapters or name == BASE:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        self.adapters[name] = str(path), (path / "adapter_model.safetensors").read_bytes()
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        model, chat = body["model"], request.path.endswith("/chat/completions")
        if model != BASE and model not in self.adapters:
            return _error(404, f"The model `{model}` does not exist.")
        if self.mute:
            return _error(500, "EngineCore encountered an issue.")
        weights = b"" if model == BASE else self.adapters[model][1]  # kept by this answer
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        said = words_of(weights, prompt, body.get("max_tokens", 16))
        if body.get("stream"):
            return await self._stream(request, model, said)
        text = "".join(said) if self.says is None else self.says
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": 1, "completion_tokens": len(said)}
        choices = [{"index": 0, **choice, "finish_reason": "length"}]
        return web.json_response({"id": "x", "model": model, "choices": choices, "usage": usage})

    async def _stream(
        self, request: web.Request, model: str, said: list[str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for word in said:
            chunk = {"model": model, "choices": [{"index": 0, "text": word}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            await asyncio.sleep(self.pace)
            if self.held is not None:
                await self.held.wait()
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _open_door(self, request: web.Request) -> web.Response:
        return web.json_response({"loaded": await request.json()})


def _error(status: int, message: str) -> web.Response:
    kinds = {400: "InvalidUserInput", 404: "NotFoundError"}
    kind = kinds.get(status, "InternalServerError")
    error = {"message": message, "type": kind, "param": None, "code": status}
    return web.json_response({"error": error}, status=status)
