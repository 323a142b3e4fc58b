"""PEFT adapters over a tiny random llama, and over two layers of no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from meadow.errors import AdapterError
from meadow.peft_adapters.adapter_reader import Adapter, load_adapter
from meadow.peft_adapters.adapter_writer import save_adapter
from meadow.peft_adapters.layout import Site, Tree
from meadow.peft_adapters.peft_format import CONFIG

SITES = [Site("model.layers.0.self_attn.q_proj", 32, 24), Site("model.layers.1.mlp.up", 40, 32)]
NAME = SITES[0].name
PREFIX = f"base_model.model.{NAME}"
TEXT = torch.arange(24).reshape(2, 12)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def sites_of(model: LlamaForCausalLM, *endings: str) -> list[Site]:
    return [
        Site(name, *module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(endings)
    ]


def random_tree(sites: list[Site], rank: int, seed: int = 0) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    tree = {}
    for site in sites:
        tree[f"{site.name}.lora_A"] = torch.randn(rank, site.columns, generator=generator)
        tree[f"{site.name}.lora_B"] = torch.randn(site.rows, rank, generator=generator) / 10
    return tree


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TEXT).logits
    return result


def merged_by_hand(tree: Tree, scaling: float) -> Tensor:
    model = tiny_llama()
    with torch.no_grad():
        for name in {key.rpartition(".")[0] for key in tree}:
            change = scaling * tree[f"{name}.lora_B"] @ tree[f"{name}.lora_A"]
            model.get_submodule(name).weight += change
    return logits(model)


def save_tiny(folder: Path) -> Path:
    """A good adapter, for the tests that spoil it."""
    save_adapter(folder, random_tree(SITES, 8), scaling=2.0, base="tiny")
    return folder


def same(adapter: Adapter, tree: Tree, scaling: float) -> bool:
    equal = all(torch.equal(adapter.tree[name], tree[name]) for name in tree)
    return equal and adapter.scaling == scaling and len(adapter.tree) == len(tree)


def refused(folder: Path, said: str, **kwargs: Any) -> None:
    with pytest.raises(AdapterError, match=said) as error:
        load_adapter(folder, **kwargs)
    assert "\n" not in str(error.value)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
