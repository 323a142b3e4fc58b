"""What the registry's database keeps, and the questions that it answers."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UnknownAdapterError
from .registry_names import Reference

Kind = Literal[
    "published", "moved", "rolled back", "refused", "pinned", "unpinned", "trusted", "distrusted",
    "deleted", "mended",
]  # fmt: skip

MOVES = ("moved", "rolled back")

TABLES = (
    "CREATE TABLE names (name TEXT PRIMARY KEY, last INTEGER NOT NULL)",
    "CREATE TABLE contents (id TEXT PRIMARY KEY, manifest TEXT NOT NULL, bytes INTEGER NOT NULL,"
    " facts TEXT NOT NULL)",
    "CREATE TABLE parents (id TEXT NOT NULL, parent TEXT NOT NULL, PRIMARY KEY (id, parent))",
    "CREATE TABLE versions (name TEXT NOT NULL, number INTEGER NOT NULL, id TEXT NOT NULL,"
    " published REAL NOT NULL, deleted REAL, PRIMARY KEY (name, number))",
    "CREATE UNIQUE INDEX one_number ON versions (name, id) WHERE deleted IS NULL",
    "CREATE INDEX by_id ON versions (id)",
    "CREATE TABLE aliases (name TEXT NOT NULL, alias TEXT NOT NULL, entry INTEGER NOT NULL,"
    " PRIMARY KEY (name, alias))",
    "CREATE TABLE pins (id TEXT PRIMARY KEY)",
    "CREATE TABLE signers (key_id TEXT PRIMARY KEY, public BLOB NOT NULL, label TEXT NOT NULL)",
    # AUTOINCREMENT: a revision that was seen is never given to another change
    "CREATE TABLE history (revision INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL,"
    " who TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, alias TEXT NOT NULL,"
    " before TEXT NOT NULL, after TEXT NOT NULL, why TEXT NOT NULL, figures TEXT NOT NULL,"
    " below INTEGER)",
    "CREATE INDEX by_alias ON history (name, alias, revision)",
    "CREATE TRIGGER history_stays BEFORE DELETE ON history BEGIN SELECT RAISE(ABORT, 'kept'); END",
    "CREATE TRIGGER history_holds BEFORE UPDATE ON history BEGIN SELECT RAISE(ABORT, 'kept'); END",
)
_VERSION = (
    "SELECT name, number, versions.id, manifest, bytes, published, facts FROM versions"
    " JOIN contents ON contents.id = versions.id WHERE deleted IS NULL"
)
_ENTRY = (
    "SELECT revision, time, who, kind, name, alias, before, after, why, figures, below FROM history"
)


@dataclass(frozen=True)
class Version:
    """One version of an adapter, as it was when it was published."""

    name: str
    number: int
    id: str
    manifest: str
    """SHA-256 of its manifest."""
    bytes: int
    published: float
    """Unix seconds."""
    facts: Mapping[str, Any]
    """What its manifest stated, and rank and dtypes: for lists; only `verify` vouches for them."""

    def __str__(self) -> str:
        return f"{self.name}@v{self.number}"


@dataclass(frozen=True)
class Entry:
    """One change, as it stays in the history."""

    revision: int
    time: float
    """Unix seconds."""
    who: str
    """The id of the key of who made it."""
    kind: Kind
    name: str
    alias: str
    before: str
    """The version's id before; "" for none.  As all that does not apply."""
    after: str
    why: str
    figures: Mapping[str, float]
    below: int | None
    """Of a move: the one that a rollback returns to."""


@dataclass(frozen=True)
class Alias:
    """Where an alias points, and since which change."""

    name: str
    alias: str
    version: Version
    revision: int

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


