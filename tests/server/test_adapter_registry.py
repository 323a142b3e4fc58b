"""The registry: what a version is, where aliases point, and what is kept out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
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
    open_registry,
    place,
    write_run,
)  # fmt: skip
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
from meadow.server.registry_gates import Checked, Verdict
from meadow.server.registry_runs import publish_run


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with open_registry(tmp_path) as registry:
        yield registry


def publish(registry: Registry, *numbers: int, name: str = "mail") -> list[str]:
    return [registry.keep(name, adapter(number)).id for number in numbers]


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


# What is kept out


def changed(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def link(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent.parent / name)
    (folder / name).symlink_to(folder.parent.parent / name)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def bury(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


EDITS: Mapping[str, Callable[[Path], object]] = {
    "weights": lambda folder: changed(folder, "adapter_model.safetensors", flip),
    "cut weights": lambda folder: changed(folder, "adapter_model.safetensors", lambda d: d[:-3]),
    "empty weights": lambda folder: changed(folder, "adapter_model.safetensors", lambda d: b""),
    "config": lambda folder: changed(folder, "adapter_config.json", lambda d: d + b" "),
    "manifest": lambda folder: changed(folder, "manifest.json", lambda d: d + b" "),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "pickle": lambda folder: (folder / "adapter_model.bin").write_bytes(b"\x80\x04."),
    "link": lambda folder: link(folder, "adapter_model.safetensors"),
    "linked manifest": lambda folder: link(folder, "manifest.json"),
    "pipe": lambda folder: pipe(folder, "adapter_config.json"),
    "no folder": lambda folder: shutil.rmtree(folder),
    "folder in a file's place": lambda folder: bury(folder, "manifest.json"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_version_is_found_kept_out_and_mended(
    registry: Registry, tmp_path: Path, edit: str
) -> None:
    one, two = publish(registry, 1, 2)
    registry.promote("mail@v1")
    registry.promote("mail@v2", "canary")
    EDITS[edit](place(registry, two))
    with pytest.raises((AdapterError, FormatError)) as caught:
        registry.verify("mail@v2")
    assert "\n" not in str(caught.value)
    with pytest.raises((AdapterError, FormatError)):
        registry.lease("mail@canary")
    with pytest.raises((AdapterError, FormatError)):
        registry.promote("mail@v2")
    assert registry.resolve("mail").id == one
    seen = registry.revision()
    assert registry.keep("mail", adapter(2)).number == 2
    registry.verify("mail@v2")
    assert [entry.kind for entry in registry.changes(seen)] == ["mended"]
    assert sorted(path.name for path in place(registry, two).iterdir()) == sorted(FILES)


def test_swapped_versions_are_found(registry: Registry) -> None:
    """Each is whole and signed, in the other's place."""
    one, two = publish(registry, 1, 2)
    place(registry, one).rename(place(registry, one).with_name("x"))
    place(registry, two).rename(place(registry, one))
    place(registry, one).with_name("x").rename(place(registry, two))
    for text in ("mail@v1", "mail@v2"):
        with pytest.raises(AdapterError, match="was changed after"):
            registry.verify(text)


def test_an_older_signed_manifest_is_found(registry: Registry, tmp_path: Path) -> None:
    """A trusted key signed it, and it is not what was published."""
    version = publish_run(registry, write_run(tmp_path / "a", loss=2.0), "mail")
    other = write_run(tmp_path / "b", loss=1.0)
    shutil.copy(other / "manifest.json", place(registry, version.id) / "manifest.json")
    with pytest.raises(AdapterError, match="was changed after"):
        registry.verify(version)


