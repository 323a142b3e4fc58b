"""Archives that were cut, changed or made by hand: nothing is restored but what a backup holds."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from backed_up import small, tree

from meadow.errors import FormatError
from meadow.server.coordinator_backup import MANIFEST, Backup, backup, restore

pytest_plugins = ("backup_fixtures",)


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