class Rows:
    """Answers from the database as it is now; used on the connection's own thread."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def revision(self) -> int:
        """The newest change's; 0 before the first."""
        ((newest,),) = self._db.execute("SELECT COALESCE(MAX(revision), 0) FROM history")
        return int(newest)

    def resolve(self, reference: Reference) -> Version:
        """Raises UnknownAdapterError, with what there is instead."""
        if reference.alias:
            found = self.alias(reference.name, reference.alias)
            if found is not None:
                return found.version
        elif reference.number:
            for version in self.versions(
                "name = ? AND number = ?", reference.name, reference.number
            ):
                return version
        else:
            matches = self.versions(
                "name = ? AND versions.id >= ? AND versions.id < ?",
                *(reference.name, reference.digest, reference.digest + "g"),
            )
            if len(matches) == 1:
                return matches[0]
        raise self._unknown(reference)

    def versions(self, where: str = "TRUE", *values: object) -> list[Version]:
        """Those that an SQL condition selects, by name and number."""
        rows = self._db.execute(f"{_VERSION} AND {where} ORDER BY name, number", values)
        found = [(*row[:-1], json.loads(row[-1])) for row in rows]
        return [Version(*values) for values in found]

    def of_id(self, name: str, id: str) -> Version | None:
        return next(iter(self.versions("name = ? AND versions.id = ?", name, id)), None)

    def alias(self, name: str, alias: str) -> Alias | None:
        return next(iter(self._aliases("WHERE name = ? AND alias = ?", name, alias)), None)

    def aliases(self, name: str = "") -> list[Alias]:
        return self._aliases("WHERE name = ?", name) if name else self._aliases("")

    def entry(self, revision: int) -> Entry:
        (entry,) = self._entries("WHERE revision = ?", revision)
        return entry

    def history(self, name: str, alias: str) -> list[Entry]:
        """The changes of a name, or of all; with `alias`, of that alias alone."""
        where, values = "WHERE TRUE", [value for value in (name, alias) if value]
        where += " AND name = ?" if name else ""
        where += " AND alias = ?" if alias else ""
        return self._entries(where, *values)

    def since(self, revision: int) -> list[Entry]:
        return self._entries("WHERE revision > ?", revision)

    def chain(self, revision: int | None, most: int) -> Iterator[Entry]:
        """A move, the one below it, and so on: where rollbacks go."""
        while revision is not None and most > 0:
            entry, most = self.entry(revision), most - 1
            yield entry
            revision = entry.below

    def last_moves(self, name: str, alias: str, most: int) -> list[Entry]:
        """The newest moves of an alias, whatever was rolled back."""
        where = "WHERE name = ? AND alias = ? AND kind IN (?, ?)"
        rows = self._db.execute(
            f"SELECT revision FROM history {where} ORDER BY revision DESC LIMIT ?",
            (name, alias, *MOVES, most),
        ).fetchall()
        return [self.entry(revision) for (revision,) in rows]

    def parents(self) -> dict[str, set[str]]:
        """The adapters that each one was trained from, by id."""
        found: dict[str, set[str]] = {}
        for id, parent in self._db.execute("SELECT id, parent FROM parents"):
            found.setdefault(id, set()).add(parent)
        return found

    def signers(self) -> list[tuple[str, bytes, str]]:
        """(key id, raw public key, label) of each trusted key."""
        query = "SELECT key_id, public, label FROM signers ORDER BY label, key_id"
        return list(self._db.execute(query))

    def pins(self) -> set[str]:
        return {id for (id,) in self._db.execute("SELECT id FROM pins")}

    def _aliases(self, where: str, *values: object) -> list[Alias]:
        query = f"SELECT name, alias, entry FROM aliases {where} ORDER BY name, alias"
        found = []
        for name, alias, revision in self._db.execute(query, values).fetchall():
            version = self.of_id(name, self.entry(revision).after)
            assert version is not None, "what an alias points to is never deleted"
            found.append(Alias(name, alias, version, revision))
        return found

    def _entries(self, where: str, *values: object) -> list[Entry]:
        rows = self._db.execute(f"{_ENTRY} {where} ORDER BY revision", values)
        found = [(*row[:-2], json.loads(row[-2]), row[-1]) for row in rows]
        return [Entry(*values) for values in found]

    def _unknown(self, reference: Reference) -> UnknownAdapterError:
        known = self.versions("name = ?", reference.name)
        if not known:
            return UnknownAdapterError(
                f"the registry has no adapter {reference.name}", "`meadow adapters list` shows all"
            )
        aliases = [alias.alias for alias in self.aliases(reference.name)]
        there = ", ".join([*aliases, *(f"v{version.number}" for version in known[-5:])])
        return UnknownAdapterError(f"{reference} names no single version", f"there are {there}")
