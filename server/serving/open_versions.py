"""Versions that were verified and are kept from being deleted for as long as anybody uses them."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass

from ...closeable import Closeable
from ...errors import AdapterError
from ...peft_adapters.adapter_reader import Adapter
from ...peft_adapters.blueprint import Blueprint
from ..registry import Registry, Version
from ..registry_opened import Opened


@dataclass
class _Entry:
    opened: Opened
    references: int = 0


class OpenVersions(Closeable):
    """By the version's own name ("name@v7").  A version is verified when it is opened, and again
    after nobody used it for a while."""

    def __init__(self, registry: Registry, blueprint: Blueprint) -> None:
        self._registry, self._blueprint = registry, blueprint
        self._entries: dict[str, _Entry] = {}
        self._kept: frozenset[str] = frozenset()
        self._guard = threading.Lock()

    def take(self, version: Version) -> None:
        """Refer to a version, which is verified now if it is not open.

        Raises AdapterError, FormatError or IdentityError where it does not verify, StorageError
        where the registry cannot be read.
        """
        name = str(version)
        if self._took(name):
            return
        opened = self._registry.lease(version, self._blueprint)  # outside the lock: it reads files
        with self._guard:
            entry = self._entries.setdefault(name, _Entry(opened))
            entry.references += 1
        if entry.opened is not opened:
            opened.close()  # another thread was quicker

    def give(self, version: str) -> None:
        """Refer to it no more."""
        with self._guard:
            if entry := self._entries.get(version):
                entry.references -= 1
            self._close_unused()

    def keep(self, versions: Collection[str]) -> None:
        """Let these stay open, whether referred to or not, and no others."""
        with self._guard:
            self._kept = frozenset(versions)
            self._close_unused()

    def read(self, version: str) -> Adapter:
        """The weights of an open version, from the bytes that were verified.

        Raises AdapterError where they were changed since, or nobody uses it any more.
        """
        with self._guard:
            entry = self._entries.get(version)
        if entry is None:
            raise AdapterError(f"{version} is no longer in use")
        return entry.opened.read()

    def close(self) -> None:
        with self._guard:
            for entry in self._entries.values():
                entry.opened.close()
            self._entries.clear()

    def _took(self, name: str) -> bool:
        with self._guard:
            entry = self._entries.get(name)
            if entry is not None:
                entry.references += 1
            return entry is not None

    def _close_unused(self) -> None:
        for name, entry in list(self._entries.items()):
            if not entry.references and name not in self._kept:
                self._entries.pop(name).opened.close()
