"""The coordinator's inbox and audit trail: lines that are added, and never changed or removed.

Each line carries the SHA-256 of itself and of the line before, so that an edit, a gap or a cut
shows when the lines are read.  It shows accidents and clumsy hands: who can write the database
can also write all of it anew.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from dataclasses import astuple, dataclass
from pathlib import Path

from ..canonical_json import canonical
from ..errors import JournalError
from ..one_line import one_line

TABLES = (
    # AUTOINCREMENT: SQLite remembers the last id, so that lines cut off at the end are missed
    "CREATE TABLE notes (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL,"
    " kind TEXT NOT NULL, name TEXT NOT NULL, key BLOB NOT NULL, text TEXT NOT NULL,"
    " digest BLOB NOT NULL)",
    "CREATE TRIGGER notes_stay BEFORE DELETE ON notes BEGIN SELECT RAISE(ABORT, 'kept'); END",
    "CREATE TRIGGER notes_hold BEFORE UPDATE ON notes BEGIN SELECT RAISE(ABORT, 'kept'); END",
)
_DOMAIN = b"meadow/roster-note/v1\0"
_KIND = re.compile("[a-z][a-z-]{0,31}")


@dataclass(frozen=True)
class Note:
    """One line."""

    id: int
    """Counts from 1 without gaps."""
    time: float
    """Unix seconds."""
    kind: str
    name: str
    """Whom it is about or from, as it was called then; "" for nobody."""
    key: bytes
    """That participant's raw public key at the time; b"" where it had none."""
    text: str


def append_note(
    database: sqlite3.Connection, time: float, kind: str, name: str, key: bytes, text: str
) -> Note:
    """Add a line, in the transaction that is open."""
    if not _KIND.fullmatch(kind):
        raise ValueError(f"{kind!r} is no kind of note")
    last = database.execute("SELECT id, digest FROM notes ORDER BY id DESC LIMIT 1").fetchone()
    number, previous = last or (0, bytes(32))
    note = Note(number + 1, float(time), kind, name, key, one_line(text))
    row = (*astuple(note), _digest(note, previous))
    database.execute("INSERT INTO notes VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    return note


def read_notes(database: sqlite3.Connection, path: Path, after_id: int) -> list[Note]:
    """The lines after `after_id`, once each is found to follow from the one before it."""
    database.execute("BEGIN")  # both queries see one state
    try:
        rows = database.execute("SELECT * FROM notes WHERE id >= ? ORDER BY id", (after_id,))
        found = [(Note(*fields), digest) for *fields, digest in rows]
        counted = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'notes'")
        ((last,),) = counted.fetchall() or [(0,)]
    finally:
        database.rollback()
    if not _is_whole(found, after_id, last):
        raise JournalError(
            f"the notes in {path} were changed", "restore the coordinator's folder from a backup"
        )
    return [note for note, _ in found if note.id > after_id]


def _is_whole(found: list[tuple[Note, bytes]], after_id: int, last: int) -> bool:
    """Whether these are all lines from `after_id` to `last`, each bound to the one before."""
    if [note.id for note, _ in found] != list(range(max(after_id, 1), last + 1)):
        return False
    starts_the_chain = after_id < 1
    digests = ([bytes(32)] if starts_the_chain else []) + [digest for _, digest in found]
    notes = [note for note, _ in found][0 if starts_the_chain else 1 :]
    return all(_digest(note, digests[i]) == digests[i + 1] for i, note in enumerate(notes))


def _digest(note: Note, previous: bytes) -> bytes:
    fields = [note.id, note.time, note.kind, note.name, note.key.hex(), note.text, previous.hex()]
    return hashlib.sha256(_DOMAIN + canonical(fields).encode()).digest()
