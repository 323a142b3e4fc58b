"""What a name means while versions break, trust is withdrawn, the disk fails or the registry is
away: nothing is served that does not verify, and what last did goes on.
"""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from catalogues import PATIENCE, add, looking_at, meaning, soon
from registries import ME, adapter, changed, flip, open_registry, place

from meadow.errors import AdapterError, IdentityError, MeadowError, StorageError
from meadow.peft_adapters.peft_format import WEIGHTS
from meadow.server.registry import Registry, Version
from meadow.server.registry_gc import Retention
from meadow.server.serving import open_versions
from meadow.server.serving.catalogue import Catalogue

pytest_plugins = ("registry_fixtures",)


def damage(registry: Registry, version: Version) -> None:
    changed(place(registry, version.id), WEIGHTS, flip)


def refuses(catalogue: Catalogue, model: str, kind: type[MeadowError]) -> bool:
    try:
        catalogue.acquire(model).release()
    except kind:
        return True
    return False


# Versions that break


def test_a_version_that_does_not_verify_stays_out(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue:
        meaning(catalogue, "a")
        two = registry.keep("a", adapter(2))
        registry.promote(two)
        soon(lambda: meaning(catalogue, "a") == "a@v2")
        registry.rollback("a")
        soon(lambda: meaning(catalogue, "a") == "a@v1")
        registry.promote(two)
        soon(lambda: meaning(catalogue, "a") == "a@v2")
        three = registry.keep("a", adapter(3))
        registry.promote(three)
        soon(lambda: meaning(catalogue, "a") == "a@v3")
    damage(registry, three)
    with looking_at(registry) as catalogue:  # begun anew: at first use
        assert meaning(catalogue, "a") == "a@v2"
        assert catalogue.health().behind == ("a@prod",) and catalogue.health().refused >= 1
        with pytest.raises(AdapterError):
            catalogue.acquire("a@v3")
        registry.keep("a", adapter(3))  # mended
        soon(lambda: meaning(catalogue, "a") == "a@v3")
        assert catalogue.health().behind == ()
    assert "stays out" in caplog.text


def test_a_refusal_counts_once_however_often_the_registry_is_looked_at(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, 1)
    damage(registry, add(registry, 2))
    own, looks = registry.revision, 0

    def revision() -> int:
        nonlocal looks
        looks += 1
        return own()

    monkeypatch.setattr(registry, "revision", revision)
    with looking_at(registry) as catalogue:
        assert meaning(catalogue, "a") == "a@v1"
        before = looks
        soon(lambda: looks > before + 3)
        assert catalogue.health().refused == 1


def test_without_a_version_that_verifies_there_is_an_error(registry: Registry) -> None:
    version = add(registry, 1)
    damage(registry, version)
    with looking_at(registry) as catalogue:
        for _ in range(2):
            with pytest.raises(AdapterError):
                catalogue.acquire("a")


def test_a_version_that_is_damaged_once_it_is_open_gives_way_to_the_one_before(
    registry: Registry,
) -> None:
    """Where its weights have to come from the disk again."""
    add(registry, 1)
    two = add(registry, 2)
    with looking_at(registry) as catalogue, catalogue.acquire("a") as lease:
        damage(registry, two)
        with pytest.raises(AdapterError):
            catalogue.read(lease.model)
        assert meaning(catalogue, "a") == "a@v1"
        assert catalogue.health().behind == ("a@prod",)
        registry.keep("a", adapter(2))  # mended
        soon(lambda: meaning(catalogue, "a") == "a@v2")
        assert catalogue.read(lease.model).rank == 8


def test_a_version_that_fails_is_not_read_again_for_everybody_who_asks(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has a key could keep the disk busy with it, and its users do by trying again."""
    damage(registry, add(registry, 1))
    own, read = registry.lease, list[Version]()

    def lease(version: Version, *more: Any) -> Any:
        read.append(version)
        return own(version, *more)

    monkeypatch.setattr(registry, "lease", lease)
    monkeypatch.setattr(open_versions, "_FAILED_SECONDS", 1e9)
    with looking_at(registry) as catalogue:
        for name in ["a", "a@v1"] * 9:
            assert refuses(catalogue, name, AdapterError)
        assert len(read) == 1
        monkeypatch.setattr(open_versions, "_FAILED_SECONDS", 0.0)
        registry.keep("a", adapter(1))  # mended
        assert meaning(catalogue, "a") == "a@v1" and len(read) == 2


# Trust that is withdrawn


def test_a_key_that_is_no_longer_trusted_serves_nothing_new(registry: Registry) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue:
        lease = catalogue.acquire("a")
        registry.distrust(ME.key_id)

        def refused() -> bool:
            try:
                catalogue.acquire("a").release()
            except IdentityError:
                return True
            return False

        lease.release()
        soon(refused)


def test_a_key_that_is_no_longer_trusted_serves_nothing_new_while_others_still_read(
    registry: Registry,
) -> None:
    """As under load, where some request always has the version open."""
    add(registry, 1)
    with looking_at(registry) as catalogue, catalogue.acquire("a") as early:
        registry.distrust(ME.key_id)
        for name in ("a", "a@v1"):
            soon(lambda: refuses(catalogue, name, IdentityError))  # noqa: B023
        assert catalogue.read(early.model).rank == 8  # who began before it goes on
        registry.trust(ME.public)
        soon(lambda: not refuses(catalogue, "a", IdentityError))
        assert catalogue.read(early.model).rank == 8
    assert not registry._leases._counts


def test_trust_that_is_withdrawn_while_a_version_is_verified_counts(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue:
        own = registry.lease

        def lease(*what: Any) -> Any:
            opened = own(*what)
            monkeypatch.undo()
            registry.distrust(ME.key_id)
            soon(lambda: catalogue._revision == registry.revision())
            return opened

        monkeypatch.setattr(registry, "lease", lease)
        with catalogue.acquire("a"):
            assert refuses(catalogue, "a", IdentityError)


# A disk that fails


def test_a_disk_that_refuses_one_version_keeps_no_other_alias_back(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        add(registry, 1, name=name)
    with looking_at(registry) as catalogue:
        assert [meaning(catalogue, name) for name in ("a", "b")] == ["a@v1", "b@v1"]
        own = registry.lease

        def lease(version: Version, *more: Any) -> Any:
            if str(version) == "a@v2":
                raise StorageError("cannot read a@v2: the disk reports a fault")
            return own(version, *more)

        monkeypatch.setattr(registry, "lease", lease)
        for name in ("a", "b"):
            add(registry, 2, name=name)
        soon(lambda: meaning(catalogue, "b") == "b@v2")
        soon(lambda: "a@v2" in catalogue.health().registry)
        assert meaning(catalogue, "a") == "a@v1"
        monkeypatch.undo()
        soon(lambda: meaning(catalogue, "a") == "a@v2")
        soon(lambda: not catalogue.health().registry)


def test_a_fault_that_nobody_foresaw_does_not_end_the_looking(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue:
        meaning(catalogue, "a")

        def revision() -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(registry, "revision", revision)
        soon(lambda: "Too many open files" in catalogue.health().registry)
        assert meaning(catalogue, "a") == "a@v1"
        monkeypatch.undo()
        add(registry, 2)
        soon(lambda: meaning(catalogue, "a") == "a@v2")
    assert caplog.text.count("Traceback") == 1


def test_a_note_that_cannot_be_removed_keeps_nobody_from_letting_go(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a disk that has become read-only."""
    for number in (1, 2):
        add(registry, number)
    with looking_at(registry) as catalogue:
        lease = catalogue.acquire("a@v1")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refused_by_the_disk)
            lease.release()
        assert "still noted as in use" in caplog.text
        assert meaning(catalogue, "a@v1") == "a@v1"


def refused_by_the_disk(*what: Any, **more: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


# A registry that is away


def test_while_the_registry_is_away_names_mean_what_they_did(
    registry: Registry, tmp_path: Path
) -> None:
    add(registry, 1)
    with looking_at(registry) as catalogue:
        meaning(catalogue, "a")
        away = (tmp_path / "registry").rename(tmp_path / "away")
        soon(lambda: catalogue.health().registry != "")
        assert meaning(catalogue, "a") == "a@v1"
        with pytest.raises(MeadowError):
            catalogue.acquire("a@v2")
        away.rename(tmp_path / "registry")
        soon(lambda: catalogue.health().registry == "")
        add(registry, 2)
        soon(lambda: meaning(catalogue, "a") == "a@v2")


def test_a_copy_of_the_registry_in_its_place_is_taken_up(
    registry: Registry, tmp_path: Path
) -> None:
    """Restored from a backup: another file under the same name, and not all that there was."""
    add(registry, 1)
    backup = tmp_path / "backup"
    with looking_at(registry) as catalogue, catalogue.acquire("a") as early:
        shutil.copytree(registry.folder, backup)
        add(registry, 2)
        soon(lambda: meaning(catalogue, "a") == "a@v2")
        registry.folder.rename(tmp_path / "lost")
        soon(lambda: catalogue.health().registry != "")
        assert meaning(catalogue, "a") == "a@v2"
        backup.rename(registry.folder)
        soon(lambda: catalogue.health().registry == "")
        soon(lambda: meaning(catalogue, "a") == "a@v1")
        with open_registry(tmp_path) as other:  # another process, as it were
            two = other.promote(other.keep("a", adapter(3)))
            assert two.number == 2  # a name that meant something else before
            soon(lambda: meaning(catalogue, "a") == "a@v2")
            with catalogue.acquire("a") as lease:
                assert lease.model.digest == two.id
                assert catalogue.read(lease.model).tree["m.q_proj.lora_A"][0, 0] == 3
            one = early.model.digest
            other.rollback("a")
            other.promote("a@v2")
            assert one in other.collect(Retention(history=0, days=0)).in_use
        assert catalogue.read(early.model).tree["m.q_proj.lora_A"][0, 0] == 1


def test_a_registry_that_is_still_being_copied_is_left_alone(
    registry: Registry, tmp_path: Path
) -> None:
    """An empty file where the database will be is not made into a registry, nor half of one."""
    add(registry, 1)
    with looking_at(registry) as catalogue:
        meaning(catalogue, "a")
        lost = registry.folder.rename(tmp_path / "lost")
        registry.folder.mkdir()
        database = registry.folder / "registry.db"
        whole = (lost / "registry.db").read_bytes()
        for part in (b"", whole[: len(whole) // 2]):
            database.write_bytes(part)
            looks(catalogue, 5)
            assert catalogue.health().registry != "" and meaning(catalogue, "a") == "a@v1"
            assert database.read_bytes() == part
        shutil.rmtree(registry.folder)
        shutil.copytree(lost, registry.folder)
        soon(lambda: catalogue.health().registry == "")
        assert meaning(catalogue, "a") == "a@v1"


def looks(catalogue: Catalogue, count: int) -> None:
    """Wait until the catalogue has looked so often."""
    seen, own = threading.Semaphore(0), catalogue._say

    def say(*what: Any) -> None:
        own(*what)
        seen.release()

    catalogue._say = say  # type: ignore[method-assign, assignment]
    for _ in range(count):
        assert seen.acquire(timeout=PATIENCE)
