"""Random batches through the slots of one layer, against their sums in float64.

What no token uses is NaN, so that reading it shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from ..peft_adapters.layout import Site
from ..peft_adapters.serving_slots import Packed, Place, Segment, ServingSlots

SLOTS = 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of a token's outputs, as `gap` has it."""


@dataclass(frozen=True)
class Case:
    """A layer and a batch; slots are below SLOTS."""

    columns: int
    rows: int
    decode: tuple[Place | None, ...]
    segments: tuple[Segment, ...]
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def places(self) -> list[Place | None]:
        """Of each token, in the batch's own order."""
        prompts = [segment.place for segment in self.segments for _ in range(segment.length)]
        return [*self.decode, *prompts]

    def drawn(self, what: int, *shape: int) -> Tensor:
        """Random numbers of the case's type, (...)."""
        random = torch.Generator().manual_seed(1000 * self.seed + what)
        return torch.randn(shape, generator=random).to(self.dtype)

    def inputs(self) -> Tensor:
        """(tokens, columns)."""
        return self.drawn(0, len(self.places), self.columns)

    def weight(self) -> Tensor:
        """(rows, columns)."""
        return self.drawn(1, self.rows, self.columns) / sqrt(self.columns)

    def factors(self, place: Place) -> tuple[Tensor, Tensor]:
        """A (r, columns) and B^T (r, rows) in a slot."""
        seed = 2 + 2 * (SLOTS * place.rank + place.slot)
        a = self.drawn(seed, place.rank, self.columns) / sqrt(self.columns)
        return a, self.drawn(seed + 1, place.rank, self.rows) / sqrt(place.rank)


def exact(case: Case) -> Tensor:
    """The outputs (tokens, rows), in float64."""
    x = case.inputs().double()
    y = x @ case.weight().double().T
    for token, place in enumerate(case.places):
        if place is not None:
            a, b = case.factors(place)
            y[token] += (a.double() @ x[token]) @ b.double()
    return y


@torch.inference_mode()
def served(case: Case, device: str, kernels: bool | None = None) -> Tensor:
    """The outputs as `ServingSlots` has them computed, as `exact` gives them."""
    linear = nn.Linear(case.columns, case.rows, bias=False, device=device, dtype=case.dtype)
    linear.weight.copy_(case.weight())
    model, site = nn.Sequential(linear), Site("0", case.rows, case.columns)
    slots = ServingSlots(model, [site], SLOTS, case.dtype, kernels)
    _fill(slots, case)
    order = slots.compose(case.decode, case.segments)
    tokens = _token_order(case, order.decode, order.segments)
    y: Tensor = model(case.inputs()[tokens].to(device))
    found = torch.empty(len(tokens), case.rows, dtype=torch.float64)
    found[tokens] = y.cpu().double()
    return found


def gap(found: Tensor, wanted: Tensor) -> float:
    """The largest distance of a token's outputs, relative to their norm; NaN stays NaN.

    Outputs are sums of about unit variance: a norm below that is chance, and no measure of errors.
    """
    norms = wanted.norm(dim=1).clamp(min=sqrt(wanted.shape[1]))
    return float(((found - wanted).norm(dim=1) / norms).max())


def _fill(slots: ServingSlots, case: Case) -> None:
    used = {place for place in case.places if place is not None}
    for rank in {place.rank for place in used}:
        for place in (Place(rank, slot) for slot in range(SLOTS)):
            a, b = (factor.flatten() for factor in case.factors(place))
            if place not in used:
                a, b = a * torch.nan, b * torch.nan
            slots.write(place, Packed(rank, a, b, frozenset({"0"})))


def _token_order(case: Case, decode: tuple[int, ...], segments: tuple[int, ...]) -> list[int]:
    """The batch's tokens in the order that `compose` asks for."""
    starts, start = [], len(case.decode)
    for segment in case.segments:
        starts.append(start)
        start += segment.length
    tokens = list(decode)
    for index in segments:
        tokens += range(starts[index], starts[index] + case.segments[index].length)
    return tokens
