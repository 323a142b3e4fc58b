"""The registry: signed adapters in immutable versions, and the aliases that point to them.

    registry.db           names, numbers, aliases, signers, pins, and the history of them all
    versions/ID/          the three files of a version; ID is the digest of the adapter's two
    leases/               which versions are in use by which living process
    registry.lock         the turn of who writes to versions/

Processes and threads may share a registry.  A row that names a folder is committed after the
folder is durable, and forgotten before it is deleted.  Every answer is read anew, so that what one
process decides holds for all others from their next question on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ..closeable import Closeable
from ..errors import (
    AdapterError,
    FormatError,
    IdentityError,
    MeadowError,
    PromotionError,
    RegistryError,
    UnknownAdapterError,
)
from ..file_lock import own_turn
from ..identity import Identity, default_path, key_id
from ..peft_adapters.blueprint import Blueprint
from ..peft_adapters.signed_adapter import Limits, SignedAdapter, Verified
from ..store import Disk
from .registry_changes import Changes, refuse_bound_elsewhere
from .registry_database import DATABASE, Database
from .registry_folders import VersionFolders
from .registry_gates import Checked, Gate, Verdict
from .registry_gc import Collected, Retention, collect
from .registry_leases import Leases
from .registry_names import PROD, Reference, adapter_name, alias_name
from .registry_opened import Opened
from .registry_rows import Alias, Entry, Rows, Version

__all__ = ["Alias", "Entry", "Registry", "Version", "default_folder"]

_UNUSABLE = (AdapterError, FormatError, IdentityError, RegistryError)
"""What is wrong with a version itself, and not with the disk."""
_RESTORE = "restore the registry's folder from a copy"
Named = str | Reference | Version
"""How a caller names a version; text is parsed as a Reference."""


def default_folder() -> Path:
    """Where this user's registry is: beside the key.  IdentityError where there is no home."""
    return default_path().parent / "registry"


