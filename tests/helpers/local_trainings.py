"""Jobs for a trainer over a small llama, and how far apart two of their results are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from meadow.client.encode import IGNORED, Example
from meadow.client.trainer import Job, Trainer
from meadow.config import ClientsConfig
from meadow.peft_adapters.bank import Bank
from meadow.peft_adapters.layout import FACTORS, Site, Tree
from meadow.strategies.base import Sgd

RANK, SCALING, STEPS, SEED = 4, 2.0, 3, 11
RECIPE = ClientsConfig(steps=STEPS, batch=4, lr=2e-3, clip=0.5, weight_decay=0.01)


def trainer(bank: Bank, **changes: Any) -> Trainer:
    return Trainer(bank, replace(RECIPE, **changes), pad=0)


def text(client: int, rows: int = 7) -> list[Example]:
    """Rows of 3 to 20 tokens; each client has lengths and words of its own."""
    generator = torch.Generator().manual_seed(100 + client)
    examples = []
    for row in range(rows):
        length = 3 + (5 * client + 3 * row) % 18
        low = 8 * client % 32
        ids = torch.randint(low, low + 16, (length,), generator=generator)
        labels = ids.clone()
        labels[: 1 + row % 2] = IGNORED
        examples.append(Example(ids, labels))
    return examples


def tree(layers: Sequence[Site], seed: int, rank: int = RANK) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{site.name}.{factor}": torch.randn(site.shape(factor, rank), generator=generator) * 0.1
        for site in layers
        for factor in FACTORS
    }


def jobs(layers: Sequence[Site], count: int, **request: Any) -> list[Job[Any]]:
    return [
        Job(Sgd(tree(layers, index), STEPS, **request), text(index), f"client-{index}", SEED)
        for index in range(count)
    ]


def distance(first: Tree, second: Tree) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def identical(first: Tree, second: Tree) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
