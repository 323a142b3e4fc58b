"""One step of the model for a packed batch of rows, each with its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from ...closeable import Closeable
from ...errors import ModelError
from ...peft_adapters.base_model import ALL_LINEAR, Base, sites
from ...peft_adapters.serving_slots import Packed, Place, Segment, ServingSlots
from .kv_rows import KVRows, Owner, Row, Shape
from .packed_attention import IMPLEMENTATION, PackedStep, Prompt, attend

_CHECK = Owner("", "check")
_HINT = "serve a base of plain causal attention, such as a llama, qwen or mistral"


@dataclass(frozen=True)
class Work:
    """New tokens of a row in a step: one that decodes, or a segment of its prompt."""

    row: Row
    place: Place | None  # of its adapter; None: the base
    tokens: Sequence[int]
    last: bool = True  # whether what follows the last of them is asked for
    every: bool = False  # whether what follows each of them is


class ModelRunner(Closeable):
    """Owns a base model until it is closed: its linear layers and attention are exchanged."""

    def __init__(
        self, base: Base, *, rows: int, length: int, slots: int, kernels: bool | None = None
    ) -> None:
        """`kernels` is `ServingSlots`'.  Raises ModelError for a model whose attention cannot be
        packed."""
        self.base, self._model = base, base.model
        config: Any = self._model.config
        self._config, self._before = config, config._attn_implementation
        dtype = next(p.dtype for p in base.model.parameters() if p.is_floating_point())
        self.kv = KVRows(_shape(self._config), rows, length, base.device, dtype)
        AttentionInterface.register(IMPLEMENTATION, attend)
        layers = sites(base.model, ALL_LINEAR)
        self.slots = ServingSlots(base.model, layers, slots, dtype, kernels)
        try:
            self._check()
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
        logits = self._forward([token for work in works for token in work.tokens], step, keep)
        for work in works:
            work.row.tokens += work.tokens
        return asked, logits

    def close(self) -> None:
        """Give the base its own layers and attention back."""
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
        answer = self._model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([step.positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(keep, device=device, dtype=torch.int64),
            packed=step,
        )
        logits: Tensor = answer.logits[0]
        return logits.float()

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
        exact = own.dtype == self.kv.data.dtype == torch.float32
        bound = (1e-3 if exact else 0.1) * max(1.0, float(own.abs().max()))
        if not float((own - found).abs().max()) <= bound:
            raise ModelError(f"{self.base.name} cannot be served: its attention differs", _HINT)

    def _in_parts(self, tokens: list[int]) -> Tensor:
        """The last token's logits after two segments of a prompt and a decoding step."""
        with self._borrowed() as row:
            middle = len(tokens) // 2
            for part in (tokens[:middle], tokens[middle:-1]):
                if part:
                    self.run([], [Work(row, None, part)])
            return self.run([Work(row, None, tokens[-1:])], [])[1][0]

    @contextmanager
    def _borrowed(self) -> Iterator[Row]:
        row = self.kv.take(_CHECK, [0])
        try:
            yield row
        finally:
            self.kv.give(row, keep=False)


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
