"""Error feedback: what rounding kept back from one message goes with the next.

    send   m = round(u + e)
    keep   e = u + e - m

so that over many rounds a client's messages add up to what it meant to send, but for the last e.
Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Karimireddy et al. 2019 (arXiv 1901.09847).
The residual stays with the client, in the memory that its outbox records together with the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ..peft_adapters.layout import Tree
from .averaging import put, under
from .base import Json, State, Update

FORGOTTEN_AFTER = 10
"""Rounds.  A client that was away for longer owes nothing: the adapter has moved on from what its
residual was a change of."""

_TENSORS, _ROUND = "owed", "owed_in"


@dataclass(frozen=True)
class Owed:
    """What a client has yet to send of what it trained, by tensor (float32), and since when."""

    tensors: Tree = field(default_factory=dict)
    round: int = 0

    def added_to(self, update: Update, round: int) -> Update:
        """The update with what is owed, unless that is too old to be true."""
        if not self.tensors or round - self.round > FORGOTTEN_AFTER:
            return update
        owed = {name: t for name, t in self.tensors.items() if name in update.tensors}
        return replace(
            update,
            tensors={**update.tensors, **{n: update.tensors[n] + t for n, t in owed.items()}},
        )

    def after(self, meant: Tree, read: Tree, round: int) -> Owed:
        """The residual once a message that meant one thing is read as another.

        Tensors that did not travel in this round stay owed.  A training that diverged leaves
        nothing: what is not a number must not reach a later message.
        """
        kept = self.tensors if round - self.round <= FORGOTTEN_AFTER else {}
        lost = {name: tensor - read[name] for name, tensor in meant.items()}
        owed = {n: t for n, t in {**kept, **lost}.items() if bool(torch.isfinite(t).all())}
        return Owed(owed, round) if owed else Owed()


def with_owed(memory: State, owed: Owed) -> State:
    """A strategy's memory and what is owed, in one state."""
    if not owed.tensors:
        return memory
    data: Mapping[str, Json] = {**memory.data, _ROUND: owed.round}
    return State({**memory.tensors, **put(_TENSORS, owed.tensors)}, data)


def without_owed(state: State) -> tuple[State, Owed]:
    """The inverse of `with_owed`."""
    owed = under(_TENSORS, state.tensors)
    if not owed:
        return state, Owed()
    tensors = {n: t for n, t in state.tensors.items() if not n.startswith(f"{_TENSORS}/")}
    data = {key: value for key, value in state.data.items() if key != _ROUND}
    return State(tensors, data), Owed(owed, int(state.data[_ROUND]))
