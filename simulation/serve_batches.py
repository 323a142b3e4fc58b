"""What adapters cost a batch: CPU time against the base's, and against PEFT's own mixed batch.

Requests go through the engine's own loop, without its threads, so that every batch is the same
each time.  All that a request costs is counted, its prompt and its text too; models, adapters and
slots are there before.  Base and adapters take turns, so that a slow spell of the machine meets
both.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from ..closeable import Closeable
from ..peft_adapters.base_model import ALL_LINEAR, sites
from ..peft_adapters.layout import Site
from ..peft_adapters.serving_slots import Packed, pack, padded_rank
from ..server.serving.adapter_cache import CacheStats
from ..server.serving.batcher import Batcher
from ..server.serving.live_request import LiveRequest
from ..server.serving.model_runner import ModelRunner
from ..server.serving.requests import Event, Job, Sampling, Token
from ..server.serving.served import Served
from ..server.serving.slot_table import SlotTable
from .random_llama import Size, random_adapter, random_base, random_llama, random_prompt

SCALING = 0.25
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Load:
    """Requests to be answered: their adapters' ranks in turn, prompts, and answers' lengths."""

    size: Size
    ranks: tuple[int, ...]
    prompt: int = 32
    answers: tuple[int, ...] = (16,) * 16
    rows: int = 16
    repeats: int = 7

    def models(self) -> list[Served]:
        """One adapter after the other, round and round."""
        return [model_of(at % len(self.ranks)) for at in range(len(self.answers))]

    def prompts(self, draw: int) -> list[tuple[int, ...]]:
        return [
            random_prompt(self.size, self.prompt, 1000 * draw + at)
            for at in range(len(self.answers))
        ]


@dataclass(frozen=True)
class Shares:
    """Medians of CPU seconds for so many generated tokens."""

    baseline: float
    adapters: float
    tokens: int

    @property
    def ratio(self) -> float:
        """Throughput in units of the baseline's."""
        return self.baseline / self.adapters


class _InMemory:
    """Adapters that are all there."""

    limit = 0

    def __init__(self, packed: Sequence[Packed]) -> None:
        self._packed = {model_of(number).digest: one for number, one in enumerate(packed)}

    def hold(self, model: Served) -> bool:
        return model.digest in self._packed

    def get(self, model: Served) -> Packed:
        return self._packed[model.digest]

    peek = get

    def give(self, model: Served) -> None:
        pass

    def stats(self) -> CacheStats:
        return CacheStats(sum(one.bytes for one in self._packed.values()), 0, 0, 0)


class Bench(Closeable):
    """A batcher over a random llama, with adapters 0, 1, ... in memory."""

    def __init__(self, load: Load) -> None:
        self.load, self._base = load, random_base(load.size)
        length = load.prompt + max(load.answers)
        slots = max(Counter(map(padded_rank, load.ranks)).values())
        self._runner = ModelRunner(self._base, rows=load.rows, length=length, slots=slots)
        sites = self._runner.slots.sites
        self._batcher = Batcher(
            self._runner,
            _InMemory([packed(load, sites, number) for number in range(len(load.ranks))]),
            SlotTable(slots),
            kv_tokens=load.rows * length,
            prefill_tokens=load.rows * load.prompt,
            pinned=frozenset(),
        )

    def answer(self, models: Sequence[Served], draw: int) -> tuple[float, list[list[int]]]:
        """CPU seconds to answer each of the load's requests by its model, and their tokens.

        Each `draw` has prompts of its own, of which no keys and values are there yet.
        """
        heard: list[list[Event]] = [[] for _ in models]
        requests = [
            LiveRequest(job, events.append, self._base.tokenizer, ())
            for job, events in zip(self._jobs(models, draw), heard, strict=True)
        ]
        start = time.process_time()
        for request in requests:
            self._batcher.arrive(request)
        while self._batcher.step():
            pass
        seconds = time.process_time() - start
        return seconds, [[e.id for e in events if isinstance(e, Token)] for events in heard]

    def close(self) -> None:
        self._runner.close()

    def _jobs(self, models: Sequence[Served], draw: int) -> list[Job]:
        return [
            Job(prompt, Sampling(length, temperature=0, ignore_eos=True), model, "bench")
            for model, prompt, length in zip(
                models, self.load.prompts(draw), self.load.answers, strict=True
            )
        ]


def share_of_base(load: Load) -> Shares:
    """The base's CPU time for a load, and that of its adapters."""
    plain = [Served("base")] * len(load.answers)
    with Bench(load) as bench:
        bench.answer(plain, -1)
        bench.answer(load.models(), -2)
        pairs = [
            (bench.answer(plain, 2 * turn)[0], bench.answer(load.models(), 2 * turn + 1)[0])
            for turn in range(load.repeats)
        ]
    return _shares(load, pairs)


def over_peft(load: Load) -> tuple[Shares, int]:
    """PEFT's CPU time for a load whose answers have one length, and ours; and how many of all
    answers had other tokens."""
    pairs, different = [], 0
    peft = _PeftBatch(load)
    with Bench(load) as bench:
        for turn in range(-1, load.repeats):
            theirs, expected = peft.answer(turn)
            ours, found = bench.answer(load.models(), turn)
            different += sum(a != b for a, b in zip(expected, found, strict=True))
            pairs.append((theirs, ours))
    return _shares(load, pairs[1:]), different


def _shares(load: Load, pairs: Sequence[tuple[float, float]]) -> Shares:
    baseline, adapters = zip(*pairs, strict=True)
    return Shares(median(baseline), median(adapters), sum(load.answers))


class _PeftBatch:
    """The same base and adapters under PEFT, whose mixed batch has an adapter's name for a row."""

    def __init__(self, load: Load) -> None:
        self.load = load
        model: Any = random_llama(load.size)
        layers = sites(model, ALL_LINEAR)
        for number, rank in enumerate(load.ranks):
            config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=_TARGETS)
            if number:
                model.add_adapter(f"a{number}", config)
            else:
                model = get_peft_model(model, config, adapter_name="a0")
            for name, value in random_adapter(layers, rank, number).items():
                layer = model.get_submodule(f"base_model.model.{name}.a{number}")
                layer.weight.data.copy_(value)
        self._model = model.eval()

    @torch.inference_mode()
    def answer(self, draw: int) -> tuple[float, list[list[int]]]:
        """As `Bench.answer`, with the load's adapters."""
        ids = torch.tensor(self.load.prompts(draw))
        names = [model.name for model in self.load.models()]
        start = time.process_time()
        answer = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=names,
            do_sample=False,
            use_cache=True,
            max_new_tokens=self.load.answers[0],
            min_new_tokens=self.load.answers[0],
            pad_token_id=0,
        )
        seconds = time.process_time() - start
        found: list[list[int]] = answer[:, ids.shape[1] :].tolist()
        return seconds, found


def model_of(number: int) -> Served:
    """What stands for an adapter of random numbers."""
    return Served(f"a{number}", "v1", f"{number + 1:064x}")


def packed(load: Load, sites: Sequence[Site], number: int) -> Packed:
    """One of the load's adapters as a slot holds it."""
    rank = load.ranks[number]
    return pack(random_adapter(sites, rank, number), SCALING, rank, sites, torch.float32)
