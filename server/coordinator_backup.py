"""A coordinator's folder in one file, taken while its processes run, and back again.

The file is a plain tar archive whose last member, `manifest.json`, lists size, SHA-256 and mode of
every other.  It holds the authority's private key: it is written for its owner's eyes only, and is
to be kept as the key itself would be.

What is restored is the coordinator of the moment at which the backup was taken.  Who was revoked
since then is not revoked in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from .. import __version__
from ..canonical_json import Json, canonical
from ..errors import FormatError, StorageError
from ..store import DRAFT, Disk, explained
from .folder_snapshot import KeptFile, Snapshot, snapshot

FORMAT = 1
MANIFEST = "manifest.json"

_CHUNK = 2**20  # bytes
_LARGEST_MANIFEST = 2**28  # bytes; a million files
_ANOTHER = "use another backup"
_TOP = "folder"  # the archive's one folder: nothing in the coordinator's is taken for the manifest
_MODES = 0o755  # nobody but its owner may write what is restored


@dataclass(frozen=True)
class Backup:
    """What a backup holds."""

    files: int
    bytes: int
    left_out: tuple[str, ...] = ()
    """Links and sockets of the folder: not in the backup."""


class _Steps(io.RawIOBase):
    """An unbuffered file all of whose writes are steps of a disk."""

    def __init__(self, file: BinaryIO, disk: Disk) -> None:
        self._file = file
        self._disk = disk
        self._place = 0

    def tell(self) -> int:
        return self._place

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(cast(bytes, data))
        self._disk.fill(self._file, bytes(view))
        self._place += len(view)
        return len(view)


def backup(folder: Path, file: Path, disk: Disk | None = None) -> Backup:
    """Write all of `folder` into the archive `file`, which appears whole or not at all.

    Processes may go on working in the folder.  Raises StorageError where there is no such folder,
    the file lies in it, or the disk refuses; JournalError for a database that is damaged.
    """
    disk = disk or Disk()
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}", "name the coordinator's own")
    if file.resolve().is_relative_to(folder.resolve()):
        raise StorageError(f"{file} lies in the folder that it is to hold", "write it elsewhere")
    draft = file.with_name(file.name + DRAFT)
    with snapshot(folder) as taken, explained(file):
        try:
            _write(taken, draft, disk)
            disk.rename(draft, file)
            disk.sync_folder(file.parent)
        except OSError:
            draft.unlink(missing_ok=True)  # half a file must not keep a full disk full
            raise
    return Backup(len(taken.files), sum(kept.size for kept in taken.files), taken.left_out)


def restore(file: Path, folder: Path, disk: Disk | None = None) -> Backup:
    """Put back what `backup` wrote; `folder`, new or empty, is filled whole or not at all.

    Raises FormatError for an archive that is cut off, changed, of another format, or that names
    anything outside the folder; StorageError for a folder that is not empty or a disk that
    refuses.
    """
    disk = disk or Disk()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder} is not empty", "restore into a new folder")
    folder = folder.resolve()
    disk.folder(folder.parent)
    draft = folder.with_name(folder.name + DRAFT)
    with explained(folder):
        if draft.exists():
            shutil.rmtree(draft)  # of a restore that did not end
        try:
            restored = _unpack(file, draft, disk)
        except Exception:
            shutil.rmtree(draft)  # what is not whole helps nobody
            raise
        if folder.exists():
            folder.rmdir()
        disk.rename(draft, folder)
        disk.sync_folder(folder.parent)
    return restored


# --- writing -----------------------------------------------------------------------------------


def _write(taken: Snapshot, draft: Path, disk: Disk) -> None:
    with open(draft, "wb", buffering=0, opener=_with_mode(0o600)) as raw:
        with (
            io.BufferedWriter(_Steps(raw, disk), _CHUNK) as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for name in taken.folders:
                archive.addfile(_member(f"{_TOP}/{name}", 0, 0o700, tarfile.DIRTYPE))
            entries = {kept.name: _add(archive, kept) for kept in taken.files}
            _add_manifest(archive, entries)
        disk.sync(raw)


def _add(archive: tarfile.TarFile, kept: KeptFile) -> Json:
    """Copy a file into the archive; what the manifest says of it."""
    with open(kept.path, "rb") as file:
        reader = _Hashing(file, kept.size)
        member = _member(f"{_TOP}/{kept.name}", kept.size, kept.mode & _MODES)
        archive.addfile(member, cast(BinaryIO, reader))
    return {"bytes": kept.size, "mode": kept.mode & _MODES, "sha256": reader.digest()}


def _add_manifest(archive: tarfile.TarFile, entries: Json) -> None:
    text = canonical({"format": FORMAT, "meadow": __version__, "files": entries})
    manifest = text.encode("utf-8", "surrogateescape")  # names that are not UTF-8
    archive.addfile(_member(MANIFEST, len(manifest), 0o600), io.BytesIO(manifest))


def _member(name: str, size: int, mode: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    """A member without dates and owners: one content has one archive."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.type = size, mode, kind
    return member


