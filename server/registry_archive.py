"""Versions in one file, to carry from one registry to another.

A plain tar archive: `registry.json` first, which names the versions and their signers' keys, then
the three files of each version, in that order and under the very names that the registry uses.
Anything else in it is refused.  A key that an archive brings is never trusted for that: whoever
imports names the keys that count.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from .. import __version__
from ..canonical_json import Json, canonical
from ..errors import FormatError, IdentityError, RegistryError, StorageError
from ..identity import key_id
from ..peft_adapters.manifest import LARGEST as LARGEST_MANIFEST
from ..peft_adapters.manifest import MANIFEST
from ..peft_adapters.peft_format import CONFIG, WEIGHTS
from ..peft_adapters.safetensors_header import LARGEST_JSON
from ..peft_adapters.signed_adapter import Limits, SignedAdapter
from ..store import DRAFT, Disk, explained
from .registry import Named, Registry
from .registry_changes import refuse_bound_elsewhere
from .registry_names import adapter_name
from .registry_rows import Version

FORMAT = 1
INDEX = "registry.json"

_BLOCK = tarfile.BLOCKSIZE
_READ_AT_ONCE = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE,
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
_LARGEST_INDEX = 2**24  # bytes
_ANOTHER = "ask for the archive again"


def export_versions(
    registry: Registry, named: Sequence[Named], file: Path, disk: Disk | None = None
) -> list[Version]:
    """Write versions, each verified, into the archive `file`, which appears whole or not at all.

    Equal contents give equal bytes.  Raises what `Registry.verify` raises, RegistryError where
    nothing is named, StorageError where the disk refuses.
    """
    disk = disk or Disk()
    versions = [registry.resolve(one) for one in named]
    if not versions:
        raise RegistryError("nothing is named", "name the versions to export, or use --all")
    opened = {version.id: version for version in versions}
    draft = file.with_name(file.name + DRAFT)
    with explained(file):
        try:
            with open(draft, "wb", buffering=0) as raw:
                for name, data in _members(registry, versions, list(opened.values())):
                    disk.fill(raw, _member(name, data))
                disk.fill(raw, bytes(2 * _BLOCK))
                disk.sync(raw)
            disk.rename(draft, file)
            disk.sync_folder(file.parent)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    return versions


def import_versions(
    registry: Registry, file: Path, trust: Collection[str] = (), limits: Limits | None = None
) -> list[Version]:
    """Publish all versions of an archive, under their names and with the same ids.

    `trust` are ids of keys, learnt from somewhere else than the archive, that are to count from
    now on.  Nothing is changed unless all of it verifies.  Raises FormatError for an archive that
    is cut off or holds anything else, IdentityError where a signer is not trusted, and what
    `Registry.publish` raises.
    """
    limits = limits or Limits()
    with _Archive(file, limits) as archive:
        known = {key: archive.index.keys[key] for key in trust if key in archive.index.keys}
        if missing := sorted(set(trust) - known.keys()):
            raise RegistryError(f"{file} brings no key with the id {missing[0][:80]!r}")
        _verify_all(archive, registry.trusted() | known)
    for key in known.values():
        registry.trust(key, f"of {file.name}")
    with _Archive(file, limits) as archive:
        return [registry.keep(name, files) for names, files in archive.versions() for name in names]


@dataclass(frozen=True)
class _Index:
    """What an archive says that it holds."""

    names: dict[str, list[str]]  # by id
    keys: dict[str, Ed25519PublicKey]  # by their ids


# --- writing -----------------------------------------------------------------------------------


def _members(
    registry: Registry, versions: Sequence[Version], contents: Sequence[Version]
) -> Iterator[tuple[str, bytes]]:
    yield INDEX, _index(registry, versions)
    for version in contents:
        files = registry.files(version)
        yield _place(version.id, CONFIG), files.config
        yield _place(version.id, WEIGHTS), files.weights
        yield _place(version.id, MANIFEST), files.manifest


def _index(registry: Registry, versions: Sequence[Version]) -> bytes:
    names: dict[str, set[str]] = {}
    for version in versions:
        names.setdefault(version.id, set()).add(version.name)
    listed = [{"id": id, "names": sorted(found)} for id, found in names.items()]
    keys = sorted(key.public_bytes_raw().hex() for key in registry.trusted().values())
    index = {"format": FORMAT, "meadow": __version__, "versions": listed, "keys": keys}
    return canonical(index).encode()


def _member(name: str, data: bytes) -> bytes:
    """A member without date and owner: one content has one archive."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % _BLOCK)


def _place(id: str, name: str) -> str:
    return f"versions/{id}/{name}"


