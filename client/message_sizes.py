"""How many bytes a strategy's messages have, measured before anybody has trained.

A strategy packs its real messages, with random answers in the trainer's place: sizes depend on
shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..strategies.base import Answer, Loss, Probe, Probed, Request, State, Strategy, Trained, Turn
from ..strategies.error_feedback import Owed
from ..strategies.messages import pack_update, turn_to_json
from ..strategies.transforms import Transform, to_client
from .task import drive


def measured_bytes(
    strategy: Strategy,
    clients: int,
    rounds: int,
    steps: int,
    transforms: Sequence[Transform] = (),
) -> tuple[list[int], list[int]]:
    """(up, down): bytes that one of so many clients sends and receives in each of the rounds."""
    state, memories = strategy.init(1), [State() for _ in range(clients)]
    generator = torch.Generator().manual_seed(1)
    up, down = [], []
    for number in range(1, rounds + 1):
        turn = Turn(number, rounds, 1, steps)
        sent, reducer = strategy.broadcast(state, turn), strategy.reducer(turn)
        for client, memory in enumerate(memories):
            own = Turn(number, rounds, 1, steps, client=f"client-{client}")
            work = strategy.work(sent, memory, own)
            update, memories[client] = drive(work, lambda asked: _moved(asked, generator))
            reducer.fold(replace(update, sender=own.client))
        down.append(len(pack_update(sent, turn=turn_to_json(own))))
        travels, _ = to_client(transforms, update, sent, own, Owed())
        up.append(len(pack_update(travels)))
        state = strategy.step(state, reducer.total(), turn)
    return up, down


def _moved(request: Request, generator: torch.Generator) -> Answer:
    """A training that moved every number somewhere, or losses that a direction changed."""
    assert not isinstance(request, Loss)
    if isinstance(request, Probe):
        shape = (len(request.directions), 2)
        losses = 1 + 1e-3 * torch.rand(shape, generator=generator, dtype=torch.float64)
        return Probed(losses, examples=100, tokens=1000)
    adapter = {
        name: tensor + torch.randn(tensor.shape, generator=generator)
        if name.endswith(request.train) else tensor
        for name, tensor in request.adapter.items()
    }  # fmt: skip
    return Trained(adapter, {}, loss=1.0, examples=100, tokens=1000)
