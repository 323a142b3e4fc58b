"""A dry run: the answer that a message would get, made without recording or sending it."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ..strategies.base import Strategy, Turn, Update
from ..strategies.messages import pack_update, turn_to_json, unpack_update
from ..terms import Terms
from .outbox import Outbox


class DryOutbox(Outbox):
    """Knows all that the outbox holds, and keeps nothing."""

    def record(self, round: int, payload: bytes, memory: bytes) -> None:
        """Nothing is recorded."""

    def settle(self, before_round: int) -> None:
        """Nothing is deleted."""


def first_message(strategy: Strategy, terms: Terms, name: str) -> bytes:
    """What round 1 sends to a participant, as far as the terms tell: the cohort is its alone."""
    rounds, steps = terms.config.rounds, terms.config.clients.steps
    total = math.ceil(rounds.count * rounds.fraction) * steps
    turn = Turn(1, rounds.count, rounds.seed, steps, total, name, (name,))
    sent = strategy.broadcast(strategy.init(rounds.seed), turn)
    header = {"run": terms.run, "config": terms.config_digest}
    return pack_update(sent, turn=turn_to_json(turn), **header)


def describe(answer: bytes) -> dict[str, Any]:
    """What an answer holds, for the log: how many numbers of which types, and its notes."""
    update, _ = unpack_update(answer)
    return {
        "tensors": len(update.tensors),
        "types": dict(Counter(_type(tensor) for tensor in update.tensors.values())),
        "numbers": sum(tensor.numel() for tensor in update.tensors.values()),
        "weight": update.weight,
        "notes": {key: _brief(value) for key, value in update.notes.items()},
    }


def list_tensors(answer: bytes) -> list[dict[str, Any]]:
    """Name, type and shape of everything that would be sent."""
    update: Update = unpack_update(answer)[0]
    return [
        {"name": name, "type": _type(tensor), "shape": list(tensor.shape)}
        for name, tensor in update.tensors.items()
    ]


def _type(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _brief(value: object) -> object:
    """A number as it is; of anything longer, what it is."""
    if value is None or isinstance(value, int | float):
        return value
    size = len(value) if isinstance(value, str | list | dict) else 0
    return f"{type(value).__name__} of {size}"
