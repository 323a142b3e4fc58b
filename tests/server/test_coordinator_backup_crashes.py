"""A backup or a restore that dies at any step of its disk: what is there is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backed_up import small, tree
from faulty_disk import Crash, Faulty, Numbered

from meadow.errors import StorageError
from meadow.server.coordinator_backup import Backup, backup, restore


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
