"""`meadow bench zo`, speed: what a zeroth-order step and a rebuild cost beside a forward pass.

CPU time of one thread.  What is compared is measured in turns within one run, so that whatever
else the machine does touches all alike; a figure is a median.  `value` is what a case's bound
speaks of, `baseline` the same figure of MeZO's or FedKSeed's own code (see mezo), `ratio` the one
over the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from ..peft_adapters.full_rank import FullRank
from .gossip_bench import rows as gossip_rows
from .mezo import FedKSeed, Mezo, borrowed
from .one_thread import one_thread
from .zo_memory import KINDS, growth_apart
from .zo_setup import FULL, RANK, Setup, Shape
from .zo_sizes import rows as size_rows

REPEATS = 7
SEEDS = 8  # of FedKSeed's rebuild, which takes equally long for each

Row = dict[str, Any]
Times = Mapping[str, Sequence[float]]


def run(
    phase: Callable[[str], None],
    only: Sequence[str] = (),
    repeats: int = REPEATS,
    shape: Shape = FULL,
    rank: int = RANK,
) -> list[Row]:
    """The rows of all speed, size and memory cases, or of those in `only`."""
    found: list[Row] = []
    for part, names in _PARTS.items():
        wanted = [name for name in names if not only or name in only]
        if wanted:
            phase(part)
            rows = _MEASURES[part](repeats, shape, rank)
            found += [row for row in rows if row["case"] in wanted]
    return found


def steps(repeats: int, shape: Shape, rank: int) -> list[Row]:
    """One step over a forward pass and loss of the same 2B rows, with and without the state."""
    setup = Setup(shape, rank)
    own = Mezo(setup.parameters, lr=1e-9, epsilon=1e-3)
    theirs = FedKSeed(setup.parameters, lr=1e-9, epsilon=1e-3)
    with borrowed(setup.parameters), one_thread():
        times = in_turns(
            {
                "step": setup.step,
                "adapted": lambda: _adapted(setup),
                "bare": lambda: setup.loss(copies=2),
                "mezo": lambda: own.step(1, setup.loss),
                "fedkseed": lambda: theirs.step(1, setup.loss),
            },
            repeats,
        )
    told = {"shape": str(shape), "rank": rank, **_milliseconds(times)}
    return [
        _row("step_over_forward", times, "step", "adapted", "mezo", 1.05, **told),
        _row("step_over_bare_forward", times, "step", "bare", "mezo", 1.25, **told)
        | {"fedkseed": _over(times, "fedkseed", "bare")},
    ]


def rebuilds(repeats: int, shape: Shape, rank: int) -> list[Row]:
    """Q and adapter from as many pairs as there are directions, over a forward pass of B rows.

    FedKSeed's rebuild is timed on a few seeds and scaled to as many, and so is the fused one of
    full-rank directions, on as many groups of eight.
    """
    setup = Setup(shape, rank)
    theirs = FedKSeed(setup.parameters, lr=1e-9, epsilon=1e-3)
    pool = setup.pool
    full = FullRank(pool.run_id, pool.base_digest, pool.sites, pool.size)
    with borrowed(setup.parameters), one_thread():
        times = in_turns(
            {
                "forward": setup.loss,
                "rebuild": setup.rebuild,
                "fedkseed": lambda: theirs.rebuild([(k, 1.0) for k in range(SEEDS)]),
                "full_rank": lambda: _fused(setup, full, SEEDS * 8),
            },
            repeats,
        )
    scaled = {
        **times,
        "fedkseed": [t * pool.size / SEEDS for t in times["fedkseed"]],
        "full_rank": [t * pool.size / (SEEDS * 8) for t in times["full_rank"]],
    }
    told = {"shape": str(shape), "directions": pool.size, **_milliseconds(scaled)}
    told["scaled"] = f"FedKSeed's from {SEEDS} seeds, full rank from {SEEDS * 8}"
    return [
        _row("rebuild_over_forward", scaled, "rebuild", "forward", "fedkseed", 0.1, **told),
        _row("full_rank_rebuild", scaled, "full_rank", "forward", "fedkseed", None, **told),
    ]


def memory(repeats: int, shape: Shape, rank: int) -> list[Row]:
    """Growth of peak resident memory, each in processes of its own: the least of two."""
    del repeats
    found = {kind: min(growth_apart(kind, shape, rank) for _ in range(2)) for kind in KINDS}
    value, baseline = (found[kind] / found["forward"] for kind in ("step", "mezo"))
    return [
        {
            "case": "peak_memory_over_forward",
            "value": value,
            "unit": "forward with adapter",
            "baseline": baseline,
            "ratio": value / baseline,
            "bar": 1.1,
            "shape": str(shape),
            **{f"{kind}_bytes": size for kind, size in found.items()},
        }
    ]


def sizes(repeats: int, shape: Shape, rank: int) -> list[Row]:
    """What travels at rank 64; see zo_sizes."""
    del repeats, shape, rank
    return size_rows()


def gossip(repeats: int, shape: Shape, rank: int) -> list[Row]:
    """How a hundred peers come to one state; see gossip_bench."""
    del repeats, shape, rank
    return gossip_rows()


_PARTS = {
    "steps": ("step_over_forward", "step_over_bare_forward"),
    "rebuilds": ("rebuild_over_forward", "full_rank_rebuild"),
    "sizes": ("record_bytes", "join_bytes"),
    "memory": ("peak_memory_over_forward",),
    "gossip": ("gossip_rounds", "gossip_bytes"),
}
CASES = tuple(name for names in _PARTS.values() for name in names)
_MEASURES: dict[str, Callable[[int, Shape, int], list[Row]]] = {
    "steps": steps,
    "rebuilds": rebuilds,
    "sizes": sizes,
    "memory": memory,
    "gossip": gossip,
}


def in_turns(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of every piece of work, each done once per turn, after one turn to warm up.

    Every other turn goes backwards, so that none always finds the caches as another left them.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name in list(work)[:: -1 if turn % 2 else 1]:
            began = time.process_time()
            work[name]()
            if turn:
                times[name].append(time.process_time() - began)
    return times


def _row(
    case: str, times: Times, name: str, over: str, baseline: str, bar: float | None, **told: Any
) -> Row:
    value, theirs = _over(times, name, over), _over(times, baseline, over)
    unit = {"adapted": "forward with adapter", "bare": "bare forward"}.get(over, "forward")
    return {
        "case": case,
        "value": value,
        "unit": unit,
        "baseline": theirs,
        "ratio": value / theirs,
        "bar": bar,
        **told,
    }


def _over(times: Times, name: str, over: str) -> float:
    """A ratio of medians."""
    return median(times[name]) / median(times[over])


def _milliseconds(times: Times) -> Row:
    return {"milliseconds": {name: round(1e3 * median(t), 1) for name, t in times.items()}}


def _adapted(setup: Setup) -> None:
    with setup.adapted():
        setup.loss(copies=2)


def _fused(setup: Setup, full: FullRank, count: int) -> None:
    """FedKSeed's form with signs: every weight read and written once for all directions."""
    integers = {k: k % 127 + 1 for k in range(count)}
    parameters = setup.parameters
    for index, site in enumerate(full.sites):
        full.rebuild(index, parameters[f"{site.name}.base.weight"].data, integers)
