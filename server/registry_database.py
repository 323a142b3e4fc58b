"""The registry's database: opened, asked and changed, each change in one transaction.

Its one connection lives on a thread of its own, so that threads may share it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from ..closeable import Closeable
from ..errors import FormatError, JournalError, StorageError
from ..identity import Identity
from ..store import Disk, explained
from .registry_changes import Changes
from .registry_rows import TABLES, Rows

FORMAT = 1
DATABASE = "registry.db"

_T = TypeVar("_T")


def is_registry(folder: Path) -> bool:
    """Whether a registry lies in a folder."""
    return (folder / DATABASE).is_file()


class Database(Closeable):
    """One process's way to `registry.db`, for changes that the key `who` makes.

    Who opens it has the registry's turn: SQLite does not wait where two turn on a database's log.
    """

    def __init__(self, path: Path, who: Identity, disk: Disk, clock: Callable[[], float]) -> None:
        """Create the database, which trusts `who` first, or go on with it.

        Raises JournalError where it is damaged, FormatError for another format, StorageError
        where the disk refuses.
        """
        self._path = path
        self._who = who
        self._disk = disk
        self._clock = clock
        self._db: sqlite3.Connection  # touched on that thread only
        with ExitStack() as resources:
            self._thread = resources.enter_context(ThreadPoolExecutor(1, "meadow-registry"))
            self._thread.submit(self._connect).result()
            resources.callback(lambda: self._thread.submit(self._db.close).result())
            self._resources = resources.pop_all()

    def close(self) -> None:
        self._resources.close()

    def read(self, question: Callable[[Rows], _T]) -> _T:
        """An answer all of which comes from one state."""

        def ask() -> _T:
            self._db.execute("BEGIN")
            try:
                return question(Rows(self._db))
            finally:
                self._db.rollback()

        return self._on_thread(ask)

    def change(self, change: Callable[[Changes], _T]) -> _T:
        """All of a change or nothing of it; durable on return."""
        now = self._clock()

        def commit() -> _T:
            with self._disk.transaction(self._db, self._path):
                return change(Changes(self._db, now, self._who.key_id))

        return self._on_thread(commit)

    @property
    def is_replaced(self) -> bool:
        """Whether another database lies at the path now."""
        with explained(self._path):
            return _place(self._path) not in (None, self._place)

    def fingerprint(self) -> tuple[int, ...]:
        """Another one whenever somebody has written to the database that lies there."""
        log = self._path.with_name(self._path.name + "-wal")
        with explained(self._path):
            found = [path.stat() for path in (self._path, log) if path.exists()]
        return tuple(part for s in found for part in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns))

    def reopen(self) -> None:
        """Go on with the database that lies at the path now.

        Raises as the constructor does, also for an empty one; then it goes on with none.
        """

        def again() -> None:
            with explained(self._path):
                if not self._path.stat().st_size:  # to connect would make it a database
                    raise StorageError(f"{self._path} is empty", "put the folder there as a whole")
            before = self._db
            self._connect(create=False)
            before.close()

        self._thread.submit(again).result()

    def _on_thread(self, work: Callable[[], _T]) -> _T:
        with explained(self._path):
            self._check_place()
            return self._thread.submit(work).result()

    def _check_place(self) -> None:
        """A database that was removed or replaced would go on answering from its old file."""
        if _place(self._path) != self._place:
            raise StorageError(
                f"{self._path} is gone or was replaced", "bring it back, and open it anew"
            )

    def _connect(self, create: bool = True) -> None:
        database = self._disk.connect(self._path)
        try:
            with explained(self._path):
                self._admit(database, create)
                place = _place(self._path)
        except BaseException:
            database.close()
            raise
        self._db, self._place = database, place

    def _admit(self, database: sqlite3.Connection, create: bool) -> None:
        """Create the tables, or check that they are ours."""
        ((health,),) = database.execute("PRAGMA quick_check(1)").fetchall()
        if health != "ok":
            hint = "restore the registry's folder from a copy"
            raise JournalError(f"{self._path} is damaged: {health}", hint)
        ((version,),) = database.execute("PRAGMA user_version").fetchall()
        empty = not database.execute("SELECT name FROM sqlite_master").fetchall()
        if create and version == 0 and empty:
            with self._disk.transaction(database, self._path):
                self._create(database)
        elif version != FORMAT:
            raise FormatError(
                f"{self._path} has registry format {version}, this meadow reads {FORMAT}",
                "install the version of meadow that wrote it",
            )

    def _create(self, database: sqlite3.Connection) -> None:
        for statement in TABLES:
            database.execute(statement)
        changes = Changes(database, self._clock(), self._who.key_id)
        own = self._who.public.public_bytes_raw()
        changes.trust(self._who.key_id, own, "who made this registry")
        database.execute(f"PRAGMA user_version = {FORMAT}")


def _place(path: Path) -> tuple[int, int] | None:
    """Which file lies at a path, whatever it is called; None for none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
