"""Backups: taken while processes work, whole or not at all, and nothing else is restored."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from enrolment import approved, enrolled
from faulty_disk import Crash, Faulty, Numbered

from meadow.errors import FormatError, JournalError, StorageError
from meadow.journal import Journal, RunIdentity
from meadow.server import folder_snapshot
from meadow.server.authority import Authority
from meadow.server.coordinator_backup import MANIFEST, Backup, backup, restore
from meadow.server.folder_snapshot import STAGING
from meadow.server.roster import Roster

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


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A coordinator's folder after a round, with nobody working in it."""
    folder = tmp_path / "home"
    Authority.open(folder / "authority").issue_server(["localhost"])
    with Roster.open(folder / "roster.db") as roster:
        approved(roster, "a")
    with Journal.open(folder / "run", RUN) as journal:
        journal.close_round(0, b"state 0", {})
        journal.open_round(1, ["a"])
        journal.receive(1, "a", b"payload")
        journal.close_round(1, b"state 1", {"loss": 1.0})
    (folder / "run" / "metrics.jsonl").write_text("{}\n")
    (folder / "logs" / "empty").mkdir(parents=True)
    return folder


@pytest.fixture
def file(home: Path, tmp_path: Path) -> Path:
    path = tmp_path / "backup.tar"
    backup(home, path)
    return path


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


# --- crashes -----------------------------------------------------------------------------------


def small(root: Path) -> Path:
    """A folder with a file, a folder and a database in it."""
    home = root / "home"
    (home / "run").mkdir(parents=True)
    (home / "run" / "a").write_bytes(b"a" * 3000)
    with closing(sqlite3.connect(home / "x.db")) as database, database:
        database.execute("CREATE TABLE t (v)")
        database.execute("INSERT INTO t VALUES (7)")
    return home


def places(root: Path, work: Any, way: str) -> list[int]:
    small(root)
    disk = Numbered(root)
    work(root, disk)
    shutil.rmtree(root)
    root.mkdir()
    return disk.tearable if way == "torn" else list(range(1, disk.count + 1))


def save(root: Path, disk: Numbered) -> Backup:
    return backup(root / "home", root / "b.tar", disk)


def save_and_bring_back(root: Path, disk: Numbered) -> Backup:
    save(root, Numbered(root))
    return restore(root / "b.tar", root / "sub" / "new", disk)


@pytest.mark.parametrize("work", [save, save_and_bring_back])
@pytest.mark.parametrize("way", ["before", "after", "torn", "power", "full"])
def test_any_step(tmp_path: Path, roots: Iterator[Path], way: str, work: Any) -> None:
    """What is there is whole; the same command, given again, ends well."""
    steps = places(tmp_path / "count", work, way)
    assert steps
    for at, root in zip(steps, roots, strict=False):
        home = small(root)
        whole, disk = tree(home), Faulty(root, at, way)
        try:
            work(root, disk)
        except Crash:
            root = disk.survivor
        except StorageError:
            pass
        if (root / "b.tar").exists():
            restore(root / "b.tar", root / "check")
            assert tree(root / "check") == whole
        if (root / "sub" / "new").exists():
            assert tree(root / "sub" / "new") == whole
        else:
            work(root, Numbered(root))
        left = [path for path in root.rglob("*.draft") if path.name != ".backup-lock.draft"]
        assert not left or (root / "sub" / "new").exists()


# --- archives that are not what they were ------------------------------------------------------


def test_a_cut_anywhere_is_noticed(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    end = len(data.rstrip(b"\0"))
    generator = random.Random(0)
    cuts = {0, 1, 511, 512, 513, end - 1, *generator.sample(range(end), 12)}
    for length in cuts:
        file.write_bytes(data[:length])
        with pytest.raises(FormatError):
            restore(file, tmp_path / "new")
        assert not (tmp_path / "new").exists() and not (tmp_path / "new.draft").exists()


def test_a_changed_byte_is_noticed_or_means_nothing(tmp_path: Path) -> None:
    home, file = small(tmp_path), tmp_path / "b.tar"
    backup(home, file)
    whole, data = tree(home), file.read_bytes()
    generator = random.Random(0)
    noticed = 0
    for place in generator.sample(range(len(data)), 100):
        changed = bytearray(data)
        changed[place] ^= 1 << generator.randrange(8)
        file.write_bytes(changed)
        try:
            restore(file, tmp_path / "new")
        except FormatError:
            noticed += 1
        else:
            assert tree(tmp_path / "new") == whole  # it fell into padding
            shutil.rmtree(tmp_path / "new")
    assert noticed > 40


def archive(path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]], files: Any) -> None:
    """A backup made by hand, whose manifest lists `files`."""
    with tarfile.open(path, "w") as made:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                made.addfile(member)
            else:
                add(made, *member)
        if files is not None:
            text = files if isinstance(files, bytes) else json.dumps(files).encode()
            add(made, MANIFEST, text)


