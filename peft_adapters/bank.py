"""The bank: one frozen linear layer, many low-rank slots, each row of the batch routed to its own.

`Bank` swaps the adapted layers of a base model for `BankLinear`s, which add nothing until some
group of slots is in use.  There are two kinds of groups:

`Slots`      ordinary LoRA factors, a pair for each layer and slot;
`CoreSlots`  cores between a pool's fixed sign matrices (see `pool`), one for each slot, or one for
             each slot and layer; a row may be nudged along one direction of the pool, which costs
             a column, not a product.

A group's numbers live in flat buffers, one for each factor, with a row for each slot, of which
every layer sees strided views.  So one client's factor is one row, and an optimiser or a norm over
a slot is one operation, whatever the number of layers.

Rows are routed either evenly (slot s takes the s-th equal share of the rows: training) or by an
index per row (serving).  Several groups may be in use at once and add up: a frozen side adapter
lies under a trained one.  Rows never mix, so N clients side by side train as if alone; reading
each base weight once for all of them is the gain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layout import CORE, FACTORS, Site, Tree
from .pool import Pool

Shape = tuple[int, int]


class Group(ABC):
    """`count` slots, each a set of named matrices for every factor, float32.

    `shapes[factor][name]` is a matrix's shape; `flat[factor]` is (count, width); `grads[factor]`
    has the same shape and receives what a backward pass leaves for the factors named in `train`.
    A tree names a matrix `<name>.<factor>`.
    """

    def __init__(
        self,
        shapes: Mapping[str, Mapping[str, Shape]],
        count: int,
        device: torch.device | str,
    ) -> None:
        self.shapes, self.count = shapes, count
        self.flat: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        self.leaves: dict[str, dict[str, Tensor]] = {}
        for factor, parts in shapes.items():
            width = sum(rows * columns for rows, columns in parts.values())
            self.flat[factor] = torch.zeros(count, width, device=device)
            self.leaves[factor] = self._views(self.flat[factor], factor)

    @abstractmethod
    def add(self, y: Tensor, x: Tensor, name: str, scaling: float) -> Tensor:
        """y (batch, ..., out) plus what this group's slots give for x (batch, ..., in)."""

    def _views(self, buffer: Tensor, factor: str) -> dict[str, Tensor]:
        views, offset = {}, 0
        for name, shape in self.shapes[factor].items():
            size = shape[0] * shape[1]
            views[name] = buffer[:, offset : offset + size].view(buffer.shape[0], *shape)
            offset += size
        return views

    def train(self, factors: Sequence[str]) -> None:
        """Let gradients flow into these factors only, accumulating into `grads`."""
        for factor in self.shapes:
            for leaf in self.leaves[factor].values():
                leaf.requires_grad_(factor in factors)
                leaf.grad = None
            if factor not in factors:
                self.grads.pop(factor, None)
                continue
            self.grads[factor] = torch.zeros_like(self.flat[factor])
            for name, view in self._views(self.grads[factor], factor).items():
                self.leaves[factor][name].grad = view

    def write(self, slot: int, tree: Tree) -> None:
        """Copy a tree into a slot; a smaller rank is padded with zeros, which stay zero."""
        with torch.no_grad():
            for factor, parts in self.shapes.items():
                for name in parts:
                    target = self.leaves[factor][name][slot]
                    source = tree[f"{name}.{factor}"]
                    target.zero_()
                    target[: source.shape[0], : source.shape[1]] = source.to(target)

    def read(self, slot: int, rank: int | None = None) -> Tree:
        """A copy of a slot's tree on the CPU, cut to `rank`."""
        return {
            f"{name}.{factor}": self._cut(self.leaves[factor][name][slot], factor, rank)
            for name in next(iter(self.shapes.values()))
            for factor in self.shapes
        }

    def split(self, row: Tensor, factor: str, rank: int | None) -> Tree:
        """Name the parts of one flat row (width,) of this factor, cut to `rank`, on the CPU."""
        views = self._views(row.view(1, -1), factor)
        return {
            f"{name}.{factor}": self._cut(view[0], factor, rank) for name, view in views.items()
        }

    def join(self, tree: Tree, factor: str) -> Tensor:
        """The inverse of `split`: a flat row (width,), padded with zeros to this rank."""
        row = torch.zeros_like(self.flat[factor][0])
        for name, view in self._views(row.view(1, -1), factor).items():
            part = tree[f"{name}.{factor}"]
            view[0][: part.shape[0], : part.shape[1]] = part.to(view)
        return row

    @staticmethod
    def _cut(tensor: Tensor, factor: str, rank: int | None) -> Tensor:
        cut = tensor[:rank] if factor == "lora_A" else tensor[:, :rank]
        return cut.detach().to("cpu", copy=True).contiguous()


class Slots(Group):
    """`count` LoRA adapters of one rank for all `sites`."""

    def __init__(
        self, sites: Sequence[Site], count: int, rank: int, device: torch.device | str
    ) -> None:
        shapes = {f: {site.name: site.shape(f, rank) for site in sites} for f in FACTORS}
        super().__init__(shapes, count, device)
        self.rank = rank
        self.rows: Tensor | None = None  # slot of each row of the batch; None: equal shares

    def add(self, y: Tensor, x: Tensor, name: str, scaling: float) -> Tensor:
        """y + scaling * B_s A_s x, with s the row's slot."""
        a, b = self.leaves["lora_A"][name], self.leaves["lora_B"][name]
        return y + _low_rank(x.to(a.dtype), a, b, self.rows, scaling).to(y.dtype)


class Nudge(NamedTuple):
    """For each row of the batch, a direction k = (a, b) of the pool and how far along it."""

    a: Tensor  # int64 (rows,)
    b: Tensor  # int64 (rows,)
    amount: Tensor  # float32 (rows,)


