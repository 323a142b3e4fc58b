"""The only way durable bytes are written, in steps that a test can stop at.

A file appears whole or not at all: draft in the same folder, fsync, rename, fsync of the folder.
Each of these steps, and the commit of a database, is a method of `Disk` on its own, so that a
subclass can end the process before any of them, tear a write, or report a full disk.  `Blobs`
keeps files under their SHA-256; a row that names a blob is committed after the blob was put.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import JournalError, StorageError

DRAFT = ".draft"
_ATTEMPTS = 4

_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file grew beyond the allowed size",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EIO: "the disk reports a fault",
    errno.ENOENT: "its folder is gone",
    errno.ENOTDIR: "a file is in the way",
    errno.EEXIST: "a file is in the way",
    errno.EISDIR: "a folder is in the way",
    errno.EMFILE: "this process has too many files open",
    errno.ENFILE: "the system has too many files open",
    errno.ESTALE: "the server that it is mounted from has another one now",
    errno.ETIMEDOUT: "the server that it is mounted from does not answer",
    errno.EHOSTDOWN: "the server that it is mounted from does not answer",
    errno.ENOTCONN: "what it is mounted from is not connected",
}
_DATABASE_FAULTS = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "the disk is read-only",
    sqlite3.SQLITE_PERM: "permission is denied",
    sqlite3.SQLITE_IOERR: "the disk reports a fault or is full",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened or created",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's and SQLite's errors about `path` into StorageError or JournalError.

    Errors that say nothing about the disk or the file pass unchanged: they are defects.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FAULTS:
            raise
        raise _storage_error(path, _FAULTS[error.errno]) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code
        if code in _DATABASE_FAULTS:
            raise _storage_error(path, _DATABASE_FAULTS[code]) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise JournalError(f"{path} is locked", "close the program that uses it") from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise JournalError(
                f"{path} is damaged", "restore it or start anew elsewhere"
            ) from error
        raise


def _storage_error(path: Path, reason: str) -> StorageError:
    hint = "mend that and run the same command again: nothing acknowledged is lost"
    return StorageError(f"cannot write {path}: {reason}", hint)


class Disk:
    """Durable writes.  When `write`, `folder` or `transaction` returns, a power cut is harmless."""

    def write(self, path: Path, data: bytes, mode: int = 0o666) -> None:
        """Put `data` at `path` in one piece, in place of what was there.

        `mode` is the file's, before the umask, from its first byte on.

        Raises StorageError where the disk refuses; `path` then holds what it held or all of
        `data`, and `data` may be written again.
        """
        draft = path.with_name(path.name + DRAFT)
        with explained(path):
            try:
                with open(draft, "wb", buffering=0, opener=_creating(mode)) as file:
                    self.fill(file, data)
                    self.sync(file)
                self.rename(draft, path)
                self.sync_folder(path.parent)
            except OSError:
                _discard(draft)  # half a file must not keep a full disk full
                raise

    def folder(self, path: Path) -> None:
        """Make a folder that lasts, its parents first.

        The parent is synced even where the folder was there: who made it may have died before.
        """
        if not path.parent.exists():
            self.folder(path.parent)
        with explained(path):
            self.make(path)
            self.sync_folder(path.parent)

    def confirm(self, folder: Path) -> None:
        """Make the names in a folder durable, which who wrote them may have died before doing."""
        with explained(folder):
            self.sync_folder(folder)

    def delete(self, path: Path) -> None:
        """Remove a file that nothing refers to; a power cut may bring it back."""
        with explained(path):
            self.remove(path)

    @contextmanager
    def transaction(self, database: sqlite3.Connection, path: Path) -> Iterator[None]:
        """All of the block's statements or none of them; durable when the block has ended."""
        with explained(path):
            try:
                database.execute("BEGIN IMMEDIATE")
                yield
                self.commit(database)
            finally:
                if database.in_transaction:
                    database.rollback()

    def connect(self, path: Path) -> sqlite3.Connection:
        """Open or create a database whose commits are durable; transactions are explicit."""
        with explained(path):
            database = sqlite3.connect(path, isolation_level=None, timeout=30)
            try:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = FULL")
            except sqlite3.Error:
                database.close()
                raise
        return database

    # The steps.  Nothing else touches the disk.

    def fill(self, file: BinaryIO, data: bytes) -> None:
        """Write all of `data` to an empty, unbuffered file."""
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]

    def sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())

    def rename(self, draft: Path, path: Path) -> None:
        os.replace(draft, path)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def commit(self, database: sqlite3.Connection) -> None:
        database.execute("COMMIT")


def _creating(mode: int) -> Callable[[str, int], int]:
    return lambda name, flags: os.open(name, flags, mode)


def _discard(draft: Path) -> None:
    try:
        draft.unlink(missing_ok=True)
    except OSError:
        return  # the fault that led here is the one to report; a sweep takes the draft later


@contextmanager
def locked(path: Path, hint: str) -> Iterator[None]:
    """Hold the lock of `path`'s folder; the system releases it when the process ends, however.

    Raises JournalError, with the hint, where another process holds it.
    """
    with explained(path):
        file = open(path, "ab")
    with file:
        if not _taken(file):
            raise JournalError(f"another process is working in {path.parent}", hint)
        yield


def _taken(file: BinaryIO) -> bool:
    """Whether the lock is ours now.  Who only looks whether it is held has it for an instant."""
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01 * (attempt + 1 < _ATTEMPTS))
        else:
            return True
    return False


def digest_of(data: bytes) -> str:
    """SHA-256 in hexadecimal: the name of a blob."""
    return hashlib.sha256(data).hexdigest()


class Blobs:
    """Files named by their content, in one existing folder with one writer."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder = folder
        self._disk = disk

    def put(self, data: bytes) -> str:
        """Store `data`, durable on return, and give its digest.  Heals a damaged copy."""
        digest = digest_of(data)
        path = self._folder / digest
        if self._holds(path, data):
            self._disk.confirm(self._folder)
        else:
            self._disk.write(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of a digest.  JournalError, naming the file, if it is missing or damaged."""
        path = self._folder / digest
        with explained(path):
            try:
                data = path.read_bytes()
            except FileNotFoundError as error:
                raise JournalError(f"{path} is missing", "restore it from a copy") from error
        if digest_of(data) != digest:
            raise JournalError(f"{path} is damaged", "restore it from a copy")
        return data

    def sweep(self, keep: Collection[str]) -> None:
        """Delete every file but those of `keep`: unreferenced blobs and drafts."""
        with explained(self._folder):
            names = sorted(path.name for path in self._folder.iterdir())
        for name in names:
            if name not in keep:
                self._disk.delete(self._folder / name)

    def _holds(self, path: Path, data: bytes) -> bool:
        with explained(path):
            return path.exists() and path.read_bytes() == data
