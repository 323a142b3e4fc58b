"""`meadow publish --to vllm`: servers in step with the registry, and a gateway in front of them."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from .errors import ConfigError, ReplicaError
from .loopback import is_loopback, loopback_names

Add = Callable[..., argparse.ArgumentParser]
_KEY = "VLLM_API_KEY"
_PATIENCE, _ONCE_PATIENCE = 2.0, 120.0  # seconds that the slowest server is waited for
_KEEP_ALIVE = 4.0  # seconds; vLLM closes after 5, and a request would meet that half-way


def add_command(commands: Any, add: Add) -> None:
    """`meadow publish`; `add(commands, name, run, about)` makes it."""
    publish = add(commands, "publish", _publish, "keep vLLM servers in step with the registry")
    publish.add_argument(
        "names", nargs="+", metavar="NAME", help="NAME, NAME@ALIAS or NAME@v7 of the registry"
    )
    publish.add_argument("--to", choices=["vllm"], default="vllm", help="what kind of server")
    publish.add_argument(
        "--url", action="append", required=True, help="a server; once for each, no balancer"
    )
    publish.add_argument(
        "--folder", type=Path, required=True, metavar="DIR", help="where the servers read adapters"
    )
    publish.add_argument(
        "--mounted", type=Path, metavar="DIR", help="how the servers see that folder (default: so)"
    )
    publish.add_argument(
        "--registry", type=Path, metavar="DIR", help="default: registry/ beside this user's key"
    )
    publish.add_argument(
        "--key-file", type=Path, metavar="FILE", help=f"the servers' API key (default: ${_KEY})"
    )
    publish.add_argument("--gateway", default="", metavar="HOST:PORT", help="answer clients there")
    publish.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys of the gateway's clients, one a line"
    )
    publish.add_argument(
        "--canaries", type=Path, metavar="FILE", help="prompts to ask of each server (TOML, JSONL)"
    )
    publish.add_argument(
        "--poll", type=float, default=0.5, metavar="S", help="seconds between two looks"
    )
    publish.add_argument(
        "--drain", type=float, default=5.0, metavar="S",
        help="seconds an old version stays at the least (default: 5)",
    )  # fmt: skip
    publish.add_argument("--once", action="store_true", help="end as soon as all is in step")


def _publish(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if not options.poll > 0 or not options.drain >= 0:
        raise ConfigError("--poll is more than 0, and --drain not below")
    if options.once and options.gateway:
        raise ConfigError("--once ends, and a gateway does not", "leave one of them out")
    keys = _client_keys(options)
    return asyncio.run(_work(options, keys))


async def _work(options: argparse.Namespace, keys: list[str]) -> dict[str, Any]:
    import aiohttp

    from .server.canaries import read_canaries
    from .server.model_routes import ModelRoutes
    from .server.registry_names import Reference
    from .server.vllm_publisher import Publisher, Shelf
    from .server.vllm_replica import Replica
    from .store import Disk, locked

    wanted = list(dict.fromkeys(Reference.parse(text) for text in options.names))
    canaries = read_canaries(options.canaries) if options.canaries else []
    folder, disk = options.folder.resolve(), Disk()
    shelf = Shelf(folder / "versions", (options.mounted or folder) / "versions", disk)
    shelf.check()
    disk.folder(folder)
    async with AsyncExitStack() as stack:
        stack.enter_context(locked(folder / "publisher.lock", "one publisher has one folder"))
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE)
        session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        await stack.enter_async_context(session)
        key = _server_key(options)
        routes = ModelRoutes([Replica(url, session, key) for url in dict.fromkeys(options.url)])
        patience = _ONCE_PATIENCE if options.once else _PATIENCE
        publisher = Publisher(
            *(_opener(options), wanted, routes, shelf, canaries, options.drain, patience),
            tell=_say,
        )
        stack.push_async_callback(publisher.close)
        if options.once:
            await _once(publisher, options.poll)
        else:
            if options.gateway:
                _say(f"gateway: {await _listen(stack, routes, keys, options.gateway)}")
            await publisher.run(_ended(), options.poll)
        return _report(publisher, routes)


def _opener(options: argparse.Namespace) -> Callable[[], Any]:
    from .identity import own_identity
    from .server.registry import Registry, default_folder

    who, folder = own_identity(), options.registry or default_folder()
    return lambda: Registry.open(folder, who)


async def _once(publisher: Any, poll: float) -> None:
    """Until all is in step.  Raises ReplicaError with the first thing that keeps it from being."""
    while not await publisher.settle():
        if publisher.faults:
            first, *others = publisher.faults.values()
            more = f"and {len(others)} more" if others else ""
            raise ReplicaError(first, more)
        await asyncio.sleep(poll)


async def _listen(stack: AsyncExitStack, routes: Any, keys: list[str], address: str) -> str:
    """Answer clients until the stack is closed; the URL."""
    from .server.model_gateway import ModelGateway
    from .server.model_gateway_connections import listening

    host, port = _split(address)
    gateway = ModelGateway(routes, keys, None if keys else loopback_names(host))
    try:
        _, port = await stack.enter_async_context(
            listening(gateway.application(), gateway.connections, host, port)
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {address}: {error.strerror or error}", "choose another --gateway"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _ended() -> asyncio.Event:
    """Set once the process is asked to end."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    return ended


def _report(publisher: Any, routes: Any) -> dict[str, Any]:
    models = {alias: served.name for alias, served in routes.aliases().items()}
    return {"models": models, "faults": publisher.faults}


def _client_keys(options: argparse.Namespace) -> list[str]:
    """The gateway's keys; none are needed where only this machine reaches it."""
    if options.keys is not None:
        keys = [line.strip() for line in _read(options.keys).splitlines() if line.strip()]
        if not keys:
            raise ConfigError(f"{options.keys} holds no key", "one a line")
        return keys
    if options.gateway and not is_loopback(_split(options.gateway)[0]):
        raise ConfigError(
            f"{options.gateway} can be reached from elsewhere, and everybody could ask",
            "--keys FILE, or --gateway 127.0.0.1:PORT",
        )
    return []


def _server_key(options: argparse.Namespace) -> str:
    if options.key_file is None:
        return os.environ.get(_KEY, "")
    return _read(options.key_file).strip()


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--gateway {address!r} is not host:port", "for example 127.0.0.1:8080")
    return host.strip("[]"), int(port)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
