"""A registry, fake vLLM servers, a publisher and a gateway between them, on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from fake_vllm import KEY, FakeVllm, words_of
from registries import adapter, open_registry

from meadow.server.canaries import Canary
from meadow.server.model_gateway import ModelGateway
from meadow.server.model_gateway_connections import Connections, listening
from meadow.server.model_routes import ModelRoutes
from meadow.server.registry import Registry
from meadow.server.registry_names import Reference
from meadow.server.vllm_publisher import Publisher, Shelf
from meadow.server.vllm_replica import Replica
from meadow.store import Disk


def name_of(number: int, name: str = "mail") -> str:
    """What a version is called on the servers."""
    return f"{name}@{adapter(number).id[:12]}"


def said_by(number: int, prompt: str, count: int) -> str:
    """What the fake servers say under a version."""
    return "".join(words_of(adapter(number).weights, prompt, count))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Stage:
    root: Path
    servers: list[FakeVllm]
    registry: Registry
    session: aiohttp.ClientSession
    make: Callable[[ModelRoutes, Callable[[str], None], Clock], Publisher]
    said: list[str] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    gateway: str = ""
    connections: Connections = field(default_factory=lambda: Connections(0))
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.replicas = [
            Replica(one.url, self.session, KEY, seconds=5.0, look_seconds=2.0)
            for one in self.servers
        ]
        self.routes = ModelRoutes(self.replicas)
        self.publisher = self.make(self.routes, self.said.append, self.clock)

    async def restart(self) -> None:
        """Another publisher process, which knows nothing of the first; not behind the gateway."""
        await self.publisher.close()
        self.__post_init__()

    async def close(self) -> None:
        await self.publisher.close()

    def promote(self, number: int, alias: str = "prod", name: str = "mail") -> None:
        """Publish a version, where it is not yet, and point an alias to it."""
        version = self.registry.keep(name, adapter(number))
        self.registry.promote(version, alias)

    async def settle(self, passes: int = 1) -> bool:
        done = False
        for _ in range(passes):
            done = await self.publisher.settle()
        return done

    def loaded(self) -> list[set[str]]:
        return [set(server.adapters) for server in self.servers]

    async def ask(self, path: str = "/v1/completions", **body: Any) -> tuple[int, Any, Any]:
        """A client's request at the gateway: status, headers, JSON."""
        asked = {"model": "mail", "prompt": "hi", "max_tokens": 3, **body}
        async with self.session.post(
            self.gateway + path, json=asked, headers=self.headers
        ) as answer:
            return answer.status, answer.headers, await answer.json(content_type=None)


@asynccontextmanager
async def staged(
    root: Path,
    servers: int = 2,
    wanted: Sequence[str] = ("mail",),
    canaries: Sequence[Canary] = (),
    keys: Sequence[str] = (),
    hosts: Collection[str] | None = None,
    drain: float = 10.0,
    patience: float = 5.0,
    body_seconds: float = 30.0,
) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeVllm()) for _ in range(servers)]
        session = await stack.enter_async_context(aiohttp.ClientSession())
        registry = stack.enter_context(open_registry(root))
        shelf = Shelf(root / "shelf", root / "shelf", Disk())
        references = [Reference.parse(text) for text in wanted]

        def make(routes: ModelRoutes, tell: Callable[[str], None], clock: Clock) -> Publisher:
            return Publisher(
                lambda: open_registry(root), references, routes, shelf, canaries, drain, patience,
                tell, clock,
            )  # fmt: skip

        stage = Stage(root, fakes, registry, session, make)
        stack.push_async_callback(stage.close)
        gateway = ModelGateway(stage.routes, keys, hosts, body_seconds)
        stage.connections = gateway.connections
        host, port = await stack.enter_async_context(
            listening(gateway.application(), gateway.connections, "127.0.0.1", 0, 0.1)
        )
        stage.gateway = f"http://{host}:{port}"
        yield stage


Play = Callable[[Stage], Awaitable[None]]


def play(root: Path, scene: Play, **options: Any) -> None:
    """A scene on a stage of its own, in which no adapter is ever loaded in place of another."""

    async def whole() -> None:
        async with staged(root, **options) as stage:
            await scene(stage)
            for server in stage.servers:
                inplace = [body for _, _, body in server.log if body and "load_inplace" in body]
                assert inplace == [], "never"

    asyncio.run(whole())
