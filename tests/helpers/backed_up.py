"""Folders to back up, and everything that is in them, to be compared with what comes back."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

from meadow.journal import RunIdentity

RUN = RunIdentity("config", "base", {})
MOMENTARY = (".draft", ".db-wal", ".db-shm")


def tree(folder: Path) -> dict[str, Any]:
    """Everything in a folder: bytes and mode of files, rows of databases, None for folders.

    But for what lasts only as long as somebody works in it.
    """
    paths = [path for path in sorted(folder.rglob("*")) if not path.name.endswith(MOMENTARY)]
    return {path.relative_to(folder).as_posix(): content(path) for path in paths}


def content(path: Path) -> Any:
    if path.is_dir():
        return None
    if path.suffix != ".db":
        return path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
    with closing(sqlite3.connect(path)) as database:
        return list(database.iterdump())


def small(root: Path) -> Path:
    """A folder with a file, a folder and a database in it."""
    home = root / "home"
    (home / "run").mkdir(parents=True)
    (home / "run" / "a").write_bytes(b"a" * 3000)
    with closing(sqlite3.connect(home / "x.db")) as database, database:
        database.execute("CREATE TABLE t (v)")
        database.execute("INSERT INTO t VALUES (7)")
    return home
