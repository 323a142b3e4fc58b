"""A run publishes what it learns, once, whatever ends it; what a gate refuses ends no run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import Crash, Faulty, Numbered
from registries import STRANGER

from meadow.config import Config
from meadow.errors import ConfigError, IdentityError, MeadowError, RegistryError, StorageError
from meadow.events import Event
from meadow.identity import own_identity
from meadow.peft_adapters.adapter_reader import load_adapter
from meadow.server.registry import Registry
from meadow.server.registry_rows import Kind, Version
from meadow.simulation.engine import Lab, Result, simulate
from meadow.store import Disk

ROUNDS = 4


def publishing(tiny: Config, root: Path, **serve: Any) -> Config:
    """Four rounds, of which every second is published."""
    own = {"name": "mail", "registry": str(root / "registry"), "publish_every": 2}
    lenient = {"max_loss_increase": 100.0, **own, **serve}
    return tiny.replace(rounds={"count": ROUNDS}, clients={"steps": 1}, serve=lenient)


def opened(root: Path, disk: Disk | None = None) -> Registry:
    return Registry.open(root / "registry", own_identity(), disk)


def run(
    config: Config, root: Path, lab: Lab, disk: Disk | None = None
) -> tuple[Result, list[Event]]:
    torch.set_num_threads(1)
    events: list[Event] = []
    return simulate(config, root / "run", lab, events.append, disk), events


def told(events: list[Event], kind: str) -> list[Any]:
    return [event.data for event in events if event.kind == kind]


# --- what is published ---------------------------------------------------------------------------


def test_every_so_many_rounds_and_at_the_end(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    result, events = run(publishing(tiny, tmp_path, publish_every=3), tmp_path, lab)
    assert [(row["version"], row["alias"]) for row in told(events, "published")] == [
        ("mail@v1", "prod"), ("mail@v2", "prod"),
    ]  # fmt: skip
    with opened(tmp_path) as registry:
        first, second = (registry.verify(version) for version in registry.versions("mail"))
        assert registry.resolve("mail").number == 2
        read = registry.files("mail").decode()
        kinds = [entry.kind for entry in registry.history("mail")]
    assert kinds == ["published", "moved"] * 2
    written = load_adapter(result.adapter, sites=lab.layers)
    assert all(torch.equal(read.tree[name], written.tree[name]) for name in written.tree)
    assert (first.provenance.rounds, second.provenance.rounds) == (3, 4)
    assert (first.provenance.parents, second.provenance.parents) == ((), (first.id,))


def test_the_manifest_says_what_was_measured_and_on_what(
    tiny: Config, lab: Lab, tmp_path: Path
) -> None:
    result, _ = run(publishing(tiny, tmp_path), tmp_path, lab)
    with opened(tmp_path) as registry:
        stated = [registry.verify(version).provenance for version in registry.versions()]
    assert [one.loss for one in stated] == [result.metrics[n]["loss"] for n in (2, 4)]
    for one in stated:
        assert (one.base_loss, one.dtype, one.privacy) == (result.base_loss, "float32", "none")
        assert one.held_out_rows == 6  # two of each participant
        assert one.held_out_digest == lab.held_out().digest
        assert (one.strategy, one.participants) == ("fedavg_lora", 3)


def test_without_a_name_nothing_is_published(
    tiny: Config, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_identity()
    home = Path(str(tmp_path / "home"))
    monkeypatch.setenv("MEADOW_HOME", str(home))
    _, events = run(publishing(tiny, tmp_path, name="", registry=""), tmp_path, lab)
    assert told(events, "published") == [] and not list(tmp_path.rglob("registry.db"))
    assert sorted(path.name for path in home.iterdir()) == ["identity.pem", "identity.pem.lock"]


def test_without_a_folder_it_is_the_users_registry(
    tiny: Config, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEADOW_HOME", str(tmp_path))
    run(publishing(tiny, tmp_path, registry="", publish_every=0), tmp_path, lab)
    with opened(tmp_path) as registry:
        assert [str(version) for version in registry.versions()] == ["mail@v1"]


# --- decisions -----------------------------------------------------------------------------------


def test_a_refusal_is_a_notice_and_the_version_stays(
    tiny: Config, lab: Lab, tmp_path: Path
) -> None:
    """The first run learns nothing more; the second, on the same rows, is much worse."""
    run(publishing(tiny, tmp_path, publish_every=0), tmp_path, lab)
    worse = publishing(tiny, tmp_path, publish_every=0, max_loss_increase=0.0)
    worse = worse.replace(clients={"lr": 3.0})
    result, events = run(worse, tmp_path / "second", lab)
    assert result.adapter.exists() and events[-1].kind == "run_finished"
    (row,), (notice,) = told(events, "published"), told(events, "notice")
    assert (row["version"], row["alias"]) == ("mail@v2", "")
    assert notice["text"].startswith("mail@v2 is not promoted to prod: loss ")
    with opened(tmp_path) as registry:
        assert registry.resolve("mail").number == 1 and len(registry.versions()) == 2


def test_what_was_decided_is_not_decided_again(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    """The same command, given again, neither promotes what was rolled back nor publishes twice."""
    config = publishing(tiny, tmp_path)
    run(config, tmp_path, lab)
    with opened(tmp_path) as registry:
        registry.rollback("mail", why="complaints")
        before = registry.history()
    _, events = run(config, tmp_path, lab)
    assert told(events, "published")[-1]["alias"] == ""
    with opened(tmp_path) as registry:
        assert registry.history() == before and registry.resolve("mail").number == 1


def test_publishing_may_change_during_a_run(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    run(publishing(tiny, tmp_path, name=""), tmp_path, lab)
    run(publishing(tiny, tmp_path, alias=""), tmp_path, lab)
    with opened(tmp_path) as registry:
        assert [str(version) for version in registry.versions()] == ["mail@v1"]
        assert registry.aliases() == []


# --- mistakes show before the work ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("serve", "error", "said"),
    [
        ({"name": "../mail"}, RegistryError, "cannot be an adapter's name"),
        ({"alias": "v7"}, RegistryError, "cannot be an alias"),
        ({"canaries": "/nowhere/c.toml"}, ConfigError, "cannot read /nowhere/c.toml"),
        ({"held_out": "/nowhere/rows.jsonl"}, ConfigError, "no such file of held-out rows"),
        ({"dtype": "bfloat16"}, ConfigError, "measured in float32, and it is served in bfloat16"),
        ({"quantize": "4bit"}, ConfigError, "it is served in float32.4bit"),
    ],
)
def test_mistakes(
    tiny: Config, lab: Lab, tmp_path: Path, serve: dict[str, Any], error: type[MeadowError],
    said: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=said):
        run(publishing(tiny, tmp_path, **serve), tmp_path, lab)
    assert not list((tmp_path / "run" / "clients").rglob("*"))


def test_rounds_without_a_loss_are_not_promised(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    config = publishing(tiny, tmp_path, publish_every=3).replace(rounds={"evaluate_every": 2})
    with pytest.raises(ConfigError, match="a multiple of .* evaluate_every = 2"):
        run(config, tmp_path, lab)


def test_a_registry_that_does_not_trust_the_run(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    Registry.open(tmp_path / "registry", STRANGER).close()
    with pytest.raises(IdentityError, match="does not trust this run's key"):
        run(publishing(tiny, tmp_path), tmp_path, lab)


# --- crashes -------------------------------------------------------------------------------------


def facts(root: Path) -> tuple[list[Version], list[tuple[Kind, str, str]]]:
    with opened(root, Numbered(root)) as registry:
        versions = registry.versions()
        for version in versions:
            registry.verify(version)
        history = [(entry.kind, entry.alias, entry.after) for entry in registry.history("mail")]
    return versions, history


def short(tiny: Config, root: Path, rounds: int) -> Config:
    """A few rounds, each of them published."""
    return publishing(tiny, root, publish_every=1).replace(rounds={"count": rounds})


def check(root: Path, rounds: int) -> None:
    """A version a round, each goes on from the one before, was published and promoted once."""
    versions, history = facts(root)
    numbers = [(version.number, version.facts["rounds"]) for version in versions]
    assert numbers == [(number, number) for number in range(1, rounds + 1)]
    ids = [version.id for version in versions]
    assert [version.facts["parents"] for version in versions] == [[], *([id] for id in ids[:-1])]
    assert history == [
        entry for id in ids for entry in (("published", "", id), ("moved", "prod", id))
    ]
    events = (root / "run" / "events.jsonl").read_text().splitlines()
    published = {json.loads(line)["id"] for line in events if '"published"' in line}
    assert ids[-1] in published
    assert not list((root / "run").rglob("*.draft"))


def places(tiny: Config, lab: Lab, root: Path, way: str, rounds: int) -> list[int]:
    """The steps of a whole run from the first on that touches the registry."""
    disk = Numbered(root)
    began: list[int] = []
    real = disk.step

    def watch(*arguments: Any, **named: Any) -> None:
        if not began and (root / "registry").exists():
            began.append(disk.count)
        real(*arguments, **named)

    disk.step = watch  # type: ignore[method-assign]
    run(short(tiny, root, rounds), root, lab, disk)
    check(root, rounds)
    found = disk.tearable if way == "torn" else range(1, disk.count + 1)
    return [at for at in found if at >= began[0]]


def crash_at(tiny: Config, lab: Lab, root: Path, at: int, way: str, rounds: int) -> bool:
    """Whether the run was ended at this step; it is started again, and ends well."""
    disk, config = Faulty(root, at, way), short(tiny, root, rounds)
    survivor, ended = root, False
    try:
        run(config, root, lab, disk)
    except Crash:
        survivor, ended = disk.survivor, True
    except StorageError:
        assert way == "full"
        ended = True
    # the settings name the survivor's own registry: where a run publishes may change
    run(short(tiny, survivor, rounds), survivor, lab, Numbered(survivor))
    check(survivor, rounds)
    return ended


@pytest.mark.parametrize(
    ("way", "stride"), [("before", 41), ("torn", 59), ("power", 53), ("full", 47)]
)
def test_a_crash_here_and_there(
    tiny: Config, lab: Lab, tmp_path: Path, roots: Iterator[Path], way: str, stride: int
) -> None:
    found = places(tiny, lab, next(roots), way, rounds=2)
    assert len(found) > (20 if way == "torn" else 80)
    some = zip(found[::stride], roots, strict=False)
    assert all(crash_at(tiny, lab, root, at, way, rounds=2) for at, root in some)


@pytest.mark.long
@pytest.mark.parametrize("way", ["before", "torn", "power", "full"])
def test_a_crash_at_every_step(
    tiny: Config, lab: Lab, tmp_path: Path, roots: Iterator[Path], way: str
) -> None:
    """Of one publication."""
    for at, root in zip(places(tiny, lab, next(roots), way, rounds=1), roots, strict=False):
        assert crash_at(tiny, lab, root, at, way, rounds=1)
