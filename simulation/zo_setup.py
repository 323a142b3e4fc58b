"""The fixed model shape of `meadow bench zo`'s speed cases, and one zeroth-order step over it.

Weights and tokens are random: neither speed nor memory depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ..client.encode import IGNORED, Example, collate
from ..client.task import Participant
from ..client.trainer import Trainer
from ..config import ClientsConfig
from ..peft_adapters.attention_kernels import any_length_at_once
from ..peft_adapters.bank import Bank, CoreSlots, core_tree
from ..peft_adapters.base_model import sites
from ..peft_adapters.pool import Integers, Pool, directions, fold
from ..strategies.zeroth_order import Header, Walked, run_id_of, walk

RANK = 64
HEADER = Header(epsilon=-10, scale=-6, multiplier=64)
WHO = b"bench"


@dataclass(frozen=True)
class Shape:
    """A llama without grouped queries, and a batch of `rows` texts of `length` tokens."""

    hidden: int = 512
    intermediate: int = 1408
    layers: int = 6
    heads: int = 8
    vocabulary: int = 8192
    rows: int = 8
    length: int = 128

    def __str__(self) -> str:
        return (
            f"llama, hidden {self.hidden}, {self.layers} layers, {self.heads} heads,"
            f" intermediate {self.intermediate}, vocabulary {self.vocabulary} (tied);"
            f" {self.rows} x {self.length} tokens"
        )

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The model, frozen."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
            use_cache=False,
        )
        model: nn.Module = LlamaForCausalLM(config).requires_grad_(False).eval().to(device)
        return model


FULL = Shape()
"""23.5M parameters."""


class Setup:
    """A model of a shape with a pool's state in place, and what is timed on it."""

    def __init__(self, shape: Shape, rank: int = RANK, device: torch.device | str = "cpu") -> None:
        self.shape, self.model = shape, shape.model(device)
        layers = sites(self.model, "all-linear")
        self.bank = Bank(self.model, layers, scaling=1.0)
        self.pool = Pool(run_id_of(0), 64 * "0", tuple(layers), rank)
        self.pairs = pairs(self.pool, self.pool.size)
        self.q = self.pool.zero()
        fold(self.q, *self.pairs)
        recipe = ClientsConfig(batch=shape.rows)
        self.trainer = Trainer(self.bank, recipe, pad=0)
        self.participant = Participant("bench", texts(shape), (), 0)
        ids, _, labels = collate(self.participant.train, pad=0)
        self.ids, self.labels = ids.to(device), labels.to(device)

    @cached_property
    def cores(self) -> CoreSlots:
        """The state as a forward pass without a step needs it."""
        cores = self.bank.cores(self.pool, 1)
        cores.write(0, core_tree(self.pool, self.q))
        return cores

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that MeZO moves: every parameter once."""
        return dict(self.model.named_parameters())

    def step(self, first: int = 0) -> Walked:
        """One zeroth-order step: both signs of the batch, rounding, and the fold into Q."""

        def along(step: int) -> Integers:
            return directions(self.pool.run_id, WHO, step, 1, self.pool.size)

        walking = walk(self.pool, self.q, HEADER, WHO, first, along, 1)
        probed = self.trainer.probe([self.participant.job(next(walking))])[0]
        try:
            walking.send(probed)
        except StopIteration as stop:
            walked: Walked = stop.value
            return walked
        raise AssertionError("one step asks once")

    def loss(self, copies: int = 1) -> float:
        """A forward pass and its mean loss over so many copies of the batch."""
        ids, labels = self.ids.repeat(copies, 1), self.labels.repeat(copies, 1)
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # logits stay in place
        with torch.no_grad(), any_length_at_once():  # as the trainer's passes
            logits = self.model(input_ids=ids, use_cache=False).logits
            return float(nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten()))

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Within this block the model answers with the state added."""
        with self.bank.using(self.cores):
            yield

    def rebuild(self) -> dict[str, Tensor]:
        """Q and the adapter from as many (direction, integer) pairs as the pool has directions."""
        q = self.pool.zero()
        fold(q, *self.pairs)
        return self.pool.adapter(q)


def pairs(pool: Pool, count: int) -> tuple[Integers, Integers]:
    """Directions of `count` steps and bytes for them, in units of HEADER's multiplier."""
    rng = np.random.default_rng(0)
    k = directions(pool.run_id, WHO, 0, count, pool.size)
    return k, rng.integers(-127, 128, count) * HEADER.multiplier


def texts(shape: Shape) -> tuple[Example, ...]:
    """A batch of random tokens, all of which count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.vocabulary, (shape.rows, shape.length), generator=generator)
    return tuple(Example(row, row.clone()) for row in ids)
