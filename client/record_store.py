"""A peer's durable store: every signed thing it holds, in order of arrival.

The store knows of an entry only what it needs to find it again; what the bytes mean, and whether
they count, is the ledger's.  It has two promises to keep:

- When a method has returned, what it wrote survives a power cut.  Until then all of it or nothing
  may be found after a restart.
- A peer's own record is durable before it can be sent, and no second one gets its sequence number:
  two signed records with one number would exclude the peer from the run for good.  `append_own`
  holds this, also after a crash and for records that were dropped.

A folder holds `records.db` (SQLite) and `records.lock`.  One process uses a folder at a time; in
it, threads may share the store, whose one connection lives on a thread of its own.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from ..closeable import Closeable
from ..errors import FormatError, JournalError
from ..store import Disk, explained, locked

FORMAT = 1
Kind = Literal["record", "introduction", "proof", "checkpoint"]
Key = tuple[Kind, bytes]
"""Kind and digest: what names an entry."""

_T = TypeVar("_T")
_KINDS = frozenset(get_args(Kind))
_PAGE = 500  # entries that an iteration reads at once
_ANEW = "restore the folder from a copy, or join again with another folder and a new identity"
_LARGEST_SEQUENCE = 2**63 - 1

_TABLES = (
    # AUTOINCREMENT: the place of a dropped entry is not given again, so that order stays order
    "CREATE TABLE entries (place INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL,"
    " digest BLOB NOT NULL, peer BLOB NOT NULL, sequence INTEGER NOT NULL, data BLOB NOT NULL,"
    " checksum BLOB NOT NULL, UNIQUE (kind, digest))",
    "CREATE TABLE facts (key TEXT PRIMARY KEY, value BLOB NOT NULL)",
)
_COLUMNS = "place, kind, digest, peer, sequence, data, checksum"


@dataclass(frozen=True)
class Entry:
    """One signed thing."""

    kind: Kind
    digest: bytes
    """What names it among its kind: of a record, the digest of its signed body."""
    peer: bytes
    """Whom it is of."""
    sequence: int
    data: bytes

    @property
    def key(self) -> Key:
        return self.kind, self.digest


class RecordStore(Closeable):
    """Made by `RecordStore.open`; close it, or use it in a `with` statement."""

    def __init__(self, path: Path, own: bytes, disk: Disk) -> None:
        self._path = path
        self._own = own
        self._disk = disk
        self._resources = ExitStack()
        self._thread: ThreadPoolExecutor
        self._db: sqlite3.Connection  # touched on that thread only

    @classmethod
    def open(cls, folder: Path, run: bytes, own: bytes, disk: Disk | None = None) -> RecordStore:
        """Create the store of `folder`, or go on with it.

        `run` is the run's id and `own` the peer's public key, 32 bytes each.  Raises JournalError
        where the folder is in use, damaged, or belongs to another run or peer; FormatError for
        another format; StorageError where the disk refuses.
        """
        disk = disk or Disk()
        disk.folder(folder)
        store = cls(folder / "records.db", own, disk)
        with ExitStack() as resources:
            resources.enter_context(
                locked(folder / "records.lock", "stop it first: one peer is one process")
            )
            store._thread = resources.enter_context(ThreadPoolExecutor(1, "meadow-records"))
            store._on_thread(store._connect)
            resources.callback(lambda: store._on_thread(store._db.close))
            store._on_thread(lambda: store._admit(run))
            store._resources = resources.pop_all()
        return store

    def close(self) -> None:
        """Release the folder.  Nothing depends on it: a store that was not closed is as safe."""
        self._resources.close()

    # Writing

    def append(self, entries: Sequence[Entry]) -> int:
        """Keep entries, all in one commit; how many were new.  Of equal keys the first stays."""
        return self._on_thread(lambda: self._write((), entries)) if entries else 0

    def append_own(self, record: Entry) -> None:
        """Keep a record that this peer has just signed: send it afterwards, never before.

        Raises JournalError if this peer holds, or ever held, a record of its own with this
        sequence number or a higher one; the record at hand must then be thrown away.
        """
        if record.kind != "record" or record.peer != self._own:
            raise ValueError("only a record of this peer's own can be signed by it")
        self._on_thread(lambda: self._write_own(record))

    def replace(self, drop: Iterable[Key], put: Sequence[Entry] = ()) -> None:
        """Forget entries (those that are unknown are passed over) and keep others, in one."""
        keys = list(drop)
        self._on_thread(lambda: self._write(keys, put))

    # Reading

    def signed(self) -> int | None:
        """The highest sequence number of an own record that was ever kept here; the next record
        must have a higher one.  None if there was none."""
        return self._on_thread(self._mark)

    def get(self, kind: Kind, digest: bytes) -> Entry | None:
        """The entry of that name, if it is here."""
        found = self._select("WHERE kind = ? AND digest = ?", kind, digest)
        return found[0][1] if found else None

    def count(self, kind: Kind) -> int:
        ((number,),) = self._on_thread(
            lambda: self._rows("SELECT count(*) FROM entries WHERE kind = ?", kind)
        )
        return int(number)

    def entries(self, kind: Kind | None = None) -> Iterator[Entry]:
        """All entries, or all of one kind, in order of arrival.

        What arrives or is dropped meanwhile may or may not show.  Raises JournalError at an entry
        that is damaged.
        """
        condition, values = ("AND kind = ? ", [kind]) if kind else ("", [])
        place = 0
        while page := self._select(
            f"WHERE place > ? {condition}ORDER BY place LIMIT {_PAGE}", place, *values
        ):
            yield from (entry for _, entry in page)
            place = page[-1][0]

    # On the store's thread

    def _on_thread(self, work: Callable[[], _T]) -> _T:
        return self._thread.submit(work).result()

    def _connect(self) -> None:
        self._db = self._disk.connect(self._path)

    def _write(self, drop: Sequence[Key], put: Sequence[Entry]) -> int:
        rows = [_row(entry) for entry in put]
        with self._disk.transaction(self._db, self._path):
            self._db.executemany("DELETE FROM entries WHERE kind = ? AND digest = ?", drop)
            cursor = self._db.executemany(
                f"INSERT OR IGNORE INTO entries ({_COLUMNS}) VALUES (NULL, ?, ?, ?, ?, ?, ?)", rows
            )
            new = cursor.rowcount
            own = [e.sequence for e in put if e.kind == "record" and e.peer == self._own]
            self._raise_mark(max(own, default=-1))
        return new

    def _write_own(self, record: Entry) -> None:
        mark = self._mark()
        if mark is not None and record.sequence <= mark:
            raise JournalError(
                f"{self._path} shows that this peer has signed its record {record.sequence} before",
                "send the stored one: a second would exclude this peer from the run",
            )
        self._write((), [record])

    def _mark(self) -> int | None:
        mark = self._facts().get("signed")
        return None if mark is None else int(mark)

    def _raise_mark(self, sequence: int) -> None:
        mark = self._mark()
        if sequence > (-1 if mark is None else mark):
            self._put_fact("signed", str(sequence).encode())

    def _select(self, rest: str, *values: Any) -> list[tuple[int, Entry]]:
        """Places and entries; JournalError where an entry is not what was written."""
        query = f"SELECT {_COLUMNS} FROM entries {rest}"
        found = []
        for place, *fields, checksum in self._on_thread(lambda: self._read(query, *values)):
            entry = Entry(*fields)
            if not _is_readable(entry) or _checksum(entry) != checksum:
                raise JournalError(f"{self._path} is damaged at entry {place}", _ANEW)
            found.append((place, entry))
        return found

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return self._rows(query, *values)
        except sqlite3.OperationalError as error:  # bytes where text should be, which none decodes
            raise JournalError(f"{self._path} is damaged: {str(error)[:40]}", _ANEW) from error

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with explained(self._path):
            return self._db.execute(query, values).fetchall()

    def _facts(self) -> dict[str, bytes]:
        return dict(self._rows("SELECT key, value FROM facts"))

    def _put_fact(self, key: str, value: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    # Opening

    def _admit(self, run: bytes) -> None:
        """Create the tables, or check that they are ours, whole, and of this run and peer."""
        ((health,),) = self._rows("PRAGMA quick_check(1)")
        if health != "ok":
            raise JournalError(f"{self._path} is damaged: {health}", _ANEW)
        ((version,),) = self._rows("PRAGMA user_version")
        if version == 0 and not self._rows("SELECT name FROM sqlite_master"):
            self._create({"run": run, "own": self._own})
        elif version != FORMAT:
            raise FormatError(
                f"{self._path} has record store format {version}, this meadow reads {FORMAT}",
                "open it with the meadow that wrote it",
            )
        self._require(run)
        self._settle()

    def _create(self, facts: dict[str, bytes]) -> None:
        with self._disk.transaction(self._db, self._path):
            for statement in (*_TABLES, f"PRAGMA user_version = {FORMAT}"):
                self._db.execute(statement)
            for key, value in facts.items():
                self._put_fact(key, value)

    def _require(self, run: bytes) -> None:
        facts = self._facts()
        if facts.get("run") != run:
            raise JournalError(f"{self._path} holds another run", "choose another folder")
        if facts.get("own") != self._own:
            hint = "start with the identity that it was made with, or choose another folder"
            raise JournalError(f"{self._path} belongs to another peer", hint)

    def _settle(self) -> None:
        """Make durable what a predecessor may have written to the log but not synced.

        It was killed before it could send that record.  This process would send it, and after a
        power cut a third one would sign another in its place.
        """
        ((busy, _, _),) = self._rows("PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            raise JournalError(f"{self._path} is locked", "close the program that uses it")


def owner_of(folder: Path) -> bytes:
    """The public key of the peer whose store a folder holds.  Raises JournalError for none."""
    path = folder / "records.db"
    if not path.exists():
        raise JournalError(f"{folder} holds no records", "name the folder of a peer")
    with explained(path), closing(sqlite3.connect(path)) as database:
        tables = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'facts'").fetchone()
        query = "SELECT value FROM facts WHERE key = 'own'"
        found = database.execute(query).fetchone() if tables else None
    if found is None:
        raise JournalError(f"{path} does not say whose it is", _ANEW)
    return bytes(found[0])


def _row(entry: Entry) -> tuple[Any, ...]:
    if entry.kind not in _KINDS or not 0 <= entry.sequence <= _LARGEST_SEQUENCE:
        raise ValueError(f"no entry can be {entry.kind!r} number {entry.sequence}")
    fields = entry.kind, entry.digest, entry.peer, entry.sequence, entry.data
    return (*fields, _checksum(entry))


def _is_readable(entry: Entry) -> bool:
    """Whether the fields have their types, which damage may have changed as well."""
    data = entry.digest, entry.peer, entry.data
    return all(isinstance(each, bytes) for each in data) and isinstance(entry.sequence, int)


def _checksum(entry: Entry) -> bytes:
    """16 bytes that tell damage, which must not be taken for another peer's forgery."""
    place = f"{entry.kind} {entry.sequence} {len(entry.digest)} {len(entry.peer)}\n".encode()
    return hashlib.sha256(place + entry.digest + entry.peer + entry.data).digest()[:16]
