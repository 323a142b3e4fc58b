"""A real registry of random adapters, and a server's engine over it, for measurements under load.

Everything is as `meadow serve` has it, but for HTTP: signed versions on disk, aliases, the
catalogue's and the engine's threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..identity import Identity
from ..peft_adapters.adapter_writer import save_adapter
from ..peft_adapters.base_model import ALL_LINEAR, Base, sites
from ..peft_adapters.blueprint import Blueprint
from ..peft_adapters.manifest import ADAPTER, MANIFEST, Provenance, write_manifest
from ..server.registry import Registry, Version
from ..server.serving.catalogue import Catalogue
from ..server.serving.engine import Engine, EngineOptions
from ..server.serving.requests import Event, Failed, Finished, Job, Sampling, Token
from .random_llama import DIGEST, TINY, random_adapter, random_base

ME = Identity(Ed25519PrivateKey.from_private_bytes(b"\1" * 32))
PATIENCE = 120.0  # seconds that an answer may take before it counts as failed


@dataclass
class Answer:
    """What became of one request."""

    version: str = ""  # that answered: "v7"
    error: str = ""
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0  # from the request to its last token
    done: threading.Event = field(default_factory=threading.Event)


class Server:
    """Answers greedily, as the registry says at that moment."""

    def __init__(self, catalogue: Catalogue, engine: Engine) -> None:
        self.catalogue, self.engine = catalogue, engine

    def ask(self, model: str, prompt: Sequence[int], length: int, tenant: str = "bench") -> Answer:
        """One answer, whatever becomes of it; from any thread."""
        answer, start = Answer(), time.perf_counter()
        try:
            with self.catalogue.acquire(model) as lease:
                answer.version = lease.model.version
                sampling = Sampling(length, temperature=0, ignore_eos=True)
                job = Job(tuple(prompt), sampling, lease.model, tenant)
                self.engine.submit(job, lambda event: _hear(answer, event))
                if not answer.done.wait(PATIENCE):
                    answer.error = "no answer"
        except Exception as error:  # counted: a failure of any kind is what is looked for
            answer.error = f"{type(error).__name__}: {error}"
        answer.seconds = time.perf_counter() - start
        return answer


def _hear(answer: Answer, event: Event) -> None:
    match event:
        case Token(id=token):
            answer.tokens.append(token)
        case Failed(error=error):
            answer.error = error
            answer.done.set()
        case Finished():
            answer.done.set()


@contextmanager
def registry_of(folder: Path, base: Base) -> Iterator[tuple[Registry, Blueprint]]:
    """An empty registry, and what its adapters have to fit."""
    layers = tuple(sites(base.model, ALL_LINEAR))
    modules = tuple(name for name, _ in base.model.named_modules())
    with Registry.open(folder / "registry", ME) as registry:
        yield registry, Blueprint(base.name, DIGEST, layers, modules)


def publish(
    registry: Registry, blueprint: Blueprint, folder: Path, name: str, rank: int, seed: int
) -> Version:
    """A new version, whose run's folder is left in `folder`."""
    tree = random_adapter(blueprint.layers, rank, seed)
    save_adapter(
        folder / ADAPTER, tree, scaling=1.0, base=blueprint.name, modules=blueprint.modules
    )
    write_manifest(
        folder,
        ME,
        Provenance(
            run_id=f"{seed:032x}",
            base_digest=blueprint.digest,
            config_digest="c0" * 32,
            strategy="random",
            rounds=1,
            participants=1,
            seed=seed,
        ),
    )
    return registry.publish(name, folder / ADAPTER, folder / MANIFEST, blueprint)


@contextmanager
def server_over(
    registry: Registry, blueprint: Blueprint, base: Base, options: EngineOptions
) -> Iterator[Server]:
    """A catalogue and an engine, with their threads."""
    with ExitStack() as resources:
        catalogue = resources.enter_context(Catalogue(base.name, blueprint, registry))
        engine = resources.enter_context(Engine(base, catalogue, options))
        yield Server(catalogue, engine)


def tiny_base() -> Base:
    """Wide enough spread that each adapter says something else."""
    return random_base(TINY, spread=0.1)
