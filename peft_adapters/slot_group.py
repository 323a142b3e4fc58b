"""The slots of one padded rank, and batched products over runs of tokens that use them.

A run is neighbouring tokens whose adapters lie side by side, so that one product serves them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Site

_FEW = 2  # runs over the slots themselves that are preferred to a copy of them


@dataclass(frozen=True)
class Packed:
    """An adapter in the form of a slot, so that filling one is two copies."""

    rank: int  # padded
    a: Tensor  # (width of all A)
    b: Tensor  # (width of all B^T), scaling folded in
    modules: frozenset[str]

    @property
    def bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


class Factors:
    """`count` adapters, each a row of `a` and a row of `b`; at site i `a_of[i]` (count, r, in) and
    `b_of[i]` (count, r, out) are views of them."""

    def __init__(
        self,
        sites: Sequence[Site],
        rank: int,
        count: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.count = count
        self.a, self.a_of = _rows([site.columns for site in sites], rank, count, device, dtype)
        self.b, self.b_of = _rows([site.rows for site in sites], rank, count, device, dtype)

    def copy(self, to: int, source: Factors, at: int) -> None:
        self.a[to], self.b[to] = source.a[at], source.b[at]


def _rows(
    widths: Sequence[int], rank: int, count: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    flat = torch.zeros(count, rank * sum(widths), dtype=dtype, device=device)
    views, start = [], 0
    for width in widths:
        views.append(flat[:, start : start + rank * width].view(count, rank, width))
        start += rank * width
    return flat, views


class RunWork(NamedTuple):
    """A run of tokens at one layer, by batched products."""

    start: int
    stop: int
    shape: tuple[int, int]  # shares, and their length
    a: Tensor  # (shares, r, in); of one share alone (r, in)
    b: Tensor  # likewise, (r, out)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add B A x to y; x is (all tokens, in), y (all tokens, out)."""
        own, out, a, b = x[self.start : self.stop], y[self.start : self.stop], self.a, self.b
        if self.shape[0] == 1:
            out.addmm_((a @ own.mT).mT, b)
        elif self.shape[1] == 1:
            out.unsqueeze(1).baddbmm_(torch.bmm(own.unsqueeze(1), a.mT), b)
        else:  # in this order of factors the product is half as costly
            inner = torch.bmm(a, own.view(*self.shape, -1).mT)
            out.view(*self.shape, -1).baddbmm_(inner.mT, b)


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens: `count` shares of `length` each, share i by adapter first + i."""

    start: int
    count: int
    length: int
    source: Factors
    first: int
    modules: frozenset[str]  # outside of which all of these adapters are zero

    def at(self, site: int) -> RunWork:
        """The work of a layer."""
        shares = slice(self.first, self.first + self.count)
        a, b = self.source.a_of[site][shares], self.source.b_of[site][shares]
        if self.count == 1:
            a, b = a[0], b[0]
        stop = self.start + self.count * self.length
        return RunWork(self.start, stop, (self.count, self.length), a, b)


class SlotGroup:
    """The slots of one padded rank, and copies of those that the batch's rows use.

    `slots` stays where it is in memory; `rows`, the copies, moves when it grows.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        rank: int,
        count: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.sites, self.rank = sites, rank
        self.slots = Factors(sites, rank, count, device, dtype)
        self.rows = Factors(sites, rank, 0, device, dtype)
        self.modules: list[frozenset[str]] = [frozenset()] * count
        self._held: list[int] = []  # slot of which each row is a copy; -1: of none

    def write(self, slot: int, packed: Packed) -> None:
        """Fill a slot that no row uses."""
        self.slots.a[slot].copy_(packed.a)
        self.slots.b[slot].copy_(packed.b)
        self.modules[slot] = packed.modules
        self._held = [-1 if held == slot else held for held in self._held]

    def _claim(self, slots: Sequence[int]) -> list[int]:
        """The first rows become copies of `slots`, in an order that leaves the most in place.

        Returns the order: which of `slots` each row has.
        """
        self._grow(len(slots))
        left: dict[int, list[int]] = {}
        for index, slot in enumerate(slots):
            left.setdefault(slot, []).append(index)
        order = [left[held].pop() if left.get(held) else -1 for held in self._held[: len(slots)]]
        rest = iter([index for indices in left.values() for index in indices])
        for row, index in enumerate(order):
            if index < 0:
                order[row] = next(rest)
                self._copy(row, slots[order[row]])
        return order

    def decode(self, slots: Sequence[int], start: int) -> tuple[Sequence[int], list[Run]]:
        """Runs of tokens, one for each of `slots`, and the order that they have to come in.

        Where the slots themselves lie together, nothing is copied.
        """
        order: Sequence[int] = sorted(range(len(slots)), key=lambda index: slots[index])
        direct = self.direct([(slots[index], 1) for index in order], start)
        if len(direct) <= _FEW:
            return order, direct
        modules = frozenset[str]().union(*(self.modules[slot] for slot in slots))
        return self._claim(slots), [Run(start, len(slots), 1, self.rows, 0, modules)]

    def direct(self, lengths: Iterable[tuple[int, int]], start: int) -> list[Run]:
        """Runs over the slots themselves, for neighbouring tokens: (slot, how many)."""
        runs: list[Run] = []
        for slot, same in groupby(lengths, key=itemgetter(0)):
            run = self._uniform(slot, start, sum(length for _, length in same))
            start += run.length
            if runs and _follows(run, runs[-1]):
                before = runs.pop()
                modules = before.modules | run.modules
                run = replace(before, count=before.count + 1, modules=modules)
            runs.append(run)
        return runs

    def _uniform(self, slot: int, start: int, length: int) -> Run:
        """A run of tokens that use one adapter: no copy is needed."""
        return Run(start, 1, length, self.slots, slot, self.modules[slot])

    def _copy(self, row: int, slot: int) -> None:
        self.rows.copy(row, self.slots, slot)
        self._held[row] = slot

    def _grow(self, count: int) -> None:
        if count > self.rows.count:
            a, b = self.rows.a, self.rows.b
            size = max(count, 2 * self.rows.count)
            self.rows = Factors(self.sites, self.rank, size, a.device, a.dtype)
            self.rows.a[: len(a)], self.rows.b[: len(b)] = a, b
            self._held += [-1] * (size - len(self._held))


def _follows(run: Run, before: Run) -> bool:
    """Whether two runs of neighbouring tokens are one, of one share more."""
    return run.length == before.length and run.first == before.first + before.count
