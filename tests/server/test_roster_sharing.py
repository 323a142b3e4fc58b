"""The roster between processes and threads, and a file that is no roster."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from enrolment import DAY, Clock, approved, new_flower_key, new_key

from meadow.errors import FormatError, JournalError
from meadow.server.roster import Roster


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def roster(tmp_path: Path, clock: Clock) -> Iterator[Roster]:
    with Roster.open(tmp_path / "home" / "roster.db", clock=clock) as opened:
        yield opened


# --- several processes and threads -------------------------------------------------------------


def test_a_decision_holds_for_others_at_once(roster: Roster, tmp_path: Path) -> None:
    key = approved(roster, "a").key
    with Roster.open(tmp_path / "home" / "roster.db") as other:
        for decide, status in ((other.suspend, "suspended"), (other.revoke, "revoked")):
            decide("a")
            found = roster.by_key(key)
            assert found is not None and found.status == status


RACER = """
import sys
from pathlib import Path
from meadow.errors import InvitationError
from meadow.server.roster import Roster

path, token, key, flower_key = Path(sys.argv[1]), *sys.argv[2:]
with Roster.open(path) as roster:
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    sys.stdin.readline()
    try:
        roster.enrol(bytes.fromhex(token), bytes.fromhex(key), flower_key)
    except InvitationError as error:
        assert "by another key" in str(error)
        sys.exit(3)
"""


def test_of_two_processes_that_race_for_a_token_one_enrols(tmp_path: Path) -> None:
    path = tmp_path / "roster.db"
    with Roster.open(path) as roster:
        token = roster.invite("a", DAY).hex()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, path, token, new_key().hex(), new_flower_key()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate(timeout=60)
    assert sorted(racer.returncode for racer in racers) == [0, 3]
    with Roster.open(path) as roster:
        assert [note.kind for note in roster.notes()] == ["invited", "enrolled"]


def test_threads_that_open_and_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "roster.db"
    faults: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with Roster.open(path) as opened:
                for _ in range(5):
                    opened.note("refusal", b"", str(number))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    with Roster.open(path) as opened:
        assert [note.id for note in opened.notes()] == list(range(1, 21))


def test_threads_share_one_roster(roster: Roster) -> None:
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda: results.append(roster.note("x", b"", ""))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(roster.notes()) == 8


# --- damage ------------------------------------------------------------------------------------


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "roster.db"
    Roster.open(path).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(FormatError, match="roster format 2, this meadow reads 1"):
        Roster.open(path)


def test_what_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "roster.db"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(JournalError, match="damaged"):
        Roster.open(path)
