"""What happens to an update between a strategy's two halves; both halves in one object.

A client applies its transforms in order, the coordinator their server halves in reverse.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import UpdateError
from ..peft_adapters.layout import Tree
from .base import Turn, Update
from .error_feedback import Owed


class Transform(ABC):
    """Clip, noise, sparsify, quantise: a change to one update, and its inverse where it has one."""

    feeds_back: ClassVar[bool] = False
    """Whether a later message makes good what `server` cannot restore of this one."""

    @abstractmethod
    def client(self, update: Update, reference: Update, turn: Turn) -> Update:
        """Applied before sending; `reference` is what the client received."""

    def server(self, update: Update, reference: Update, turn: Turn) -> Update:
        """Applied to each update on arrival."""
        return update


@dataclass(frozen=True)
class Clip(Transform):
    """Bound the L2 norm of what a client changes, over all tensors together.

    A tensor that was also received counts as its difference from it, one that was not (a delta,
    a fresh factor) as itself.  A zero change stays zero.
    """

    bound: float

    def client(self, update: Update, reference: Update, turn: Turn) -> Update:
        base = _told_against(update, reference)
        if any(update.tensors[name].shape != tensor.shape for name, tensor in base.items()):
            raise UpdateError(
                "clip_update cannot tell what changed in an adapter of another rank than was sent",
                "[clients] clip_update = 0, or equal ranks",
            )
        change = {n: t - base[n] if n in base else t for n, t in update.tensors.items()}
        norm = float(torch.stack([tensor.double().norm() for tensor in change.values()]).norm())
        if not norm > self.bound:
            return update  # to the bit: base + (t - base) would round
        factor = self.bound / norm
        clipped = {n: factor * t + base[n] if n in base else factor * t for n, t in change.items()}
        return replace(update, tensors=clipped)


@dataclass(frozen=True)
class Cast(Transform):
    """Send changes in a smaller float type; the coordinator sums in float32 or wider.

    Of a tensor that was also received, in the same shape, the difference from it travels: a
    round's change is much smaller than what it changes, so that rounding costs much less.
    """

    dtype: torch.dtype
    feeds_back: ClassVar[bool] = True

    def client(self, update: Update, reference: Update, turn: Turn) -> Update:
        base = _same_shape(update, reference)
        change = {n: t - base[n] if n in base else t for n, t in update.tensors.items()}
        return replace(update, tensors={n: t.to(self.dtype) for n, t in change.items()})

    def server(self, update: Update, reference: Update, turn: Turn) -> Update:
        base = _same_shape(update, reference)
        wide = {name: tensor.float() for name, tensor in update.tensors.items()}
        return replace(
            update, tensors={n: t + base[n] if n in base else t for n, t in wide.items()}
        )


def to_client(
    transforms: Sequence[Transform], update: Update, reference: Update, turn: Turn, owed: Owed
) -> tuple[Update, Owed]:
    """The update as it is sent, with what is owed from before; and what is owed from now on."""
    update = owed.added_to(update, turn.round)
    for transform in transforms:
        meant, update = update, transform.client(update, reference, turn)
        if transform.feeds_back:
            read = transform.server(update, reference, turn)
            owed = owed.after(_lasting(meant, reference), read.tensors, turn.round)
    return update, owed


def to_server(
    transforms: Sequence[Transform], update: Update, reference: Update, turn: Turn
) -> Update:
    for transform in reversed(transforms):
        update = transform.server(update, reference, turn)
    return update


def make_transforms(clip_update: float, wire: str) -> list[Transform]:
    """The transforms that the config's [clients] section asks for."""
    transforms: list[Transform] = []
    if clip_update > 0:
        transforms.append(Clip(clip_update))
    if wire != "float32":
        transforms.append(Cast(getattr(torch, wire)))
    return transforms


def _told_against(update: Update, reference: Update) -> Tree:
    """The received tensors of which an update holds new values; none where it holds changes."""
    if update.notes.get("delta", False):
        return {}
    return {n: reference.tensors[n] for n in update.tensors if n in reference.tensors}


def _same_shape(update: Update, reference: Update) -> Tree:
    base = _told_against(update, reference)
    return {n: t for n, t in base.items() if t.shape == update.tensors[n].shape}


def _lasting(update: Update, reference: Update) -> Tree:
    """The tensors that a later round goes on with; a fresh one's name means another thing then."""
    if update.notes.get("delta", False):
        return update.tensors
    return {name: update.tensors[name] for name in _same_shape(update, reference)}
