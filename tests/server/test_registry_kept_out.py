"""What the registry keeps out: what was edited or swapped, strangers, other bases and paths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from registries import BLUEPRINT, FILES, STRANGER, adapter, changed, flip, place, publish, write_run

from meadow.errors import AdapterError, FormatError, IdentityError, RegistryError
from meadow.server.registry import Registry
from meadow.server.registry_runs import publish_run

pytest_plugins = ("registry_fixtures",)


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
