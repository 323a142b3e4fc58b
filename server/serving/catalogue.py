"""Which models can be named, and which version each name means at this moment.

A thread looks at the registry several times a second.  An alias that somebody uses moves once its
new version is verified and in memory, by one store into a dictionary: requests before it have the
old version, those after it the new one.  A new version that does not verify stays out, and the
alias goes on meaning the one before.  While the registry cannot be read, names mean what they did;
one that is put in its place is taken up, and everything verified anew.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...closeable import Closeable
from ...errors import (
    AdapterError,
    FormatError,
    IdentityError,
    MeadowError,
    RegistryError,
    StorageError,
    UnknownAdapterError,
    UnknownModelError,
)
from ...peft_adapters.adapter_reader import Adapter
from ...peft_adapters.blueprint import Blueprint
from ...peft_adapters.peft_format import LARGEST_RANK
from ..registry import Alias, Registry, Version
from ..registry_names import PROD, Reference
from .open_versions import Key, OpenVersions
from .served import Served

__all__ = ["Card", "Catalogue", "Health", "Lease", "Served"]

_LOG = logging.getLogger(__name__)
_UNUSABLE = (AdapterError, FormatError, IdentityError, UnknownAdapterError)
"""What is wrong with a version itself, and not with the disk."""
_HINT = "GET /v1/models lists what is served"
_Key = tuple[str, str]  # an adapter's name and an alias


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
    """What keeps the catalogue from showing the registry as it is."""

    registry: str  # why the registry cannot be read now; "" where it can
    behind: tuple[str, ...]  # aliases whose newest version does not verify: one before it answers
    refused: int  # how many times a version did not verify, so far


class Lease(Closeable):
    """A model that stays usable until this is released; releasing twice does nothing."""

    def __init__(self, model: Served, release: Callable[[], None] | None = None) -> None:
        self.model = model
        self._release = release

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()

    close = release


class Catalogue(Closeable):
    """The base, and the registry's adapters as of the last look at it."""

    def __init__(
        self,
        base_name: str,
        blueprint: Blueprint,
        registry: Registry | None,
        poll_seconds: float = 0.25,
        largest_rank: int = LARGEST_RANK,
    ) -> None:
        """An adapter of a larger rank does not verify.

        Raises StorageError or JournalError where the registry cannot be read at first.
        """
        self.base = Served(base_name)
        self.warm: Callable[[Served], None] | None = None
        """Called with a new version of an alias in use, just before the alias moves to it."""
        self._registry = registry
        self._fault, self._refused = "", 0
        self._revision = -1
        self._seen: tuple[int, ...] = ()  # of another registry in its place, as of the last look
        self._targets: dict[_Key, Alias] = {}  # where the registry's aliases point
        self._serving: dict[_Key, Version] = {}  # what those in use mean, verified
        self._stays_out: dict[_Key, int] = {}  # the alias's revision that was refused
        self._ended = threading.Event()
        self._guard = threading.Lock()  # of targets and serving
        self._keeping = threading.Lock()
        self._thread: threading.Thread | None = None
        if registry is not None:
            self._versions = OpenVersions(registry, blueprint, largest_rank)
            self._look(registry)
            self._thread = threading.Thread(
                target=self._watch, args=[registry, poll_seconds], name="meadow-catalogue"
            )
            self._thread.daemon = True
            self._thread.start()

    def acquire(self, model: str) -> Lease:
        """What `model` means now: the base, NAME, NAME@alias, NAME@v7 or NAME@sha256:ab12...

        May read the disk, for a version that nobody asked for so far: call it off the event loop.
        Raises UnknownModelError for what does not exist, AdapterError and the like for a version
        that does not verify and has none before it, StorageError where that cannot be found out.
        """
        if model == self.base.name:
            return Lease(self.base)
        try:
            reference = Reference.parse(model)
        except RegistryError as error:
            raise UnknownModelError(f"no model is called {model[:80]!r}", _HINT) from error
        if self._registry is None:
            raise _unknown(model)
        try:
            version = self._taken(self._registry, reference)
        except UnknownAdapterError as error:
            raise _unknown(model) from error
        return self._lease(version, reference.alias)

    def ready(self, model: str) -> Lease | None:
        """As `acquire`, for the base and for aliases in use; None where the disk would have to be
        read, or nothing is called so."""
        if model == self.base.name:
            return Lease(self.base)
        name, mark, alias = model.partition("@")
        key = name, alias if mark else PROD
        with self._guard:
            version = self._serving.get(key)
        if version is None or not self._versions.took(version):
            return None
        return self._lease(version, key[1])

    def _lease(self, version: Version, alias: str) -> Lease:
        served = Served(version.name, f"v{version.number}", version.id, alias)
        return Lease(served, lambda: self._versions.give(version))

    def read(self, model: Served) -> Adapter:
        """The weights of a leased version, from the bytes that were verified."""
        return self._versions.read(Key(str(model), model.digest))

    def cards(self) -> list[Card]:
        """The base, then each alias, by name."""
        with self._guard:
            meant = {key: alias.version for key, alias in self._targets.items()} | self._serving
        return [Card(self.base.name, ""), *(self._card(key, meant[key]) for key in sorted(meant))]

    def health(self) -> Health:
        """From any thread."""
        with self._guard:
            behind = [
                str(alias)
                for key, alias in sorted(self._targets.items())
                if key in self._serving and self._serving[key].id != alias.version.id
            ]
            return Health(self._fault, tuple(behind), self._refused)

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._versions.close()

    def _card(self, key: _Key, version: Version) -> Card:
        name, alias = key
        id = name if alias == PROD else f"{name}@{alias}"
        facts = f"v{version.number}", version.id, int(version.published)
        return Card(id, self.base.name, *facts)

    # What a name means

    def _taken(self, registry: Registry, reference: Reference) -> Version:
        """The version that is meant, verified and referred to."""
        if not reference.alias:
            version = registry.resolve(reference)
            self._versions.take(version)
            return version
        key = reference.name, reference.alias
        with self._guard:
            serving = self._serving.get(key)
        if serving is not None:
            try:
                self._versions.take(serving)
            except _UNUSABLE as error:
                _LOG.warning("%s is served no more: %s", serving, error)
                self._forget(key, serving)
            else:
                return serving
        return self._first_use(registry, key)

    def _forget(self, key: _Key, version: Version) -> None:
        with self._guard:
            if self._serving.get(key) == version:
                del self._serving[key]

    def _first_use(self, registry: Registry, key: _Key) -> Version:
        """An alias that nobody asked for so far: its version, or one before it that verifies."""
        alias = registry.resolve_alias(*key)
        try:
            version = alias.version
            self._versions.take(version)
        except _UNUSABLE as error:
            self._refuse(key, alias, error)
            version = self._earlier(registry, alias, error)
        with self._guard:
            self._targets.setdefault(key, alias)
            self._serving.setdefault(key, version)
        self._keep()
        return version

    def _earlier(self, registry: Registry, alias: Alias, fault: MeadowError) -> Version:
        for version in _before(registry, alias):
            try:
                self._versions.take(version)
            except _UNUSABLE as error:
                _LOG.warning("%s is no way back for %s: %s", version, alias, error)
            else:
                return version
        raise fault

    def _refuse(self, key: _Key, alias: Alias, error: MeadowError) -> None:
        """The next looks do not try again before the registry changes."""
        with self._guard:
            self._refused += 1
        self._stays_out[key] = alias.revision
        _LOG.warning("%s of %s stays out: %s", alias.version, alias, error)

    # Watching the registry

    def _watch(self, registry: Registry, seconds: float) -> None:
        while not self._ended.wait(seconds):
            try:
                if registry.is_replaced:
                    self._take_up(registry)
                self._look(registry)
                self._say("")
            except MeadowError as error:
                self._say(str(error))
            except Exception as error:  # a defect, or out of files: the next look may be better
                self._say(f"{type(error).__name__}: {error}", error)

    def _say(self, fault: str, defect: Exception | None = None) -> None:
        with self._guard:
            before, self._fault = self._fault, fault
        if fault != before:
            _LOG.warning("the registry: %s", fault or "is back", exc_info=defect)

    def _take_up(self, registry: Registry) -> None:
        """Go on with a registry that lies in the place of the one that was opened, once it does not
        change from look to look: whoever copies it there may not be done."""
        before, self._seen = self._seen, registry.fingerprint()
        if self._seen != before:
            return
        registry.reopen()
        with self._guard:
            self._serving = {}  # what a name means there, the next who asks finds out
        self._revision = -1
        self._versions.doubt()

    def _look(self, registry: Registry) -> None:
        revision = registry.revision()
        if revision != self._revision:
            self._read_aliases(registry)
            self._revision = revision
        with self._guard:
            meant = [(key, self._targets[key], version) for key, version in self._serving.items()]
        faults: list[StorageError] = []
        for key, alias, version in meant:
            if version.id != alias.version.id and self._stays_out.get(key) != alias.revision:
                try:
                    self._move(key, alias)
                except StorageError as error:  # of this version's files, perhaps: others move
                    faults.append(error)
        if faults:
            raise faults[0]

    def _read_aliases(self, registry: Registry) -> None:
        targets = {(alias.name, alias.alias): alias for alias in registry.aliases()}
        changes = registry.changes(self._revision) if self._revision >= 0 else []
        with self._guard:
            self._targets = targets
            self._serving = {key: v for key, v in self._serving.items() if key in targets}
        if any(change.kind == "distrusted" for change in changes):
            self._versions.doubt()
        self._stays_out = {}  # what was wrong with a version may have been mended
        self._keep()

    def _move(self, key: _Key, alias: Alias) -> None:
        """Let an alias in use mean another version, if that verifies."""
        version = alias.version
        try:
            self._versions.take(version, anew=True)
        except _UNUSABLE as error:
            self._refuse(key, alias, error)
            return
        if self.warm is not None:
            self.warm(Served(version.name, f"v{version.number}", version.id, key[1]))
        with self._guard:
            self._serving[key] = version
        self._keep()
        self._versions.give(version)

    def _keep(self) -> None:
        with self._keeping:  # to its end: who comes second knows more
            with self._guard:
                versions = list(self._serving.values())
            self._versions.keep(versions)


def _before(registry: Registry, alias: Alias) -> Iterator[Version]:
    """The versions that an alias pointed to earlier, the newest first."""
    entries = {entry.revision: entry for entry in registry.history(alias.name, alias.alias)}
    entry = entries.get(alias.revision)
    while entry is not None and entry.below is not None:
        entry = entries.get(entry.below)
        if entry is not None and entry.after != alias.version.id:
            try:
                yield registry.resolve(Reference(alias.name, digest=entry.after))
            except UnknownAdapterError:
                continue  # it was collected


def _unknown(model: str) -> UnknownModelError:
    return UnknownModelError(f"the model {model[:80]!r} does not exist", _HINT)
