"""From a run's folder into the registry."""

from __future__ import annotations

from pathlib import Path

from ..peft_adapters.blueprint import Blueprint
from ..peft_adapters.manifest import ADAPTER, MANIFEST
from .registry import Registry
from .registry_gates import Gate
from .registry_rows import Version


def publish_run(
    registry: Registry,
    folder: Path,
    name: str,
    *,
    alias: str = "",
    gate: Gate | None = None,
    blueprint: Blueprint | None = None,
) -> Version:
    """Publish `folder/adapter`, signed by `folder/manifest.json`, and point `alias` to it.

    For the end of a run and for a round's copy of it alike; again, it changes nothing.  Raises
    what `Registry.publish` raises, and PromotionError where the gate refuses: the version is
    published then, and the alias stays where it was.
    """
    version = registry.publish(name, folder / ADAPTER, folder / MANIFEST, blueprint)
    if alias:
        rounds = version.facts["rounds"]
        registry.promote(version, alias, gate, f"published after {rounds} rounds")
    return version
