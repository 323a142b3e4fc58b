"""Backups: taken while processes work, whole or not at all, and readable by any tar program."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from backed_up import RUN, tree
from enrolment import enrolled

from meadow.errors import JournalError, StorageError
from meadow.journal import Journal
from meadow.server import folder_snapshot
from meadow.server.authority import Authority
from meadow.server.coordinator_backup import MANIFEST, backup, restore
from meadow.server.folder_snapshot import STAGING
from meadow.server.roster import Roster

pytest_plugins = ("backup_fixtures",)


def test_a_coordinator_comes_back_as_it_was(home: Path, file: Path, tmp_path: Path) -> None:
    certificate = Authority.open(home / "authority").certificate
    with Roster.open(home / "roster.db") as roster:
        people, notes = roster.participants(), roster.notes()
    restored = restore(file, tmp_path / "new" / "place")
    there = tmp_path / "new" / "place"
    assert tree(there) == tree(home)
    assert restored.files == len([entry for entry in tree(there).values() if entry])
    assert stat.S_IMODE(there.stat().st_mode) == 0o700
    assert Authority.open(there / "authority").certificate == certificate
    with Roster.open(there / "roster.db") as roster:
        assert (roster.participants(), roster.notes()) == (people, notes)
    with Journal.open(there / "run", RUN) as journal:
        assert journal.last() == (1, b"state 1")
        assert journal.payload(journal.contributions(1)["a"]) == b"payload"


def test_the_file_is_the_owners_and_nothing_else_is_left(home: Path, file: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not (home / STAGING).exists()
    assert not list(file.parent.glob("*.draft"))


def test_an_old_backup_is_replaced(home: Path, file: Path, tmp_path: Path) -> None:
    (home / "later").write_text("x")
    backup(home, file)
    restore(file, tmp_path / "new")
    assert (tmp_path / "new" / "later").read_text() == "x"


def test_any_tar_program_can_read_it(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", file, "-C", tmp_path / "out"], check=True)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["format"] == 1
    for name, entry in manifest["files"].items():
        data = (tmp_path / "out" / "folder" / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["bytes"] == len(data)


def test_names_of_every_kind(tmp_path: Path) -> None:
    home = tmp_path / "home"
    names = ["manifest.json", "ü", "x" * 200, "a b", "-x", os.fsdecode(b"\xff")]
    for name in names:
        (home / ("y" * 150) / name).parent.mkdir(parents=True, exist_ok=True)
        (home / ("y" * 150) / name).write_text(name, errors="surrogateescape")
    (home / "manifest.json").write_text("not the archive's")
    backup(home, tmp_path / "b.tar")
    restore(tmp_path / "b.tar", tmp_path / "new")
    assert tree(tmp_path / "new") == tree(home)


def test_what_is_no_file_is_named(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (home / "link").symlink_to("/etc/passwd")
    (home / "loop").symlink_to(home, target_is_directory=True)
    monkeypatch.chdir(home)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("sock")
        made = backup(home, tmp_path / "b.tar")
    assert made.left_out == ("link", "loop", "sock")
    restore(tmp_path / "b.tar", tmp_path / "new")
    assert not {"link", "loop", "sock"} & tree(tmp_path / "new").keys()


def test_modes_are_kept_but_nobody_else_may_write(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for mode in (0o600, 0o644, 0o777, 0o4755):
        (home / f"{mode:o}").write_text("")
        (home / f"{mode:o}").chmod(mode)
    backup(home, tmp_path / "b.tar")
    restore(tmp_path / "b.tar", tmp_path / "new")
    modes = {name: mode for name, (_, mode) in tree(tmp_path / "new").items()}
    assert modes == {"600": 0o600, "644": 0o644, "777": 0o755, "4755": 0o755}


def test_places_that_cannot_be(home: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="lies in the folder"):
        backup(home, home / "run" / "b.tar")
    with pytest.raises(StorageError, match="no folder"):
        backup(tmp_path / "nowhere", tmp_path / "b.tar")
    with pytest.raises(StorageError):
        backup(home, tmp_path / "nowhere" / "b.tar")
    with pytest.raises(StorageError, match="not empty"):
        restore(file, home)
    with pytest.raises(StorageError, match="not empty"):
        restore(file, file)
    with pytest.raises(StorageError):
        restore(tmp_path / "nothing.tar", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_may_be_there(file: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    restore(file, tmp_path / "new")
    assert (tmp_path / "new" / "roster.db").exists()


def test_a_damaged_database_is_not_backed_up_in_silence(home: Path, tmp_path: Path) -> None:
    path = home / "roster.db"
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * 100 + data[4196:])
    with pytest.raises(JournalError, match="damaged"):
        backup(home, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists() and not (home / STAGING).exists()


# --- while processes work ----------------------------------------------------------------------


def test_a_transaction_that_is_open_is_not_in_it(home: Path, tmp_path: Path) -> None:
    """And one that was committed only into the database's log is."""
    with Roster.open(home / "roster.db") as roster:
        enrolled(roster, "b")
        assert (home / "roster.db-wal").stat().st_size > 0
        backup(home, tmp_path / "b.tar")
        restore(tmp_path / "b.tar", tmp_path / "new")
        with Roster.open(tmp_path / "new" / "roster.db") as copy:
            assert copy.participants() == roster.participants()


