"""Keys and values of past tokens: one row for each request, as long as the longest may become.

Rows in use lie near the front, so that a batch reads its keys and values in place.  A row whose
request has ended stays as it is until it is needed, and a request that begins with the same tokens
goes on from them: only under the same adapter version, by whose digest a row is known, and only
of the same tenant, who else could find out by the clock what others have asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError


class Owner(NamedTuple):
    """Whose keys and values a row holds."""

    digest: str  # of the adapter version that computed them; "" for the base
    tenant: str


class Shape(NamedTuple):
    """What a model's attention keeps of a token."""

    layers: int
    heads: int  # of keys and values
    width: int  # of a head


@dataclass(eq=False)
class Row:
    """One request's place; `tokens` are those whose keys and values are in it."""

    index: int
    owner: Owner | None = None
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    used: int = 0  # when it was last taken or given, on a clock of such uses


class KVRows:
    """`rows` rows of at most `length` tokens.

    `data` is (layer, keys or values, row, head, position, width); positions that hold no token of
    their row's request are finite.  With `scratch` it has a row more, which no request gets and
    nobody reads: there tokens write that are none.
    """

    def __init__(
        self,
        shape: Shape,
        rows: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        scratch: bool = False,
    ) -> None:
        self.length = length
        self.scratch = rows if scratch else None
        size = (shape.layers, 2, rows + scratch, shape.heads, length, shape.width)
        self.data = _zeros(size, device, dtype)
        self.rows = [Row(index) for index in range(rows)]
        self._clock = count(1)

    @property
    def span(self) -> int:
        """All rows in use are before this one."""
        return max((row.index + 1 for row in self.rows if row.busy), default=0)

    @property
    def free(self) -> int:
        """How many more requests have room."""
        return sum(not row.busy for row in self.rows)

    def take(self, owner: Owner, prompt: Sequence[int], *, reuse: bool = True) -> Row:
        """A row for a request; its `tokens` are those of the prompt that need no computing.

        At least the prompt's last token does, and all do without `reuse`.  Some row must be free.
        """
        target = next(row for row in self.rows if not row.busy)
        source, shared = self._longest(owner, prompt) if reuse else (None, 0)
        idle = [row for row in self.rows if not row.busy]
        row = source if source in idle else min(idle, key=lambda row: row.used)
        self._swap(row, target)
        if source is not None and source is not row:
            at, to = source.index, row.index
            self.data[:, :, to, :, :shared] = self.data[:, :, at, :, :shared]
        self._wipe(row, shared)
        row.owner, row.tokens = owner, list(prompt[:shared])
        row.busy, row.used = True, next(self._clock)
        return row

    def give(self, row: Row, *, keep: bool) -> None:
        """A request has ended; a later one may go on from what it leaves if `keep`."""
        row.busy, row.used = False, next(self._clock)
        if not keep:
            row.owner, row.used = None, 0
        self._close_gaps()

    def positions(self, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Where tokens' keys lie, (heads, tokens), in a layer's keys as (row * head * position)."""
        return self.places(torch.tensor(rows), torch.tensor(positions)).to(self.data.device)

    def places(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The same of tensors (tokens), int64, where these are."""
        heads = torch.arange(self.data.shape[3], device=rows.device).unsqueeze(1)
        return (rows * len(heads) + heads) * self.length + positions

    def _longest(self, owner: Owner, prompt: Sequence[int]) -> tuple[Row | None, int]:
        """The row of this owner that begins most like the prompt, an idle one if there is one."""
        found: tuple[Row | None, int] = (None, 0)
        for row in sorted(self.rows, key=lambda row: row.busy):
            if row.owner == owner:
                shared = min(_shared(row.tokens, prompt), len(prompt) - 1)
                if shared > found[1]:
                    found = row, shared
        return found

    def _close_gaps(self) -> None:
        """Move the last rows into gaps, once a quarter of the rows that are read are gaps."""
        while True:
            gaps = [row for row in self.rows[: self.span] if not row.busy]
            if 4 * len(gaps) <= self.span:
                return
            self._swap(gaps[0], self.rows[self.span - 1])

    def _swap(self, one: Row, other: Row) -> None:
        if one is other:
            return
        length = max(len(one.tokens), len(other.tokens))
        if length:
            pair, turned = [one.index, other.index], [other.index, one.index]
            self.data[:, :, pair, :, :length] = self.data[:, :, turned, :, :length]
        one.index, other.index = other.index, one.index
        self.rows[one.index], self.rows[other.index] = one, other

    def _wipe(self, row: Row, since: int) -> None:
        """What one request left, were it not finite, would spoil the next one's sums."""
        self.data[:, :, row.index, :, since : max(len(row.tokens), since)] = 0


def _zeros(size: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """On a CPU, memory that the system commits when a row is first used."""
    item = torch.empty((), dtype=dtype).element_size()
    try:
        if device.type != "cpu":
            return torch.zeros(*size, device=device, dtype=dtype)
        memory = np.zeros(int(np.prod(size)) * item, np.uint8)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            f"no memory for {size[2]} texts of {size[4]} tokens", "serve fewer or shorter ones"
        ) from error
    return torch.from_numpy(memory).view(dtype).view(*size)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
