"""FedKSeed's client: what it sends and remembers, over rounds and absences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fedkseed_rounds import (
    RUN,
    SEED,
    SENT,
    STEPS,
    TURN,
    own_directions,
    strategy,
    total,
    worked,
)

from meadow.peft_adapters.pool import directions
from meadow.strategies.base import Loss, State
from meadow.strategies.messages import (
    pack_update,
)


def test_a_client_sends_bytes_and_remembers_its_steps() -> None:
    made = strategy()
    sent = made.broadcast(made.init(SEED), TURN)
    (update, memory), asked = worked(made, sent, State(data={"steps": 9}))
    assert [probe.step for probe in asked] == [9, 10, 11, 12]
    assert [probe.directions[0] for probe in asked] == own_directions("ada")
    assert all(probe.epsilon == 2.0**-10 for probe in asked)
    assert list(update.tensors) == ["bytes"] and update.weight == 12.0
    exact = np.array(own_directions("ada")) / 2**13 * 2**9 * 2**6  # g in units of 2^-6
    assert np.abs(update.tensors["bytes"].numpy() - exact).max() < 1
    assert memory.data == {"steps": 13}
    assert update.notes.keys() == {"loss", "examples", "tokens", "saturated", "lost"}


def test_what_a_client_applied_is_what_the_coordinator_applies() -> None:
    """One client of gain 1: its own Q after the round is the coordinator's."""
    made = strategy()
    state = made.init(SEED)
    sent = made.broadcast(state, TURN)
    (update, _), asked = worked(made, sent)
    state = made.step(state, total(made, {"ada": (update.tensors["bytes"].tolist(), 4.0)}), TURN)
    last = asked[-1].q.clone()
    last.view(-1)[asked[-1].directions[0]] -= int(update.tensors["bytes"][-1]) * 1678
    assert torch.equal(last, state.tensors["q"]) and bool(last.any())


@pytest.mark.parametrize("options", [{}, {"importance": True}, {"combine": "median"}])
def test_a_client_that_was_away_needs_one_message(options: dict[str, Any]) -> None:
    """Nothing of the rounds between is kept or asked for: bytes are a function of the message."""
    made = strategy(momentum=0.9, **options)
    state, size = made.init(SEED), 0
    for number in range(1, 201):
        turn = replace(TURN, round=number, rounds=1000)
        sent = made.broadcast(state, turn)
        size = size or len(pack_update(sent))
        state = made.step(state, total(made, SENT), turn)
    turn = replace(TURN, round=201, rounds=1000)
    sent = made.broadcast(state, turn)
    assert len(pack_update(sent)) <= size + 64 and sent.tensors["q"].dtype == torch.int32
    here, _ = worked(made, sent, State(data={"steps": 3}), turn)
    fresh, asked = worked(strategy(momentum=0.9, **options), sent, State(data={"steps": 3}), turn)
    assert torch.equal(here[0].tensors["bytes"], fresh[0].tensors["bytes"])
    assert torch.equal(asked[0].q, state.tensors["q"])


def test_rounds_have_directions_of_their_own() -> None:
    made = strategy()
    sent = made.broadcast(made.init(SEED), TURN)
    found = [
        made.along(sent, replace(TURN, round=number, client="ada"), 0, STEPS).tolist()
        for number in (1, 2, 3)
    ]
    whole = directions(RUN, b"ada", 0, 3 * STEPS, 9).tolist()
    assert [k for part in found for k in part] == whole


def test_several_directions_a_step() -> None:
    """Twice the bytes; the step is their mean: half the multiplier."""
    made = strategy(directions=2)
    sent = made.broadcast(made.init(SEED), TURN)
    assert sent.notes["multiplier"] == round(0.5e-4 * 2**24)
    (update, _), asked = worked(made, sent)
    assert update.tensors["bytes"].shape == (2 * STEPS,)
    assert made.template(sent, TURN) == {"bytes": (2 * STEPS,)}
    k = directions(RUN, b"ada", 2 * STEPS, 2 * STEPS, 9).tolist()
    assert [at for probe in asked for at in probe.directions] == k


def test_the_export_is_the_pools_adapter() -> None:
    made = replace(strategy(), scaling=4.0)
    state = State({"q": torch.arange(9).view(1, 3, 3)}, made.init(SEED).data)
    tree = made.pool(SEED).adapter(state.tensors["q"], 4.0)
    found = made.export(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in tree.items())
    own = made.own(made.broadcast(state, TURN), State(), TURN)
    assert isinstance(own, Loss) and own.side is None
    assert all(torch.equal(own.adapter[name], tensor) for name, tensor in tree.items())
