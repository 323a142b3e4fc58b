"""The bank: one frozen linear layer, many low-rank slots, each row of the batch routed to its own.

`Bank` swaps the adapted layers of a base model for `BankLinear`s, which add nothing until some
`Slots` are in use.  A `Slots` object is a group of equal-rank adapters for all layers at once;
its numbers live in two flat buffers, one for each factor: (slots, sum r*in) and (slots,
sum out*r), of which every layer sees strided views.  So one client's factor is one row, and an
optimiser or a norm over a slot is one operation, whatever the number of layers.

Rows are routed either evenly (slot s takes the s-th equal share of the rows: training) or by an
index per row (serving).  Several groups may be in use at once and add up: a frozen side adapter
lies under a trained one.  Rows never mix, so N clients side by side train as if alone; reading
each base weight once for all of them is the gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .layout import FACTORS, Site, Tree


class Slots:
    """`count` adapters of one rank for all `sites`, float32, with their gradients.

    `flat[factor]` is (count, width); `grads[factor]` has the same shape and receives what a
    backward pass leaves for the factors named in `train`.
    """

    def __init__(
        self, sites: Sequence[Site], count: int, rank: int, device: torch.device | str
    ) -> None:
        self.sites, self.count, self.rank = tuple(sites), count, rank
        self.rows: Tensor | None = None  # slot of each row of the batch; None: equal shares
        self.flat: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        self.leaves: dict[str, dict[str, Tensor]] = {}
        for factor in FACTORS:
            width = sum(_size(site, factor, rank) for site in self.sites)
            self.flat[factor] = torch.zeros(count, width, device=device)
            self.leaves[factor] = self._views(self.flat[factor], factor)

    def _views(self, buffer: Tensor, factor: str) -> dict[str, Tensor]:
        views, offset = {}, 0
        for site in self.sites:
            size = _size(site, factor, self.rank)
            shape = (buffer.shape[0], *site.shape(factor, self.rank))
            views[site.name] = buffer[:, offset : offset + size].view(shape)
            offset += size
        return views

    def train(self, factors: Sequence[str]) -> None:
        """Let gradients flow into these factors only, accumulating into `grads`."""
        for factor in FACTORS:
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
        """Copy an adapter into a slot; a smaller rank is padded with zeros, which stay zero."""
        with torch.no_grad():
            for factor in FACTORS:
                for site in self.sites:
                    target = self.leaves[factor][site.name][slot]
                    source = tree[f"{site.name}.{factor}"]
                    target.zero_()
                    target[: source.shape[0], : source.shape[1]] = source.to(target)

    def read(self, slot: int, rank: int | None = None) -> Tree:
        """A copy of a slot's adapter on the CPU, cut to `rank`."""
        kept = self.rank if rank is None else rank
        return {
            f"{site.name}.{factor}": self._cut(self.leaves[factor][site.name][slot], factor, kept)
            for site in self.sites
            for factor in FACTORS
        }

    def split(self, row: Tensor, factor: str, rank: int) -> Tree:
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
    def _cut(tensor: Tensor, factor: str, rank: int) -> Tensor:
        cut = tensor[:rank] if factor == "lora_A" else tensor[:, :rank]
        return cut.detach().to("cpu", copy=True).contiguous()


def _size(site: Site, factor: str, rank: int) -> int:
    rows, columns = site.shape(factor, rank)
    return rows * columns


class BankLinear(nn.Module):
    """`y = W x` plus, for each group in use, `scaling * B_s A_s x` with s the row's slot."""

    def __init__(self, base: nn.Linear, site: Site, bank: Bank) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self._bank = (bank,)  # a tuple, so that the bank is no sub-module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        bank = self._bank[0]
        for slots in bank.active:
            a, b = slots.leaves["lora_A"][self.site.name], slots.leaves["lora_B"][self.site.name]
            y = y + _low_rank(x.to(a.dtype), a, b, slots.rows, bank.scaling).to(y.dtype)
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
        self.active: tuple[Slots, ...] = ()
        for site in self.sites:
            parent = model.get_submodule(site.name.rpartition(".")[0])
            layer = getattr(parent, site.name.rpartition(".")[2])
            setattr(parent, site.name.rpartition(".")[2], BankLinear(layer, site, self))

    def slots(self, count: int, rank: int) -> Slots:
        """An empty group on the model's device."""
        return Slots(self.sites, count, rank, next(self.model.parameters()).device)

    @contextmanager
    def using(self, *groups: Slots) -> Iterator[None]:
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
