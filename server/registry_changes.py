"""The rules by which the registry changes, each inside one transaction.

Every change leaves one entry in the history, in the same transaction; asking again for what is so
already changes nothing and leaves none.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import asdict

from ..canonical_json import canonical
from ..errors import RegistryError, UnknownAdapterError
from ..peft_adapters.signed_adapter import SignedAdapter, Verified
from .registry_rows import Kind, Rows, Version

LONGEST_TEXT = 500
"""Characters of a reason or a label; what is longer is cut."""


class Changes:
    """What one transaction does, at the time `now` (Unix seconds), for the key id `who`."""

    def __init__(self, database: sqlite3.Connection, now: float, who: str) -> None:
        self._db = database
        self._now = now
        self._who = who
        self.rows = Rows(database)

    def publish(
        self, name: str, files: SignedAdapter, verified: Verified, *, written: bool
    ) -> Version:
        """The version of a name with this content: the one there is, or one with a new number.

        `written` says that its files were not there as they should be.  They are, and are not what
        is noted here, where who wrote them died before this was done.
        """
        known = self.rows.of_id(name, files.id)
        if known is None or written or known.manifest != files.manifest_digest:
            self._keep_content(files, verified)
            if known is not None:
                self._tell("mended", name, after=files.id)
        if known is not None:
            return self._live(name, files.id)
        query = (
            "INSERT INTO names VALUES (?, 1)"
            " ON CONFLICT (name) DO UPDATE SET last = last + 1 RETURNING last"
        )
        (number,) = self._db.execute(query, (name,)).fetchone()
        row = (name, number, files.id, self._now)
        self._db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, NULL)", row)
        self._tell("published", name, after=files.id)
        return self._live(name, files.id)

    def move(
        self,
        name: str,
        alias: str,
        after: str,
        *,
        below: int | None,
        kind: Kind = "moved",
        why: str = "",
        figures: Mapping[str, float] | None = None,
    ) -> Version:
        """Point an alias to a version; a rollback returns to the entry `below`."""
        version, now = self._live(name, after), self.rows.alias(name, alias)
        before = now.version.id if now else ""
        revision = self._tell(kind, name, alias, before, after, why, figures, below)
        self._db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (name, alias, revision))
        return version

    def refuse(
        self, name: str, alias: str, after: str, why: str, figures: Mapping[str, float]
    ) -> None:
        """Keep why a version was not promoted."""
        now = self.rows.alias(name, alias)
        before = now.version.id if now else ""
        self._tell("refused", name, alias, before, after, why, figures)

    def pin(self, version: Version, why: str) -> None:
        self._live(version.name, version.id)
        if self._db.execute("INSERT OR IGNORE INTO pins VALUES (?)", (version.id,)).rowcount:
            self._tell("pinned", version.name, after=version.id, why=why)

    def unpin(self, version: Version, why: str) -> None:
        if self._db.execute("DELETE FROM pins WHERE id = ?", (version.id,)).rowcount:
            self._tell("unpinned", version.name, before=version.id, why=why)

    def trust(self, key_id: str, public: bytes, label: str) -> None:
        query = "INSERT OR IGNORE INTO signers VALUES (?, ?, ?)"
        if self._db.execute(query, (key_id, public, one_line(label))).rowcount:
            self._tell("trusted", after=key_id, why=label)

    def distrust(self, key_id: str, why: str) -> None:
        if self._db.execute("DELETE FROM signers WHERE key_id = ?", (key_id,)).rowcount:
            self._tell("distrusted", before=key_id, why=why)

    def delete(self, ids: Collection[str]) -> list[Version]:
        """Forget the versions that have one of these contents; their numbers are never reused."""
        gone = [version for version in self.rows.versions() if version.id in ids]
        for version in gone:
            row = (self._now, version.name, version.number)
            self._db.execute("UPDATE versions SET deleted = ? WHERE name = ? AND number = ?", row)
            self._tell("deleted", version.name, before=version.id, why=str(version))
        for id in ids:
            self._db.execute("DELETE FROM contents WHERE id = ?", (id,))
            self._db.execute("DELETE FROM parents WHERE id = ?", (id,))
        return gone

    def _keep_content(self, files: SignedAdapter, verified: Verified) -> None:
        stated = asdict(verified.provenance)
        facts = {**stated, "rank": verified.rank, "dtypes": verified.dtypes}
        size = len(files.config) + len(files.weights)
        row = (files.id, files.manifest_digest, size, canonical(facts))
        self._db.execute("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?)", row)
        links = [(files.id, parent) for parent in set(verified.provenance.parents)]
        self._db.execute("DELETE FROM parents WHERE id = ?", (files.id,))
        self._db.executemany("INSERT INTO parents VALUES (?, ?)", links)

    def _live(self, name: str, id: str) -> Version:
        version = self.rows.of_id(name, id)
        if version is None:
            raise UnknownAdapterError(f"{name}@sha256:{id[:12]} was deleted", "publish it again")
        return version

    def _tell(
        self,
        kind: Kind,
        name: str = "",
        alias: str = "",
        before: str = "",
        after: str = "",
        why: str = "",
        figures: Mapping[str, float] | None = None,
        below: int | None = None,
    ) -> int:
        """Add an entry; its revision."""
        place = (self._now, self._who, kind, name, alias, before, after)
        row = (*place, one_line(why), json.dumps(dict(figures or {})), below)
        query = (
            "INSERT INTO history (time, who, kind, name, alias, before, after, why, figures, below)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING revision"
        )
        (revision,) = self._db.execute(query, row).fetchone()
        return int(revision)


def refuse_bound_elsewhere(name: str, verified: Verified) -> None:
    """Raise RegistryError where a manifest says that its adapter belongs under another name."""
    bound = verified.provenance.name
    if bound not in ("", name):
        raise RegistryError(
            f"this adapter was signed to be published as {bound[:130]!r}, not as {name!r}",
            "publish it under that name",
        )


def one_line(text: str) -> str:
    """A text as it can be shown in a terminal: nothing that moves the cursor."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)[:LONGEST_TEXT]
