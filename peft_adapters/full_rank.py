"""FedKSeed's own form: a pool of full-rank directions, kept as the mode to compare with.

Direction k moves every adapted matrix (m, n) by its own z_k in {+-1}^(m x n).  The state is K
integers I, and the model is

    W = W0 - 2^-unit * sum_k I_k z_k

Qin et al. 2024 (arXiv 2312.06353), with signs in place of normals, so that the sum is one of
integers: neither the order of the directions, nor chunks, nor threads change a bit of it.  Unlike
a `Pool`'s it is no low-rank adapter; `best_lora` says how much of it fits into one.

Signs are the stream (seed, tensor id, part) of `philox`, with seed and tensor ids as in `Pool` and
part 2 + k (0 and 1 are U and V); element (i, j) is sign i * n + j.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UpdateError
from .layout import Site, Tree
from .philox import philox4x32, signs
from .pool import Pool

LARGEST = 2**31 - 1
"""Of sum_k |I_k|: then no entry of the change outgrows an int32."""

_FIRST_PART = 2
_MOST = 2**32 - _FIRST_PART  # a part is a 32-bit word
_SIGNS, _WORDS, _BYTES = 128, 4, 16  # of one Philox call
_CALLS = 2048  # in a chunk: what one holds fits into a cache
_GROUP = 8  # directions that share a look-up

_SWAPS = ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0))


@dataclass(frozen=True)
class FullRank:
    """`count` full-rank directions; one integer moves a weight by 2^-unit.

    `run_id` and `base_digest` are hexadecimal; `sites` are sorted by name.
    """

    run_id: str
    base_digest: str
    sites: tuple[Site, ...]
    count: int = 4096
    unit: int = 30
    chunk: int = field(default=_CALLS, compare=False)  # Philox calls at a time; changes no result

    def __post_init__(self) -> None:
        if not 0 < self.count <= _MOST:
            raise ValueError(f"1 to {_MOST} directions, not {self.count}")

    @cached_property
    def seed(self) -> int:
        """64 bits, those of the pool of this run and base."""
        return Pool(self.run_id, self.base_digest, self.sites, 1).seed

    def direction(self, index: int, k: int, device: torch.device | str = "cpu") -> Tensor:
        """z_k of matrix `index`: int8 (m, n)."""
        site = self.sites[index]
        stream = signs(self.seed, index, _FIRST_PART + k, site.rows * site.columns, device)
        return stream.view(site.rows, site.columns)

    def change(self, index: int, integers: Mapping[int, int]) -> Tensor:
        """sum_k I_k z_k of matrix `index`: int32 (m, n), from the integers I by direction k.

        Raises UpdateError where the sum of their magnitudes outgrows 32 bits.
        """
        refuse_overflow(integers)
        site = self.sites[index]
        out = torch.empty(site.rows * site.columns, dtype=torch.int32)
        for start, total in self._sums(index, integers):
            out[start : start + len(total)] = total
        return out.view(site.rows, site.columns)

    def rebuild(self, index: int, weight: Tensor, integers: Mapping[int, int]) -> Tensor:
        """W of matrix `index` from W0, `weight` (m, n): each is read, and written, once.

        float64 is exact up to the difference; then there is one rounding to `weight`'s type.
        Raises UpdateError as `change` does.
        """
        refuse_overflow(integers)
        flat, out = weight.reshape(-1), torch.empty_like(weight).view(-1)
        for start, total in self._sums(index, integers):
            part = slice(start, start + len(total))
            out[part] = flat[part].double() - total.double() * 2.0**-self.unit
        return out.view(weight.shape)

    def _sums(self, index: int, integers: Mapping[int, int]) -> Iterator[tuple[int, Tensor]]:
        """(first element, int32 sums) of each chunk of a matrix."""
        size = self.sites[index].rows * self.sites[index].columns
        counted = [(k, value) for k, value in sorted(integers.items()) if value]
        groups = [counted[at : at + _GROUP] for at in range(0, len(counted), _GROUP)]
        parts = [torch.tensor([_FIRST_PART + k for k, _ in group]) for group in groups]
        tables = [_table([value for _, value in group]) for group in groups]
        for start in range(0, size, self.chunk * _SIGNS):
            calls = -(-min(self.chunk * _SIGNS, size - start) // _SIGNS)
            total = torch.zeros(calls * _SIGNS, dtype=torch.int32)
            for part, table in zip(parts, tables, strict=True):
                words = self._words(index, part, start // _SIGNS, calls)
                total += table.index_select(0, _transposed(words))
            yield start, total[: size - start]

    def _words(self, index: int, parts: Tensor, first_call: int, calls: int) -> Tensor:
        """Random bytes of up to eight directions: uint8 (directions, calls * 16)."""
        call = torch.arange(first_call, first_call + calls).repeat(len(parts))
        part = parts.repeat_interleave(calls)
        columns = [call & 0xFFFFFFFF, call >> 32, torch.full_like(call, index), part]
        key = (self.seed & 0xFFFFFFFF, self.seed >> 32)
        words = philox4x32(torch.stack(columns, 1), key)
        return words.to(torch.int32).view(torch.uint8).view(len(parts), calls * _BYTES)


def refuse_overflow(integers: Mapping[int, int]) -> None:
    """Raise UpdateError where a sum of these integers, whatever the signs, may outgrow 32 bits."""
    if sum(map(abs, integers.values())) > LARGEST:
        raise UpdateError(
            "the full-rank state has outgrown 32 bits", "a smaller multiplier, or fewer steps"
        )


def best_lora(change: Tensor, rank: int, scaling: float = 1.0) -> tuple[Tensor, Tensor, float]:
    """The LoRA pair nearest to a weight change (m, n), and what it leaves out.

    (A (rank, n), B (m, rank), residual), float32, with `scaling * B @ A` the truncated singular
    value decomposition (Eckart and Young 1936) and the residual's Frobenius norm as a share of the
    change's: 0 where it fits, towards 1 where nothing does.
    """
    u, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
    root = s[:rank].sqrt()
    whole = float(s.square().sum())
    left = float(s[rank:].square().sum())
    b, a = u[:, :rank] * (root / scaling), root[:, None] * vh[:rank]
    return a.float(), b.float(), (left / whole) ** 0.5 if whole else 0.0


def export(
    directions: FullRank, integers: Mapping[int, int], rank: int, scaling: float = 1.0
) -> tuple[Tree, dict[str, float]]:
    """The best rank-r adapter of a full-rank state, and its residual by matrix."""
    tree: Tree = {}
    residuals = {}
    for index, site in enumerate(directions.sites):
        change = directions.change(index, integers).double() * -(2.0**-directions.unit)
        a, b, residuals[site.name] = best_lora(change, rank, scaling)
        tree |= {f"{site.name}.lora_A": a, f"{site.name}.lora_B": b}
    return tree, residuals


def _table(values: list[int]) -> Tensor:
    """The signed sum of up to eight integers for every pattern of their signs: int32 (256,).

    Bit g of the pattern is set where integer g counts negative.
    """
    patterns = torch.arange(2**_GROUP)[:, None] >> torch.arange(len(values)) & 1
    return ((1 - 2 * patterns) * torch.tensor(values)).sum(1).to(torch.int32)


def _transposed(words: Tensor) -> Tensor:
    """Bytes of up to eight directions (d, w) as one pattern for each element: int32 (w * 8,).

    Eight bytes, one of each direction, are the rows of an 8 x 8 matrix of bits, which is
    transposed in three swaps (Warren, Hacker's Delight, 7-3); byte j then has the sign of element
    j in all directions, that of direction g in bit g.
    """
    padded = torch.zeros(words.shape[1], _GROUP, dtype=torch.uint8)
    padded[:, : len(words)] = words.T
    x = padded.view(torch.int64).view(-1)
    for shift, mask in _SWAPS:
        swapped = (x ^ (x >> shift)) & mask
        x = x ^ swapped ^ (swapped << shift)
    return x.view(torch.uint8).to(torch.int32)
