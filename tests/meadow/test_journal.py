"""The journal's promises, one by one; what crashes do to it is in test_journal_crashes.py."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from meadow.errors import FormatError, JournalError, StorageError, UpdateError
from meadow.journal import Journal, OpenRound, RunIdentity
from meadow.store import Disk, digest_of

IDENTITY = RunIdentity("config", "base", {"torch": "2.13", "torch_threads": "2"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


@pytest.fixture
def journal(folder: Path) -> Iterator[Journal]:
    with Journal.open(folder, IDENTITY) as journal:
        journal.close_round(0, b"initial", {})
        yield journal


def sql(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "journal.db", isolation_level=None)) as database:
        database.execute(statement)


def test_a_run_from_the_first_round_to_the_second(journal: Journal) -> None:
    assert journal.last() == (0, b"initial") and journal.current() is None
    journal.open_round(1, ["bob", "ada", "eve"])
    assert journal.current() == OpenRound(1, ("bob", "ada", "eve"))
    assert journal.receive(1, "ada", b"from ada")
    assert journal.receive(1, "bob", b"from bob")
    journal.refuse(1, "eve", "not finite")
    assert list(journal.contributions(1)) == ["bob", "ada"]  # the cohort's order
    assert journal.payload(journal.contributions(1)["ada"]) == b"from ada"
    assert journal.refusals(1) == {"eve": "not finite"}
    assert journal.last() == (0, b"initial")
    journal.close_round(1, b"second", {"loss": 2.5})
    assert journal.last() == (1, b"second") and journal.current() is None
    assert journal.metrics() == [{"round": 0}, {"round": 1, "loss": 2.5}]


def test_everything_is_there_after_a_restart(folder: Path) -> None:
    with Journal.open(folder, IDENTITY) as journal:
        run_id = journal.run_id
        journal.close_round(0, b"initial", {"loss": float("inf")})
        journal.open_round(1, ["ada", "eve"])
        journal.receive(1, "ada", b"from ada")
        journal.refuse(1, "eve", "late")
        journal.note("finished", {"at": 3})
    with Journal.open(folder, IDENTITY) as journal:
        assert journal.run_id == run_id and len(run_id) == 32
        assert journal.notices == []
        assert journal.current() == OpenRound(1, ("ada", "eve"))
        assert journal.contributions(1) == {"ada": digest_of(b"from ada")}
        assert journal.refusals(1) == {"eve": "late"}
        assert journal.get("finished") == {"at": 3} and journal.get("unknown") is None
        assert journal.metrics() == [{"round": 0, "loss": float("inf")}]
        assert not journal.receive(1, "ada", b"from ada")


def test_run_ids_differ(tmp_path: Path) -> None:
    ids = set()
    for name in ("a", "b"):
        with Journal.open(tmp_path / name, IDENTITY) as journal:
            ids.add(journal.run_id)
    assert len(ids) == 2


def test_the_first_contribution_counts(journal: Journal) -> None:
    journal.open_round(1, ["ada"])
    assert journal.receive(1, "ada", b"first")
    assert not journal.receive(1, "ada", b"first")
    with pytest.raises(UpdateError, match="ada sent a second, different answer to round 1"):
        journal.receive(1, "ada", b"second")
    journal.refuse(1, "ada", "a second answer")
    assert journal.contributions(1) == {"ada": digest_of(b"first")}
    journal.close_round(1, b"state", {})
    assert not journal.receive(1, "ada", b"first")  # its receipt was lost


def test_uninvited_answers_are_refused_by_name(journal: Journal) -> None:
    with pytest.raises(UpdateError, match="ada answers round 1, which is not open"):
        journal.receive(1, "ada", b"early")
    journal.open_round(1, ["ada", "eve"])
    with pytest.raises(UpdateError, match="bob was not asked"):
        journal.receive(1, "bob", b"uninvited")
    journal.refuse(1, "eve", "first reason")
    journal.refuse(1, "eve", "second reason")
    assert journal.refusals(1) == {"eve": "first reason"}
    with pytest.raises(UpdateError, match="eve was refused"):
        journal.receive(1, "eve", b"again")
    journal.close_round(1, b"state", {})
    with pytest.raises(UpdateError, match="ada answers round 1, which is not open"):
        journal.receive(1, "ada", b"late")
    assert journal.contributions(1) == {}


def test_rounds_only_go_forward(journal: Journal) -> None:
    with pytest.raises(ValueError, match="round 2"):
        journal.open_round(2, ["ada"])
    with pytest.raises(ValueError, match="twice"):
        journal.open_round(1, ["ada", "ada"])
    with pytest.raises(ValueError, match="round 1 is not open"):
        journal.close_round(1, b"", {})
    with pytest.raises(ValueError, match="round 0 is not open"):
        journal.close_round(0, b"", {})
    journal.open_round(1, ["ada"])
    with pytest.raises(ValueError, match="round 2"):
        journal.open_round(2, ["ada"])
    with pytest.raises(ValueError, match="round 2 is not open"):
        journal.close_round(2, b"", {})
    journal.close_round(1, b"", {})
    with pytest.raises(ValueError, match="round 1 cannot"):
        journal.open_round(1, ["ada"])


def test_the_initial_state_comes_first(folder: Path) -> None:
    with Journal.open(folder, IDENTITY) as journal:
        assert journal.last() is None
        with pytest.raises(ValueError, match="round 1 cannot"):
            journal.open_round(1, ["ada"])


def test_prune_keeps_what_a_restart_needs(folder: Path, journal: Journal) -> None:
    for number in (1, 2, 3):
        journal.open_round(number, ["ada"])
        journal.receive(number, "ada", b"payload %d" % number)
        journal.close_round(number, b"state %d" % number, {})
    journal.open_round(4, ["ada"])
    journal.receive(4, "ada", b"payload 4")
    journal.prune(2)
    kept = [b"state 2", b"payload 2", b"state 3", b"payload 3", b"payload 4"]
    names = {path.name for path in (folder / "blobs").iterdir()}
    assert names == {digest_of(data) for data in kept}
    assert journal.last() == (3, b"state 3")
    assert journal.contributions(1) == {"ada": digest_of(b"payload 1")}  # who sent what stays
    with pytest.raises(JournalError, match="missing"):
        journal.payload(digest_of(b"payload 1"))
    with pytest.raises(ValueError, match="keep_rounds"):
        journal.prune(0)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (replace(IDENTITY, config_digest="x"), "settings"),
        (replace(IDENTITY, base_digest="x"), "base"),
    ],
)
def test_another_run_is_refused(folder: Path, other: RunIdentity, what: str) -> None:
    Journal.open(folder, IDENTITY).close()
    with pytest.raises(JournalError, match=f"another|of another {what}") as caught:
        Journal.open(folder, other)
    assert what in str(caught.value) and "--out" in str(caught.value)
    Journal.open(folder, IDENTITY).close()


def test_another_machine_is_noticed_for_good(folder: Path) -> None:
    other = replace(IDENTITY, environment={"torch": "2.13", "torch_threads": "1"})
    Journal.open(folder, IDENTITY).close()
    for identity in (other, IDENTITY):  # what was computed on the other machine stays in the run
        with Journal.open(folder, identity) as journal:
            (notice,) = journal.notices
            assert "torch_threads 2 -> 1" in notice and "torch 2.13" not in notice


def test_another_format_is_refused_by_name(folder: Path) -> None:
    Journal.open(folder, IDENTITY).close()
    sql(folder, "PRAGMA user_version = 9")
    with pytest.raises(FormatError, match="journal format 9, this meadow reads 1"):
        Journal.open(folder, IDENTITY)


def test_two_journals_cannot_share_a_folder(folder: Path, journal: Journal) -> None:
    with pytest.raises(JournalError, match="another process"):
        Journal.open(folder, IDENTITY)
    journal.close()
    Journal.open(folder, IDENTITY).close()


@pytest.mark.long
def test_two_processes_cannot_share_a_folder(folder: Path, journal: Journal) -> None:
    program = (
        "import sys, pathlib\n"
        "from meadow.journal import Journal, RunIdentity\n"
        "Journal.open(pathlib.Path(sys.argv[1]), RunIdentity('config', 'base', {}))\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "another process is working in" in done.stderr


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.9])
def test_a_damaged_database_is_refused(folder: Path, place: float) -> None:
    with Journal.open(folder, IDENTITY) as journal:
        journal.close_round(0, b"initial", {})
    path = folder / "journal.db"
    data = bytearray(path.read_bytes())
    start = int(place * len(data)) // 4096 * 4096
    data[start : start + 512] = bytes(range(256)) * 2
    path.write_bytes(data)
    with pytest.raises(JournalError, match="damaged"):
        Journal.open(folder, IDENTITY)


def test_a_database_that_vanished_does_not_start_a_new_run(folder: Path) -> None:
    with Journal.open(folder, IDENTITY) as journal:
        journal.close_round(0, b"initial", {})
    (folder / "journal.db").unlink()
    with pytest.raises(JournalError, match="lost"):
        Journal.open(folder, IDENTITY)
    assert (folder / "blobs" / digest_of(b"initial")).exists()


def test_damaged_blobs_are_named(folder: Path, journal: Journal) -> None:
    path = folder / "blobs" / digest_of(b"initial")
    path.write_bytes(b"initiaL")
    with pytest.raises(JournalError, match=path.name):
        journal.last()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError, match="a file is in the way"):
        Journal.open(tmp_path / "out", IDENTITY)
    assert (tmp_path / "out").read_text() == "mine"


class Flaky(Disk):
    """A disk whose next commits fail as SQLite reports a full one."""

    failures = 0

    def commit(self, database: sqlite3.Connection) -> None:
        if self.failures:
            self.failures -= 1
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        super().commit(database)


def test_the_same_journal_goes_on_when_space_returns(folder: Path) -> None:
    disk = Flaky()
    with Journal.open(folder, IDENTITY, disk) as journal:
        journal.close_round(0, b"initial", {})
        journal.open_round(1, ["ada"])
        disk.failures = 2
        with pytest.raises(StorageError, match="full"):
            journal.receive(1, "ada", b"payload")
        assert journal.contributions(1) == {}
        with pytest.raises(StorageError, match="full"):
            journal.close_round(1, b"state", {})
        assert journal.receive(1, "ada", b"payload")
        journal.close_round(1, b"state", {})
        assert journal.last() == (1, b"state")


# Other cohorts, and contributions that are taken back


def test_an_open_round_can_be_given_another_cohort(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal:
        journal.close_round(0, b"start", {})
        journal.open_round(1, ["ada", "bob"])
        journal.receive(1, "bob", b"bytes")
        for wrong in (["ada"], ["bob", "bob"]):
            with pytest.raises(ValueError, match="cannot be given"):
                journal.recast(1, wrong)
        journal.recast(1, ["eve", "bob"])
        with pytest.raises(UpdateError, match="not asked"):
            journal.receive(1, "ada", b"x")
        journal.receive(1, "eve", b"y")
        assert list(journal.contributions(1)) == ["eve", "bob"]
        journal.close_round(1, b"next", {})
        with pytest.raises(ValueError, match="not open"):
            journal.recast(1, ["eve"])


def test_what_a_client_takes_back_is_gone_and_what_others_sent_is_not(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal:
        journal.close_round(0, b"start", {})
        for number in (1, 2):
            journal.open_round(number, ["ada", "bob"])
            journal.receive(number, "ada", b"ada %d" % number)
            journal.receive(number, "bob", b"bob %d" % number)
            if number == 1:
                journal.close_round(1, b"next", {})
        digest = journal.contributions(2)["ada"]
        assert journal.retract("ada", "gone") == [1, 2] and journal.retract("ada", "gone") == []
        assert list(journal.contributions(1)) == list(journal.contributions(2)) == ["bob"]
        assert journal.refusals(2) == {"ada": "gone"}
        with pytest.raises(UpdateError, match="was refused"):
            journal.receive(2, "ada", b"again")
        journal.prune(2)
        with pytest.raises(JournalError):
            journal.payload(digest)
        assert journal.payload(journal.contributions(2)["bob"]) == b"bob 2"


# Late answers


def test_a_late_answer_counts_once_and_not_before_its_round(journal: Journal) -> None:
    journal.open_round(1, ["ada", "bob", "eve"])
    journal.receive(1, "ada", b"in time")
    journal.refuse(1, "bob", "no")
    assert journal.keep_late(1, "eve", b"late", 2)
    assert not journal.keep_late(1, "eve", b"late", 3)  # the first stays
    assert not journal.keep_late(1, "ada", b"again", 2) and not journal.keep_late(1, "bob", b"x", 2)
    with pytest.raises(UpdateError, match="max was not asked in round 1"):
        journal.keep_late(1, "max", b"uninvited", 2)
    assert journal.late(1) == []
    journal.close_round(1, b"state 1", {})
    journal.prune(1)
    assert journal.payload(journal.late(2)[0][2]) == b"late"
    journal.open_round(2, ["ada"])
    journal.close_round(2, b"state 2", {}, [(1, "eve")])
    assert journal.late(3) == [] and not journal.keep_late(1, "eve", b"late", 3)


def test_a_late_answer_that_comes_in_time_after_all_is_none(journal: Journal) -> None:
    journal.open_round(1, ["eve"])
    assert journal.keep_late(1, "eve", b"the same", 2)
    assert journal.receive(1, "eve", b"the same")
    journal.close_round(1, b"state 1", {})
    assert journal.late(2) == [] and journal.state(1) == b"state 1"
