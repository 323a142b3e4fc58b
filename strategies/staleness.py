"""Answers that come after their round: what they say of a newer state, and what they weigh.

A client that trained from x_k has found a change d, whatever has become of the state meanwhile.  It
counts from where the state is now, and for less the longer ago its client was asked:

    x_k + d  becomes  x_n + d,   its weight w  becomes  w (1 + s)^-a   with s = n - k rounds late

The weight is FedAsync's polynomial (Xie et al. 2019, "Asynchronous Federated Optimization", arXiv
1903.03934, section 5.2); that changes of different ages are averaged, and not states, is FedBuff's
(Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", arXiv 2106.06639).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .base import Strategy, Update, option


@dataclass(frozen=True, kw_only=True)
class Patient(Strategy):
    """A strategy that can count such answers."""

    sends_changes: ClassVar[bool] = False  # what is sent is a change already, not a state

    late: int = option(0, "answers that come up to so many rounds late count (0: none)", 0)
    late_power: float = option(0.5, "a late one weighs (1 + rounds late)^-this", 0)

    def adopt(self, late: Update, then: Update, now: Update, rounds: int) -> Update:
        """The answer to `then` as one to `now`, which was sent so many rounds afterwards."""
        weight = late.weight * (1 + rounds) ** -self.late_power
        if self.sends_changes:
            return replace(late, weight=weight)
        moved = {
            name: _moved(tensor, then.tensors[name], now.tensors[name])
            for name, tensor in late.tensors.items()
        }
        return replace(late, tensors=moved, weight=weight)


def patience_of(strategy: Strategy) -> int:
    """By how many rounds an answer may be late and still count."""
    return strategy.late if isinstance(strategy, Patient) else 0


def _moved(end: Tensor, start: Tensor, now: Tensor) -> Tensor:
    """now + (end - start), rounded once."""
    return (now.double() + (end.double() - start.double())).float()
