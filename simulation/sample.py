"""Greedy completions, to look at what an adapter changed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..peft_adapters.adapter_reader import load_adapter
from ..peft_adapters.layout import rank_of
from .engine import Lab


@torch.no_grad()
def complete(lab: Lab, adapter: Path | None, prompt: Tensor, tokens: int) -> str:
    """The most likely continuation of `prompt` (length,), at most `tokens` long."""
    groups = []
    if adapter is not None:
        tree = load_adapter(adapter, sites=lab.layers).tree
        groups.append(lab.bank.slots(1, rank_of(tree)))
        groups[0].write(0, tree)
    ids = prompt.to(lab.base.device)[None]
    with lab.bank.using(*groups):
        for _ in range(tokens):
            logits = lab.base.model(input_ids=ids, use_cache=False).logits
            token = logits[0, -1].argmax()
            if int(token) == lab.base.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return str(lab.base.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))
