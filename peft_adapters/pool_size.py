"""Whether a pool's rank suits a model: what a run is told before it begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .layout import Site

_WIDEST = 4  # of the hidden size, the share (1 / 4) beyond which a pool is hardly low-rank
_DENSITY = 8  # directions per hidden unit below which quality was seen to suffer


def warnings_of(rank: int, sites: Sequence[Site]) -> list[str]:
    """What a run with a pool of this rank should be told before it begins.

    The hidden size is the most frequent dimension of the adapted matrices.  The second bound is a
    rule of thumb from two small models: at r^2 = 4 times the hidden size 83 % of the improvement
    with fresh directions was left, at 10 times all of it.
    """
    dimensions = Counter(n for site in sites for n in (site.rows, site.columns))
    hidden = max(dimensions, key=lambda n: (dimensions[n], n))
    found = []
    if rank * _WIDEST > hidden:
        found.append(
            f"rank {rank} is more than a quarter of the hidden size {hidden}: a step and the"
            " adapter cost nearly as much as the whole matrices"
        )
    if rank * rank < _DENSITY * hidden:
        found.append(
            f"rank {rank} gives {rank * rank} directions, few for a hidden size of {hidden}:"
            f" expect to learn less than with [model] rank = {_enough(hidden)}"
        )
    return found


def _enough(hidden: int) -> int:
    """The smallest power of two whose square has the density."""
    rank = 1
    while rank * rank < _DENSITY * hidden:
        rank *= 2
    return rank
