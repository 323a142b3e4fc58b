"""A random llama of a few thousand weights and three participants with a few rows each: a whole
run over them takes a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from meadow.config import Config

CLIENTS = ("ada", "bob", "eve")
LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"


def save_base(folder: Path) -> Path:
    """The llama in Hugging Face's layout; its tokens are letters."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    words = {name: number for number, name in enumerate(["<s>", "</s>", *_LETTERS])}
    letters = Tokenizer(models.WordLevel(words, unk_token="a"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def write_rows(path: Path) -> Path:
    """Six rows for training and two held out of each client, each with a habit of its own."""
    lines = []
    for at, client in enumerate(CLIENTS):
        for number in range(8):
            response = (_LETTERS[at * 3] + _LETTERS[at * 3 + 1]) * (2 + number % 3) + "."
            row = {"client": client, "prompt": f"say {_LETTERS[number]}", "response": response}
            lines.append(json.dumps({**row, "split": "train" if number < 6 else "test"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_config(folder: Path) -> Config:
    """Two rounds of two steps for all three clients, over the files that it puts into `folder`."""
    return config_over(save_base(folder / "base"), write_rows(folder / "rows.jsonl"))


def config_over(base: Path, rows: Path) -> Config:
    """The run of `tiny_config` over files that are there already."""
    return Config().replace(
        model={"base": str(base), "rank": 2, "alpha": 4.0, "device": "cpu"},
        data={"source": str(rows), "max_length": 32},
        rounds={"count": 2},
        clients={"steps": 2, "batch": 2, "lr": 2e-2},
        simulation={"threads": 1},
    )
