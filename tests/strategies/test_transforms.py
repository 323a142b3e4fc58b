"""Clip and cast: what they promise of any update."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import adapter

from meadow.errors import UpdateError
from meadow.peft_adapters.layout import Tree
from meadow.strategies.base import Turn, Update
from meadow.strategies.error_feedback import Owed
from meadow.strategies.transforms import Cast, Clip, make_transforms, to_client, to_server

TURN = Turn(1, 1, 1)
NOTHING = Update({})


def size(tree: Tree, base: Tree | None = None) -> float:
    change = [t.double() - (base or {}).get(n, torch.zeros(())) for n, t in tree.items()]
    return float(torch.cat([part.flatten() for part in change]).norm())


def moved(seed: int, scale: float) -> Tree:
    return {name: t + scale * adapter(seed + 50)[name] for name, t in adapter(seed).items()}


bounds = st.floats(1e-3, 1e3)
scales = st.floats(0.0, 100.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), bounds, scales)
def test_a_change_is_bounded_and_keeps_its_direction(seed: int, bound: float, scale: float) -> None:
    sent, update = Update(adapter(seed)), Update(moved(seed, scale), 3.0, notes={"loss": 1.0})
    clipped = Clip(bound).client(update, sent, TURN)
    before, after = size(update.tensors, sent.tensors), size(clipped.tensors, sent.tensors)
    assert after <= bound * (1 + 1e-5) + 1e-5
    assert after == pytest.approx(min(before, bound), rel=1e-3, abs=1e-5)
    assert (clipped.weight, clipped.notes) == (3.0, {"loss": 1.0})
    if before <= bound:
        assert all(torch.equal(clipped.tensors[n], t) for n, t in update.tensors.items())
    else:
        for name, tensor in clipped.tensors.items():
            start, share = sent.tensors[name], bound / before
            expected = start + share * (update.tensors[name] - start)
            assert torch.allclose(tensor, expected, rtol=1e-4, atol=1e-5)


def test_no_change_stays_none() -> None:
    sent = Update(adapter(1))
    clipped = Clip(1e-6).client(Update(dict(sent.tensors)), sent, TURN)
    assert all(torch.equal(clipped.tensors[name], t) for name, t in sent.tensors.items())
    zeros = Update({"w": torch.zeros(3)}, notes={"delta": True})
    assert not Clip(1e-6).client(zeros, NOTHING, TURN).tensors["w"].any()


def test_a_delta_is_its_own_change() -> None:
    """Its names are those of what was received, which it must not be compared with."""
    update = Update(adapter(2), notes={"delta": True})
    clipped = Clip(0.5).client(update, Update(adapter(1)), TURN)
    assert size(clipped.tensors) == pytest.approx(0.5, rel=1e-5)


def test_what_was_not_received_counts_whole() -> None:
    update = Update(adapter(2))
    clipped = Clip(0.5).client(update, Update({"side/block.one.lora_A": torch.ones(2)}), TURN)
    assert size(clipped.tensors) == pytest.approx(0.5, rel=1e-5)


def test_an_adapter_of_another_rank_has_no_change_to_bound() -> None:
    with pytest.raises(UpdateError, match="another rank than was sent .*clip_update = 0"):
        Clip(1.0).client(Update(adapter(1, 1)), Update(adapter(1, 3)), TURN)


def test_a_cast_travels_small_and_is_summed_wide() -> None:
    update = Update(adapter(1), 2.0, notes={"loss": 1.0})
    cast = Cast(torch.bfloat16)
    sent = cast.client(update, NOTHING, TURN)
    assert {tensor.dtype for tensor in sent.tensors.values()} == {torch.bfloat16}
    arrived = cast.server(sent, NOTHING, TURN)
    assert {tensor.dtype for tensor in arrived.tensors.values()} == {torch.float32}
    assert (arrived.weight, arrived.notes) == (2.0, {"loss": 1.0})
    for name, tensor in update.tensors.items():
        assert torch.allclose(arrived.tensors[name], tensor, rtol=2**-8, atol=0)
        assert torch.equal(arrived.tensors[name], tensor.bfloat16().float())


def test_a_client_goes_forwards_and_the_coordinator_backwards() -> None:
    chain = make_transforms(0.5, "bfloat16")
    assert [type(part) for part in chain] == [Clip, Cast]
    sent, _ = to_client(chain, Update(adapter(2)), NOTHING, TURN, Owed())
    assert {tensor.dtype for tensor in sent.tensors.values()} == {torch.bfloat16}
    arrived = to_server(chain, sent, NOTHING, TURN)
    assert size(arrived.tensors) == pytest.approx(0.5, rel=2**-8)
    assert {tensor.dtype for tensor in arrived.tensors.values()} == {torch.float32}


def test_by_default_nothing_happens() -> None:
    assert make_transforms(0.0, "float32") == []
    update = Update(adapter(1))
    sent, owed = to_client([], update, NOTHING, TURN, Owed())
    assert to_server([], sent, NOTHING, TURN) is update and owed == Owed()
