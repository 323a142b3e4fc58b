"""A is shared; B never leaves its client."""

from __future__ import annotations

from toy import RANK, SITES, ToyFederation, apart

from meadow.strategies.averaging import select, under
from meadow.strategies.registry import make

STRATEGY = make("fedsa_lora", {}, SITES, RANK)


def test_b_is_in_no_message_and_not_in_the_state() -> None:
    federation = ToyFederation(STRATEGY)
    for number in (1, 2, 3):
        federation.round(number)
        for update in (federation.sent, *federation.updates):
            assert {name.rpartition(".")[2] for name in update.tensors} == {"lora_A"}
        held = select(under("x", federation.state.tensors), ("lora_B",))
        assert all(not tensor.any() for tensor in held.values())


def test_each_client_goes_on_with_its_own_b() -> None:
    federation = ToyFederation(STRATEGY).run(2)
    sent = STRATEGY.broadcast(federation.state, federation.turn(3))
    own = {
        name: STRATEGY.own(sent, memory, federation.turn(3, name)).adapter
        for name, memory in federation.memories.items()
    }
    for name, tree in own.items():
        kept = under("own", federation.memories[name].tensors)
        assert apart(select(tree, ("lora_B",)), kept) == 0
        assert apart(select(tree, ("lora_A",)), sent.tensors) == 0
    assert apart(own["ada"], own["bob"]) > 1e-3


def test_both_factors_are_trained() -> None:
    federation = ToyFederation(STRATEGY).run(1)
    start = under("x", STRATEGY.init(1).tensors)
    assert all(not t.equal(start[name]) for name, t in federation.updates[0].tensors.items())
    own = under("own", federation.memories["ada"].tensors)
    assert all(bool(tensor.any()) for tensor in own.values())


def test_optimiser_state_is_kept_beside_b() -> None:
    federation = ToyFederation(make("fedsa_lora", {"keep_optimizer": True}, SITES, RANK)).run(1)
    memory = federation.memories["ada"]
    assert under("own", memory.tensors) and under("optimizer", memory.tensors)
