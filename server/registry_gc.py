"""Which contents of the registry are still needed, and what becomes of the others."""

from __future__ import annotations

from dataclasses import dataclass

from .registry_changes import Changes
from .registry_database import Database
from .registry_folders import VersionFolders
from .registry_leases import Leases
from .registry_rows import Rows, Version

DAY = 86400.0  # seconds


@dataclass(frozen=True)
class Retention:
    """What stays besides what is pinned, what aliases point to, and what these descend from."""

    history: int = 5
    """So many of each alias's last moves, and as many steps back."""
    days: float = 7.0
    """Versions that were published within so many."""


@dataclass(frozen=True)
class Collected:
    """What a collection deleted, or would delete."""

    versions: tuple[Version, ...]
    bytes: int
    """Of their adapters; a content of two names counts once."""
    in_use: tuple[str, ...]
    """Ids that stay only because a process has them open."""
    leftovers: int
    """Folders that no version names: of publications that were cut off."""


def collect(
    database: Database,
    folders: VersionFolders,
    leases: Leases,
    retention: Retention,
    now: float,
    dry_run: bool,
) -> Collected:
    """Delete the versions that nothing needs and no process uses, and leftovers; with `dry_run`,
    only say which.  For whoever has the registry's turn; `now` is Unix seconds.
    """
    leased = leases.held()

    def forget(changes: Changes) -> tuple[list[Version], set[str]]:
        stay = needed(changes.rows, retention, now)
        unneeded = [version for version in changes.rows.versions() if version.id not in stay]
        gone = [version for version in unneeded if version.id not in leased]
        if not dry_run:
            changes.delete({version.id for version in gone})
        return gone, {version.id for version in unneeded} & leased

    gone, in_use = database.change(forget)
    sizes = {version.id: version.bytes for version in gone}
    orphans = _orphans(database, folders)
    if not dry_run:
        _delete(orphans - leases.held(), folders)
    leftovers = orphans - sizes.keys()
    return Collected(tuple(gone), sum(sizes.values()), tuple(sorted(in_use)), len(leftovers))


def needed(rows: Rows, retention: Retention, now: float) -> set[str]:
    """The ids of all contents that have to stay."""
    ids = {version.id for version in rows.versions("published > ?", now - retention.days * DAY)}
    ids |= rows.pins()
    for alias in rows.aliases():
        ids.add(alias.version.id)
        place = alias.name, alias.alias
        ids |= {entry.after for entry in rows.last_moves(*place, retention.history)}
        ids |= {entry.after for entry in rows.chain(alias.revision, retention.history + 1)}
    return _with_ancestors(ids, _started_from(rows))


def _started_from(rows: Rows) -> dict[str, set[str]]:
    """What each version was trained from, but for earlier rounds of its own run: each of those is
    whole in itself, and a run may have thousands."""
    run_of = {version.id: version.facts["run_id"] for version in rows.versions()}
    return {
        id: {parent for parent in parents if run_of.get(parent) != run_of.get(id)}
        for id, parents in rows.parents().items()
    }


def _with_ancestors(ids: set[str], parents: dict[str, set[str]]) -> set[str]:
    found, left = set(ids), list(ids)
    while left:
        new = parents.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def _orphans(database: Database, folders: VersionFolders) -> set[str]:
    """Folders that no version names."""
    named = {version.id for version in database.read(lambda rows: rows.versions())}
    return folders.ids() - named


def _delete(orphans: set[str], folders: VersionFolders) -> None:
    """Who has leased one just before it was forgotten keeps it until the next time."""
    for id in sorted(orphans):
        folders.delete(id)
    folders.sweep()
