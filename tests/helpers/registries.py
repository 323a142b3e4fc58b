"""Signed adapters of a few hundred bytes, and registries to put them into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meadow.identity import Identity
from meadow.peft_adapters.adapter_writer import save_adapter
from meadow.peft_adapters.blueprint import Blueprint
from meadow.peft_adapters.layout import Site
from meadow.peft_adapters.manifest import ADAPTER, MANIFEST, Provenance, write_manifest
from meadow.peft_adapters.peft_format import CONFIG, WEIGHTS
from meadow.peft_adapters.signed_adapter import SignedAdapter
from meadow.server.registry import Registry
from meadow.store import Disk

ME = Identity(Ed25519PrivateKey.from_private_bytes(b"\1" * 32))
STRANGER = Identity(Ed25519PrivateKey.from_private_bytes(b"\2" * 32))
BASE = "ba" * 32
SITE = Site("m.q_proj", 16, 8)
BLUEPRINT = Blueprint("tiny", BASE, (SITE,), ("m.q_proj",))
PROVENANCE = Provenance(
    run_id="5f" * 16,
    base_digest=BASE,
    config_digest="c0" * 32,
    strategy="fedavg_lora",
    rounds=1,
    participants=3,
    seed=7,
    base_loss=2.5,
    loss=1.25,
)
NOON = 1_800_000_000.0


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def write_run(folder: Path, number: int = 1, signer: Identity = ME, **stated: Any) -> Path:
    """A run's folder; each number has weights of its own."""
    tree = {f"{SITE.name}.lora_A": torch.full((8, 8), float(number))}
    tree[f"{SITE.name}.lora_B"] = torch.ones(16, 8)
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder / ADAPTER, tree, scaling=2.0, base="tiny")
    facts = dataclasses.replace(PROVENANCE, **{"run_id": f"{number:032x}", **stated})
    write_manifest(folder, signer, facts)
    return folder


@cache
def adapter(number: int = 1) -> SignedAdapter:
    """The files of `write_run`, without a folder."""
    with TemporaryDirectory() as folder:
        run = write_run(Path(folder), number)
        return SignedAdapter.read(run / ADAPTER, run / MANIFEST)


def open_registry(
    root: Path,
    who: Identity = ME,
    disk: Disk | None = None,
    clock: Callable[[], float] | None = None,
) -> Registry:
    return Registry.open(root / "registry", who, disk, clock or Clock())


def publish(registry: Registry, *numbers: int, name: str = "mail") -> list[str]:
    """The ids of versions with the weights of these numbers."""
    return [registry.keep(name, adapter(number)).id for number in numbers]


def place(registry: Registry, id: str) -> Path:
    """Where a content's files are."""
    return registry.folder / "versions" / id


def changed(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def flip(data: bytes) -> bytes:
    """With another last bit."""
    return data[:-1] + bytes([data[-1] ^ 1])


FILES = (CONFIG, WEIGHTS, MANIFEST)
