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

_T = TypeVar("_T")


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

    def _on_thread(self, work: Callable[[], _T]) -> _T:
        with explained(self._path):
            self._check_place()
            return self._thread.submit(work).result()

    def _check_place(self) -> None:
        """A database that was removed or replaced would go on answering from its old file."""
        if not self._path.exists() or os.stat(self._path).st_ino != self._inode:
            raise StorageError(
                f"{self._path} is gone or was replaced", "bring it back, and open it anew"
            )

    def _connect(self) -> None:
        self._db = self._disk.connect(self._path)
        try:
            with explained(self._path):
                self._admit()
                self._inode = os.stat(self._path).st_ino
        except BaseException:
            self._db.close()
            raise

    def _admit(self) -> None:
        """Create the tables, or check that they are ours."""
        ((health,),) = self._db.execute("PRAGMA quick_check(1)").fetchall()
        if health != "ok":
            hint = "restore the registry's folder from a copy"
            raise JournalError(f"{self._path} is damaged: {health}", hint)
        ((version,),) = self._db.execute("PRAGMA user_version").fetchall()
        if version == 0 and not self._db.execute("SELECT name FROM sqlite_master").fetchall():
            with self._disk.transaction(self._db, self._path):
                self._create()
        elif version != FORMAT:
            raise FormatError(
                f"{self._path} has registry format {version}, this meadow reads {FORMAT}",
                "install the version of meadow that wrote it",
            )

    def _create(self) -> None:
        for statement in TABLES:
            self._db.execute(statement)
        changes = Changes(self._db, self._clock(), self._who.key_id)
        own = self._who.public.public_bytes_raw()
        changes.trust(self._who.key_id, own, "who made this registry")
        self._db.execute(f"PRAGMA user_version = {FORMAT}")