def test_nothing_of_a_stranger_is_published(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", signer=STRANGER)
    with pytest.raises(IdentityError, match="by no key that is trusted"):
        publish_run(registry, run, "mail")
    assert registry.versions() == [] and not list((registry.folder / "versions").iterdir())
    registry.trust(STRANGER.public, "the other ward")
    publish_run(registry, run, "mail")
    assert registry.labels()[STRANGER.key_id] == "the other ward"


def test_another_base_is_refused(registry: Registry, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", base_digest="be" * 32)
    with pytest.raises(AdapterError, match="was trained on base"):
        publish_run(registry, run, "mail", blueprint=BLUEPRINT)
    version = publish_run(registry, run, "mail")
    with pytest.raises(AdapterError, match="was trained on base"):
        registry.lease(version, BLUEPRINT)


@pytest.mark.parametrize("name", ["", "../x", "a/b/c", ".x", "a..b", "/etc", "a\n", "ä", "x" * 65])
def test_a_name_never_is_a_path(registry: Registry, tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(RegistryError, match="cannot be an adapter's name"):
        publish_run(registry, run, name)
    for ask in (registry.resolve, registry.versions, registry.rollback):
        if name:
            with pytest.raises(RegistryError):
                ask(name)


# Aliases


def test_rollback_goes_further_back_each_time(registry: Registry) -> None:
    publish(registry, 1, 2, 3)
    for text in ("mail@v1", "mail@v2", "mail@v2", "mail@v3"):
        registry.promote(text, why=f"try {text}")
    assert [registry.rollback("mail", why="worse").number for _ in range(2)] == [2, 1]
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.rollback("mail")
    registry.promote("mail@v3")
    assert registry.rollback("mail").number == 1
    moves = registry.history("mail", "prod")
    assert [entry.kind for entry in moves] == ["moved"] * 3 + ["rolled back"] * 2 + [
        "moved", "rolled back",
    ]  # fmt: skip
    assert {entry.who for entry in moves} == {ME.key_id}
    assert [moves[0].why, moves[3].why] == ["try mail@v1", "worse"]
    assert [entry.before for entry in moves[1:]] == [entry.after for entry in moves[:-1]]


def test_rollback_passes_over_what_no_longer_verifies(registry: Registry) -> None:
    one, two, _ = publish(registry, 1, 2, 3)
    for number in (1, 2, 3):
        registry.promote(f"mail@v{number}")
    changed(place(registry, two), "adapter_model.safetensors", flip)
    assert registry.rollback("mail").id == one


def test_rollback_of_what_never_was(registry: Registry) -> None:
    publish(registry, 1)
    with pytest.raises(UnknownAdapterError, match="no alias prod"):
        registry.rollback("mail")


class Fixed:
    """A gate that has made up its mind, and keeps what it was asked."""

    def __init__(self, *reasons: str) -> None:
        self.reasons = reasons
        self.asked: list[tuple[str, str | None]] = []

    def check(self, candidate: Checked, current: Checked | None) -> Verdict:
        now = None if current is None else str(current.version)
        self.asked.append((str(candidate.version), now))
        return Verdict(not self.reasons, self.reasons, {"loss": 1.5})


def test_a_gate_is_asked_and_its_refusal_kept(registry: Registry) -> None:
    one, two = publish(registry, 1, 2)
    passes, refuses = Fixed(), Fixed("too bad", "too old")
    registry.promote("mail@v1", gate=passes)
    with pytest.raises(
        PromotionError, match="mail@v2 is not promoted to prod: too bad; too old"
    ) as e:
        registry.promote("mail@v2", gate=refuses)
    assert e.value.reasons == ("too bad", "too old")
    assert passes.asked == [("mail@v1", None)] and refuses.asked == [("mail@v2", "mail@v1")]
    assert registry.resolve("mail").id == one
    moved, refused = registry.history("mail", "prod")
    assert (moved.kind, dict(moved.figures)) == ("moved", {"loss": 1.5})
    assert (refused.kind, refused.before, refused.after) == ("refused", one, two)
    assert refused.why == "too bad; too old"


def test_a_gate_is_asked_again_where_the_alias_moved_meanwhile(
    registry: Registry, tmp_path: Path
) -> None:
    publish(registry, 1, 2, 3)
    registry.promote("mail@v1")

    class Overtaken(Fixed):
        def check(self, candidate: Checked, current: Checked | None) -> Verdict:
            if not self.asked:
                with open_registry(tmp_path) as other:
                    other.promote("mail@v2")
            return super().check(candidate, current)

    gate = Overtaken()
    registry.promote("mail@v3", gate=gate)
    assert gate.asked == [("mail@v3", "mail@v1"), ("mail@v3", "mail@v2")]
    assert registry.rollback("mail").number == 2


def test_what_does_not_verify_any_more_can_be_replaced(registry: Registry) -> None:
    one, _ = publish(registry, 1, 2)
    registry.promote("mail@v1")
    changed(place(registry, one), "adapter_model.safetensors", flip)
    gate = Fixed()
    registry.promote("mail@v2", gate=gate)
    assert gate.asked == [("mail@v2", None)]


@pytest.mark.parametrize("alias", ["", "v7", "a b", "../x", "sha256:" + "0" * 12, "-x", "x" * 65])
def test_an_alias_is_a_word(registry: Registry, alias: str) -> None:
    publish(registry, 1)
    with pytest.raises(RegistryError, match="cannot be an alias"):
        registry.promote("mail@v1", alias)


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