# --- reading -----------------------------------------------------------------------------------


def _verify_all(archive: _Archive, trusted: dict[str, Ed25519PublicKey]) -> None:
    for names, files in archive.versions():
        try:
            verified = files.verify(trusted)
        except IdentityError as error:
            keys = ", ".join(sorted(archive.index.keys)) or "none"
            raise IdentityError(
                f"{files.origin}: {error.message}",
                f"if the sender confirms a key's id, import with --trust; it brings {keys}",
            ) from error
        for name in names:
            refuse_bound_elsewhere(name, verified)


class _Header(tarfile.TarInfo):
    """Of a member that tarfile reads nothing of by itself.

    Of others, long names say, it reads as many bytes as their headers say, whatever that is.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or header.type in _READ_AT_ONCE:
            raise tarfile.ReadError("a header of a kind that no archive of ours has")
        return header


class _Archive:
    """Reads an archive from its beginning; its own word on where to write is never used."""

    def __init__(self, file: Path, limits: Limits) -> None:
        self._file = file
        self._limits = limits
        self.index: _Index

    def __enter__(self) -> _Archive:
        if not self._file.is_file():
            raise StorageError(f"there is no archive {self._file}")
        try:
            self._tar = tarfile.open(self._file, mode="r:", tarinfo=_Header)  # noqa: SIM115 - closed on exit
        except tarfile.TarError as error:
            raise self._refusal(f"is no whole archive: {error}") from error
        try:
            self.index = self._read_index()
        except BaseException:
            self._tar.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def versions(self) -> Iterator[tuple[list[str], SignedAdapter]]:
        """(names, files) of each version, once."""
        for id, names in self.index.names.items():
            files = SignedAdapter(
                self._file / "versions" / id,
                self._next(_place(id, CONFIG), LARGEST_JSON),
                self._next(_place(id, WEIGHTS), self._limits.weights),
                self._next(_place(id, MANIFEST), LARGEST_MANIFEST),
                self._limits,
            )
            if files.id != id:
                raise self._refusal(f"was changed: {id[:12]} has the content of {files.id[:12]}")
            yield names, files
        if self._member() is not None:
            raise self._refusal("goes on after its last version")

    def _next(self, name: str, largest: int) -> bytes:
        """The content of the next member, which has to be this one."""
        member = self._member()
        if member is None:
            raise self._refusal(f"is cut off before {name}")
        if member.name != name or member.type != tarfile.REGTYPE or member.issparse():
            raise self._refusal(f"has {member.name[:150]!r} where the file {name} belongs")
        if member.size > largest:
            raise self._refusal(f"has {member.size} bytes of {name}, at most {largest} are read")
        return self._content(member)

    def _member(self) -> tarfile.TarInfo | None:
        try:
            return self._tar.next()
        except (tarfile.TarError, ValueError, EOFError) as error:
            raise self._refusal(f"is no whole archive: {error}") from error

    def _content(self, member: tarfile.TarInfo) -> bytes:
        content: IO[bytes] | None = self._tar.extractfile(member)
        assert content is not None, "it is a plain file"
        try:
            data = content.read()
        except (tarfile.TarError, EOFError) as error:
            raise self._refusal(f"is cut off in {member.name}") from error
        if len(data) != member.size:
            raise self._refusal(f"is cut off in {member.name}")
        return data

    def _read_index(self) -> _Index:
        try:
            index: Json = json.loads(self._next(INDEX, _LARGEST_INDEX))
        except (ValueError, RecursionError) as error:
            raise self._refusal("has an index that is not readable JSON") from error
        match index:
            case {"format": int(version)} if version != FORMAT:
                raise self._refusal(f"has archive format {version}, this meadow reads {FORMAT}")
            case {"format": int(_), "versions": [*versions], "keys": [*keys]}:
                return _Index(self._names(versions), self._keys(keys))
        raise self._refusal("has an index of another form")

    def _names(self, versions: list[Json]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for version in versions:
            match version:
                case {"id": str(id), "names": [str(), *_] as names} if id not in found:
                    found[id] = [adapter_name(str(name)) for name in names]
                case _:
                    raise self._refusal("has an index of another form")
        return found

    def _keys(self, keys: list[Json]) -> dict[str, Ed25519PublicKey]:
        try:
            public = [Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)) for key in keys]
        except (ValueError, TypeError) as error:
            raise self._refusal("brings a key that is none") from error
        return {key_id(key): key for key in public}

    def _refusal(self, text: str) -> FormatError:
        return FormatError(f"{self._file} {text}", _ANOTHER)
