"""A pool of directions that is a LoRA adapter, and the integers that say how far along each.

For each adapted matrix of shape (m, n) there are U in {+-1}^(m x r) and V in {+-1}^(n x r), derived
from run id and base digest alone.  Direction k = (a, b) moves every adapted matrix by u_a v_b^T at
once.  The state is Q, integers of shape (cores, r, r), and the model is

    W = W0 + 2^-unit * U Q V^T

a rank-r adapter: A = V^T, B = 2^-unit * U Q.  Sums of integers do not depend on order, so whoever
has the same steps has the same Q, and the same adapter to the last bit.  With "shared" cores one Q
serves all matrices, with "per_layer" each has its own (zeroth-order steps move them all alike).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..canonical_json import canonical
from ..errors import FormatError, UpdateError
from .layout import Site, Tree
from .philox import signs

Cores = Literal["shared", "per_layer"]

FORMAT = 1
LARGEST = 2**31 - 1
"""Of |Q|: a value travels in four bytes, and U Q is exact in float64 for any rank there is."""

_SEED = b"meadow/pool/v1\0"
_STEP = b"meadow/direction/v1\0"
_STATE = b"meadow/state/v1\0"
_LEFT, _RIGHT = 0, 1  # Philox's part
_DIGEST = re.compile("[0-9a-f]{64}")
_LARGEST_SIDE = 2**24


@dataclass(frozen=True)
class Pool:
    """What fixes every direction of a run.

    `run_id` and `base_digest` are hexadecimal; `sites` are sorted by name, so that a matrix's
    index is its tensor id; one integer of Q is a weight change of 2^-unit u v^T.
    """

    run_id: str
    base_digest: str
    sites: tuple[Site, ...]
    rank: int
    cores: Cores = "shared"
    unit: int = 24

    def __post_init__(self) -> None:
        if list(self.sites) != sorted(self.sites, key=lambda site: site.name):
            raise ValueError("a pool's sites are sorted by name")

    @property
    def size(self) -> int:
        """Directions in the pool."""
        return self.rank * self.rank

    @cached_property
    def seed(self) -> int:
        """64 bits."""
        digest = hashlib.sha256(_SEED + bytes.fromhex(self.run_id + self.base_digest)).digest()
        return int.from_bytes(digest[:8], "little")

    def left(self, index: int, device: torch.device | str = "cpu") -> Tensor:
        """U^T of matrix `index`: int8 (r, m)."""
        rows = self.sites[index].rows
        return signs(self.seed, index, _LEFT, self.rank * rows, device).view(self.rank, rows)

    def right(self, index: int, device: torch.device | str = "cpu") -> Tensor:
        """V^T of matrix `index`: int8 (r, n)."""
        columns = self.sites[index].columns
        return signs(self.seed, index, _RIGHT, self.rank * columns, device).view(self.rank, columns)

    def zero(self) -> Tensor:
        """Q before the first step: int64 (cores, r, r)."""
        count = len(self.sites) if self.cores == "per_layer" else 1
        return torch.zeros(count, self.rank, self.rank, dtype=torch.int64)

    def core(self, q: Tensor, index: int) -> Tensor:
        """The part of Q that belongs to matrix `index`: (r, r)."""
        return q[index if self.cores == "per_layer" else 0]

    def adapter(self, q: Tensor, scaling: float = 1.0) -> Tree:
        """The LoRA adapter whose weight change, `scaling * B @ A`, is 2^-unit U Q V^T.

        float64 is exact here; the one rounding, to float32, is the last operation.  Raises
        UpdateError where Q has overflowed.
        """
        refuse_overflow(q)
        tree: Tree = {}
        for index, site in enumerate(self.sites):
            product = self.left(index).double().T @ self.core(q, index).double()
            tree[f"{site.name}.lora_A"] = self.right(index).float()
            tree[f"{site.name}.lora_B"] = (product * (2.0**-self.unit / scaling)).float()
        return tree

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "run_id": self.run_id,
            "base_digest": self.base_digest,
            "sites": [[site.name, site.rows, site.columns] for site in self.sites],
            "rank": self.rank,
            "cores": self.cores,
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Pool:
        """The inverse of `to_json`.  Raises FormatError for what it cannot have written."""
        if fields.get("format") != FORMAT:
            raise FormatError(
                f"the pool of directions has format {str(fields.get('format'))[:40]!r},"
                f" this meadow reads {FORMAT}"
            )
        try:
            sites = tuple(Site(str(name), int(m), int(n)) for name, m, n in fields["sites"])
            rank, unit = int(fields["rank"]), int(fields["unit"])
            pool = cls(fields["run_id"], fields["base_digest"], sites, rank, fields["cores"], unit)
            if pool.to_json() != dict(fields) or not pool._is_within_bounds():
                raise ValueError("out of bounds")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"not a pool of directions: {str(error)[:80]}") from error
        return pool

    def _is_within_bounds(self) -> bool:
        """Whether a pool that somebody else wrote is one that can be worked with."""
        names = [site.name for site in self.sites]
        sides = [side for site in self.sites for side in (site.rows, site.columns)]
        return (
            all(_DIGEST.fullmatch(text) for text in (self.run_id, self.base_digest))
            and len(set(names)) == len(names) > 0
            and all(0 < side <= _LARGEST_SIDE for side in sides)
            and self.cores in get_args(Cores)
            and 0 < self.rank <= 1024
            and 0 <= self.unit <= 60
        )

    def specification(self) -> bytes:
        return canonical(self.to_json()).encode()

    def state_id(self, q: Tensor) -> str:
        """SHA-256 over specification, base digest and Q: equal where, and only where, models are.

        Raises UpdateError where Q has overflowed.
        """
        refuse_overflow(q)
        digest = hashlib.sha256(_STATE + len(self.specification()).to_bytes(8, "little"))
        digest.update(self.specification() + bytes.fromhex(self.base_digest))
        digest.update(q.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def refuse_overflow(q: Tensor) -> None:
    """Raise UpdateError for a state that four bytes a number cannot hold."""
    if q.numel() and int(q.abs().max()) > LARGEST:
        raise UpdateError(
            "a number of the pool's state has outgrown 32 bits", "a smaller unit, or fewer steps"
        )


Integers = np.ndarray[Any, np.dtype[np.int64]]


def draws(label: bytes, run_id: str, participant: bytes, first_step: int, count: int) -> list[int]:
    """One 64-bit integer for each of `count` steps from `first_step` on, the same anywhere.

    The first eight bytes, little-endian, of SHA-256(label, run id, participant, step).
    """
    start = hashlib.sha256(label + bytes.fromhex(run_id))
    start.update(len(participant).to_bytes(4, "little") + participant)
    found = []
    for step in range(first_step, first_step + count):
        digest = start.copy()
        digest.update(step.to_bytes(8, "little"))
        found.append(int.from_bytes(digest.digest()[:8], "little"))
    return found


def directions(run_id: str, participant: bytes, first_step: int, count: int, size: int) -> Integers:
    """The direction k = a * r + b of each of `count` steps from `first_step` on: int64 (count,).

    Both sides derive it and nobody sends it.  `participant` may stand for a whole round, where all
    clients share directions.
    """
    found = draws(_STEP, run_id, participant, first_step, count)
    return np.array([value % size for value in found], np.int64)


def drawn_directions(
    run_id: str, participant: bytes, first_step: int, count: int, weights: Integers
) -> Integers:
    """As `directions`, with probabilities in proportion to integer `weights` (size,)."""
    ends = np.cumsum(weights)
    found = draws(_STEP, run_id, participant, first_step, count)
    places = np.array([value % int(ends[-1]) for value in found], np.int64)
    return np.searchsorted(ends, places, side="right").astype(np.int64)


def fold(q: Tensor, k: Integers, increments: Sequence[int] | Integers) -> None:
    """Add increments[i] at direction k[i] to every core of Q, in place."""
    change = torch.zeros(q.shape[1] * q.shape[2], dtype=torch.int64)
    values = torch.as_tensor(np.asarray(increments, np.int64))
    change.index_add_(0, torch.from_numpy(k), values)
    q += change.view(1, *q.shape[1:])