class _Hashing:
    """Reads the first `size` bytes of a file and hashes them on the way."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size
        self._hash = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        self._hash.update(data)
        return data

    def digest(self) -> str:
        return self._hash.hexdigest()


# --- reading -----------------------------------------------------------------------------------


def _unpack(file: Path, draft: Path, disk: Disk) -> Backup:
    """Fill the folder `draft`, durably, once it is what the archive's manifest says."""
    disk.make(draft)
    draft.chmod(0o700)
    reader = _Reader(file, draft, disk)
    try:
        reader.read()
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise FormatError(f"{file} is not a whole backup: {error}", _ANOTHER) from error
    for folder in reversed(reader.folders):
        disk.sync_folder(folder)
    return Backup(len(reader.files), sum(entry["bytes"] for entry in reader.files.values()))


class _Reader:
    """Takes an archive apart, member by member; its own word on where to write is never used."""

    def __init__(self, file: Path, draft: Path, disk: Disk) -> None:
        self._file = file
        self._draft = draft
        self._disk = disk
        self.folders = [draft]
        self.files: dict[str, Json] = {}

    def read(self) -> None:
        """Unpack everything.  FormatError where that is not exactly what the manifest lists."""
        manifest: Json = None
        with tarfile.open(self._file, mode="r:") as archive:
            for member in archive:
                if manifest is not None:
                    raise self._refusal("goes on after its manifest")
                if member.name == MANIFEST:
                    manifest = self._manifest(_content(archive, member))
                else:
                    self._take(archive, member)
        if manifest is None:
            raise self._refusal("is cut off")
        for name in sorted(manifest.keys() | self.files.keys()):
            if manifest.get(name) != self.files.get(name):
                raise self._refusal(f"was changed: {name[:200]!r} is not what its manifest says")

    def _take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Put one member in its place."""
        name = self._inside(member.name)
        path = self._draft / name
        if path.parent not in self.folders or path in self.folders or name in self.files:
            raise self._refusal(f"has {name[:200]!r} twice, or without its folder")
        if member.type == tarfile.DIRTYPE:
            self._disk.make(path)
            self.folders.append(path)
        else:
            content = _content(archive, member)
            digest = self._copy(content, path, member.mode & _MODES)
            self.files[name] = {"bytes": member.size, "mode": member.mode, "sha256": digest}

    def _copy(self, content: IO[bytes], path: Path, mode: int) -> str:
        """Write a new file, durably; the SHA-256 of what was written."""
        seen = hashlib.sha256()
        with open(path, "xb", buffering=0, opener=_with_mode(mode)) as file:
            while data := content.read(_CHUNK):
                seen.update(data)
                self._disk.fill(file, data)
            self._disk.sync(file)
        return seen.hexdigest()

    def _inside(self, name: str) -> str:
        """The path of a member within the folder, if that is what it is."""
        first, _, rest = name.partition("/")
        parts = rest.split("/")
        if first != _TOP or any(part in ("", ".", "..") for part in parts) or "\0" in rest:
            raise self._refusal(f"names {name[:200]!r}, which is not in the folder")
        return rest

    def _manifest(self, content: IO[bytes]) -> dict[str, Json]:
        """What the archive should hold, by name."""
        match json.loads(content.read(_LARGEST_MANIFEST).decode("utf-8", "surrogateescape")):
            case {"format": int(version), "files": dict(files)}:
                if version != FORMAT:
                    raise self._refusal(f"has backup format {version}, this meadow reads {FORMAT}")
                return files
        raise self._refusal("has a manifest of another form")

    def _refusal(self, text: str) -> FormatError:
        return FormatError(f"{self._file} {text}", _ANOTHER)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    """The bytes of a plain file.  ValueError for links, devices and files with holes."""
    content = archive.extractfile(member) if member.type == tarfile.REGTYPE else None
    if content is None or member.issparse():
        raise ValueError(f"{member.name[:200]!r} is no plain file")
    return content


def _with_mode(mode: int) -> Callable[[str, int], int]:
    return lambda name, flags: os.open(name, flags, mode)
