"""The audit trail: it only grows, and what else happens to it shows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from enrolment import NOON, Clock, approved, new_key
from hypothesis import given
from hypothesis import strategies as st

from meadow.errors import JournalError
from meadow.one_line import LONGEST, one_line
from meadow.server.roster import Note, Roster

KEY = new_key()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "roster.db"


@pytest.fixture
def roster(path: Path) -> Iterator[Roster]:
    with Roster.open(path, clock=Clock()) as opened:
        yield opened


def test_a_note_says_who_when_and_what(roster: Roster) -> None:
    key = approved(roster, "Ward 3").key
    written = roster.note("refusal", key, "round 4: too many steps")
    assert written == Note(4, NOON, "refusal", "Ward 3", key, "round 4: too many steps")
    assert roster.note("withdrawal", KEY, "").name == ""  # a stranger
    assert roster.notes()[3:] == [written, Note(5, NOON, "withdrawal", "", KEY, "")]


def test_reading_goes_on_after_a_note(roster: Roster) -> None:
    for number in range(1, 6):
        roster.note("refusal", b"", str(number))
    everything = roster.notes()
    for after in range(-1, 8):
        assert roster.notes(after) == everything[max(after, 0) :]


@pytest.mark.parametrize("kind", ["", "Refusal", "a b", "x" * 33, "a\n", "1"])
def test_kinds_are_short_words(roster: Roster, kind: str) -> None:
    with pytest.raises(ValueError):
        roster.note(kind, b"", "")
    assert roster.notes() == []


@given(text=st.text() | st.text(st.characters(codec="utf-8", categories=["Cc", "Cf"])))
def test_anybodys_text_becomes_one_printable_line(text: str) -> None:
    line = one_line(text)
    assert line.isprintable() and len(line) <= LONGEST
    if text.isprintable() and len(text) <= LONGEST:
        assert line == text


def test_foreign_text_does_not_reach_the_terminal(roster: Roster) -> None:
    note = roster.note("refusal", b"", "\x1b[2J\nok \ud800" + "x" * 10_000)
    assert note.text.startswith("\\x1b[2J\\nok \\ud800xxx")
    assert len(note.text) == LONGEST
    assert roster.notes() == [note]


@pytest.mark.parametrize("statement", ["DELETE FROM notes", "UPDATE notes SET text = 'x'"])
def test_the_database_itself_keeps_them(path: Path, roster: Roster, statement: str) -> None:
    roster.note("refusal", b"", "")
    with closing(sqlite3.connect(path)) as database:
        with pytest.raises(sqlite3.IntegrityError, match="kept"):
            database.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [f"DELETE FROM notes WHERE id = {number}" for number in (1, 2, 3)]
    + ["DELETE FROM notes"]
    + [
        f"UPDATE notes SET {change} WHERE id = 2"
        for change in (
            "time = 0",
            "kind = 'x'",
            "name = 'x'",
            "key = x'00'",
            "text = 'x'",
            "digest = zeroblob(32)",
            "id = 9",
        )
    ]
    + ["UPDATE notes SET digest = zeroblob(32) WHERE id = 3"],
)
def test_what_gets_past_that_shows(path: Path, roster: Roster, statement: str) -> None:
    for number in range(3):
        roster.note("refusal", KEY, str(number))
    with closing(sqlite3.connect(path)) as database, database:
        for trigger in ("notes_stay", "notes_hold"):
            database.execute(f"DROP TRIGGER {trigger}")
        database.execute(statement)
    with pytest.raises(JournalError, match="were changed"):
        roster.notes()
