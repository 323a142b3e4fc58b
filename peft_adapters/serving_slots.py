"""Adapters ready for a batch, each in a slot, and linear layers whose rows use different ones.

Ranks are padded with zeros to 8, 16, 32, ...; adapters of one padded rank r share a `SlotGroup`.
For each of `count` slots it holds, at every adapted layer, A (r, in) and B^T (r, out), the latter
with the adapter's scaling folded in.  B is kept transposed because one row's product then runs
along memory: at r = 8 a third of the time.

A packed batch has its tokens in one line: first the rows that decode, one token each, then
segments of prompts.  `ServingSlots.compose` chooses the order of both, so that what uses a group
lies together, and by its slots.  Where rows that decode use slots that are scattered, a copy of
their adapters is gathered, and kept: a row that joins or leaves costs one adapter's copy, and every
other step none.  Tokens of the base are in no group and cost nothing; neighbouring tokens that use
one adapter are a plain product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .layout import Site, Tree, modules_of

SMALLEST_RANK = 8
_NONE = 2**31  # more than any rank
_FEW = 2  # runs over the slots themselves that are preferred to a copy of them


class Place(NamedTuple):
    """Where an adapter is ready: its group's rank, and the slot in it."""

    rank: int
    slot: int


class Segment(NamedTuple):
    """Neighbouring tokens of one prompt; `place` None is the base."""

    place: Place | None
    length: int


class Order(NamedTuple):
    """How a packed batch's tokens are ordered: indices into what `compose` was given."""

    decode: tuple[int, ...]
    segments: tuple[int, ...]


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


def padded_rank(rank: int) -> int:
    """The rank of the group that an adapter belongs to: 8, 16, 32, ..."""
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length())


def pack(
    tree: Tree, scaling: float, rank: int, sites: Sequence[Site], dtype: torch.dtype
) -> Packed:
    """An adapter (its tree in float32) as a slot holds it; layers that it leaves out are zero."""
    padded = padded_rank(rank)
    factors = _Factors(sites, padded, 1, torch.device("cpu"), dtype)
    present = frozenset(modules_of(tree))
    for site, a, b in zip(sites, factors.a_of, factors.b_of, strict=True):
        if site.name in present:
            own = tree[f"{site.name}.lora_A"]
            a[0, : len(own)] = own
            b[0, : len(own)] = (tree[f"{site.name}.lora_B"] * scaling).T
    return Packed(padded, factors.a[0], factors.b[0], present)


class _Factors:
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

    def copy(self, to: int, source: _Factors, at: int) -> None:
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


@dataclass(frozen=True)
class _Run:
    """Neighbouring tokens: `count` shares of `length` each, share i by adapter first + i."""

    start: int
    count: int
    length: int
    source: _Factors
    first: int
    modules: frozenset[str]  # outside of which all of these adapters are zero


