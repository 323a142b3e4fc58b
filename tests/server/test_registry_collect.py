"""What is deleted and what stays: aliases, their past, pins, parents, age, and who is reading."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from registries import Clock, adapter, open_registry, place, write_run

from meadow.errors import UnknownAdapterError
from meadow.server import registry_gc
from meadow.server.registry import Registry
from meadow.server.registry_changes import Changes
from meadow.server.registry_gc import DAY, Retention
from meadow.server.registry_leases import Leases
from meadow.server.registry_opened import Opened
from meadow.server.registry_runs import publish_run

NOTHING = Retention(history=0, days=0.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    """Six versions of a day ago."""
    with open_registry(tmp_path, clock=clock) as registry:
        for number in range(1, 7):
            registry.keep("mail", adapter(number))
        clock.now += DAY
        yield registry


def left(registry: Registry, name: str = "mail") -> list[int]:
    return [version.number for version in registry.versions(name)]


def on_disk(registry: Registry) -> set[str]:
    return {path.name for path in (registry.folder / "versions").iterdir()}


def test_what_nothing_needs_goes_and_its_number_never_comes_back(registry: Registry) -> None:
    registry.promote("mail@v2")
    registry.pin("mail@v4")
    found = registry.collect(NOTHING)
    assert [version.number for version in found.versions] == [1, 3, 5, 6]
    assert found.bytes == sum(version.bytes for version in found.versions)
    assert left(registry) == [2, 4]
    assert on_disk(registry) == {adapter(2).id, adapter(4).id}
    assert [e.kind for e in registry.history("mail")[-4:]] == ["deleted"] * 4
    with pytest.raises(UnknownAdapterError):
        registry.resolve("mail@v6")
    assert registry.keep("mail", adapter(6)).number == 7
    registry.unpin("mail@v4")
    assert [v.number for v in registry.collect(NOTHING).versions] == [4, 7]


def test_a_dry_run_says_the_same_and_does_nothing(registry: Registry) -> None:
    registry.promote("mail@v2")
    (registry.folder / "versions" / ("0" * 64)).mkdir()
    before, seen = on_disk(registry), registry.revision()
    promised = registry.collect(NOTHING, dry_run=True)
    assert (on_disk(registry), registry.revision()) == (before, seen)
    assert registry.collect(NOTHING) == promised
    assert promised.leftovers == 1 and len(promised.versions) == 5


def test_what_is_young_stays(registry: Registry, clock: Clock) -> None:
    registry.keep("mail", adapter(7))
    assert registry.collect(Retention(0, 1.5)).versions == ()
    assert [v.number for v in registry.collect(Retention(0, 0.5)).versions] == [1, 2, 3, 4, 5, 6]
    clock.now += DAY
    assert [v.number for v in registry.collect(Retention(0, 0.5)).versions] == [7]


def test_the_past_of_an_alias_stays_as_far_as_asked(registry: Registry) -> None:
    for number in range(1, 7):
        registry.promote(f"mail@v{number}")
    assert registry.rollback("mail").number == 5
    registry.collect(Retention(history=2, days=0.0))
    # the last two moves led to 5 and 6; two steps back are 4 and 3
    assert left(registry) == [3, 4, 5, 6]
    assert [registry.rollback("mail").number for _ in range(2)] == [4, 3]


def test_what_a_kept_version_descends_from_stays(registry: Registry, tmp_path: Path) -> None:
    child = write_run(tmp_path / "child", 10, parents=(adapter(3).id,))
    middle = publish_run(registry, child, "other")
    grandchild = write_run(tmp_path / "grandchild", 11, parents=(middle.id, "0" * 64))
    publish_run(registry, grandchild, "other", alias="prod")
    registry.collect(Retention(0, -1.0))
    assert (left(registry), left(registry, "other")) == ([3], [1, 2])


def test_earlier_rounds_of_the_same_run_go(registry: Registry, tmp_path: Path) -> None:
    """A run that publishes each round does not keep all for ever; what it started from stays."""
    parents = (adapter(3).id,)
    for number in (10, 11, 12):
        run = write_run(tmp_path / str(number), number, run_id="a", rounds=number, parents=parents)
        parents = (publish_run(registry, run, "other").id,)
        if number == 10:
            registry.promote("other@v1", "first")
    registry.promote("other@v3")
    registry.collect(Retention(0, -1.0))
    assert (left(registry), left(registry, "other")) == ([3], [1, 3])


def test_a_content_of_two_names_goes_when_neither_needs_it(registry: Registry) -> None:
    registry.keep("copy", adapter(1))
    registry.promote("copy@v1")
    assert 1 in [v.number for v in registry.versions("mail")]
    registry.collect(Retention(0, -1.0))
    assert (left(registry), left(registry, "copy")) == ([1], [1])


def test_leftovers_of_a_publication_that_was_cut_off_go(registry: Registry, tmp_path: Path) -> None:
    versions = registry.folder / "versions"
    whole, draft = versions / ("0" * 64), versions / ("1" * 64 + ".draft")
    for folder in (whole, draft):
        folder.mkdir()
        (folder / "manifest.json").write_bytes(b"{}")
    (versions / "notes.txt").write_text("mine")
    registry.close()
    with open_registry(tmp_path) as again:
        assert not draft.exists() and whole.exists()
        again.collect(Retention())
    assert not whole.exists() and (versions / "notes.txt").exists()


# In use


def test_what_is_in_use_stays_until_it_is_closed(registry: Registry, tmp_path: Path) -> None:
    with open_registry(tmp_path) as reader:
        first, second = reader.lease("mail@v1"), reader.lease("mail@v1")
        for opened in (first, second):
            assert registry.collect(NOTHING, dry_run=True).in_use == (adapter(1).id,)
            opened.close()
        assert registry.collect(NOTHING, dry_run=True).in_use == ()
        with reader.lease("mail@v2") as opened:
            found = registry.collect(NOTHING)
            assert found.in_use == (adapter(2).id,) and left(registry) == [2]
            assert opened.read().rank == 8
    assert len(registry.collect(NOTHING).versions) == 1


READER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from registries import open_registry
with open_registry(Path(sys.argv[1])) as registry:
    opened = registry.lease("mail@v3")
    print("open", flush=True)
    sys.stdin.read()
    print(opened.read().rank, flush=True)
"""


