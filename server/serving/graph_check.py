"""Whether recorded steps are to be trusted: found out once, before anybody is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...errors import ModelError
from ...peft_adapters.serving_slots import SMALLEST_RANK, Packed, Place, ServingSlots
from ...peft_adapters.slot_group import Factors
from .decode_graphs import DecodeGraphs
from .kv_rows import Row
from .work import Work

Compute = Callable[[Sequence[Work], Sequence[Work]], tuple[list[Work], Tensor]]
"""`ModelRunner.run` without recordings."""

_HINT = "serve it without --cuda-graphs"
_LONGEST = 9  # tokens of a text


def agree(own: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are equal but for what another order of sums does to them in `dtype`."""
    bound = (1e-3 if dtype == torch.float32 else 0.1) * max(1.0, float(own.abs().max()))
    return float((own - found).abs().max()) <= bound


def check_graphs(graphs: DecodeGraphs, rows: Sequence[Row], compute: Compute, base: str) -> None:
    """Compare steps of rows of the base and of adapters, which are recorded and then replayed.

    `rows` are empty.  The adapters are random and gone afterwards, as is what was recorded.
    Raises ModelError where recorded logits are others, and AdapterError where there is no memory.
    """
    random = torch.Generator().manual_seed(0)
    try:
        places = _filled(graphs.slots, random)
        _read(rows, graphs, compute, random)
        for batch in _batches(rows, [*places, None], graphs, random):
            if not _agree(batch, graphs, compute):
                raise ModelError(f"{base}: recorded steps have other logits", _HINT)
    except (TypeError, LookupError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{base}: its steps cannot be recorded: {reason}", _HINT) from error
    finally:
        graphs.forget()
        graphs.slots.drop(SMALLEST_RANK)


def _agree(batch: Sequence[Work], graphs: DecodeGraphs, compute: Compute) -> bool:
    """Both write the same keys and values, so that either may come first."""
    asked, computed = compute(batch, [])
    replayed = graphs.run(batch, at_once=True)
    assert replayed is not None
    own = computed[[asked.index(work) for work in batch]]
    return agree(own, replayed, graphs.kv.data.dtype)


def _filled(slots: ServingSlots, random: torch.Generator) -> list[Place]:
    """Small random adapters at all layers, in two slots if there are so many."""
    places = [Place(SMALLEST_RANK, slot) for slot in range(min(2, slots.count))]
    for place in places:
        own = Factors(slots.sites, place.rank, 1, torch.device("cpu"), slots.dtype)
        for a, b in zip(own.a_of, own.b_of, strict=True):
            a.normal_(std=a.shape[-1] ** -0.5, generator=random)
            b.normal_(std=0.1, generator=random)
        modules = frozenset(site.name for site in slots.sites)
        slots.write(place, Packed(place.rank, own.a[0], own.b[0], modules))
    return places


def _read(
    rows: Sequence[Row], graphs: DecodeGraphs, compute: Compute, random: torch.Generator
) -> None:
    """Texts of different lengths, after which a token has room."""
    most = min(_LONGEST, graphs.kv.length - 1)
    for at, row in enumerate(rows):
        text = _drawn(most - at % most, graphs, random)
        compute([], [Work(row, None, text)])
        row.tokens += text


def _batches(
    rows: Sequence[Row],
    places: Sequence[Place | None],
    graphs: DecodeGraphs,
    random: torch.Generator,
) -> Iterator[list[Work]]:
    """Rows that take turns with the adapters, and of which some are missing.

    The last one never is: most of these are steps of one kind, of which one recording serves all.
    """
    for turn in range(len(places) + 1):
        yield [
            Work(row, places[(at + turn) % len(places)], _drawn(1, graphs, random))
            for at, row in enumerate(rows)
            if at == len(rows) - 1 or turn == 0 or (at + turn) % 3
        ]


def _drawn(count: int, graphs: DecodeGraphs, random: torch.Generator) -> list[int]:
    drawn: list[int] = torch.randint(graphs.logits.shape[1], (count,), generator=random).tolist()
    return drawn