def add(made: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    made.addfile(member, io.BytesIO(data))


def entry(data: bytes, mode: int = 0o644) -> dict[str, Any]:
    return {"bytes": len(data), "mode": mode, "sha256": hashlib.sha256(data).hexdigest()}


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_an_archive_made_by_hand(tmp_path: Path) -> None:
    """The cases below are refused for what is wrong in them, not for how they are made."""
    folder = special("folder/d", tarfile.DIRTYPE)
    manifest = {"format": 1, "files": {"d/a": entry(b"x")}}
    archive(tmp_path / "b.tar", [folder, ("folder/d/a", b"x")], manifest)
    assert restore(tmp_path / "b.tar", tmp_path / "new") == Backup(1, 1)


TRICKS = [
    "folder/../evil", "../evil", "/evil", "folder//evil", "folder/./evil", "folder/a/../../evil",
    "evil", "folder", "folder/", "folder/missing/evil", "other/evil", "folder/..",
]  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_paths_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    files = {name.removeprefix("folder/"): entry(b"x"), name: entry(b"x")}
    archive(tmp_path / "b.tar", [(name, b"x")], {"format": 1, "files": files})
    with pytest.raises(FormatError):
        restore(tmp_path / "b.tar", inside / "new")
    assert not list(tmp_path.rglob("*evil*")) and list(inside.iterdir()) == []


@pytest.mark.parametrize(
    "members",
    [
        [special("folder/a", tarfile.SYMTYPE, "/etc/passwd")],
        [special("folder/a", tarfile.LNKTYPE, "/etc/passwd")],
        [special("folder/a", tarfile.CHRTYPE)],
        [special("folder/a", tarfile.FIFOTYPE)],
        [special("folder/d", tarfile.SYMTYPE, ".."), ("folder/d/a", b"x")],
        [("folder/a", b"x"), ("folder/a", b"y")],
        [special("folder/d", tarfile.DIRTYPE), special("folder/d", tarfile.DIRTYPE)],
        [special("folder/a", tarfile.DIRTYPE), ("folder/a", b"x")],
        [("folder/a", b"x"), special("folder/a", tarfile.DIRTYPE)],
        [("folder/a", b"x"), ("folder/a/b", b"x")],
        [("folder/a", b"y")],
        [("folder/a", b"x"), ("folder/b", b"x")],
        [],
    ],
)
def test_members_that_a_backup_never_has(
    tmp_path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]]
) -> None:
    archive(tmp_path / "b.tar", members, {"format": 1, "files": {"a": entry(b"x")}})
    with pytest.raises(FormatError):
        restore(tmp_path / "b.tar", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.draft").exists()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "cut off"),
        (b"{", "not a whole backup"),
        (b"\xff\xfe", "not a whole backup"),
        ([], "another form"),
        ({"format": 1}, "another form"),
        ({"format": 2, "files": {}}, "backup format 2, this meadow reads 1"),
    ],
)
def test_manifests_of_another_form(tmp_path: Path, manifest: Any, message: str) -> None:
    archive(tmp_path / "b.tar", [], manifest)
    with pytest.raises(FormatError, match=message):
        restore(tmp_path / "b.tar", tmp_path / "new")


def test_nothing_comes_after_the_manifest(tmp_path: Path) -> None:
    manifest = json.dumps({"format": 1, "files": {"a": entry(b"x")}}).encode()
    members: list[Any] = [(MANIFEST, manifest), ("folder/a", b"x")]
    archive(tmp_path / "b.tar", members, None)
    with pytest.raises(FormatError, match="after its manifest"):
        restore(tmp_path / "b.tar", tmp_path / "new")
