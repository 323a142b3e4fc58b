"""A server as one process: the base is loaded, the registry watched, requests answered, until
somebody asks it to end.

See `http_server` for the end.
"""

from __future__ import annotations

import asyncio
import gc
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ConfigError
from ...identity import own_identity
from ...loopback import is_loopback, loopback_names
from ...peft_adapters.base_model import (
    ALL_LINEAR,
    DTYPES,
    NANO,
    Base,
    device_of,
    load_base,
    sites,
)
from ...peft_adapters.blueprint import Blueprint
from ...peft_adapters.peft_format import LARGEST_RANK
from ..registry import Registry, default_folder
from ..registry_database import is_registry
from .catalogue import Catalogue
from .chat_prompt import Prompts
from .cuda_recorder import check_recording
from .doorway import Doorway
from .engine import Engine, EngineOptions
from .generation import Front
from .http_server import HttpServer
from .metrics import Meters
from .tenants import Tenants
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class ServeOptions:
    """What a server is started with."""

    base: str = NANO
    dtype: str = "float32"
    quantize: str = "none"
    device: str = "auto"
    registry: Path | None = None
    """None: the user's own."""
    listen: str = "127.0.0.1:8000"
    """host:port; port 0 takes one that is free."""
    keys: Path | None = None
    open_to_all: bool = False
    """Without keys, listen also where others reach it."""
    drain_seconds: float = 60.0
    largest_body: int = Front.largest_body
    largest_rank: int = LARGEST_RANK
    """Adapters of a larger one are refused: slots take memory by rank."""
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True)
class Opened:
    """A server that answers."""

    address: str
    """host:port."""
    models: tuple[str, ...]
    """What can be named, the base first."""


def serve(options: ServeOptions, opened: Callable[[Opened], None]) -> bool:
    """Answer requests until a signal comes; False where some of them had to be cut short.

    `opened` is called once requests are answered.  Raises MeadowError for what keeps the server
    from starting.
    """
    check_exposure(options)
    tenants = Tenants(options.keys)
    with bound(options.listen) as listening, opened_front(options, tenants) as front:

        def tell() -> None:
            base, *adapters = (card.id for card in front.catalogue.cards())
            adapters.sort(key=lambda id: ("@" in id, id))  # those of `prod` first
            opened(Opened(_reached_at(listening), (base, *adapters)))

        server = HttpServer(front, options.drain_seconds, tell)
        with left_alone():
            return asyncio.run(server.run_on(listening))


@contextmanager
def left_alone() -> Iterator[None]:
    """What is in memory now is not looked through by Python's collector of cycles until the block
    ends.  A body of a million small lists has it look through everything several times, the
    libraries' hundreds of thousands of objects included, while nobody is answered."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def check_exposure(options: ServeOptions) -> None:
    """Raise ConfigError where others could reach a server that asks nobody for a key."""
    host, _ = _address(options.listen)
    if options.keys is None and not options.open_to_all and not is_loopback(host):
        raise ConfigError(
            f"listening at {options.listen} without keys would let anybody in who can reach it",
            "give --keys FILE (`meadow keys add` makes one), listen at 127.0.0.1, or say --open",
        )


def check_rank_bound(largest: int) -> None:
    """Raise ConfigError for a bound that no adapter could reach, or none keep."""
    if not 1 <= largest <= LARGEST_RANK:
        raise ConfigError(f"--max-rank {largest} is not 1 to {LARGEST_RANK}")


@contextmanager
def bound(address: str) -> Iterator[socket.socket]:
    """A socket that is ours and takes no connections yet.  Raises ConfigError where the address is
    not to be had."""
    host, port = _address(address)
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, place = found[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _not_to_be_had(address, error) from error
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(place)
        except OSError as error:
            raise _not_to_be_had(address, error) from error
        yield listening


@contextmanager
def opened_front(options: ServeOptions, tenants: Tenants) -> Iterator[Front]:
    """The base loaded, the registry open, the engine running; all closed again in the end."""
    if options.engine.cuda_graphs:  # else one would hear of it once the base is loaded
        check_recording(device_of(options.device), DTYPES[options.dtype])
    check_rank_bound(options.largest_rank)
    base = load_base(
        options.base, dtype=options.dtype, quantize=options.quantize, device=options.device
    )
    name = public_name(options.base)
    with ExitStack() as resources:
        registry = resources.enter_context(_registry(options.registry))
        catalogue = resources.enter_context(
            Catalogue(name, blueprint_of(base), registry, largest_rank=options.largest_rank)
        )
        engine = resources.enter_context(Engine(base, catalogue, options.engine))
        yield front_of(base, name, catalogue, engine, tenants, options)


def front_of(
    base: Base, name: str, catalogue: Catalogue, engine: Engine, tenants: Tenants, o: ServeOptions
) -> Front:
    embedding = base.model.get_input_embeddings()  # type: ignore[operator]
    meters, (host, _) = Meters(), _address(o.listen)
    hosts = loopback_names(host) if is_loopback(host) and not tenants.are_known else None
    return Front(
        base=name,
        engine=engine,
        catalogue=catalogue,
        prompts=Prompts(base.tokenizer, embedding.num_embeddings, engine.max_length),
        vocabulary=Vocabulary(base.tokenizer),
        tenants=tenants,
        doorway=Doorway(meters, hosts),
        meters=meters,
        largest_body=o.largest_body,
    )


def blueprint_of(base: Base) -> Blueprint:
    """What adapters for this base have to fit."""
    modules = tuple(name for name, _ in base.model.named_modules())
    return Blueprint(base.name, base.digest, tuple(sites(base.model, ALL_LINEAR)), modules)


def public_name(base: str) -> str:
    """What a base is called in requests and answers: of a folder, the last part of its path."""
    folder = Path(base).expanduser()
    if base == NANO or not folder.is_dir():
        return base
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-") or "base"


def _registry(folder: Path | None) -> Registry:
    if folder is not None and not is_registry(folder):
        raise ConfigError(f"{folder}: no registry there", "`meadow adapters publish` makes one")
    return Registry.open(folder or default_folder(), own_identity())


def _address(listen: str) -> tuple[str, int]:
    host, mark, port = listen.rpartition(":")
    if not mark or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--listen {listen!r} is not host:port", "for example 127.0.0.1:8000")
    return host.strip("[]"), int(port)


def _reached_at(listening: socket.socket) -> str:
    """host:port as a program of this machine would call it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _not_to_be_had(address: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen at {address}: {error.strerror or error}", "choose another --listen"
    )
