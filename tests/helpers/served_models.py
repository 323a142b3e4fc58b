"""A small random llama, adapters for it, and requests to a batcher without threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tiny import save_base
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
)

from meadow.peft_adapters.base_model import ALL_LINEAR, Base, load_base, sites
from meadow.peft_adapters.layout import Site, Tree
from meadow.peft_adapters.serving_slots import Packed, pack
from meadow.server.serving.adapter_cache import CacheStats
from meadow.server.serving.batcher import Batcher
from meadow.server.serving.live_request import LiveRequest
from meadow.server.serving.model_runner import ModelRunner
from meadow.server.serving.requests import Event, Job, Sampling, Token
from meadow.server.serving.served import Served
from meadow.server.serving.slot_table import SlotTable

VOCABULARY, LENGTH = 64, 96
CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
}  # fmt: skip
RANKS = (8, 64, 5, 16)


def small_base() -> Base:
    """A random llama whose likeliest token is clearly so, with `tiny`'s tokenizer of letters."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval().requires_grad_(False)
    return Base(model, letters(), "ba" * 32, "small", torch.device("cpu"))


def windowed_base(window: int) -> Base:
    """A random mistral, each token of which sees the last few alone."""
    torch.manual_seed(3)
    config = MistralConfig(**CONFIG, sliding_window=window, attn_implementation="eager")
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    return Base(model, letters(), "ba" * 32, "mistral", torch.device("cpu"))


@cache
def letters() -> PreTrainedTokenizerBase:
    """Token 2 is "a", and so on."""
    with TemporaryDirectory() as folder:
        return load_base(str(save_base(Path(folder))), device="cpu").tokenizer


def all_sites(base: Base) -> list[Site]:
    return sites(base.model, ALL_LINEAR)


def random_tree(places: Sequence[Site], rank: int, seed: int) -> Tree:
    """An adapter that changes what the model says."""
    random = torch.Generator().manual_seed(seed)
    tree = {}
    for site in places:
        tree[f"{site.name}.lora_A"] = torch.randn(rank, site.columns, generator=random) / 4
        tree[f"{site.name}.lora_B"] = torch.randn(site.rows, rank, generator=random) / rank
    return tree


def model_of(number: int) -> Served:
    """The base, or one of the adapters 1, 2, ..., whose ranks go through RANKS."""
    return Served(f"a{number}", "v1", f"{number:064x}", "prod") if number else Served("small")


class ReadyCache:
    """Every adapter is in memory as soon as it is asked for; counts who holds what."""

    def __init__(self, places: Sequence[Site]) -> None:
        self._places, self.limit = places, 0
        self.held: dict[str, int] = {}

    def hold(self, model: Served) -> bool:
        self.held[model.digest] = self.held.get(model.digest, 0) + 1
        return True

    def give(self, model: Served) -> None:
        self.held[model.digest] -= 1

    def get(self, model: Served) -> Packed:
        return packed_adapter(int(model.digest, 16), tuple(self._places))

    def peek(self, model: Served) -> Packed:
        return self.get(model)

    def stats(self) -> CacheStats:
        return CacheStats(0, 0, 0, 0)


@cache
def packed_adapter(number: int, places: tuple[Site, ...]) -> Packed:
    rank = RANKS[number % len(RANKS)]
    return pack(random_tree(places, rank, number), 2.0, rank, places, torch.float32)


class Desk:
    """A batcher whose steps the test takes, and what its requests were told."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        slots: int = 4,
        kv_tokens: int = 10**6,
        prefill_tokens: int = 64,
    ) -> None:
        self.cache = ReadyCache(runner.slots.sites)
        self.batcher = Batcher(
            runner,
            self.cache,
            SlotTable(slots),
            kv_tokens=kv_tokens,
            prefill_tokens=prefill_tokens,
            pinned=frozenset(),
        )

    def ask(
        self, prompt: Sequence[int], sampling: Sampling, model: int = 0, tenant: str = "t"
    ) -> tuple[LiveRequest, list[Event]]:
        events: list[Event] = []
        job = Job(tuple(prompt), sampling, model_of(model), tenant)
        request = LiveRequest(job, events.append, letters(), frozenset({1}))
        self.batcher.arrive(request)
        return request, events

    def finish(self) -> None:
        while self.batcher.step():
            pass


@contextmanager
def small_runner(rows: int = 6, slots: int = 4) -> Iterator[ModelRunner]:
    with ModelRunner(small_base(), rows=rows, length=LENGTH, slots=slots) as runner:
        yield runner


def tokens_of(events: Sequence[Event]) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def text_of(events: Sequence[Event]) -> str:
    return "".join(getattr(event, "text", "") for event in events)
