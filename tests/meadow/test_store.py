"""Durable writes: whole or absent, in the right order, and clear about a disk that refuses."""

from __future__ import annotations

import errno
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import pytest

from meadow.errors import JournalError, StorageError
from meadow.store import Blobs, Disk, digest_of


class Recording(Disk):
    """Tells which steps were taken."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def fill(self, file: BinaryIO, data: bytes) -> None:
        self.steps.append("fill")
        super().fill(file, data)

    def sync(self, file: BinaryIO) -> None:
        self.steps.append("sync")
        super().sync(file)

    def rename(self, draft: Path, path: Path) -> None:
        self.steps.append("rename")
        super().rename(draft, path)

    def sync_folder(self, folder: Path) -> None:
        self.steps.append(f"sync {folder.name}")
        super().sync_folder(folder)


class Failing(Disk):
    """Writes half of the bytes, then fails."""

    def __init__(self, code: int) -> None:
        self.code = code

    def fill(self, file: BinaryIO, data: bytes) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(self.code, "injected")


def test_a_file_is_synced_before_it_gets_its_name(tmp_path: Path) -> None:
    disk = Recording()
    disk.write(tmp_path / "state", b"new")
    assert disk.steps == ["fill", "sync", "rename", f"sync {tmp_path.name}"]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").read_bytes() == b"new"


def test_folders_are_made_from_the_top_and_each_is_synced(tmp_path: Path) -> None:
    disk = Recording()
    disk.folder(tmp_path / "a" / "b")
    assert disk.steps == [f"sync {tmp_path.name}", "sync a"]
    disk.folder(tmp_path / "a" / "b")
    assert disk.steps[2:] == ["sync a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_refusing_disk_keeps_what_was_there(tmp_path: Path, code: int) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    with pytest.raises(StorageError) as caught:
        Failing(code).write(path, b"something new")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_defect_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="injected") as caught:
        Failing(errno.EBADF).write(tmp_path / "state", b"new")
    assert not isinstance(caught.value, StorageError)


def test_a_file_in_place_of_a_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="a file is in the way"):
        Disk().folder(tmp_path / "file")
    with pytest.raises(StorageError, match="a file is in the way"):
        Disk().folder(tmp_path / "file" / "below")
    with pytest.raises(StorageError, match="gone"):
        Disk().write(tmp_path / "nowhere" / "file", b"")


def test_databases_are_durable(tmp_path: Path) -> None:
    with closing(Disk().connect(tmp_path / "x.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    disk, path = Disk(), tmp_path / "x.db"
    with closing(disk.connect(path)) as database:
        with disk.transaction(database, path):
            database.execute("CREATE TABLE t (i)")
        with pytest.raises(ZeroDivisionError), disk.transaction(database, path):
            database.execute("INSERT INTO t VALUES (1)")
            raise ZeroDivisionError
        assert database.execute("SELECT * FROM t").fetchall() == []
        with pytest.raises(sqlite3.OperationalError), disk.transaction(database, path):
            database.execute("INSERT INTO no_such_table VALUES (1)")


def test_a_database_that_really_is_full(tmp_path: Path) -> None:
    disk, path = Disk(), tmp_path / "x.db"
    with closing(disk.connect(path)) as database:
        with disk.transaction(database, path):
            database.execute("CREATE TABLE t (b)")
        database.execute("PRAGMA max_page_count = 4")
        with pytest.raises(StorageError, match="full"), disk.transaction(database, path):
            database.execute("INSERT INTO t VALUES (zeroblob(100000))")
        database.execute("PRAGMA max_page_count = 100000")
        with disk.transaction(database, path):
            database.execute("INSERT INTO t VALUES (zeroblob(100000))")
        assert database.execute("SELECT count(*) FROM t").fetchone() == (1,)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"certainly not SQLite" * 100)
    with pytest.raises(JournalError, match="damaged"):
        Disk().connect(tmp_path / "x.db")


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path, Disk())


def test_blobs_are_named_by_their_content(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put(b"payload")
    assert digest == digest_of(b"payload") == blobs.put(b"payload")
    assert blobs.get(digest) == b"payload"
    assert [path.name for path in tmp_path.iterdir()] == [digest]


def test_a_blob_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    disk = Recording()
    blobs = Blobs(tmp_path, disk)
    blobs.put(b"payload")
    disk.steps.clear()
    blobs.put(b"payload")
    assert disk.steps == [f"sync {tmp_path.name}"]


def test_damage_is_found_and_healed(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put(b"payload")
    (tmp_path / digest).write_bytes(b"paylOad")
    with pytest.raises(JournalError, match=digest):
        blobs.get(digest)
    blobs.put(b"payload")
    assert blobs.get(digest) == b"payload"


def test_a_missing_blob_is_named(blobs: Blobs) -> None:
    with pytest.raises(JournalError, match=f"{digest_of(b'never')} is missing"):
        blobs.get(digest_of(b"never"))


def test_sweep_leaves_what_is_referenced(blobs: Blobs, tmp_path: Path) -> None:
    kept, dropped = blobs.put(b"kept"), blobs.put(b"dropped")
    (tmp_path / f"{dropped}.draft").write_bytes(b"half")
    blobs.sweep({kept})
    assert [path.name for path in tmp_path.iterdir()] == [kept]
