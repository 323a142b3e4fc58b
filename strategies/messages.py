"""Updates, states and turns as bytes: one encoding for wire, journal and memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from ..errors import FormatError, UpdateError
from ..wire import decode, encode, require_finite
from .base import Json, State, Turn, Update

SENT = (torch.float32, torch.bfloat16)
"""What [clients] wire allows.  A finite float64 could be infinite once it is rounded."""
INTEGERS = (torch.int8, torch.int32)
"""What a strategy of integers sends."""


def pack_update(update: Update, **header: Json) -> bytes:
    """An update and what its receiver has to know besides."""
    meta = {"weight": update.weight, "count": update.count, "notes": dict(update.notes), **header}
    return encode(update.tensors, meta)


def unpack_update(data: bytes) -> tuple[Update, dict[str, Json]]:
    """The inverse of `pack_update`, for messages of a coordinator that is trusted with shapes."""
    tensors, meta = decode(data)
    return _update(tensors, meta), meta


def check_contribution(
    data: bytes,
    expect: Mapping[str, tuple[int, ...]],
    who: str,
    types: Sequence[torch.dtype] = SENT,
) -> Update:
    """A client's update, refused with UpdateError or FormatError unless it is exactly what was
    asked for: names, shapes (before any parsing), finite numbers, a sane weight and count."""
    tensors, meta = decode(data, expect=expect)
    update = _update(tensors, meta)
    if not (math.isfinite(update.weight) and 0 <= update.weight <= 1e9) or update.count != 1:
        raise UpdateError(f"{who}: weight {update.weight} or count {update.count} cannot be true")
    if any(tensor.dtype not in types for tensor in update.tensors.values()):
        known = " and ".join(str(dtype).removeprefix("torch.") for dtype in types)
        raise UpdateError(f"{who}: only {known} tensors are accepted")
    require_finite(update.tensors, who)
    return dataclasses.replace(update, sender=who)


def _update(tensors: dict[str, Json], meta: Json) -> Update:
    try:
        weight, count, notes = float(meta["weight"]), int(meta["count"]), dict(meta["notes"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError("a message lacks its weight, count or notes") from error
    return Update(tensors, weight, count, notes)


def pack_state(state: State) -> bytes:
    return encode(state.tensors, dict(state.data))


def unpack_state(data: bytes) -> State:
    tensors, meta = decode(data)
    return State(tensors, meta)


def turn_to_json(turn: Turn) -> Json:
    return dataclasses.asdict(turn)


def turn_from_json(fields: Json) -> Turn:
    try:
        return Turn(**{**fields, "cohort": tuple(fields["cohort"])})
    except (KeyError, TypeError) as error:
        raise FormatError("a message does not say whose turn it is") from error
