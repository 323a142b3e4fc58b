"""Versions that were verified and are kept from being deleted for as long as anybody uses them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ...closeable import Closeable
from ...errors import AdapterError, FormatError, IdentityError, MeadowError
from ...peft_adapters.adapter_reader import Adapter
from ...peft_adapters.blueprint import Blueprint
from ...peft_adapters.peft_format import LARGEST_RANK
from ..registry import Registry, Version
from ..registry_opened import Opened

_LOG = logging.getLogger(__name__)
_TURNS = 16
_FAILED_SECONDS = 1.0
"""For so long what did not verify is not read again, however many ask for it."""


class Key(NamedTuple):
    """What is open: a version's own name ("name@v7"), and the id of its content, which a registry
    that was put in another's place may give the same name."""

    name: str
    id: str


def key_of(version: Version) -> Key:
    return Key(str(version), version.id)


@dataclass
class _Entry:
    opened: Opened
    references: int = 0
    doubted: bool = False


class OpenVersions(Closeable):
    """A version is verified when it is opened, again after nobody used it for a while, and again
    once it is doubted."""

    def __init__(
        self, registry: Registry, blueprint: Blueprint, largest_rank: int = LARGEST_RANK
    ) -> None:
        """One of a larger rank does not verify."""
        self._registry, self._blueprint, self._largest = registry, blueprint, largest_rank
        self._entries: dict[Key, _Entry] = {}
        self._kept: frozenset[Key] = frozenset()
        self._failed: dict[Key, tuple[float, MeadowError]] = {}  # when, and why
        self._doubts = 0  # how often all were doubted
        self._guard = threading.Lock()
        self._turns = [threading.Lock() for _ in range(_TURNS)]

    def take(self, version: Version, *, anew: bool = False) -> None:
        """Refer to a version, which is verified now if it is not open.

        Of several threads that ask for one at once the first verifies it; one that has just failed
        is tried again only if `anew`.  Raises AdapterError, FormatError or IdentityError where it
        does not verify, StorageError where the registry cannot be read.
        """
        key = key_of(version)
        if self.took(version):
            return
        with self._turns[hash(key) % _TURNS]:
            if not self.took(version):
                if not anew:
                    self._recall(key)
                self._try(key, version)

    def took(self, version: Version) -> bool:
        """Refer to a version if it is open and not doubted; whether it is.  Waits for no disk."""
        with self._guard:
            entry = self._entries.get(key_of(version))
            if entry is None or entry.doubted:
                return False
            entry.references += 1
            return True

    def give(self, version: Version) -> None:
        """Refer to it no more."""
        with self._guard:
            if entry := self._entries.get(key_of(version)):
                entry.references -= 1
            unused = self._unused()
        _close(unused)

    def keep(self, versions: Iterable[Version]) -> None:
        """Let these stay open, whether referred to or not, and no others."""
        with self._guard:
            self._kept = frozenset(map(key_of, versions))
            unused = self._unused()
        _close(unused)

    def doubt(self) -> None:
        """Verify each again before anybody else uses it: trust was withdrawn from a key, or the
        registry is another."""
        with self._guard:
            self._doubts += 1
            for entry in self._entries.values():
                entry.doubted = True

    def read(self, key: Key) -> Adapter:
        """The weights of an open version, from the bytes that were verified.

        Raises AdapterError where they were changed since, or nobody uses it any more.
        """
        with self._guard:
            entry = self._entries.get(key)
        if entry is None:
            raise AdapterError(f"{key.name} is no longer in use")
        try:
            return entry.opened.read()
        except AdapterError:
            entry.doubted = True  # who asks next finds out what is there now
            raise

    def close(self) -> None:
        with self._guard:
            left = [entry.opened for entry in self._entries.values()]
            self._entries.clear()
        _close(left)

    def _recall(self, key: Key) -> None:
        """Raise what a version has just failed with."""
        since, error = self._failed.get(key, (-_FAILED_SECONDS, None))
        if error is not None and time.monotonic() - since < _FAILED_SECONDS:
            raise type(error)(error.message, error.hint)

    def _try(self, key: Key, version: Version) -> None:
        try:
            self._open(key, version)
        except (AdapterError, FormatError, IdentityError) as error:
            self._failed[key] = time.monotonic(), error
            raise
        self._failed.pop(key, None)

    def _open(self, key: Key, version: Version) -> None:
        doubts = self._doubts
        opened = self._registry.lease(version, self._blueprint)  # outside the lock: it reads files
        if opened.verified.rank > self._largest:
            _close([opened])
            raise AdapterError(
                f"{version} has rank {opened.verified.rank}, and at most {self._largest} is served",
                "publish it with a smaller rank, or start the server with a larger --max-rank",
            )
        with self._guard:
            entry = self._entries.setdefault(key, _Entry(opened))
            before, entry.opened = entry.opened, opened  # it was doubted, and others still use it
            entry.doubted = self._doubts != doubts
            entry.references += 1
        _close([before] if before is not opened else [])

    def _unused(self) -> list[Opened]:
        """Take out what nobody refers to and is not to be kept."""
        unused = [
            key
            for key, entry in self._entries.items()
            if not entry.references and key not in self._kept
        ]
        return [self._entries.pop(key).opened for key in unused]


def _close(unused: Iterable[Opened]) -> None:
    """Who gives a version back has its answer, whatever the disk says of the note about it: that
    one is void once this process has ended."""
    for opened in unused:
        try:
            opened.close()
        except MeadowError as error:
            _LOG.warning("%s is still noted as in use: %s", opened.version, error)
