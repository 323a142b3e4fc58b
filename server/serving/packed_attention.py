"""Attention over a packed batch, under transformers' own models.

A model runs on all tokens of a step in one line, (1, tokens): first one token of each row that
decodes, then segments of prompts.  Its linear layers need not know which is which.  Its attention
does: this module registers an implementation with transformers that writes new keys and values
into their rows (`KVRows`), and lets each token see its own row's past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...errors import ModelError
from .kv_rows import KVRows

IMPLEMENTATION = "meadow_packed"
_SEEN = ("sliding_window", "is_causal", "dropout", "position_ids", "use_cache", "output_attentions")


class Prompt(NamedTuple):
    """A segment of a prompt: `length` tokens of a row, of which `past` were computed before."""

    row: int
    past: int
    length: int


class Step(Protocol):
    """What attention has to know of one step's batch."""

    kv: KVRows
    prompts: Sequence[Prompt]
    where: Tensor  # of each token's key, (heads * tokens)
    decoding: int  # tokens, before those of the prompts
    span: int  # rows that these read
    longest: int  # positions that they read
    prompt_masks: dict[tuple[Prompt, int | None], Tensor]  # by window: made once for all layers

    def by_row(self, tokens: Tensor) -> Tensor:
        """Decoding tokens (n, ...) as rows (span, ...); what a gap gets is of no use."""

    def by_token(self, rows: Tensor) -> Tensor:
        """The inverse of `by_row`."""

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What each row must not see, (span, 1, 1, longest): 0 or -inf; None where all is seen."""


@dataclass
class PackedStep:
    """A step of any batch, as `Step` has it.

    `decode` is (row, past) of each decoding token, in the batch's order; `prompts` follow them.
    """

    kv: KVRows
    decode: Sequence[tuple[int, int]]
    prompts: Sequence[Prompt]
    where: Tensor = field(init=False)
    prompt_masks: dict[tuple[Prompt, int | None], Tensor] = field(init=False, default_factory=dict)
    _masks: dict[int | None, Tensor | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        rows = [row for row, _ in self.decode]
        rows += [prompt.row for prompt in self.prompts for _ in range(prompt.length)]
        self.where = self.kv.positions(rows, self.positions).flatten()
        self.decoding = len(self.decode)
        self.span = max((row for row, _ in self.decode), default=-1) + 1
        self.longest = max((past for _, past in self.decode), default=0) + 1
        self._lookup = self._rows()

    @property
    def positions(self) -> list[int]:
        """Each token's position in its own text."""
        found = [past for _, past in self.decode]
        for prompt in self.prompts:
            found += range(prompt.past, prompt.past + prompt.length)
        return found

    def by_row(self, tokens: Tensor) -> Tensor:
        return tokens if self._lookup is None else tokens[self._lookup[0]]

    def by_token(self, rows: Tensor) -> Tensor:
        return rows if self._lookup is None else rows[self._lookup[1]]

    def _rows(self) -> tuple[Tensor, Tensor] | None:
        rows = [row for row, _ in self.decode]
        if rows == list(range(len(rows))):
            return None
        token_of = [0] * self.span
        for token, row in enumerate(rows):
            token_of[row] = token
        device = self.kv.data.device
        return torch.tensor(token_of, device=device), torch.tensor(rows, device=device)

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if window not in self._masks:
            self._masks[window] = self._decode_mask(window, dtype)
        return self._masks[window]

    def _decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        lengths = [self.longest] * self.span  # a gap sees zeros, and its result is not read
        for row, past in self.decode:
            lengths[row] = past + 1
        if min(lengths) == self.longest and (window is None or window >= self.longest):
            return None
        ends = torch.tensor(lengths, device=self.kv.data.device)
        return mask_of(ends, self.longest, window, dtype)


def mask_of(ends: Tensor, longest: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """`Step.decode_mask` of rows whose texts end before `ends` (span)."""
    after = ends.view(-1, 1, 1, 1)
    at = torch.arange(longest, device=ends.device)
    hidden = at >= after
    if window is not None:
        hidden |= at < after - window
    return _bias(hidden, dtype)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf for what is hidden, (..., longest), else 0.

    Rows begin at whole 16 bytes: a GPU's kernels else copy it first, in every layer.
    """
    *rows, longest = hidden.shape
    bias = torch.zeros(*rows, -(-longest // 8) * 8, dtype=dtype, device=hidden.device)
    return bias[..., :longest].masked_fill_(hidden, -torch.inf)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Step,
    scaling: float,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, heads, tokens, width), key and value (1, fewer
    heads, tokens, width); gives (1, tokens, heads, width)."""
    asked = (name for name, value in others.items() if value is not None and value is not False)
    unknown = [name for name in asked if name not in _SEEN]
    if unknown or attention_mask is not None:
        raise ModelError(f"this base's attention cannot be served: {unknown or 'its own mask'}")
    data = packed.kv.data[int(module.layer_idx)]  # type: ignore[arg-type]
    for kind, new in enumerate((key, value)):
        data[kind].view(-1, data.shape[-1]).index_copy_(0, packed.where, new[0].flatten(0, 1))
    parts = []
    start = packed.decoding
    if start:
        parts.append(_decode(query[0, :, :start], data, packed, scaling, sliding_window))
    for prompt in packed.prompts:
        own = query[:, :, start : start + prompt.length]
        parts.append(_prompt(own, data, prompt, packed, scaling, sliding_window))
        start += prompt.length
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def _decode(
    query: Tensor, data: Tensor, packed: Step, scaling: float, window: int | None
) -> Tensor:
    """query (heads, n, width) of one token in each of n rows; gives (n, heads, width).

    Heads that share keys stand in the place of a longer query, so that no key is repeated.
    """
    heads, _, width = query.shape
    shared = data.shape[2]
    keys, values = data[:, : packed.span, :, : packed.longest]
    own = packed.by_row(query.transpose(0, 1)).reshape(-1, shared, heads // shared, width)
    mask = packed.decode_mask(window, query.dtype)
    out = scaled_dot_product_attention(own, keys, values, mask, scale=scaling)
    return packed.by_token(out.reshape(-1, heads, width))


def _prompt(
    query: Tensor, data: Tensor, prompt: Prompt, packed: Step, scaling: float, window: int | None
) -> Tensor:
    """query (1, heads, t, width) of one prompt's segment; gives (t, heads, width).

    A first segment needs no mask, and then kernels take fewer heads of keys as they are.  With a
    mask a GPU's may not, and would repeat them in float32: there heads that share keys stand in the
    place of a longer query.
    """
    end = prompt.past + prompt.length
    keys, values = data[:, prompt.row : prompt.row + 1, :, :end]
    if prompt.past == 0 and (window is None or window >= end):
        out = scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    _, heads, length, width = query.shape
    shared = data.shape[2]
    if (prompt, window) not in packed.prompt_masks:
        mask = _prompt_mask(prompt, window, query, heads // shared)
        packed.prompt_masks[prompt, window] = mask
    own, mask = query.reshape(1, shared, -1, width), packed.prompt_masks[prompt, window]
    out = scaled_dot_product_attention(own, keys, values, mask, scale=scaling)
    return out.reshape(heads, length, width).transpose(0, 1)


def _prompt_mask(prompt: Prompt, window: int | None, like: Tensor, times: int) -> Tensor:
    """What the segment's tokens must not see, so many times over: (times * t, positions)."""
    at = torch.arange(prompt.past + prompt.length, device=like.device)
    own = at[prompt.past :].unsqueeze(1)
    hidden = at > own
    if window is not None:
        hidden |= at <= own - window
    return _bias(hidden.repeat(times, 1), like.dtype)