class CoreSlots(Group):
    """`count` cores C of a pool: slot s adds `scale * U C_s V^T` to every adapted matrix.

    Cores are (r, r), one for all matrices ("shared") or one for each; `scale` is the weight change
    that a 1 in the core stands for.  With a `nudge`, row i of the batch moves by amount_i along
    its direction: the core's product with (x V) gains one column, so that evaluating +epsilon and
    -epsilon in one batch costs no more than the forward pass of its rows.
    """

    def __init__(
        self, pool: Pool, count: int, device: torch.device | str, scale: float | None = None
    ) -> None:
        square = (pool.rank, pool.rank)
        super().__init__({CORE: dict.fromkeys(core_names(pool), square)}, count, device)
        self.pool = pool
        self.scale = 2.0**-pool.unit if scale is None else scale
        self.nudge: Nudge | None = None
        self._signs = {
            site.name: (
                pool.right(index, device).float(),
                pool.left(index, device).float().T.contiguous(),
            )
            for index, site in enumerate(pool.sites)
        }

    def add(self, y: Tensor, x: Tensor, name: str, scaling: float) -> Tensor:
        """y + U (scale * C_s + nudge) V^T x; the signs' own scale, not `scaling`, counts."""
        right, left = self._signs[name]
        cores = self.leaves[CORE]
        core = cores[name] if name in cores else cores[SHARED]
        along = nn.functional.linear(x.to(right.dtype), right)
        if self.count == 1:
            inner = nn.functional.linear(along, core[0] * self.scale)
        else:
            grouped = along.reshape(self.count, -1, self.pool.rank)  # rows of a slot are adjacent
            inner = torch.bmm(grouped, core.mT * self.scale).view(along.shape)
        if self.nudge is not None:
            inner = _nudged(inner, along, self.nudge)
        if y.dtype != left.dtype:
            return y + nn.functional.linear(inner, left).to(y.dtype)
        flat = torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), left.T)  # y is read once
        return flat.view(y.shape)


SHARED = "pool"


def core_names(pool: Pool) -> list[str]:
    """How a tree names a pool's cores: one for all matrices, or each after its matrix."""
    return [site.name for site in pool.sites] if pool.cores == "per_layer" else [SHARED]


def core_tree(pool: Pool, cores: Tensor) -> Tree:
    """Cores (cores, r, r) as the float32 tree that `CoreSlots` reads and writes."""
    return {f"{name}.{CORE}": c.float() for name, c in zip(core_names(pool), cores, strict=True)}


def core_stack(pool: Pool, tree: Tree) -> Tensor:
    """The inverse of `core_tree`: float32 (cores, r, r)."""
    return torch.stack([tree[f"{name}.{CORE}"] for name in core_names(pool)])


def _nudged(inner: Tensor, along: Tensor, nudge: Nudge) -> Tensor:
    """inner (rows, T, r) with amount * along[..., b] added at column a, row by row, in place."""
    shape = (*along.shape[:-1], 1)
    lift = (-1, *[1] * (along.dim() - 1))
    source = along.gather(-1, nudge.b.view(lift).expand(shape)) * nudge.amount.view(lift)
    return inner.scatter_add_(-1, nudge.a.view(lift).expand(shape), source)


class BankLinear(nn.Module):
    """`y = W x` plus what each group in use adds."""

    def __init__(self, base: nn.Linear, site: Site, bank: Bank) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self._bank = (bank,)  # a tuple, so that the bank is no sub-module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        bank = self._bank[0]
        for group in bank.active:
            y = group.add(y, x, self.site.name, bank.scaling)
        return y


def _low_rank(x: Tensor, a: Tensor, b: Tensor, rows: Tensor | None, scaling: float) -> Tensor:
    """`scaling * B A x` for x (batch, ..., in), A (slots, r, in), B (slots, out, r)."""
    if rows is None and a.shape[0] == 1:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, a[0]) * scaling, b[0])
    if rows is not None:
        a, b = a[rows], b[rows]
    shares = x.reshape(a.shape[0], x.shape[0] // a.shape[0], *x.shape[1:])  # refuses unequal ones
    grouped = shares.flatten(1, -2)
    y = torch.bmm(torch.bmm(grouped, a.mT) * scaling, b.mT)
    return y.view(*x.shape[:-1], b.shape[1])


class Bank:
    """Puts `BankLinear`s in place of a model's adapted layers.  Base weights are never written."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], scaling: float) -> None:
        self.model, self.sites, self.scaling = model, tuple(sites), scaling
        self.active: tuple[Group, ...] = ()
        for site in self.sites:
            parent = model.get_submodule(site.name.rpartition(".")[0])
            layer = getattr(parent, site.name.rpartition(".")[2])
            setattr(parent, site.name.rpartition(".")[2], BankLinear(layer, site, self))

    def slots(self, count: int, rank: int) -> Slots:
        """An empty group on the model's device."""
        return Slots(self.sites, count, rank, next(self.model.parameters()).device)

    def cores(self, pool: Pool, count: int, scale: float | None = None) -> CoreSlots:
        """Empty cores of a pool on the model's device."""
        return CoreSlots(pool, count, next(self.model.parameters()).device, scale)

    @contextmanager
    def using(self, *groups: Group) -> Iterator[None]:
        """Within this block the model answers with these groups added."""
        before, self.active = self.active, groups
        try:
            yield
        finally:
            self.active = before

    def detach(self) -> None:
        """Give the model its own layers back."""
        for site in self.sites:
            parent = self.model.get_submodule(site.name.rpartition(".")[0])
            layer = getattr(parent, site.name.rpartition(".")[2])
            if isinstance(layer, BankLinear):
                setattr(parent, site.name.rpartition(".")[2], layer.base)
