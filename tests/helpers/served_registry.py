"""A small base on disk, and a registry of signed adapters for it."""

from __future__ import annotations

import dataclasses
import shutil
from functools import cached_property
from pathlib import Path

import torch
from registries import PROVENANCE
from served_models import CONFIG, random_tree
from tiny import save_base
from transformers import LlamaConfig, LlamaForCausalLM

from meadow.closeable import Closeable
from meadow.config import ModelConfig
from meadow.identity import own_identity
from meadow.peft_adapters.adapter_writer import save_adapter
from meadow.peft_adapters.blueprint import Blueprint, open_blueprint
from meadow.peft_adapters.manifest import ADAPTER, write_manifest
from meadow.peft_adapters.peft_format import WEIGHTS
from meadow.server.registry import Registry
from meadow.server.registry_rows import Version

LENGTH = 2048
NAME = "news"


class ServedRegistry(Closeable):
    """In a folder: `base`, `registry` and what was published; signed by this user."""

    def __init__(self, root: Path) -> None:
        self.root, self.base = root, save_base(root / "base")
        torch.manual_seed(1)
        llama = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "max_position_embeddings": LENGTH}))
        llama.save_pretrained(self.base)
        self.folder = root / "registry"
        self.registry = Registry.open(self.folder, own_identity())

    def close(self) -> None:
        self.registry.close()

    @cached_property
    def blueprint(self) -> Blueprint:
        return open_blueprint(ModelConfig(base=str(self.base)))

    def publish(
        self, number: int, alias: str = "prod", name: str = NAME, base_digest: str = ""
    ) -> Version:
        """A version with weights of its own; with an alias, that moves without gates."""
        run = self.root / f"run-{name}-{number}"
        tree = random_tree(self.blueprint.layers, 8, number)
        save_adapter(run / ADAPTER, tree, scaling=2.0, base="small")
        digest = base_digest or self.blueprint.digest
        stated = dataclasses.replace(PROVENANCE, run_id=f"{number:032x}", base_digest=digest)
        manifest = write_manifest(run, own_identity(), stated)
        version = self.registry.publish(name, run / ADAPTER, manifest)
        shutil.rmtree(run)
        if alias:
            self.registry.promote(version, alias)
        return version

    def files(self, version: Version) -> Path:
        return self.folder / "versions" / version.id

    def corrupt(self, version: Version) -> None:
        """Change one byte of a version's weights."""
        path = self.files(version) / WEIGHTS
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