class SlotGroup:
    """The slots of one padded rank, and copies of those that the batch's rows use."""

    def __init__(
        self,
        sites: Sequence[Site],
        rank: int,
        count: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.sites, self.rank = sites, rank
        self.slots = _Factors(sites, rank, count, device, dtype)
        self.rows = _Factors(sites, rank, 0, device, dtype)
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

    def decode(self, slots: Sequence[int], start: int) -> tuple[Sequence[int], list[_Run]]:
        """Runs of tokens, one for each of `slots`, and the order that they have to come in.

        Where the slots themselves lie together, nothing is copied.
        """
        order: Sequence[int] = sorted(range(len(slots)), key=lambda index: slots[index])
        direct = self.direct([(slots[index], 1) for index in order], start)
        if len(direct) <= _FEW:
            return order, direct
        modules = frozenset[str]().union(*(self.modules[slot] for slot in slots))
        return self._claim(slots), [_Run(start, len(slots), 1, self.rows, 0, modules)]

    def direct(self, lengths: Iterable[tuple[int, int]], start: int) -> list[_Run]:
        """Runs over the slots themselves, for neighbouring tokens: (slot, how many)."""
        runs: list[_Run] = []
        for slot, same in groupby(lengths, key=itemgetter(0)):
            run = self._uniform(slot, start, sum(length for _, length in same))
            start += run.length
            if runs and _follows(run, runs[-1]):
                before = runs.pop()
                modules = before.modules | run.modules
                run = replace(before, count=before.count + 1, modules=modules)
            runs.append(run)
        return runs

    def _uniform(self, slot: int, start: int, length: int) -> _Run:
        """A run of tokens that use one adapter: no copy is needed."""
        return _Run(start, 1, length, self.slots, slot, self.modules[slot])

    def _copy(self, row: int, slot: int) -> None:
        self.rows.copy(row, self.slots, slot)
        self._held[row] = slot

    def _grow(self, count: int) -> None:
        if count > self.rows.count:
            a, b = self.rows.a, self.rows.b
            size = max(count, 2 * self.rows.count)
            self.rows = _Factors(self.sites, self.rank, size, a.device, a.dtype)
            self.rows.a[: len(a)], self.rows.b[: len(b)] = a, b
            self._held += [-1] * (size - len(self._held))


_Work = tuple[int, int, tuple[int, int], Tensor, Tensor]


class ServedLinear(nn.Module):
    """`y = W x`, and for each run of tokens B A x of their adapters; x is (..., in), all tokens of
    the batch in their order."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.work: list[_Work] = []
        self.tokens = -1  # of the batch; -1: there is none

    def forward(self, x: Tensor) -> Tensor:
        """Raises ModelError in a model that gives a layer other tokens than the batch's."""
        y: Tensor = self.base(x)
        tokens, sums = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if self.tokens not in (-1, len(tokens)):
            raise ModelError("a layer is not given all tokens", "such a base cannot be served")
        for start, stop, shape, a, b in self.work:
            own, out = tokens[start:stop], sums[start:stop]
            if shape[0] == 1:
                out.addmm_((a @ own.mT).mT, b)
            elif shape[1] == 1:
                out.unsqueeze(1).baddbmm_(torch.bmm(own.unsqueeze(1), a.mT), b)
            else:  # in this order of factors the product is half as costly
                inner = torch.bmm(a, own.view(*shape, -1).mT)
                out.view(*shape, -1).baddbmm_(inner.mT, b)
        return y


class ServingSlots:
    """Puts `ServedLinear`s in place of a model's layers, and fills and composes their slots.

    `count` slots of each padded rank that occurs; a group is made when its first adapter comes.
    Numbers are held in the model's own type and on its device.  Used by one thread.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], count: int, dtype: torch.dtype
    ) -> None:
        self.sites, self.count, self.dtype = tuple(sites), count, dtype
        self.groups: dict[int, SlotGroup] = {}
        self._device = next(model.parameters()).device
        self._model = model
        self.layers = [self._swap(site.name) for site in self.sites]
        self._last: tuple[object, Order] | None = None

    def write(self, place: Place, packed: Packed) -> None:
        """Fill a slot that nothing in the batch uses."""
        self.group(place.rank).write(place.slot, packed)
        self._last = None

    def group(self, rank: int) -> SlotGroup:
        """The slots of a padded rank."""
        if rank not in self.groups:
            self.groups[rank] = SlotGroup(self.sites, rank, self.count, self._device, self.dtype)
        return self.groups[rank]

    def compose(self, decode: Sequence[Place | None], segments: Sequence[Segment]) -> Order:
        """Prepare the layers for a batch, whose tokens have to come in the order returned.

        `decode` is the adapter of each row with one token.  The same batch again costs nothing.
        """
        key = tuple(decode), tuple(segments)
        if self._last is None or self._last[0] != key:
            self._last = key, self._composed(*key)
        return self._last[1]

    def _composed(self, decode: tuple[Place | None, ...], segments: tuple[Segment, ...]) -> Order:
        runs: list[_Run] = []
        rows: list[int] = []
        for rank in sorted({place.rank for place in decode if place is not None}):
            own = [
                (i, place.slot) for i, place in enumerate(decode) if place and place.rank == rank
            ]
            order, found = self.group(rank).decode([slot for _, slot in own], len(rows))
            runs += found
            rows += [own[index][0] for index in order]
        rows += [index for index, place in enumerate(decode) if place is None]
        order_of_segments = sorted(range(len(segments)), key=lambda index: _kind(segments[index]))
        ordered = [segments[index] for index in order_of_segments]
        runs += self._segment_runs(ordered, len(rows))
        for index, (site, layer) in enumerate(zip(self.sites, self.layers, strict=True)):
            layer.work = [_work(run, index) for run in runs if site.name in run.modules]
            layer.tokens = len(decode) + sum(segment.length for segment in segments)
        return Order(tuple(rows), tuple(order_of_segments))

    def _segment_runs(self, segments: Sequence[Segment], start: int) -> Iterator[_Run]:
        for rank, same in groupby(segments, key=lambda segment: _kind(segment)[0]):
            lengths = [(segment.place, segment.length) for segment in same]
            if rank != _NONE:
                own = [(place.slot, length) for place, length in lengths if place is not None]
                yield from self.group(rank).direct(own, start)
            start += sum(length for _, length in lengths)

    def detach(self) -> None:
        """Give the model its own layers back."""
        for site, layer in zip(self.sites, self.layers, strict=True):
            self._put(site.name, layer.base)

    def _swap(self, name: str) -> ServedLinear:
        layer = ServedLinear(self._model.get_submodule(name))
        self._put(name, layer)
        return layer

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self._model.get_submodule(parent), last, layer)


def _kind(segment: Segment) -> tuple[int, int, int]:
    """What the order of segments goes by: those of a rank and a length lie together, by their
    slots; those of the base come last."""
    place = segment.place or Place(_NONE, 0)
    return place.rank, segment.length, place.slot


def _follows(run: _Run, before: _Run) -> bool:
    """Whether two runs of neighbouring tokens are one, of one share more."""
    return run.length == before.length and run.first == before.first + before.count


def _work(run: _Run, site: int) -> _Work:
    """Start, end, (shares, their length), A and B^T of a run at a layer."""
    stop, shares = run.start + run.count * run.length, slice(run.first, run.first + run.count)
    a, b = run.source.a_of[site][shares], run.source.b_of[site][shares]
    if run.count == 1:
        a, b = a[0], b[0]
    return run.start, stop, (run.count, run.length), a, b
