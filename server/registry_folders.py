"""Where the registry keeps contents: one folder for each id, which appears whole or not at all.

versions/ID/adapter_config.json, adapter_model.safetensors, manifest.json
"""

from __future__ import annotations

import re
from pathlib import Path

from ..peft_adapters.manifest import MANIFEST
from ..peft_adapters.peft_format import CONFIG, WEIGHTS
from ..peft_adapters.signed_adapter import Limits, SignedAdapter
from ..store import DRAFT, Disk, explained

_ID = re.compile("[0-9a-f]{64}")


class VersionFolders:
    """The folder `versions`; who changes it has the registry's turn."""

    def __init__(self, folder: Path, disk: Disk, limits: Limits) -> None:
        self._folder = folder
        self._disk = disk
        self._limits = limits

    def path(self, id: str) -> Path:
        """Where an id's files are.  ValueError for what is no id: it could name another place."""
        if not _ID.fullmatch(id):
            raise ValueError(f"{id[:80]!r} is no id")
        return self._folder / id

    def read(self, id: str) -> SignedAdapter:
        """Raises AdapterError where files are missing, too large, or others are there."""
        folder = self.path(id)
        return SignedAdapter.read(folder, folder / MANIFEST, self._limits)

    def put(self, files: SignedAdapter) -> bool:
        """Keep an adapter, durable on return; whether that took writing.  Mends a damaged copy."""
        target = self.path(files.id)
        if target.is_dir() and not target.is_symlink():
            written = [self._clear(target, {name for name, _ in _named(files)})]
            written += [self._mend(target / name, data) for name, data in _named(files)]
            self._disk.confirm(target)
            self._disk.confirm(self._folder)
            return any(written)
        draft = target.with_name(files.id + DRAFT)
        self._remove(draft)
        self._disk.folder(draft)
        for name, data in _named(files):
            self._disk.write(draft / name, data)
        with explained(target):
            target.unlink(missing_ok=True)  # a file or link in the way
            self._disk.rename(draft, target)
        self._disk.confirm(self._folder)
        return True

    def ids(self) -> set[str]:
        """Of all folders that are there."""
        with explained(self._folder):
            return {path.name for path in self._folder.iterdir() if _ID.fullmatch(path.name)}

    def delete(self, id: str) -> None:
        self._remove(self.path(id))

    def sweep(self) -> None:
        """Remove what publications that were cut off have left."""
        with explained(self._folder):
            drafts = [path for path in self._folder.iterdir() if path.suffix == DRAFT]
        for path in drafts:
            if _ID.fullmatch(path.stem):
                self._remove(path)
        with explained(self._folder):
            torn = sorted(self._folder.glob("*/*" + DRAFT))
        for path in torn:  # of copies that were being mended
            if _ID.fullmatch(path.parent.name):
                self._remove(path)

    def _clear(self, folder: Path, names: set[str]) -> bool:
        """Remove what is no plain file of these names; whether there was anything."""
        with explained(folder):
            strange = [
                path
                for path in sorted(folder.iterdir())
                if path.name not in names or path.is_symlink() or not path.is_file()
            ]
        for path in strange:
            self._remove(path)
        return bool(strange)

    def _mend(self, path: Path, data: bytes) -> bool:
        with explained(path):
            if path.exists() and path.read_bytes() == data:
                return False
        self._disk.write(path, data)
        return True

    def _remove(self, folder: Path) -> None:
        """Remove a folder of plain files, or whatever else has its name; nothing refers to it."""
        if folder.is_symlink() or not folder.is_dir():
            if folder.is_symlink() or folder.exists():
                self._disk.delete(folder)
            return
        with explained(folder):
            entries = sorted(folder.iterdir())
        for path in entries:
            self._disk.delete(path)
        self._disk.confirm(folder)
        with explained(folder):
            folder.rmdir()


def _named(files: SignedAdapter) -> list[tuple[str, bytes]]:
    return [(CONFIG, files.config), (WEIGHTS, files.weights), (MANIFEST, files.manifest)]
