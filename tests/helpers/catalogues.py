"""Catalogues that look at a registry all the time, and what a name means to them."""

from __future__ import annotations

import time
from collections.abc import Callable

from registries import BLUEPRINT, adapter

from meadow.server.registry import Registry, Version
from meadow.server.serving.catalogue import Catalogue

PATIENCE = 30.0


def looking_at(registry: Registry | None) -> Catalogue:
    return Catalogue("base", BLUEPRINT, registry, poll_seconds=0.01)


def add(registry: Registry, number: int, alias: str = "prod", name: str = "a") -> Version:
    version = registry.keep(name, adapter(number))
    return registry.promote(version, alias) if alias else version


def meaning(catalogue: Catalogue, model: str) -> str:
    with catalogue.acquire(model) as lease:
        return str(lease.model)


def soon(question: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not question():
        assert time.monotonic() < end
        time.sleep(0.005)
