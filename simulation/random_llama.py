"""Llamas and adapters of random numbers, for measurements that only their shapes matter to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ..nano import FOLDER as NANO_FOLDER
from ..peft_adapters.base_model import Base
from ..peft_adapters.layout import Site, Tree

DIGEST = "ba" * 32
"""What stands for the digest of weights that no file holds."""


@dataclass(frozen=True)
class Size:
    """A llama's shape."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int = 4096
    length: int = 512
    shared: int = 0  # heads of keys and values; 0: as many as others
    tied: bool = True  # whether the output head is the embedding


M27 = Size(512, 1376, 8, 8)
M105 = Size(1024, 2752, 8, 16)
TINY = Size(64, 96, 2, 4, vocabulary=512, length=128)
B8 = Size(4096, 14336, 32, 32, vocabulary=128256, length=8192, shared=8, tied=False)
"""Llama 3 8B's."""


def random_llama(
    size: Size,
    spread: float = 0.02,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """The same numbers every time; `spread` is the standard deviation of the weights."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.shared or size.heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=size.tied,
        initializer_range=spread,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    return model.eval()


def random_base(
    size: Size,
    spread: float = 0.02,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Base:
    """With nano's tokenizer, to which most of the vocabulary is unknown and has no text."""
    tokenizer = AutoTokenizer.from_pretrained(NANO_FOLDER, trust_remote_code=False)
    model = random_llama(size, spread, dtype, device)
    return Base(model, tokenizer, DIGEST, "random", torch.device(device))


def random_adapter(sites: Sequence[Site], rank: int, seed: int) -> Tree:
    """One that changes most of a random llama's answers."""
    random = torch.Generator().manual_seed(seed)
    tree = {}
    for site in sites:
        a = torch.randn(rank, site.columns, generator=random) / site.columns**0.5
        tree[f"{site.name}.lora_A"] = a
        tree[f"{site.name}.lora_B"] = torch.randn(site.rows, rank, generator=random) / rank**0.5
    return tree


def random_prompt(size: Size, length: int, seed: int) -> tuple[int, ...]:
    """Tokens that begin and end nothing."""
    random = torch.Generator().manual_seed(seed % 2**63)
    return tuple(torch.randint(5, size.vocabulary, (length,), generator=random).tolist())
