"""What happens to an update between a strategy's two halves; both halves in one object.

A client applies its transforms in order, the coordinator their server halves in reverse.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import UpdateError
from .base import Turn, Update


class Transform(ABC):
    """Clip, noise, sparsify, quantise: a change to one update, and its inverse where it has one."""

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
        base = {
            name: reference.tensors[name]
            for name, tensor in update.tensors.items()
            if name in reference.tensors and not update.notes.get("delta", False)
        }
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
    """Send in a smaller float type; the coordinator sums in float32 or wider."""

    dtype: torch.dtype

    def client(self, update: Update, reference: Update, turn: Turn) -> Update:
        return replace(update, tensors={n: t.to(self.dtype) for n, t in update.tensors.items()})

    def server(self, update: Update, reference: Update, turn: Turn) -> Update:
        return replace(update, tensors={n: t.float() for n, t in update.tensors.items()})


def to_client(
    transforms: Sequence[Transform], update: Update, reference: Update, turn: Turn
) -> Update:
    for transform in transforms:
        update = transform.client(update, reference, turn)
    return update


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