@pytest.mark.parametrize("end", [pytest.param("close", marks=pytest.mark.long), "kill"])
def test_another_process_keeps_what_it_uses_as_long_as_it_lives(
    registry: Registry, tmp_path: Path, end: str
) -> None:
    helpers = str(Path(__file__).parents[1] / "helpers")
    command = [sys.executable, "-c", READER, str(tmp_path), helpers]
    with subprocess.Popen(command, stdin=-1, stdout=-1) as reader:
        assert reader.stdout is not None and reader.stdin is not None
        assert reader.stdout.readline() == b"open\n"
        found = registry.collect(NOTHING)
        assert found.in_use == (adapter(3).id,) and left(registry) == [3]
        if end == "kill":
            reader.send_signal(signal.SIGKILL)
        else:
            reader.stdin.close()
            assert reader.stdout.read() == b"8\n"
        reader.wait()
    found = registry.collect(NOTHING)
    assert (found.in_use, left(registry)) == ((), [])
    assert not list((registry.folder / "leases").iterdir())


def test_a_lease_just_before_the_end_keeps_the_files(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody leases between the look at the leases and the decision to delete."""
    with open_registry(tmp_path) as reader:
        opened: list[Opened] = []
        original = registry_gc.needed

        def needed(*arguments: object) -> set[str]:
            if not opened:
                opened.append(reader.lease("mail@v1"))
            return original(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr("meadow.server.registry_gc.needed", needed)
        registry.collect(NOTHING)
        assert left(registry) == []
        assert opened[0].read().rank == 8  # its files are there while it is used
        with pytest.raises(UnknownAdapterError, match="was deleted"):
            reader.lease(opened[0].version)
        opened[0].close()
    registry.collect(NOTHING)
    assert on_disk(registry) == set()


def test_a_lease_just_after_the_end_is_refused(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has resolved a version, and leases it when it has just been forgotten."""
    with open_registry(tmp_path) as reader:
        version = reader.resolve("mail@v1")
        original = Leases.held
        asked = []

        def held(self: Leases) -> set[str]:
            asked.append(self)
            if len(asked) == 2:
                with pytest.raises(UnknownAdapterError, match="was deleted"):
                    reader.lease(version)
            return original(self)

        monkeypatch.setattr(Leases, "held", held)
        registry.collect(NOTHING)
        assert len(asked) == 2 and on_disk(registry) == set()


def test_a_version_that_was_deleted_cannot_be_promoted(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = registry.resolve("mail@v1")
    original = Changes.move

    def move(self: Changes, *arguments: object, **named: object) -> object:
        self.delete({version.id})
        return original(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Changes, "move", move)
    with pytest.raises(UnknownAdapterError, match="was deleted"):
        registry.promote(version)
    assert 1 in left(registry) and registry.aliases() == []
    assert place(registry, version.id).is_dir()
