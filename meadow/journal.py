"""The coordinator's durable log: what a run has decided and received, so that it can go on.

A run's folder holds `journal.db` (SQLite), `blobs/` (payloads and states under their SHA-256) and
`journal.lock`.  A round is opened with its cohort, collects contributions and refusals, and is
closed in one transaction together with the state that follows from it.  Whatever a method has
returned from survives a power cut, and whatever it has not returned from may be asked for again:
that is all that "the same command continues" needs.

One process, and in it one thread, uses a journal at a time.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .canonical_json import Json, canonical
from .closeable import Closeable
from .errors import FormatError, JournalError, UpdateError
from .journal_tables import LATE, TABLES
from .machine_changes import machine_changes
from .store import Blobs, Disk, digest_of, explained, locked

FORMAT = 1
_ANEW = "choose another --out, or delete that folder to start anew"


@dataclass(frozen=True)
class RunIdentity:
    """What a run's folder belongs to.

    `environment` is what bit-for-bit equality depends on besides the settings: thread count, CPU
    capability, version of torch.
    """

    config_digest: str
    base_digest: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class OpenRound:
    """A round that was opened and not yet closed."""

    number: int
    cohort: tuple[str, ...]


class Journal(Closeable):
    """One run's log.  Made by `Journal.open`; close it, or use it in a `with` statement."""

    run_id: str
    """Random, made at creation, equal after every restart."""
    notices: list[str]
    """What the run's owner should be told."""

    def __init__(self, folder: Path, database: sqlite3.Connection, disk: Disk) -> None:
        self._folder = folder
        self._path = folder / "journal.db"
        self._db = database
        self._disk = disk
        self._blobs = Blobs(folder / "blobs", disk)
        self._resources = ExitStack()
        self.notices = []

    @classmethod
    def open(cls, folder: Path, identity: RunIdentity, disk: Disk | None = None) -> Journal:
        """Create the journal of `folder`, or resume the run that it holds.

        Raises JournalError where the folder is in use, damaged, or holds a run with other
        settings or another base model; FormatError for another journal format.
        """
        disk = disk or Disk()
        disk.folder(folder)
        with ExitStack() as resources:
            resources.enter_context(
                locked(folder / "journal.lock", "wait for it, or choose another --out")
            )
            database = resources.enter_context(closing(disk.connect(folder / "journal.db")))
            journal = cls(folder, database, disk)
            journal._admit(identity)
            journal._resources = resources.pop_all()
        return journal

    def close(self) -> None:
        """Release the folder.  Nothing depends on it: a journal that was not closed is as safe."""
        self._resources.close()

    # Rounds

    def open_round(self, number: int, cohort: Sequence[str]) -> None:
        """Open the round after the last closed one, with its clients in fold order."""
        newest = self.newest()
        if self.current() is not None or newest is None or number != newest + 1:
            raise ValueError(f"round {number} cannot be opened after round {newest}")
        if len(set(cohort)) != len(cohort):
            raise ValueError(f"round {number} names a client twice: {list(cohort)}")
        with self._transaction():
            self._db.execute(
                "INSERT INTO rounds VALUES (?, ?, NULL, NULL)", (number, canonical(list(cohort)))
            )

    def recast(self, number: int, cohort: Sequence[str]) -> None:
        """Give the open round another cohort, which keeps all that have contributed."""
        opened = self.current()
        if opened is None or opened.number != number:
            raise ValueError(f"round {number} is not open")
        if not set(self.contributions(number)) <= set(cohort) or len(set(cohort)) != len(cohort):
            raise ValueError(f"round {number} cannot be given the cohort {list(cohort)}")
        with self._transaction():
            self._db.execute(
                "UPDATE rounds SET cohort = ? WHERE number = ?", (canonical(list(cohort)), number)
            )

    def current(self) -> OpenRound | None:
        """The round that is open, if one is."""
        for number, cohort in self._rows("SELECT number, cohort FROM rounds WHERE state IS NULL"):
            return OpenRound(number, tuple(self._load(cohort)))
        return None

    def close_round(
        self,
        number: int,
        state: bytes,
        metrics: Mapping[str, Json],
        late: Sequence[tuple[int, str]] = (),
    ) -> None:
        """Store the state that follows from a round, its metrics and its end, all in one.

        Round 0 is never opened: closing it stores the initial state.  `late` are the answers to
        earlier rounds, as (round, client), that this one has counted.
        """
        opened = self.current()
        first = number == 0 and self.newest() is None
        if not first and (opened is None or opened.number != number):
            raise ValueError(f"round {number} is not open")
        cohort = canonical(list(opened.cohort) if opened else [])
        row = (number, cohort, self._blobs.put(state), json.dumps(dict(metrics), sort_keys=True))
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?)", row)
            query = "UPDATE late SET counted = ? WHERE round = ? AND client = ?"
            self._db.executemany(query, [(number, *answer) for answer in late])

    def last(self) -> tuple[int, bytes] | None:
        """Number and state of the last closed round; None before the initial state is stored."""
        newest = self.newest()
        return None if newest is None else (newest, self.state(newest))

    def state(self, number: int) -> bytes:
        """The state after a closed round.  JournalError if it is damaged or was pruned."""
        ((state,),) = self._rows("SELECT state FROM rounds WHERE number = ?", number)
        return self._blobs.get(state)

    def metrics(self) -> list[dict[str, Json]]:
        """`{"round": number, **metrics}` of every closed round, in order, round 0 included.

        Figures come back as they were given, also those that are not finite.
        """
        closed = "SELECT number, metrics FROM rounds WHERE state IS NOT NULL ORDER BY number"
        return [{"round": number, **self._load(text)} for number, text in self._rows(closed)]

    # Contributions

    def receive(self, number: int, client: str, payload: bytes) -> bool:
        """Store a contribution; True if it is new, False if these bytes were there already.

        The first one counts.  Raises UpdateError, naming the client, for other bytes than
        before, for a round that is not open, and for a client that is not asked or was refused.
        """
        known = self._rows(
            "SELECT digest FROM contributions WHERE round = ? AND client = ?", number, client
        )
        if known:
            if known[0][0] != digest_of(payload):
                raise UpdateError(f"{client} sent a second, different answer to round {number}")
            return False
        self._require_asked(number, client)
        digest = self._blobs.put(payload)
        with self._transaction():
            self._db.execute("INSERT INTO contributions VALUES (?, ?, ?)", (number, client, digest))
            self._db.execute("DELETE FROM late WHERE round = ? AND client = ?", (number, client))
        return True

    def keep_late(self, number: int, client: str, payload: bytes, since: int) -> bool:
        """Store an answer to a round that went on without it, for round `since`; False where that
        client counted or was refused there, or is kept.  UpdateError for who was not asked."""
        if client not in self.cohort(number):
            raise UpdateError(f"{client} was not asked in round {number}")
        kept = self._rows("SELECT 1 FROM late WHERE round = ? AND client = ?", number, client)
        if kept or client in self.contributions(number) or client in self.refusals(number):
            return False
        row = (number, client, self._blobs.put(payload), since)
        with self._transaction():
            self._db.execute("INSERT INTO late VALUES (?, ?, ?, ?, NULL)", row)
        return True

    def late(self, number: int) -> list[tuple[int, str, str]]:
        """Round, client and digest of the late answers that round `number` may count, in order."""
        query = "SELECT round, client, digest FROM late WHERE since <= ? AND counted IS NULL"
        found = self._rows(f"{query} ORDER BY round, client", number)
        return [(asked, client, digest) for asked, client, digest in found]

    def refuse(self, number: int, client: str, reason: str) -> None:
        """Record why a client's answer does not count; the first reason stays.

        A contribution that was received before stays, too: then the refusal tells of a second.
        """
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO refusals VALUES (?, ?, ?)", (number, client, reason)
            )

    def forgive(self, number: int) -> None:
        """Forget a round's refusals, so that the same command asks those clients once more."""
        with self._transaction():
            self._db.execute("DELETE FROM refusals WHERE round = ?", (number,))

    def retract(self, client: str, reason: str) -> list[int]:
        """Forget all that a client has contributed; the rounds that it had contributed to.

        Its payloads are deleted with the next `prune` or `sweep`.  It is refused in the open round,
        if that is one of them or asks it.  What closed rounds made of it all stays in them.
        """
        found = self._rows(
            "SELECT round FROM contributions WHERE client = ? UNION"
            " SELECT round FROM late WHERE client = ? ORDER BY round",
            *(client, client),
        )
        rounds = [int(number) for (number,) in found]
        opened = self.current()
        asked = [opened.number] if opened is not None and client in opened.cohort else []
        with self._transaction():
            for table in ("contributions", "late"):
                self._db.execute(f"DELETE FROM {table} WHERE client = ?", (client,))
            for number in {*rounds, *asked}:
                self._db.execute(
                    "INSERT OR IGNORE INTO refusals VALUES (?, ?, ?)", (number, client, reason)
                )
        return rounds

    def contributions(self, number: int) -> dict[str, str]:
        """The digest of each client that contributed to a round, in the cohort's order."""
        found = dict(self._rows("SELECT client, digest FROM contributions WHERE round = ?", number))
        return {client: found[client] for client in self.cohort(number) if client in found}

    def refusals(self, number: int) -> dict[str, str]:
        """The reason of each client that was refused in a round, sorted by client."""
        query = "SELECT client, reason FROM refusals WHERE round = ? ORDER BY client"
        return dict(self._rows(query, number))

    def payload(self, digest: str) -> bytes:
        """The bytes of a contribution.  JournalError if they are damaged or were pruned."""
        return self._blobs.get(digest)

    # Facts and space

    def note(self, key: str, value: Json) -> None:
        """Keep a small fact, for example that the run is finished."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (key, canonical(value)))

    def get(self, key: str) -> Json:
        """A fact kept by `note`, or None."""
        rows = self._rows("SELECT value FROM notes WHERE key = ?", key)
        return self._load(rows[0][0]) if rows else None

    def prune(self, keep_rounds: int) -> None:
        """Delete payloads and states of all but the `keep_rounds` last closed rounds.

        Their rows, with the digests, stay.  The open round and the last state are never touched.
        """
        if keep_rounds < 1:
            raise ValueError(f"keep_rounds is {keep_rounds}: the last state has to stay")
        newest = self.newest()
        if newest is not None:
            self._blobs.sweep(self._digests(newest - keep_rounds + 1))

    def sweep(self) -> None:
        """Delete what no row names: payloads that were retracted, or left by a crash."""
        self._blobs.sweep(self._digests(0))

    # Opening

    def _admit(self, identity: RunIdentity) -> None:
        """Create the tables, or check that they are ours and this run's."""
        ((health,),) = self._rows("PRAGMA quick_check(1)")
        if health != "ok":
            raise JournalError(f"{self._path} is damaged: {health}", _ANEW)
        ((version,),) = self._rows("PRAGMA user_version")
        if version == 0 and not self._rows("SELECT name FROM sqlite_master"):
            self._create(identity)
        elif version != FORMAT:
            raise FormatError(
                f"{self._path} has journal format {version}, this meadow reads {FORMAT}", _ANEW
            )
        else:
            self._resume(identity)
        self.run_id = self._fact("run_id")
        self._disk.folder(self._folder / "blobs")
        self.sweep()

    def _create(self, identity: RunIdentity) -> None:
        blobs = self._folder / "blobs"
        if blobs.exists() and any(blobs.iterdir()):
            raise JournalError(f"{self._path} is empty, but {blobs} is not: it was lost", _ANEW)
        facts = {
            "run_id": secrets.token_hex(16),
            "config": identity.config_digest,
            "base": identity.base_digest,
            "environments": [dict(identity.environment)],
        }
        with self._transaction():
            for statement in (*TABLES, f"PRAGMA user_version = {FORMAT}"):
                self._db.execute(statement)
            for key, value in facts.items():
                self._write_fact(key, value)

    def _resume(self, identity: RunIdentity) -> None:
        if self._fact("config") != identity.config_digest:
            raise JournalError(f"{self._folder} holds a run with other settings", _ANEW)
        if self._fact("base") != identity.base_digest:
            raise JournalError(f"{self._folder} holds a run of another base model", _ANEW)
        if not self._rows("SELECT 1 FROM sqlite_master WHERE name = 'late'"):  # of an older meadow
            with self._transaction():
                self._db.execute(LATE)
        self._compare_machines(dict(identity.environment))

    def _compare_machines(self, mine: dict[str, str]) -> None:
        """Give notice if this run has ever worked on a machine that differs, and remember it."""
        seen: list[dict[str, str]] = self._fact("environments")
        if mine not in seen:
            seen.append(mine)
            with self._transaction():
                self._write_fact("environments", seen)
        changes = machine_changes(seen)
        if changes:
            self.notices.append(
                f"the machine changed during this run ({changes}): bit-for-bit equality with an "
                "uninterrupted run cannot be promised"
            )

    # SQL

    def _transaction(self) -> AbstractContextManager[None]:
        return self._disk.transaction(self._db, self._path)

    def _rows(self, query: str, *values: Json) -> list[tuple[Any, ...]]:
        with explained(self._path):
            return self._db.execute(query, values).fetchall()

    def _load(self, text: str) -> Json:
        try:
            return json.loads(text)
        except ValueError as error:
            raise JournalError(f"{self._path} is damaged: {error}", _ANEW) from error

    def _fact(self, key: str) -> Json:
        rows = self._rows("SELECT value FROM facts WHERE key = ?", key)
        if not rows:
            raise JournalError(f"{self._path} is damaged: it has no {key}", _ANEW)
        return self._load(rows[0][0])

    def _write_fact(self, key: str, value: Json) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, canonical(value)))

    def newest(self) -> int | None:
        """Number of the last closed round; None before the initial state is stored."""
        ((number,),) = self._rows("SELECT max(number) FROM rounds WHERE state IS NOT NULL")
        return None if number is None else int(number)

    def cohort(self, number: int) -> list[str]:
        """Who was asked in a round; nobody in one that was never opened."""
        rows = self._rows("SELECT cohort FROM rounds WHERE number = ?", number)
        return list(self._load(rows[0][0])) if rows else []

    def _require_asked(self, number: int, client: str) -> None:
        opened = self.current()
        if opened is None or opened.number != number:
            raise UpdateError(f"{client} answers round {number}, which is not open")
        if client not in opened.cohort:
            raise UpdateError(f"{client} was not asked in round {number}")
        if client in self.refusals(number):
            raise UpdateError(f"{client} was refused in round {number} and cannot answer again")

    def _digests(self, since: int) -> set[str]:
        """Every blob that a row from round `since` on refers to."""
        states = self._rows(
            "SELECT state FROM rounds WHERE number >= ? AND state IS NOT NULL", since
        )
        payloads = self._rows("SELECT digest FROM contributions WHERE round >= ?", since)
        late = self._rows("SELECT digest FROM late WHERE counted IS NULL")
        return {digest for (digest,) in states + payloads + late}
