"""One step of the model for a packed batch of rows, each with its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...closeable import Closeable
from ...errors import ModelError
from ...peft_adapters.attention_kernels import any_length_at_once
from ...peft_adapters.base_model import ALL_LINEAR, Base, sites
from ...peft_adapters.serving_slots import Packed, Place, Segment, ServingSlots
from .decode_graphs import DecodeGraphs, Recorder
from .fixed_step import FixedStep
from .graph_check import agree, check_graphs
from .kv_rows import KVRows, Owner, Row, Shape
from .packed_attention import (
    IMPLEMENTATION,
    PackedStep,
    Prompt,
    Step,
    attend,
)
from .work import Work

__all__ = ["ModelRunner", "Work", "number_type"]

_CHECK = Owner("", "check")
_HINT = "serve a base of plain causal attention, such as a llama, qwen or mistral"


class ModelRunner(Closeable):
    """Owns a base model until it is closed: its linear layers and attention are exchanged."""

    def __init__(
        self,
        base: Base,
        *,
        rows: int,
        length: int,
        slots: int,
        kernels: bool | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`kernels` is `ServingSlots`', which a `recorder` of decoding steps needs.  Raises
        ModelError for a model whose attention cannot be packed, or whose steps not recorded."""
        self.base, self._model = base, base.model
        config: Any = self._model.config
        self._config, self._before = config, config._attn_implementation
        dtype = number_type(base.model)
        shape, scratch = _shape(self._config), recorder is not None
        self.kv = KVRows(shape, rows, length, base.device, dtype, scratch=scratch)
        AttentionInterface.register(IMPLEMENTATION, attend)
        layers = sites(base.model, ALL_LINEAR)
        self.slots = ServingSlots(base.model, layers, slots, dtype, kernels)
        self.graphs: DecodeGraphs | None = None
        try:
            self._check()
            if recorder is not None:
                self._record_by(recorder)
        except BaseException:
            self.close()
            raise

    @torch.inference_mode()
    def write(self, place: Place, packed: Packed) -> None:
        """Fill a slot that no row uses."""
        self.slots.write(place, packed)

    @torch.inference_mode()
    def run(self, decode: Sequence[Work], prompts: Sequence[Work]) -> tuple[list[Work], Tensor]:
        """Compute these tokens; what asked for it, and its next tokens' logits, (n, vocabulary).

        Each row may be in one work.  Logits are float32 and in the works' returned order, where a
        work comes once for each of its tokens after which they are asked for.
        """
        found = self._replayed(decode) if self.graphs and decode and not prompts else None
        asked, logits = found or self._computed(decode, prompts)
        for work in (*decode, *prompts):
            work.row.tokens += work.tokens
        return asked, logits

    def _replayed(self, decode: Sequence[Work]) -> tuple[list[Work], Tensor] | None:
        """By a recorded step, if there is one."""
        assert self.graphs is not None
        logits = self.graphs.run(decode)
        if logits is None:
            return None
        keep = [at for at, work in enumerate(decode) if work.last or work.every]
        return [decode[at] for at in keep], logits if len(keep) == len(decode) else logits[keep]

    def _computed(
        self, decode: Sequence[Work], prompts: Sequence[Work]
    ) -> tuple[list[Work], Tensor]:
        segments = [Segment(work.place, len(work.tokens)) for work in prompts]
        order = self.slots.compose([work.place for work in decode], segments)
        works = [decode[index] for index in order.decode]
        works += [prompts[index] for index in order.segments]
        step = self._step(works[: len(decode)], works[len(decode) :])
        keep: list[int] = []
        asked: list[Work] = []
        end = 0
        for work in works:
            end += len(work.tokens)
            count = len(work.tokens) if work.every else int(work.last)
            keep += range(end - count, end)
            asked += [work] * count
        return asked, self._forward([token for work in works for token in work.tokens], step, keep)

    def close(self) -> None:
        """Give the base its own layers and attention back."""
        if self.graphs is not None:
            self.graphs.forget()
        self._config._attn_implementation = self._before
        self.slots.detach()

    def _step(self, decode: Sequence[Work], prompts: Sequence[Work]) -> PackedStep:
        return PackedStep(
            self.kv,
            [(work.row.index, len(work.row.tokens)) for work in decode],
            [Prompt(w.row.index, len(w.row.tokens), len(w.tokens)) for w in prompts],
        )

    def _forward(self, tokens: list[int], step: PackedStep, keep: list[int]) -> Tensor:
        device = self.base.device
        ids = torch.tensor(tokens, device=device)
        positions = torch.tensor(step.positions, device=device)
        kept = torch.tensor(keep, device=device, dtype=torch.int64)
        return self._logits(ids, positions, step, kept)

    def _fixed(self, ids: Tensor, positions: Tensor, step: FixedStep) -> Tensor:
        return self._logits(ids, positions, step, 0)

    def _logits(self, ids: Tensor, positions: Tensor, step: Step, keep: Tensor | int) -> Tensor:
        """Of the tokens to `keep`, 0 for all of them: (n, vocabulary), float32."""
        with any_length_at_once():
            answer = self._model(
                input_ids=ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=keep,
                packed=step,
            )
        logits: Tensor = answer.logits[0]
        return logits.float()

    @torch.inference_mode()
    def _record_by(self, recorder: Recorder) -> None:
        vocabulary = int(self._config.get_text_config().vocab_size)
        graphs = DecodeGraphs(self.kv, self.slots, self._fixed, recorder, vocabulary)
        with self._borrowed(min(4, len(self.kv.rows))) as rows:
            check_graphs(graphs, rows, self._computed, self.base.name)
        self.graphs = graphs

    @torch.inference_mode()
    def _check(self) -> None:
        """The model's own attention and the packed one must agree on a few tokens."""
        vocabulary = int(self._config.get_text_config().vocab_size)
        length = min(9, self.kv.length)
        tokens = [(7 + 13 * at) % vocabulary for at in range(length)]
        ids = torch.tensor([tokens], device=self.base.device)
        try:
            own = self._model(input_ids=ids).logits[0, -1].float()
            self._config._attn_implementation = IMPLEMENTATION
            found = self._in_parts(tokens)
        except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
            raise ModelError(f"{self.base.name} cannot be served: {error}", _HINT) from error
        if not agree(own, found, self.kv.data.dtype):
            raise ModelError(f"{self.base.name} cannot be served: its attention differs", _HINT)

    def _in_parts(self, tokens: list[int]) -> Tensor:
        """The last token's logits after two segments of a prompt and a decoding step."""
        with self._borrowed(1) as (row,):
            middle = len(tokens) // 2
            for part in (tokens[:middle], tokens[middle:-1]):
                if part:
                    self.run([], [Work(row, None, part)])
            return self.run([Work(row, None, tokens[-1:])], [])[1][0]

    @contextmanager
    def _borrowed(self, count: int) -> Iterator[list[Row]]:
        rows = [self.kv.take(_CHECK, [0]) for _ in range(count)]
        try:
            yield rows
        finally:
            for row in rows:
                self.kv.give(row, keep=False)


def number_type(model: nn.Module) -> torch.dtype:
    """In which it computes."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _shape(config: Any) -> Shape:
    """What a model's config says of its keys and values."""
    text = config.get_text_config()
    try:
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        shared = getattr(text, "num_key_value_heads", None) or heads
        return Shape(text.num_hidden_layers, shared, width)
    except AttributeError as error:
        raise ModelError(f"this base's attention has no known shape: {error}", _HINT) from error
