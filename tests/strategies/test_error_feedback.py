"""Over many rounds, what a client sent adds up to what it meant, whatever rounding lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import adapter

from meadow.peft_adapters.layout import Tree
from meadow.strategies.base import State, Turn, Update
from meadow.strategies.error_feedback import FORGOTTEN_AFTER, Owed, with_owed, without_owed
from meadow.strategies.messages import pack_state, unpack_state
from meadow.strategies.transforms import Cast, Transform, make_transforms, to_client, to_server

WIRE = make_transforms(0.0, "bfloat16")


def turn(round: int) -> Turn:
    return Turn(round, 100, 1)


def noise(seed: int, like: Tree, scale: float) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(t.shape, generator=generator) for n, t in like.items()}


def gap(one: Tree, other: Tree) -> float:
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-6, 1e-3, 1.0, 1e3]), st.booleans())
def test_the_errors_of_thirty_rounds_are_the_last_ones(
    seed: int, scale: float, delta: bool
) -> None:
    """Against an independent sum in float64 of everything that training changed."""
    start = adapter(seed)
    received = {name: tensor.clone() for name, tensor in start.items()}
    meant = {name: tensor.double() for name, tensor in start.items()}
    owed = Owed()
    for round in range(1, 31):
        change = noise(31 * seed + round, start, scale)
        meant = {n: t + change[n].double() for n, t in meant.items()}
        notes = {"delta": True} if delta else {}
        new = change if delta else {n: t + change[n] for n, t in received.items()}
        told, then = Update(new, notes=notes), Update(received)
        sent, owed = to_client(WIRE, told, then, turn(round), owed)
        assert {tensor.dtype for tensor in sent.tensors.values()} == {torch.bfloat16}
        read = to_server(WIRE, sent, then, turn(round)).tensors
        received = {n: received[n] + t for n, t in read.items()} if delta else dict(read)
    largest = 30 * scale + max(float(t.abs().max()) for t in start.values())
    assert gap(received, meant) <= 2**-8 * 8 * scale + 60 * 2**-24 * largest
    assert gap({n: t + owed.tensors[n] for n, t in received.items()}, meant) <= (
        60 * 2**-24 * (largest + 5 * scale)
    )


def test_what_always_rounds_away_arrives_all_the_same() -> None:
    """Half a unit in the last place, each round: without feedback it would never be sent."""
    received, owed = {"w": torch.zeros(2)}, Owed()
    for round in range(1, 65):
        change = torch.tensor([1.0, 1 + 2**-10])  # bfloat16 knows no number between 1 and 1 + 2^-7
        told = Update({"w": received["w"] + change})
        sent, owed = to_client(WIRE, told, Update(received), turn(round), owed)
        received = dict(to_server(WIRE, sent, Update(received), turn(round)).tensors)
    assert received["w"].tolist() == [64.0, pytest.approx(64 + 64 * 2**-10, abs=2**-8)]
    assert float(received["w"][1]) > 64


def test_a_change_is_rounded_not_what_it_changes() -> None:
    start = {"w": torch.full((4,), 1000.0)}
    told = Update({"w": start["w"] + 0.25})
    sent, owed = to_client(WIRE, told, Update(start), turn(1), Owed())
    assert sent.tensors["w"].tolist() == [0.25] * 4  # 1000.25 itself has no bfloat16
    assert to_server(WIRE, sent, Update(start), turn(1)).tensors["w"].tolist() == [1000.25] * 4
    assert owed.tensors["w"].tolist() == [0.0] * 4


def test_fresh_tensors_owe_nothing() -> None:
    """Another round's tensor of the same name is another thing: another start, or another rank."""
    fresh = Update(adapter(1))
    _, owed = to_client(WIRE, fresh, Update({"side/w": torch.ones(2)}), turn(1), Owed())
    assert owed == Owed()
    _, owed = to_client(WIRE, Update(adapter(1, 1)), Update(adapter(1, 3)), turn(1), Owed())
    assert owed == Owed()


def test_a_factor_that_rests_stays_owed() -> None:
    start = Update({"a": torch.ones(1), "b": torch.ones(1)})
    first = Update({"b": start.tensors["b"] + (1 + 2**-9)})
    _, owed = to_client(WIRE, first, start, turn(1), Owed())
    assert owed.tensors["b"].tolist() == [2**-9]
    _, later = to_client(WIRE, Update({"a": torch.full((1,), 2.0)}), start, turn(2), owed)
    assert later.tensors["b"].tolist() == [2**-9] and later.tensors["a"].tolist() == [0.0]


@pytest.mark.parametrize("away", [FORGOTTEN_AFTER, FORGOTTEN_AFTER + 1])
def test_what_was_owed_long_ago_is_forgotten(away: int) -> None:
    start, owed = Update({"w": torch.zeros(1)}), Owed({"w": torch.ones(1)}, 3)
    sent, after = to_client(WIRE, Update({"w": torch.zeros(1)}), start, turn(3 + away), owed)
    assert sent.tensors["w"].tolist() == [1.0 if away <= FORGOTTEN_AFTER else 0.0]
    assert after == Owed({"w": torch.zeros(1)}, 3 + away)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_a_round_that_diverged_leaves_nothing_behind(bad: float) -> None:
    """The coordinator refuses that message; the next one must not repeat its fault."""
    start = Update({"w": torch.zeros(2), "v": torch.zeros(1)})
    told = Update({"w": torch.tensor([1.0, bad]), "v": torch.tensor([1 + 2**-9])})
    sent, owed = to_client(WIRE, told, start, turn(1), Owed())
    assert not torch.isfinite(sent.tensors["w"]).all()
    assert set(owed.tensors) == {"v"}
    sent, _ = to_client(WIRE, start, start, turn(2), owed)
    assert sent.tensors["w"].tolist() == [0.0, 0.0] and sent.tensors["v"].tolist() == [2**-9]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 10.0))
def test_a_clipped_client_never_sends_more_than_its_bound(seed: int, bound: float) -> None:
    """What is owed is inside the bound, not on top of it: the participant was promised it."""
    chain = make_transforms(bound, "bfloat16")
    start, owed = Update(adapter(seed)), Owed()
    for round in range(1, 6):
        told = Update({n: t + c for (n, t), c in zip(
            start.tensors.items(), noise(seed + round, start.tensors, bound).values(), strict=True
        )})  # fmt: skip
        sent, owed = to_client(chain, told, start, turn(round), owed)
        norm = torch.cat([t.double().flatten() for t in sent.tensors.values()]).norm()
        assert float(norm) <= bound * (1 + 2**-8)


def test_without_rounding_nothing_is_owed_and_nothing_changes() -> None:
    chain: list[Transform] = [*make_transforms(0.5, "float32")]
    sent, owed = to_client(chain, Update(adapter(2)), Update({}), turn(1), Owed())
    assert owed == Owed()
    memory = State({"inner/w": torch.ones(1)}, {"steps": 4})
    assert with_owed(memory, owed) is memory and without_owed(memory) == (memory, Owed())
    assert Cast(torch.bfloat16).feeds_back and not chain[0].feeds_back


def test_a_memory_and_what_is_owed_come_back_apart() -> None:
    memory = State({"inner/w": torch.ones(1)}, {"steps": 4})
    owed = Owed({"w": torch.full((1,), 2**-12)}, 7)
    kept, back = without_owed(unpack_state(pack_state(with_owed(memory, owed))))
    assert (kept.tensors, dict(kept.data)) == (memory.tensors, memory.data)
    assert (back.tensors, back.round) == (owed.tensors, 7)
