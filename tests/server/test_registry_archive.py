"""Versions carried to another registry in one file, and every archive that is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_disk import Crash, Faulty, Numbered
from registries import ME, STRANGER, adapter, open_registry, write_run

from meadow.errors import FormatError, IdentityError, MeadowError, RegistryError, StorageError
from meadow.server.registry import Registry
from meadow.server.registry_archive import INDEX, export_versions, import_versions
from meadow.server.registry_runs import publish_run

Member = tuple[tarfile.TarInfo, bytes]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path / "here") as registry:
        registry.keep("mail", adapter(1))
        registry.keep("mail", adapter(2))
        registry.keep("team/post", adapter(2))
        registry.promote("mail@v2")
        yield registry


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path / "there", STRANGER) as registry:
        yield registry


@pytest.fixture
def file(here: Registry, tmp_path: Path) -> Path:
    export_versions(here, here.versions(), tmp_path / "a.tar")
    return tmp_path / "a.tar"


def members(file: Path) -> list[Member]:
    with tarfile.open(file, "r:") as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]


def write(file: Path, parts: list[Member]) -> Path:
    with tarfile.open(file, "w") as archive:
        for info, data in parts:
            if info.type == tarfile.REGTYPE:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def unchanged(registry: Registry) -> bool:
    return not registry.versions() and not list((registry.folder / "versions").iterdir())


def test_the_same_ids_on_the_other_side(here: Registry, there: Registry, file: Path) -> None:
    versions = import_versions(there, file, trust=[ME.key_id])
    listed = [(version.name, version.number, version.id) for version in there.versions()]
    assert listed == [(v.name, v.number, v.id) for v in here.versions()]
    assert sorted(map(str, versions)) == ["mail@v1", "mail@v2", "team/post@v1"]
    for version in there.versions():
        assert there.verify(version) == here.verify(version)
    assert there.aliases() == []
    seen = there.revision()
    import_versions(there, file)
    assert there.revision() == seen


def test_equal_contents_are_equal_bytes(here: Registry, file: Path, tmp_path: Path) -> None:
    export_versions(here, ["mail", "mail@v1", "team/post@v1"], tmp_path / "b.tar")
    one, other = members(file), members(tmp_path / "b.tar")
    assert sorted(m.name for m, _ in one) == sorted(m.name for m, _ in other)
    export_versions(here, here.versions(), tmp_path / "c.tar")
    assert (tmp_path / "c.tar").read_bytes() == file.read_bytes()


def test_a_signer_is_never_trusted_because_an_archive_says_so(there: Registry, file: Path) -> None:
    with pytest.raises(IdentityError, match=f"--trust; it brings {ME.key_id}"):
        import_versions(there, file)
    with pytest.raises(RegistryError, match="brings no key with the id '00"):
        import_versions(there, file, trust=["00" * 32])
    assert unchanged(there) and set(there.trusted()) == {STRANGER.key_id}


def test_all_or_nothing(here: Registry, there: Registry, tmp_path: Path) -> None:
    """The last of three has another signer."""
    here.trust(STRANGER.public)
    publish_run(here, write_run(tmp_path / "run", 9, signer=STRANGER), "zoo")
    export_versions(here, here.versions(), tmp_path / "a.tar")
    there.distrust(STRANGER.key_id)
    with pytest.raises(IdentityError):
        import_versions(there, tmp_path / "a.tar", trust=[ME.key_id])
    assert unchanged(there) and there.trusted() == {}


def test_a_name_that_an_archive_may_not_give_changes_nothing(
    here: Registry, there: Registry, tmp_path: Path
) -> None:
    """Who packs an archive names its versions; a signer may have bound the last of them."""
    publish_run(here, write_run(tmp_path / "run", 9, name="zoo"), "zoo")
    export_versions(here, here.versions(), tmp_path / "a.tar")
    (info, index), *parts = members(tmp_path / "a.tar")
    forged = write(tmp_path / "b.tar", [(info, index.replace(b'"zoo"', b'"spa"')), *parts])
    with pytest.raises(RegistryError, match="to be published as 'zoo', not as 'spa'"):
        import_versions(there, forged, trust=[ME.key_id])
    assert unchanged(there) and set(there.trusted()) == {STRANGER.key_id}


def test_nothing_is_exported_that_does_not_verify(here: Registry, tmp_path: Path) -> None:
    path = here.folder / "versions" / adapter(1).id / "adapter_config.json"
    path.write_bytes(b"{}")
    with pytest.raises(MeadowError):
        export_versions(here, ["mail@v2", "mail@v1"], tmp_path / "a.tar")
    assert not list(tmp_path.glob("a.tar*"))
    with pytest.raises(RegistryError, match="nothing is named"):
        export_versions(here, [], tmp_path / "a.tar")


def renamed(name: str) -> Callable[[list[Member]], object]:
    return lambda parts: setattr(parts[2][0], "name", name)


def retyped(kind: bytes, target: str = "/etc/passwd") -> Callable[[list[Member]], object]:
    def change(parts: list[Member]) -> None:
        parts[2][0].type, parts[2][0].linkname = kind, target

    return change


def reindexed(change: Callable[[dict[str, Any]], object]) -> Callable[[list[Member]], object]:
    def apply(parts: list[Member]) -> None:
        index = json.loads(parts[0][1])
        change(index)
        parts[0] = parts[0][0], json.dumps(index).encode()

    return apply


FORGERIES: dict[str, Callable[[list[Member]], object]] = {
    "parent": renamed("../../etc/passwd"),
    "absolute": renamed("/etc/passwd"),
    "within": renamed(f"versions/{'0' * 64}/../../../x"),
    "long name": renamed("versions/" + "x" * 300),
    "symbolic link": retyped(tarfile.SYMTYPE),
    "hard link": retyped(tarfile.LNKTYPE),
    "device": retyped(tarfile.CHRTYPE),
    "folder": retyped(tarfile.DIRTYPE),
    "pipe": retyped(tarfile.FIFOTYPE),
    "twice": lambda parts: parts.insert(2, parts[1]),
    "swapped": lambda parts: parts.insert(1, parts.pop(2)),
    "missing": lambda parts: parts.pop(2),
    "cut": lambda parts: parts.pop(),
    "more": lambda parts: parts.append(parts[1]),
    "no index": lambda parts: parts.pop(0),
    "other content": lambda parts: parts.__setitem__(2, (parts[2][0], parts[5][1])),
    "other config": lambda parts: parts.__setitem__(1, (parts[1][0], parts[1][1] + b" ")),
    "huge manifest": lambda parts: parts.__setitem__(3, (parts[3][0], bytes(2**20 + 1))),
    "index no JSON": lambda parts: parts.__setitem__(0, (parts[0][0], b"[" * 10**5)),
    "index a list": lambda parts: parts.__setitem__(0, (parts[0][0], b"[]")),
    "other format": reindexed(lambda index: index.update(format=2)),
    "name a path": reindexed(lambda index: index["versions"][0].update(names=["../x"])),
    "name a number": reindexed(lambda index: index["versions"][0].update(names=[3])),
    "no names": reindexed(lambda index: index["versions"][0].update(names=[])),
    "id a path": reindexed(lambda index: index["versions"][0].update(id="../../x")),
    "id twice": reindexed(lambda index: index["versions"].append(index["versions"][0])),
    "keys text": reindexed(lambda index: index.update(keys=["xyz"])),
    "keys numbers": reindexed(lambda index: index.update(keys=[1])),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_archive_changes_nothing(
    there: Registry, file: Path, tmp_path: Path, forgery: str
) -> None:
    parts = members(file)
    assert parts[0][0].name == INDEX
    FORGERIES[forgery](parts)
    before = set(tmp_path.rglob("*"))
    there.trust(ME.public)
    with pytest.raises((FormatError, RegistryError)) as caught:
        import_versions(there, write(tmp_path / "forged.tar", parts))
    assert "\n" not in str(caught.value)
    assert unchanged(there)
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "forged.tar"}


def test_an_archive_that_ends_anywhere_changes_nothing(
    there: Registry, file: Path, tmp_path: Path
) -> None:
    there.trust(ME.public)
    whole = file.read_bytes()
    used = len(whole) - 2 * tarfile.BLOCKSIZE
    last = members(file)[-1][0]
    end = used - (-last.size % tarfile.BLOCKSIZE)  # what follows is padding
    for size in [*range(0, end, 509), end - 1]:
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(FormatError):
            import_versions(there, tmp_path / "cut.tar")
        assert unchanged(there)


def test_what_is_no_archive(there: Registry, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no archive"):
        import_versions(there, tmp_path / "none.tar")
    for junk in (b"\x1f\x8b" + bytes(1000), b"PK" * 600, bytes(10240), b"x" * 512):
        (tmp_path / "junk.tar").write_bytes(junk)
        with pytest.raises(FormatError):
            import_versions(there, tmp_path / "junk.tar")


def raw_header(kind: bytes, size: int) -> bytes:
    """A header that no library writes, with its sum."""
    header = bytearray(tarfile.TarInfo(INDEX).tobuf(tarfile.GNU_FORMAT))
    first = b"\x80" if size >= 0 else b"\xff"
    header[124:136] = first + (size % 256**11).to_bytes(11, "big")
    header[156:157], header[148:156] = kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("kind", [b"0", b"L", b"K", b"S", b"x", b"X", b"g", b"5", b"N"])
@pytest.mark.parametrize("size", [-512, -1, 2**40, 2**63 - 1, 2**80], ids=str)
def test_a_header_that_asks_for_more_memory_than_there_is(
    there: Registry, tmp_path: Path, kind: bytes, size: int
) -> None:
    """A few bytes may say that a name of 2^40 follows."""
    archive = tmp_path / "a.tar"
    archive.write_bytes(raw_header(kind, size) + bytes(4 * 512))
    with pytest.raises(FormatError):
        import_versions(there, archive)
    assert unchanged(there)


def test_an_export_that_is_stopped_leaves_no_archive(here: Registry, tmp_path: Path) -> None:
    target = tmp_path / "out" / "a.tar"
    target.parent.mkdir()
    disk = Numbered(target.parent)
    export_versions(here, ["mail@v1"], target, disk)
    whole = target.read_bytes()
    target.unlink()
    for at in range(1, disk.count):  # the last step makes the name durable
        for way in ("before", "full"):
            faulty = Faulty(target.parent, at, way)
            with pytest.raises((Crash, StorageError)):
                export_versions(here, ["mail@v1"], target, faulty)
            for left in (target.parent, faulty.survivor):
                assert not (left / "a.tar").exists() or (left / "a.tar").read_bytes() == whole
            target.unlink(missing_ok=True)
            if faulty.survivor.exists():
                import shutil

                shutil.rmtree(faulty.survivor)
