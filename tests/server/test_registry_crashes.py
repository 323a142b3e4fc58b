"""A registry that stops at any step of its disk is usable, and ends as if it had never stopped.

Somebody publishes, promotes, rolls back, pins, imports and collects, each as often as it takes to
hear the answer.  Every primitive step of the disk is numbered; the process is ended at each number
in each way that tests/helpers/faulty_disk.py knows, and started again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from crashes import interrupt, steps
from faulty_disk import Crash, Faulty, Numbered
from registries import FILES, ME, STRANGER, Clock, adapter, open_registry, write_run

from meadow.errors import RegistryError
from meadow.peft_adapters.signed_adapter import SignedAdapter
from meadow.server import registry_folders
from meadow.server.registry import Registry
from meadow.server.registry_gc import DAY, Retention
from meadow.server.registry_runs import publish_run
from meadow.store import Disk

KEEP = Retention(history=1, days=0.0)


@dataclass
class World:
    """What outlives every crash: the answers that were heard."""

    heard: list[str] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)


def work(root: Path, disk: Disk, world: World) -> None:
    """The commands that are given again and again until each has ended well."""
    with open_registry(root, disk=disk, clock=world.clock) as registry:
        usable(registry)
        for command in (_publish, _promote, _replace, _roll_back, _pin, _mend, _distrust, _collect):
            if command.__name__ not in world.heard:
                command(registry)
                world.heard.append(command.__name__)
                world.clock.now += DAY
                usable(registry)


def _publish(registry: Registry) -> None:
    for number in (1, 2, 3, 4):
        registry.keep("mail", adapter(number))


def _promote(registry: Registry) -> None:
    registry.promote("mail@v1")
    registry.promote("mail@v3", "canary")


def _replace(registry: Registry) -> None:
    registry.promote("mail@v2")


def _roll_back(registry: Registry) -> None:
    """Who does not know whether a rollback was made looks before asking for another."""
    if registry.resolve("mail").number == 2:
        registry.rollback("mail", why="worse")


def _pin(registry: Registry) -> None:
    registry.pin("mail@v2", "for comparison")


def _mend(registry: Registry) -> None:
    path = registry.folder / "versions" / adapter(1).id / "adapter_config.json"
    path.write_bytes(b"{}")
    registry.keep("mail", adapter(1))


def _distrust(registry: Registry) -> None:
    registry.trust(STRANGER.public, "for a day")
    try:
        registry.distrust(STRANGER.key_id)
    except RegistryError:
        assert STRANGER.key_id not in registry.trusted()


def _collect(registry: Registry) -> None:
    registry.collect(KEEP)


def usable(registry: Registry) -> None:
    """Every version that is listed, and every alias, verifies at any time."""
    for version in registry.versions():
        registry.verify(version)
    for alias in registry.aliases():
        assert registry.resolve(str(alias)) == alias.version


def finish(root: Path, world: World) -> None:
    """Start again after the fault, and check that nothing shows."""
    if "_mend" not in world.heard and "_pin" in world.heard:
        with open_registry(root, disk=Numbered(root)) as registry:  # the damage may be there
            registry.keep("mail", adapter(1))
    work(root, Numbered(root), world)
    with open_registry(root, disk=Numbered(root)) as registry:
        # v1 is prod, v2 pinned, v3 canary; nothing needs v4
        assert [version.number for version in registry.versions("mail")] == [1, 2, 3]
        assert [version.id for version in registry.versions("mail")] == [
            adapter(number).id for number in (1, 2, 3)
        ]
        points = {str(alias): alias.version.number for alias in registry.aliases()}
        assert points == {"mail@prod": 1, "mail@canary": 3}
        kinds = [entry.kind for entry in registry.history("mail") if entry.kind != "mended"]
        assert kinds == [*["published"] * 4, *["moved"] * 3, "rolled back", "pinned", "deleted"]
        registry.collect(KEEP)
        found = sorted(str(p.relative_to(root / "registry" / "versions")) for p in
                       (root / "registry" / "versions").rglob("*") if p.is_file())  # fmt: skip
        expected = sorted(f"{adapter(n).id}/{name}" for n in (1, 2, 3) for name in FILES)
        assert found == expected
        assert registry.keep("mail", adapter(9)).number == 5


def try_all(tmp_path: Path, roots: Iterator[Path], way: str, stride: int) -> None:
    places = steps(partial(work, world=World()), tmp_path / "count", way)
    assert len(places) >= 10
    for at, root in zip(places[::stride], roots, strict=False):
        world = World()
        finish(interrupt(partial(work, world=world), Faulty(root, at, way)), world)


class Dying(Disk):
    """Ends before a commit, once it is told to."""

    dies = False

    def commit(self, database: sqlite3.Connection) -> None:
        if self.dies:
            raise Crash
        super().commit(database)


def test_a_manifest_that_was_exchanged_and_not_noted_is_noted_the_next_time(tmp_path: Path) -> None:
    """The files are as they should be then, and nothing has to be written."""
    run, disk = write_run(tmp_path / "run", 1, STRANGER), Dying()
    with open_registry(tmp_path, disk=disk) as registry:
        registry.trust(STRANGER.public)
        registry.promote(registry.keep("mail", adapter(1)))
        registry.distrust(ME.key_id)
        disk.dies = True
        with pytest.raises(Crash):
            publish_run(registry, run, "mail")
    with open_registry(tmp_path) as registry:
        assert publish_run(registry, run, "mail").number == 1
        assert registry.verify("mail").signers == (STRANGER.key_id,)
        assert registry.changes()[-1].kind == "mended"
        assert publish_run(registry, run, "mail") == registry.resolve("mail")
        assert [entry.kind for entry in registry.changes()].count("mended") == 1


@pytest.mark.parametrize("way", ["before", "after", "torn", "power", "full"])
def test_steps_here_and_there(tmp_path: Path, roots: Iterator[Path], way: str) -> None:
    try_all(tmp_path, roots, way, 23)


@pytest.mark.long
@pytest.mark.parametrize("way", ["before", "after", "torn", "power", "full"])
def test_every_step(tmp_path: Path, roots: Iterator[Path], way: str) -> None:
    try_all(tmp_path, roots, way, 1)


def test_a_registry_that_writes_in_place_would_be_noticed(
    tmp_path: Path, roots: Iterator[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof has teeth: a version's folder that appears before its files are whole."""

    def put(self: registry_folders.VersionFolders, files: SignedAdapter) -> bool:
        target = self.path(files.id)
        self._disk.make(target)
        for name, data in registry_folders._named(files):
            with open(target / name, "wb", buffering=0) as file:
                self._disk.fill(file, data)
        return True

    monkeypatch.setattr(registry_folders.VersionFolders, "put", put)
    with pytest.raises(Exception, match="no folder|cut short|is missing"):
        try_all(tmp_path, roots, "power", 5)
