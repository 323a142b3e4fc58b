"""A folder as it was at one moment, while processes go on working in it.

All databases are held for as long as it takes to name the files, and no longer: nothing is
committed meanwhile, so that every file which a row names is there.  Files that are replaced as a
whole are kept by a second name (a hard link); of files that grow, what had been written by then.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import JournalError
from ..file_lock import own_turn
from ..store import DRAFT, explained

STAGING = ".backup" + DRAFT
"""Where in the folder a snapshot is kept; what a crash left there is removed by the next."""

_LOCK = ".backup-lock" + DRAFT
_COMPANIONS = ("-wal", "-shm", "-journal")  # what SQLite puts beside a database


@dataclass(frozen=True)
class KeptFile:
    """One file of a snapshot."""

    name: str
    """Its path within the folder, parts joined by "/"."""
    path: Path
    """Where its content is to be read."""
    size: int
    """How many bytes of that belong to the snapshot."""
    mode: int
    """Permissions."""


@dataclass(frozen=True)
class Snapshot:
    """What a folder held; names are sorted."""

    files: tuple[KeptFile, ...]
    folders: tuple[str, ...]
    left_out: tuple[str, ...]
    """Names of what is neither file nor folder: links and sockets."""


@contextmanager
def snapshot(folder: Path) -> Iterator[Snapshot]:
    """The folder at one moment; it can be read as long as the block runs.

    Raises JournalError for a database that is damaged or that somebody holds for longer than half
    a minute, StorageError where there is no space.
    """
    staging = folder / STAGING
    with own_turn(folder / _LOCK), explained(folder):
        _discard(staging)
        staging.mkdir(mode=0o700)
        try:
            yield _take(folder, staging)
        finally:
            _discard(staging)


def _discard(staging: Path) -> None:
    if staging.exists():
        shutil.rmtree(staging)


def _take(folder: Path, staging: Path) -> Snapshot:
    databases: list[Path] = []
    with ExitStack() as readers:
        with ExitStack() as holders:
            sources: list[sqlite3.Connection] = []
            while new := [path for path in _databases(folder) if path not in databases]:
                sources += [_held(path, readers, holders) for path in new]
                databases += new  # and look again: one may have been made meanwhile
            files, folders, left_out = _keep(folder, staging, databases)
        for path, source in zip(databases, sources, strict=True):
            files.append(_copied(path.relative_to(folder).as_posix(), path, source, staging))
    files.sort(key=lambda file: file.name)
    return Snapshot(tuple(files), tuple(folders), tuple(left_out))


def _held(path: Path, readers: ExitStack, holders: ExitStack) -> sqlite3.Connection:
    """A connection that goes on seeing this moment, and nobody commits while `holders` is open."""
    holder = holders.enter_context(closing(_connection(path)))
    source = readers.enter_context(closing(_connection(path)))
    with explained(path):
        holder.execute("BEGIN IMMEDIATE")
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM sqlite_master").fetchone()  # here the view begins
    return source


def _connection(path: Path) -> sqlite3.Connection:
    with explained(path):
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=30)


def _keep(
    folder: Path, staging: Path, databases: Collection[Path]
) -> tuple[list[KeptFile], list[str], list[str]]:
    """Files, folders and what is neither, but for databases and what SQLite puts beside them."""
    files: list[KeptFile] = []
    folders, left_out = [], []
    skipped = {Path(f"{path}{end}") for path in databases for end in ("", *_COMPANIONS)}
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        try:
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                folders.append(name)
            elif not stat.S_ISREG(status.st_mode):
                left_out.append(name)
            elif path not in skipped:
                kept = _second_name(path, staging / str(len(files)))
                mode = stat.S_IMODE(status.st_mode)
                files.append(KeptFile(name, kept, kept.stat().st_size, mode))
        except FileNotFoundError:
            continue  # deleted since it was listed, so no row names it
    return files, folders, left_out


def _second_name(path: Path, kept: Path) -> Path:
    """Keep a file from vanishing: a hard link, or a copy where the file system has none."""
    try:
        os.link(path, kept)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(path, kept)
    return kept


def _copied(name: str, path: Path, source: sqlite3.Connection, staging: Path) -> KeptFile:
    """A database as the connection sees it, in one file."""
    kept = staging / hashlib.sha256(os.fsencode(name)).hexdigest()
    with explained(path), closing(sqlite3.connect(kept)) as target:
        source.backup(target)
        ((health,),) = target.execute("PRAGMA quick_check(1)").fetchall()
    if health != "ok":
        raise JournalError(f"{path} is damaged: {health}", "restore it from an earlier backup")
    return KeptFile(name, kept, kept.stat().st_size, stat.S_IMODE(path.stat().st_mode))


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder that lasts, parents first and sorted; links are not followed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return  # deleted since it was listed
    for entry in entries:
        if entry.name.endswith(DRAFT):
            continue
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))


def _databases(folder: Path) -> list[Path]:
    """Known by their names: nothing here may open a database but SQLite.

    A process that closes any descriptor of a file loses all its locks on it (POSIX), and with them
    the hold on the database.
    """
    return [path for path in _walk(folder) if path.suffix == ".db" and stat.S_ISREG(_mode_of(path))]


def _mode_of(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0  # deleted since it was listed
