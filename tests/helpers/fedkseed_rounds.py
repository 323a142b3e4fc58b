"""Rounds of FedKSeed by hand: a strategy over toy layers, bytes that clients send, their work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from toy import SITES

from meadow.client.task import drive
from meadow.peft_adapters.pool import directions
from meadow.strategies.base import Probe, Probed, Request, State, Turn, Update
from meadow.strategies.fedkseed import FedKSeed
from meadow.strategies.registry import make
from meadow.strategies.zeroth_order import run_id_of

RANK, SEED, STEPS = 3, 5, 4
TURN = Turn(2, 6, SEED, STEPS, 6 * STEPS)
RUN = run_id_of(SEED)
FRESH = State()
FIXED: dict[str, Any] = {"scale": -6, "adaptive_scale": False, "gain": 1.0}


def strategy(**options: Any) -> FedKSeed:
    return cast(FedKSeed, make("fedkseed", {**FIXED, **options}, SITES, RANK))


def total(strategy: FedKSeed, sent: dict[str, tuple[list[int], float]]) -> Update:
    """What the coordinator has once these bytes and weights have arrived."""
    reducer = strategy.reducer(TURN)
    for name, (bytes_, weight) in sent.items():
        tensors = {"bytes": torch.tensor(bytes_, dtype=torch.int8)}
        reducer.fold(Update(tensors, weight, sender=name))
    return reducer.total()


def stepped(strategy: FedKSeed, sent: dict[str, tuple[list[int], float]], **more: Any) -> State:
    state = strategy.init(SEED)
    state = State({**state.tensors, **more}, state.data)
    return strategy.step(state, total(strategy, sent), TURN)


def by_direction(pairs: Iterable[tuple[int, float]]) -> np.ndarray[Any, Any]:
    q = np.zeros(RANK * RANK)
    for k, value in pairs:
        q[k] += value
    return q


def own_directions(name: str) -> list[int]:
    """Each client's, of round 2: its measurements 4 to 7 of the run."""
    return list(directions(RUN, name.encode(), STEPS, STEPS, RANK * RANK).tolist())


SENT: dict[str, tuple[list[int], float]] = {
    "ada": ([3, -127, 0, 8], 30.0), "bob": ([1, 1, 1, 1], 10.0), "eve": ([-5, 100, 2, 7], 20.0),
}  # fmt: skip


def worked(
    made: FedKSeed, sent: Update, memory: State = FRESH, turn: Turn = TURN
) -> tuple[tuple[Update, State], list[Probe]]:
    """A client's round; its losses depend on the direction alone."""
    asked: list[Probe] = []

    def respond(request: Request) -> Probed:
        assert isinstance(request, Probe)
        asked.append(request)
        pairs = [(1 + k / 2**13, 1.0) for k in request.directions]
        return Probed(torch.tensor(pairs, dtype=torch.float64), 12, 7)

    return drive(made.work(sent, memory, replace(turn, client="ada")), respond), asked