class Registry(Closeable):
    """Made by `Registry.open`; close it, or use it in a `with` statement."""

    def __init__(
        self, folder: Path, who: Identity, disk: Disk, clock: Callable[[], float], limits: Limits
    ) -> None:
        self.folder = folder
        self._disk = disk
        self._clock = clock
        self._limits = limits
        self._folders = VersionFolders(folder / "versions", disk, limits)
        self._leases = Leases(folder / "leases")
        with self._turn():
            self._database = Database(folder / DATABASE, who, disk, clock)
            try:
                self._folders.sweep()
            except BaseException:
                self._database.close()
                raise

    @classmethod
    def open(
        cls,
        folder: Path,
        who: Identity,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
        limits: Limits | None = None,
    ) -> Registry:
        """Create a registry, which trusts the key `who` first, or go on with one.

        `who` is named in the history of what is changed; `clock` gives Unix seconds.  Raises
        JournalError where the registry is damaged, FormatError for another format, StorageError
        where the disk refuses.
        """
        disk = disk or Disk()
        for part in ("versions", "leases"):
            disk.folder(folder / part)
        return cls(folder, who, disk, clock, limits or Limits())

    def close(self) -> None:
        """Release files and leases.  A registry that was not closed is as safe."""
        self._leases.close()
        self._database.close()

    # Publishing

    def publish(
        self, name: str, folder: Path, manifest: Path, blueprint: Blueprint | None = None
    ) -> Version:
        """Keep a signed adapter (its folder, and its manifest) as a version of `name`.

        The same content under the same name is the same version, and is mended where the
        registry's copy was damaged.  Raises AdapterError, FormatError or IdentityError for what
        does not verify, RegistryError for a name that it was not signed for.
        """
        return self.keep(name, SignedAdapter.read(folder, manifest, self._limits), blueprint)

    def keep(self, name: str, files: SignedAdapter, blueprint: Blueprint | None = None) -> Version:
        """As `publish`, of files that were read."""
        name, offered = adapter_name(name), self._check(files, blueprint)
        refuse_bound_elsewhere(name, offered)
        with self._turn():
            kept, verified = self._kept(files) or (files, offered)
            refuse_bound_elsewhere(name, verified)
            written = self._folders.put(kept)
            return self._database.change(lambda c: c.publish(name, kept, verified, written=written))

    def _kept(self, files: SignedAdapter) -> tuple[SignedAdapter, Verified] | None:
        """The same content with the manifest under which it is here, where that still holds.

        Where it does not, what is published takes its place: the content is the same.
        """
        known = self._database.read(lambda rows: rows.versions("versions.id = ?", files.id))
        try:
            kept = self._folders.read(known[0].id) if known else files
            verified = self._check(kept)
        except _UNUSABLE:
            return None
        same = known and (kept.id, kept.manifest_digest) == (known[0].id, known[0].manifest)
        return (kept, verified) if same else None

    # Versions

    def resolve(self, named: Named) -> Version:
        """The version that a reference means now.  UnknownAdapterError where there is none."""
        if isinstance(named, Version):
            return named
        reference = Reference.parse(named) if isinstance(named, str) else named
        return self._database.read(lambda rows: rows.resolve(reference))

    def versions(self, name: str = "") -> list[Version]:
        """All versions, or one name's, in order."""
        where, values = ("name = ?", [adapter_name(name)]) if name else ("TRUE", [])
        return self._database.read(lambda rows: rows.versions(where, *values))

    def aliases(self, name: str = "") -> list[Alias]:
        return self._database.read(lambda rows: rows.aliases(adapter_name(name) if name else ""))

    def verify(self, named: Named, blueprint: Blueprint | None = None) -> Verified:
        """Check a version's files as they are now; `SignedAdapter.verify` says what and raises."""
        version = self.resolve(named)
        return self._verify(version, self._folders.read(version.id), blueprint)

    def lease(self, named: Named, blueprint: Blueprint | None = None) -> Opened:
        """Verify a version and keep it from being deleted until the answer is closed."""
        version = self.resolve(named)
        self._leases.take(version.id)
        try:
            # `deleted` may have come between; from here on it cannot
            if self._database.read(lambda rows: rows.of_id(version.name, version.id)) is None:
                raise UnknownAdapterError(f"{version} was deleted")
            files = self._folders.read(version.id)
            verified = self._verify(version, files, blueprint)
        except BaseException:
            self._leases.give(version.id)
            raise
        return Opened(version, self._folders, verified, self._leases)

    def files(self, named: Named) -> SignedAdapter:
        """A version's files, verified: what an archive holds."""
        version = self.resolve(named)
        files = self._folders.read(version.id)
        self._verify(version, files, None)
        return files

    def _verify(
        self, version: Version, files: SignedAdapter, blueprint: Blueprint | None
    ) -> Verified:
        verified = self._check(files, blueprint)
        if (files.id, files.manifest_digest) != (version.id, version.manifest):
            raise AdapterError(
                f"{files.origin} was changed after {version} was published", "publish it again"
            )
        refuse_bound_elsewhere(version.name, verified)
        return verified

    def _check(self, files: SignedAdapter, blueprint: Blueprint | None = None) -> Verified:
        try:
            return files.verify(self.trusted(), blueprint)
        except IdentityError as error:
            hint = error.hint or "if you know whose key that is: `meadow adapters trust KEY.pem`"
            raise IdentityError(f"{files.origin}: {error.message}", hint) from error

    # Aliases

    def promote(
        self, named: Named, alias: str = PROD, gate: Gate | None = None, why: str = ""
    ) -> Version:
        """Point an alias to a version that verifies, and that the gate passes.

        Raises PromotionError, which is kept in the history, where the gate refuses.
        """
        candidate, alias = self.resolve(named), alias_name(alias)
        name, verified = candidate.name, self.verify(candidate)
        while True:  # each turn but the first follows another's successful move
            now = self._database.read(lambda rows: rows.alias(name, alias))
            if now is not None and now.version.id == candidate.id:
                return candidate
            verdict = self._judge(Checked(candidate, verified), now, gate, alias)
            below = None if now is None else now.revision

            def move(
                changes: Changes, verdict: Verdict = verdict, below: int | None = below
            ) -> Version | None:
                if not _is_at(changes.rows, name, alias, below):
                    return None
                figures = verdict.figures
                return changes.move(
                    name, alias, candidate.id, below=below, why=why, figures=figures
                )

            if moved := self._database.change(move):
                return moved

    def rollback(self, name: str, alias: str = PROD, why: str = "") -> Version:
        """Point an alias to the version before, of which each further call goes further back.

        Versions that no longer verify are passed over.  Raises RegistryError where none is left.
        """
        name, alias = adapter_name(name), alias_name(alias)
        while True:
            now = self.resolve_alias(name, alias)
            target = self._before(now)

            def move(changes: Changes, now: Alias = now, target: Entry = target) -> Version | None:
                if not _is_at(changes.rows, name, alias, now.revision):
                    return None
                return changes.move(
                    name, alias, target.after, below=target.below, kind="rolled back", why=why
                )

            if moved := self._database.change(move):
                return moved

    def resolve_alias(self, name: str, alias: str = PROD) -> Alias:
        """Where an alias points.  Raises UnknownAdapterError."""
        found = self._database.read(lambda rows: rows.alias(adapter_name(name), alias_name(alias)))
        if found is None:
            hint = "`meadow adapters list` shows all"
            raise UnknownAdapterError(f"{name} has no alias {alias}", hint)
        return found

    def _judge(
        self, candidate: Checked, now: Alias | None, gate: Gate | None, alias: str
    ) -> Verdict:
        if gate is None:
            return Verdict(True)
        verdict = gate.check(candidate, None if now is None else self._checked(now.version))
        if verdict.passed:
            return verdict
        version, why = candidate.version, "; ".join(verdict.reasons)
        place = version.name, alias, version.id
        self._database.change(lambda changes: changes.refuse(*place, why, verdict.figures))
        raise PromotionError(f"{version} is not promoted to {alias}", verdict.reasons)

    def _checked(self, version: Version) -> Checked | None:
        """None where it does not verify: then there is nothing to compare with."""
        try:
            return Checked(version, self.verify(version))
        except _UNUSABLE:
            return None

    def _before(self, now: Alias) -> Entry:
        """The newest move below an alias's whose version is another one and verifies."""
        entry, fault = self._entry(now.revision), ""
        while entry.below is not None:
            entry = self._entry(entry.below)
            if entry.after == now.version.id:
                continue
            try:
                self.verify(Reference(now.name, digest=entry.after))
            except MeadowError as error:
                fault = fault or error.message
            else:
                return entry
        raise RegistryError(f"{now} has no earlier version that can be used", fault)

    def _entry(self, revision: int) -> Entry:
        return self._database.read(lambda rows: rows.entry(revision))

    # Watching

    def revision(self) -> int:
        """Counts the changes; asking costs one read of the database's memory.

        Raises StorageError where the registry's folder is gone or was replaced.
        """
        return self._database.read(lambda rows: rows.revision())

    @property
    def is_replaced(self) -> bool:
        """Whether another one, a copy perhaps, lies where this one was opened."""
        return self._database.is_replaced

    def fingerprint(self) -> tuple[int, ...]:
        """Of the database that lies there now; another one after whatever is written to it."""
        return self._database.fingerprint()

    def reopen(self) -> None:
        """Go on with the one that lies there now, as in use as this was.  Raises as `open` does."""
        with self._turn():
            self._disk.folder(self.folder / "leases")
            self._leases.renew()
            self._database.reopen()

    def changes(self, since: int = 0) -> list[Entry]:
        """What changed after a revision, in order."""
        return self._database.read(lambda rows: rows.since(since))

    def history(self, name: str = "", alias: str = "") -> list[Entry]:
        """All changes, those of a name, or those of an alias."""
        return self._database.read(lambda rows: rows.history(name, alias))

    # Trust

    def trusted(self) -> dict[str, Ed25519PublicKey]:
        """The keys whose signatures count, by their ids."""
        return {
            key: _public(raw) for key, raw, _ in self._database.read(lambda rows: rows.signers())
        }

    def labels(self) -> dict[str, str]:
        """What the operator called each trusted key."""
        return {key: label for key, _, label in self._database.read(lambda rows: rows.signers())}

    def trust(self, public: Ed25519PublicKey, label: str = "") -> str:
        """Let a key's signatures count from now on; its id."""
        raw, id = public.public_bytes_raw(), key_id(public)
        self._database.change(lambda changes: changes.trust(id, raw, label))
        return id

    def distrust(self, id: str, why: str = "") -> None:
        """Versions that only this key signed no longer verify; RegistryError for a stranger's."""
        if id not in self.trusted():
            raise RegistryError(f"no trusted key has the id {id[:80]!r}", "give it in full")
        self._database.change(lambda changes: changes.distrust(id, why))

    # Keeping and deleting

    def pin(self, named: Named, why: str = "") -> Version:
        """Keep a version's content whatever `collect` finds."""
        version = self.resolve(named)
        self._database.change(lambda changes: changes.pin(version, why))
        return version

    def unpin(self, named: Named, why: str = "") -> Version:
        version = self.resolve(named)
        self._database.change(lambda changes: changes.unpin(version, why))
        return version

    def pins(self) -> set[str]:
        """Ids of the contents that are pinned."""
        return self._database.read(lambda rows: rows.pins())

    def collect(self, retention: Retention | None = None, *, dry_run: bool = False) -> Collected:
        """Delete the versions that nothing needs and no process uses, and leftovers.

        With `dry_run`, only say which.
        """
        kept, now = retention or Retention(), self._clock()
        with self._turn():
            return collect(self._database, self._folders, self._leases, kept, now, dry_run)

    def _turn(self) -> AbstractContextManager[None]:
        return own_turn(self.folder / "registry.lock")


def _is_at(rows: Rows, name: str, alias: str, revision: int | None) -> bool:
    """Whether an alias still is where a decision about it began."""
    now = rows.alias(name, alias)
    return (None if now is None else now.revision) == revision


def _public(raw: bytes) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise IdentityError("the registry holds a trusted key that is damaged", _RESTORE) from error
