"""The registry: what a version is, how changes are told, and how its folder is opened."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from registries import (
    BLUEPRINT,
    FILES,
    ME,
    NOON,
    STRANGER,
    Clock,
    adapter,
    changed,
    open_registry,
    place,
    publish,
    write_run,
)
from safetensors.torch import load_file

from meadow.errors import (
    AdapterError,
    FormatError,
    IdentityError,
    JournalError,
    MeadowError,
    PromotionError,
    RegistryError,
    StorageError,
    UnknownAdapterError,
)
from meadow.server.registry import Registry, default_folder
from meadow.server.registry_runs import publish_run

pytest_plugins = ("registry_fixtures",)


def numbers_of(registry: Registry, name: str = "mail") -> list[int]:
    return [version.number for version in registry.versions(name)]


# Versions


def test_the_id_is_the_digest_of_the_two_files(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    version = publish_run(registry, run, "mail")
    rows = []
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (run / "adapter" / name).read_bytes()
        rows.append([name, len(data), hashlib.sha256(data).hexdigest()])
    text = json.dumps(rows, separators=(",", ":"))
    assert version.id == hashlib.sha256(text.encode()).hexdigest()
    kept = place(registry, version.id)
    assert sorted(path.name for path in kept.iterdir()) == sorted(FILES)
    assert (kept / "manifest.json").read_bytes() == (run / "manifest.json").read_bytes()
    assert (str(version), version.published) == ("mail@v1", NOON)
    assert version.facts["strategy"] == "fedavg_lora" and version.facts["rank"] == 8


def test_the_same_content_is_the_same_version(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = publish_run(registry, run, "mail", alias="prod")
    before = registry.revision()
    assert publish_run(registry, run, "mail", alias="prod") == first
    assert registry.revision() == before
    assert publish_run(registry, run, "team/mail").id == first.id
    assert len(list((registry.folder / "versions").iterdir())) == 1


def test_another_manifest_for_the_same_content_changes_nothing(
    registry: Registry, tmp_path: Path
) -> None:
    first = publish_run(registry, write_run(tmp_path / "a"), "mail")
    other = write_run(tmp_path / "b", rounds=9)
    assert publish_run(registry, other, "mail") == first
    assert registry.verify(first).provenance.rounds == 1


def test_a_manifest_whose_signer_no_longer_counts_makes_way(
    registry: Registry, tmp_path: Path
) -> None:
    registry.trust(STRANGER.public)
    first = publish_run(registry, write_run(tmp_path / "a", signer=STRANGER), "mail")
    registry.distrust(STRANGER.key_id, "left")
    with pytest.raises(IdentityError, match="by no key that is trusted"):
        registry.verify(first)
    again = publish_run(registry, write_run(tmp_path / "b"), "mail")
    assert (again.id, again.number) == (first.id, 1)
    assert registry.verify(again).signers == (ME.key_id,)


def test_every_kind_of_reference(registry: Registry) -> None:
    one, two = publish(registry, 1, 2)
    registry.promote("mail@v1")
    registry.promote("mail@v2", "canary")
    for text, id in {
        "mail": one, "mail@prod": one, "mail@canary": two, "mail@v2": two,
        f"mail@sha256:{two[:12]}": two, f"mail@sha256:{two}": two,
    }.items():  # fmt: skip
        assert registry.resolve(text).id == id
    for text in ("post", "mail@v3", "mail@beta", "mail@sha256:" + "0" * 12, f"post@sha256:{one}"):
        with pytest.raises(UnknownAdapterError):
            registry.resolve(text)


def test_an_ambiguous_digest_is_refused(registry: Registry, tmp_path: Path) -> None:
    """Two ids with one beginning cannot be made: they are written into the database."""
    (one,) = publish(registry, 1)
    twin = one[:12] + "f" * 52
    with sqlite3.connect(registry.folder / "registry.db") as database:
        database.execute("INSERT INTO contents VALUES (?, '', 0, '{}')", (twin,))
        database.execute("INSERT INTO versions VALUES ('mail', 2, ?, 0, NULL)", (twin,))
    database.close()
    with pytest.raises(UnknownAdapterError, match="no single version"):
        registry.resolve(f"mail@sha256:{one[:12]}")
    assert registry.resolve(f"mail@sha256:{one}").id == one


def test_a_name_that_was_signed_binds(registry: Registry, tmp_path: Path) -> None:
    bound = write_run(tmp_path / "run", name="team/mail")
    with pytest.raises(RegistryError, match="signed to be published as 'team/mail'"):
        publish_run(registry, bound, "mail")
    publish_run(registry, bound, "team/mail")
    free = write_run(tmp_path / "free")
    with pytest.raises(RegistryError, match="signed to be published as 'team/mail'"):
        publish_run(registry, free, "mail")  # the same content is here under that manifest
    assert registry.versions("mail") == []


# Watching


def test_changes_are_counted_and_told(registry: Registry, tmp_path: Path) -> None:
    seen = registry.revision()
    with open_registry(tmp_path) as other:
        (one,) = publish(other, 1)
        other.promote("mail@v1")
    assert registry.revision() == seen + 2
    published, moved = registry.changes(seen)
    assert (published.kind, published.name, published.after) == ("published", "mail", one)
    assert (moved.kind, moved.alias, moved.before, moved.after) == ("moved", "prod", "", one)
    assert registry.changes(moved.revision) == []


def test_history_is_never_rewritten(registry: Registry) -> None:
    publish(registry, 1)
    database = sqlite3.connect(registry.folder / "registry.db")
    for statement in ("DELETE FROM history", "UPDATE history SET who = 'nobody'"):
        with pytest.raises(sqlite3.IntegrityError, match="kept"):
            database.execute(statement)
    database.close()


def test_what_is_shown_is_one_line(registry: Registry) -> None:
    publish(registry, 1)
    registry.promote("mail@v1", why="a\nb\x1b[2J" + "x" * 1000)
    why = registry.history("mail", "prod")[0].why
    assert why.startswith("a\\nb\\x1b[2J") and why.isprintable() and len(why) == 500


# Opening


def test_the_default_place_is_beside_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEADOW_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "registry"


def test_the_maker_is_trusted_and_nobody_who_comes_later(tmp_path: Path) -> None:
    with open_registry(tmp_path) as registry:
        assert set(registry.trusted()) == {ME.key_id}
    with open_registry(tmp_path, STRANGER) as registry:
        assert set(registry.trusted()) == {ME.key_id}
        registry.keep("mail", adapter(1))
        assert registry.history("mail")[0].who == STRANGER.key_id
        registry.distrust(ME.key_id)
        with pytest.raises(RegistryError, match="no trusted key"):
            registry.distrust(ME.key_id)
    with open_registry(tmp_path) as registry:
        assert registry.trusted() == {}


def test_a_lease_gives_what_was_verified(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    version = publish_run(registry, run, "mail")
    with registry.lease("mail@v1", BLUEPRINT) as opened:
        assert opened.version == version and opened.folder == place(registry, version.id)
        assert opened.verified.provenance.strategy == "fedavg_lora"
        read = opened.read()
        file = load_file(run / "adapter" / "adapter_model.safetensors")
        for name, tensor in read.tree.items():
            assert torch.equal(tensor, file[f"base_model.model.{name}.weight"])
        assert (read.rank, read.scaling) == (8, 2.0)
        changed(opened.folder, "adapter_config.json", lambda data: data + b" ")
        with pytest.raises(AdapterError, match="was changed after"):
            opened.read()
        opened.close()
        opened.close()


def test_a_registry_that_is_gone_or_replaced_is_noticed(tmp_path: Path) -> None:
    with open_registry(tmp_path) as registry:
        publish(registry, 1)
        registry.folder.rename(tmp_path / "away")
        with pytest.raises(StorageError, match="is gone or was replaced"):
            registry.revision()
        shutil.copytree(tmp_path / "away", registry.folder)
        with pytest.raises(StorageError, match="is gone or was replaced"):
            registry.keep("mail", adapter(2))
        shutil.rmtree(registry.folder)
        (tmp_path / "away").rename(registry.folder)
        assert numbers_of(registry) == [1]


def test_a_damaged_or_foreign_database_is_refused(tmp_path: Path) -> None:
    with open_registry(tmp_path) as registry:
        publish(registry, 1)
        path = registry.folder / "registry.db"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(FormatError, match="has registry format 9"):
        open_registry(tmp_path)
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(JournalError, match="is damaged"):
        open_registry(tmp_path)


def test_contents_outlive_a_lost_database(tmp_path: Path) -> None:
    """Opening anew must not take for a leftover what only a row is missing for."""
    with open_registry(tmp_path) as registry:
        (one,) = publish(registry, 1)
    (registry.folder / "registry.db").unlink()
    with open_registry(tmp_path) as registry:
        assert registry.versions() == []
        kept = place(registry, one)
        assert sorted(path.name for path in kept.iterdir()) == sorted(FILES)


def test_errors_are_meadows(registry: Registry) -> None:
    for error in (RegistryError, UnknownAdapterError, PromotionError):
        assert issubclass(error, MeadowError)


def test_the_clock_is_the_callers(tmp_path: Path) -> None:
    clock = Clock()
    with open_registry(tmp_path, clock=clock) as registry:
        publish(registry, 1)
        clock.now += 5
        registry.promote("mail@v1")
        assert [entry.time for entry in registry.history("mail")] == [NOON, NOON + 5]


def test_a_registry_goes_on_with_the_copy_that_lies_in_its_place(tmp_path: Path) -> None:
    with open_registry(tmp_path) as registry:
        publish(registry, 1)
        with registry.lease("mail@v1"):
            assert not registry.is_replaced
            before = registry.fingerprint()
            registry.folder.rename(tmp_path / "away")
            assert not registry.is_replaced
            with pytest.raises(StorageError):
                registry.reopen()
            shutil.copytree(tmp_path / "away", registry.folder)
            shutil.rmtree(registry.folder / "leases")  # which a backup need not have
            assert registry.is_replaced and registry.fingerprint() != before
            registry.reopen()
            assert not registry.is_replaced and numbers_of(registry) == [1]
            publish(registry, 2)
            with open_registry(tmp_path) as other:
                assert numbers_of(other) == [1, 2]
                assert other._leases.held() == {adapter(1).id}
        with open_registry(tmp_path) as other:
            assert other._leases.held() == set()