def test_a_database_that_is_held_is_waited_for_in_vain(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(
        "meadow.server.folder_snapshot.sqlite3.connect",
        lambda *args, **options: connect(*args, **(options | {"timeout": 0.01})),
    )
    with closing(connect(home / "roster.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalError, match="locked"):
            backup(home, tmp_path / "b.tar")


def test_nobody_commits_while_the_files_are_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening and closing a database by hand would let go of it: locks are the process's."""
    keep, faults = folder_snapshot._keep, []
    writer = "import sqlite3, sys; sqlite3.connect(sys.argv[1], 0.05).execute('BEGIN IMMEDIATE')"

    def keep_and_try(*args: Any) -> Any:
        kept = keep(*args)
        for path in home.rglob("*.db"):
            command = [sys.executable, "-c", writer, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            faults.append(done.stderr.splitlines()[-1])
        return kept

    monkeypatch.setattr(folder_snapshot, "_keep", keep_and_try)
    backup(home, tmp_path / "b.tar")
    assert faults == ["sqlite3.OperationalError: database is locked"] * 2


WORKER = """
import sys
from pathlib import Path
from meadow.journal import Journal, RunIdentity
from meadow.server.roster import Roster
from meadow.store import Disk

class Quick(Disk):
    def sync(self, file): pass
    def sync_folder(self, folder): pass

home = Path(sys.argv[1])
with Roster.open(home / "roster.db") as roster, Journal.open(
    home / "run", RunIdentity("config", "base", {}), Quick()
) as journal, open(home / "run" / "metrics.jsonl", "a") as metrics:
    number, _ = journal.last()
    while True:
        number += 1
        journal.open_round(number, ["a"])
        journal.receive(number, "a", b"payload %d " % number * 3000)
        journal.close_round(number, b"state %d " % number * 3000, {})
        journal.prune(1)
        metrics.write("{}\\n")
        metrics.flush()
        roster.note("round", b"", str(number))
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()
"""


@pytest.fixture
def worker(home: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that goes through rounds as fast as it can, and deletes what it needs no more."""
    command = [sys.executable, "-c", WORKER, str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_every_copy_of_a_coordinator_at_work_is_one_moment(
    home: Path, tmp_path: Path, worker: subprocess.Popen[str]
) -> None:
    assert worker.stdout is not None
    rounds = [1]
    for attempt in range(6):
        reached = int(worker.stdout.readline())
        backup(home, tmp_path / "b.tar")
        there = tmp_path / f"copy{attempt}"
        restore(tmp_path / "b.tar", there)
        with Journal.open(there / "run", RUN) as journal:
            last = journal.last()
            assert last is not None and last[0] >= max(reached, rounds[-1])
            rounds.append(last[0])
            assert last[1] == b"state %d " % last[0] * 3000
            assert journal.payload(journal.contributions(last[0])["a"])[:7] == b"payload"
        with Roster.open(there / "roster.db") as roster:
            noted = int(roster.notes()[-1].text)
        assert last[0] - 1 <= noted <= last[0]
        assert (there / "run" / "metrics.jsonl").read_text() == "{}\n" * (
            (there / "run" / "metrics.jsonl").stat().st_size // 3
        )
        shutil.rmtree(there)
    assert worker.poll() is None
