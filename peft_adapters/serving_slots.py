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

On a CUDA device Triton's kernels find each slot's tokens by an index (`serving_triton`): there the
order stays as it is, and nothing is copied.  Slots keep their addresses for as long as their group
exists, so that a step of decoding rows can be recorded: `uses` and `part` are its pieces.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ModelError
from .kernel_trial import holds
from .layout import Site, Tree, modules_of
from .slot_group import Factors, Packed, Run, SlotGroup
from .slot_tokens import SHORT, Kernel, Listed, SlotTokens, Tokens, listed

__all__ = [
    "Order", "Packed", "Place", "Segment", "ServedLinear", "ServingSlots", "Use", "has_kernels",
    "pack", "padded_rank",
]  # fmt: skip

SMALLEST_RANK = 8
_NONE = 2**31  # more than any rank
_KERNELS = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = importlib.util.find_spec("triton") is not None


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


class Use(NamedTuple):
    """What a batch uses of a group."""

    rank: int
    modules: frozenset[str]  # outside of which all of these adapters are zero
    tokens: Listed


def padded_rank(rank: int) -> int:
    """The rank of the group that an adapter belongs to: 8, 16, 32, ..."""
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length())


def pack(
    tree: Tree, scaling: float, rank: int, sites: Sequence[Site], dtype: torch.dtype
) -> Packed:
    """An adapter (its tree in float32) as a slot holds it; layers that it leaves out are zero."""
    padded = padded_rank(rank)
    factors = Factors(sites, padded, 1, torch.device("cpu"), dtype)
    present = frozenset(modules_of(tree))
    for site, a, b in zip(sites, factors.a_of, factors.b_of, strict=True):
        if site.name in present:
            own = tree[f"{site.name}.lora_A"]
            a[0, : len(own)] = own
            b[0, : len(own)] = (tree[f"{site.name}.lora_B"] * scaling).T
    return Packed(padded, factors.a[0], factors.b[0], present)


class Work(Protocol):
    """What a layer does for some of a batch's tokens."""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add B A x to y; x is (all tokens, in), y (all tokens, out)."""


class Part(Protocol):
    """Some of a batch's tokens, whose adapters are in one group."""

    @property
    def modules(self) -> frozenset[str]:
        """The layers outside of which all of these adapters are zero."""

    def at(self, site: int) -> Work:
        """The work of a layer."""


class ServedLinear(nn.Module):
    """`y = W x`, and for each run of tokens B A x of their adapters; x is (..., in), all tokens of
    the batch in their order."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.work: list[Work] = []
        self.tokens = -1  # of the batch; -1: there is none

    def forward(self, x: Tensor) -> Tensor:
        """Raises ModelError in a model that gives a layer other tokens than the batch's."""
        y: Tensor = self.base(x)
        tokens, sums = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if self.tokens not in (-1, len(tokens)):
            raise ModelError("a layer is not given all tokens", "such a base cannot be served")
        for work in self.work:
            work.add(tokens, sums)
        return y


