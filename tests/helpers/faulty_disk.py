"""Disks whose steps are numbered, and one that fails at a chosen step in a chosen way.

    before, after   the process dies around the step; what was written stays
    torn            it dies in the middle: half of a file, part of the database's log
    power           it dies, and whatever was not synced is lost
    full            the step fails as on a full disk, and space returns later

Threads may share a disk: steps are taken one at a time, and once the process has "died" every
further step of any thread dies as well.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from meadow.store import Disk

Undo = Callable[[Path], None]


class Crash(BaseException):
    """The process is gone."""


class Numbered(Disk):
    """Numbers its steps from 1; syncing takes no time, because what is lost is simulated.

    `undo` holds, by the name of what would settle it, how to take back in a copy of `root` each
    effect that is not yet durable.
    """

    def __init__(self, root: Path, undo: list[tuple[str, Undo]] | None = None) -> None:
        self.root = root
        self.undo = undo or []
        self.count = 0
        self.tearable: list[int] = []  # steps that can be taken in part
        self.torn_log: tuple[str, int] | None = None  # where a torn commit left the database's log
        self.lock = threading.RLock()

    def step(
        self,
        real: Callable[[], None],
        torn: Callable[[], None] | None = None,
        full: Callable[[], None] | None = None,
    ) -> None:
        with self.lock:
            self.count += 1
            self.tearable += [self.count] if torn else []
            self.perform(real, torn, full)

    def perform(
        self,
        real: Callable[[], None],
        torn: Callable[[], None] | None,
        full: Callable[[], None] | None,
    ) -> None:
        real()

    def connect(self, path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, isolation_level=None)
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA journal_mode = WAL")
        return database

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def settle(self, what: str) -> None:
        self.undo = [(key, undo) for key, undo in self.undo if key != what]

    def fill(self, file: BinaryIO, data: bytes) -> None:
        name, half = self.name(Path(file.name)), data[: len(data) // 2]
        with self.lock:
            self.undo.append((f"content {name}", lambda copy: cut(copy / name, len(half))))

        def full() -> None:
            Disk.fill(self, file, half)
            raise OSError(errno.ENOSPC, "injected")

        self.step(lambda: Disk.fill(self, file, data), lambda: Disk.fill(self, file, half), full)

    def sync(self, file: BinaryIO) -> None:
        self.step(lambda: self.settle(f"content {self.name(Path(file.name))}"))

    def sync_folder(self, folder: Path) -> None:
        self.step(lambda: self.settle(f"names in {self.name(folder)}"))

    def rename(self, draft: Path, path: Path) -> None:
        def real() -> None:
            old, new = self.name(draft), self.name(path)
            replaced = path.read_bytes() if path.exists() else None
            self.renamed(old, new, self.name(path.parent), replaced)
            Disk.rename(self, draft, path)

        self.step(real)

    def renamed(self, old: str, new: str, folder: str, replaced: bytes | None) -> None:
        """Content that was not synced may be lost under the new name as well."""
        if any(key == f"content {old}" for key, _ in self.undo):
            self.settle(f"content {old}")
            self.undo.append((f"content {new}", lambda copy: cut(copy / new, 0)))

        def undo(copy: Path) -> None:
            os.replace(copy / new, copy / old)
            if replaced is not None:
                (copy / new).write_bytes(replaced)

        self.undo.append((f"names in {folder}", undo))

    def make(self, folder: Path) -> None:
        def real() -> None:
            if not folder.exists():
                name, parent = self.name(folder), self.name(folder.parent)
                self.undo.append((f"names in {parent}", lambda copy: shutil.rmtree(copy / name)))
            Disk.make(self, folder)

        self.step(real)

    def remove(self, path: Path) -> None:
        def real() -> None:
            if path.exists():
                name, data = self.name(path), path.read_bytes()
                key = f"names in {self.name(path.parent)}"
                self.settle(f"content {name}")
                self.undo.append((key, lambda copy: void((copy / name).write_bytes(data))))
            Disk.remove(self, path)

        self.step(real)

    def commit(self, database: sqlite3.Connection) -> None:
        log = Path(database.execute("PRAGMA database_list").fetchone()[2] + "-wal")

        def torn() -> None:
            before = log.stat().st_size
            Disk.commit(self, database)
            self.torn_log = self.name(log), (before + log.stat().st_size) // 2

        def full() -> None:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

        self.step(lambda: Disk.commit(self, database), torn, full)


class Faulty(Numbered):
    """Has the fault `way` at the step `at`; a crash leaves a copy of `root` for the next start."""

    def __init__(
        self, root: Path, at: int, way: str, undo: list[tuple[str, Undo]] | None = None
    ) -> None:
        super().__init__(root, undo)
        self.at, self.way = at, way
        self.survivor = root.with_name(root.name + "+")
        self.dead = False

    def perform(
        self,
        real: Callable[[], None],
        torn: Callable[[], None] | None,
        full: Callable[[], None] | None,
    ) -> None:
        if self.dead:
            raise Crash
        if self.count != self.at:
            return real()
        if self.way == "full":
            return (full or no_space)()
        effect = {"torn": torn, "after": real}.get(self.way)
        if effect:
            effect()
        self.dead = True
        self.crash()

    def crash(self) -> None:
        shutil.copytree(self.root, self.survivor)
        if self.torn_log:
            name, size = self.torn_log
            os.truncate(self.survivor / name, size)
        if self.way == "power":
            for _, undo in reversed(self.undo):
                undo(self.survivor)
        raise Crash


class Deadly(Faulty):
    """Crashes in earnest, with a database that syncs."""

    connect = Disk.connect

    def crash(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def cut(path: Path, size: int) -> None:
    """What a file held beyond `size` is lost; its folder may have gone before."""
    if path.exists():
        os.truncate(path, size)


def void(_: object) -> None:
    """So that a lambda can call what returns something."""


def no_space() -> None:
    raise OSError(errno.ENOSPC, "injected")
