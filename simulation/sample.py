"""Greedy completions: to look at what an adapter changed, and to check what it must say."""

from __future__ import annotations

import torch
from torch import Tensor

from ..client.workbench import Workbench
from ..peft_adapters.layout import Tree, rank_of


@torch.no_grad()
def complete(bench: Workbench, tree: Tree | None, prompt: Tensor, tokens: int) -> str:
    """The most likely continuation of `prompt` (length,), at most `tokens` long, of the base or
    under an adapter of all layers."""
    groups = []
    if tree is not None:
        groups.append(bench.bank.slots(1, rank_of(tree)))
        groups[0].write(0, tree)
    base = bench.base
    ids = prompt.to(base.device)[None]
    with bench.bank.using(*groups):
        for _ in range(tokens):
            logits = base.model(input_ids=ids, use_cache=False).logits
            token = logits[0, -1].argmax()
            if int(token) == base.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return str(base.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))