class ServingSlots:
    """Puts `ServedLinear`s in place of a model's layers, and fills and composes their slots.

    `count` slots of each padded rank that occurs; a group is made when its first adapter comes.
    Numbers are held in the model's own type and on its device.  `kernels` says whether Triton's
    compute, else batched products do; None: wherever there are any.  Used by one thread.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        count: int,
        dtype: torch.dtype,
        kernels: bool | None = None,
    ) -> None:
        self.sites, self.count, self.dtype = tuple(sites), count, dtype
        self.groups: dict[int, SlotGroup] = {}
        self._device = next(model.parameters()).device
        self._model = model
        self.layers = [self._swap(site.name) for site in self.sites]
        self._last: tuple[object, Order] | None = None
        self._used: tuple[object, list[Use]] | None = None
        self.kernels = has_kernels(self._device, dtype) if kernels is None else kernels
        self._plan = self._by_slot if self.kernels else self._in_runs

    def write(self, place: Place, packed: Packed) -> None:
        """Fill a slot that nothing in the batch uses.  Raises AdapterError; see `group`."""
        self.group(place.rank).write(place.slot, packed)
        self._last = self._used = None

    def group(self, rank: int) -> SlotGroup:
        """The slots of a padded rank.  Raises AdapterError where there is no memory for them."""
        if rank not in self.groups:
            self.groups[rank] = self._new_group(rank)
        return self.groups[rank]

    def _new_group(self, rank: int) -> SlotGroup:
        try:
            return SlotGroup(self.sites, rank, self.count, self._device, self.dtype)
        except (MemoryError, RuntimeError) as error:  # as torch says it
            raise AdapterError(
                f"no memory for {self.count} slots of rank {rank}", "serve with fewer slots"
            ) from error

    def compose(self, decode: Sequence[Place | None], segments: Sequence[Segment]) -> Order:
        """Prepare the layers for a batch, whose tokens have to come in the order returned.

        `decode` is the adapter of each row with one token.  The same batch again costs nothing.
        """
        key = tuple(decode), tuple(segments)
        if self._last is None or self._last[0] != key:
            self._last = key, self._composed(*key)
        return self._last[1]

    def _composed(self, decode: tuple[Place | None, ...], segments: tuple[Segment, ...]) -> Order:
        order, parts = self._plan(decode, segments)
        self._put_to_work(parts, len(decode) + sum(segment.length for segment in segments))
        return order

    def install(self, parts: Sequence[Part], tokens: int) -> None:
        """Prepare the layers for a batch of so many tokens, whose parts are given."""
        self._last = None
        self._put_to_work(parts, tokens)

    def _put_to_work(self, parts: Sequence[Part], tokens: int) -> None:
        for index, (site, layer) in enumerate(zip(self.sites, self.layers, strict=True)):
            layer.work = [part.at(index) for part in parts if site.name in part.modules]
            layer.tokens = tokens

    def uses(self, decode: Sequence[Place | None]) -> list[Use]:
        """What rows with one token use of each group, in blocks of `SHORT` tokens; the same batch
        again costs nothing."""
        key = tuple(decode)
        if self._used is None or self._used[0] != key:
            self._used = key, list(self._uses(key, (), SHORT))
        return self._used[1]

    def part(self, rank: int, modules: frozenset[str], tokens: Tokens) -> Part:
        """The work of a group's slots for tokens that kernels find."""
        slots = self.group(rank).slots
        return SlotTokens(_kernel(), tokens, slots.a_of, slots.b_of, modules)

    def _by_slot(
        self, decode: Sequence[Place | None], segments: Sequence[Segment]
    ) -> tuple[Order, list[Part]]:
        """For kernels, which find a slot's tokens wherever they are."""
        parts = [
            self.part(rank, modules, tokens.on(self._device))
            for rank, modules, tokens in self._uses(decode, segments)
        ]
        return Order(tuple(range(len(decode))), tuple(range(len(segments)))), parts

    def _uses(
        self, decode: Sequence[Place | None], segments: Sequence[Segment], size: int | None = None
    ) -> Iterator[Use]:
        for rank, of in sorted(_tokens_of(decode, segments).items()):
            held = self.group(rank).modules
            modules = frozenset[str]().union(*(held[slot] for slot in of))
            yield Use(rank, modules, listed(of, size))

    def _in_runs(
        self, decode: Sequence[Place | None], segments: Sequence[Segment]
    ) -> tuple[Order, list[Part]]:
        """For batched products, which take neighbours together."""
        runs: list[Part] = []
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
        return Order(tuple(rows), tuple(order_of_segments)), runs

    def _segment_runs(self, segments: Sequence[Segment], start: int) -> Iterator[Run]:
        for rank, same in groupby(segments, key=lambda segment: _kind(segment)[0]):
            lengths = [(segment.place, segment.length) for segment in same]
            if rank != _NONE:
                own = [(place.slot, length) for place, length in lengths if place is not None]
                yield from self.group(rank).direct(own, start)
            start += sum(length for _, length in lengths)

    def drop(self, rank: int) -> None:
        """Give a group's memory back; nothing may use its slots any more."""
        self.install([], -1)
        self.groups.pop(rank, None)
        self._used = None

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


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels can compute there; the first time this is tried out."""
    return _TRITON and device.type == "cuda" and dtype in _KERNELS and _work(dtype)


@cache
def _work(dtype: torch.dtype) -> bool:
    return holds(lambda: kernel_is_right(torch.device("cuda"), dtype), "adapters")


def kernel_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """One token by one adapter of ones."""
    x, y = (torch.ones(1, 16, device=device, dtype=dtype) for _ in range(2))
    a, b = (torch.ones(1, SMALLEST_RANK, 16, device=device, dtype=dtype) for _ in range(2))
    _kernel()(x, y, a, b, listed({0: [0]}).on(device))
    return bool((y == 1 + SMALLEST_RANK * 16).all())


def _kernel() -> Kernel:
    from . import serving_triton

    return serving_triton.add


def _tokens_of(
    decode: Sequence[Place | None], segments: Sequence[Segment]
) -> dict[int, dict[int, list[int]]]:
    """The tokens of each slot of each rank, as places in the batch."""
    tokens: dict[int, dict[int, list[int]]] = {}
    start = 0
    for place, length in (*((place, 1) for place in decode), *segments):
        if place is not None:
            own = tokens.setdefault(place.rank, {}).setdefault(place.slot, [])
            own += range(start, start + length)
        start += length
    return tokens


def _kind(segment: Segment) -> tuple[int, int, int]:
    """What the order of segments goes by: those of a rank and a length lie together, by their
    slots; those of the base come last."""
    place = segment.place or Place(_NONE, 0)
    return place.rank, segment.length, place.slot
