"""Which models can be named, and which version each name means at this moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...closeable import Closeable
from ...peft_adapters.blueprint import Blueprint
from ...peft_adapters.peft_format import Adapter
from ..registry import Registry
from .served import Served


@dataclass(frozen=True)
class Card:
    """A model as a list of models shows it."""

    id: str  # what a request names: "base", "tenant/name" (its alias prod), "tenant/name@canary"
    parent: str  # the base's name; "" for the base itself
    version: str = ""  # which it means now: "v7"
    digest: str = ""
    created: int = 0  # Unix seconds


@dataclass(frozen=True)
class Health:
    """What keeps the catalogue from showing the registry as it is; all empty is well."""

    registry: str  # why the registry cannot be read now; "" where it can
    behind: tuple[str, ...]  # aliases whose newest version does not verify: one before it answers
    refused: int  # how many versions did not verify so far


class Lease(Closeable):
    """A model that stays usable until this is released; releasing twice does nothing."""

    model: Served

    def release(self) -> None: ...


class Catalogue(Closeable):
    """The base, and the registry's adapters as of the last look at it."""

    def __init__(
        self,
        base_name: str,
        blueprint: Blueprint,
        registry: Registry | None,
        poll_seconds: float = 0.25,
    ) -> None: ...

    def acquire(self, model: str) -> Lease:
        """What `model` means now: `base`, NAME, NAME@alias, NAME@v7 or NAME@sha256:ab12...

        May read the disk, for a version that nobody asked for so far: call it off the event loop.
        Raises UnknownModelError for what does not exist, and AdapterError for a version that does
        not verify and has none before it.
        """

    def read(self, model: Served) -> Adapter:
        """The weights of a leased version, from the bytes that were verified."""

    def cards(self) -> list[Card]: ...

    def health(self) -> Health: ...

    warm: Callable[[Served], None] | None
    """Called with a new version of an alias in use, just before the alias moves to it."""
