"""Which version answers for an alias now, on which servers, and what is still under way.

Shared by the publisher, which moves aliases, and the gateway, which follows them; both live on one
event loop, so that nothing here changes between two statements without `await`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import RegistryError
from .registry_names import PROD, Reference
from .registry_rows import Version
from .vllm_replica import Replica

DIGITS = 12


@dataclass(frozen=True)
class Served:
    """A version under the name that it has on the servers: one name for one content."""

    version: Version

    @property
    def name(self) -> str:
        return f"{self.version.name}@{self.version.id[:DIGITS]}"

    def is_called(self, model: str) -> bool:
        """Whether a name is this version's: as the servers have it, NAME@v7, NAME@sha256:..."""
        if model in (self.name, str(self.version)):
            return True
        try:
            reference = Reference.parse(model)
        except RegistryError:
            return False
        beginning = reference.name == self.version.name and reference.digest
        return bool(beginning) and self.version.id.startswith(reference.digest)


@dataclass(frozen=True)
class Target:
    """The name on the servers, and the version's id; "" for a base."""

    name: str
    version: str


class ModelRoutes:
    """From what a request names to a version and the servers that have it."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = replicas
        self._aliases: dict[str, Served] = {}
        self._running: Counter[str] = Counter()

    def point(self, reference: Reference, served: Served) -> None:
        """From now on, a reference means this version; requests under way keep theirs."""
        for name in names_of(reference):
            self._aliases[name] = served

    def served(self, reference: Reference) -> Served | None:
        """What a reference means now."""
        return self._aliases.get(names_of(reference)[0])

    def aliases(self) -> dict[str, Served]:
        return dict(self._aliases)

    def target(self, model: str) -> Target | None:
        """What answers, from now to its request's end, for what a request calls `model`: an alias,
        a live version in any of its spellings, or a base."""
        live = [one for one in self._aliases.values() if one.is_called(model)]
        served = self._aliases.get(model) or next(iter(live), None)
        if served is not None:
            return Target(served.name, served.version.id)
        return Target(model, "") if model in self.bases() else None

    def bases(self) -> set[str]:
        return set().union(*(replica.bases for replica in self.replicas))

    def having(self, name: str, tried: Collection[Replica] = ()) -> Replica | None:
        """The least busy server that has a name and was not tried."""
        able = [one for one in self.replicas if name in one.ready | one.bases and one not in tried]
        return min(able, key=lambda replica: replica.in_flight, default=None)

    def running(self, name: str) -> int:
        """How many requests are under way under a name."""
        return self._running[name]

    @contextmanager
    def request(self, name: str) -> Iterator[None]:
        """A request is under way: its version stays loaded."""
        self._running[name] += 1
        try:
            yield
        finally:
            self._running[name] -= 1


def names_of(reference: Reference) -> list[str]:
    """What a client may call it: `mail` as well as `mail@prod`."""
    return [str(reference), *([reference.name] if reference.alias == PROD else [])]
