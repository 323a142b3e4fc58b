"""pool_lora: both kinds of clients enter the same integers, each with its own weight."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import factors
from toy import SITES

from meadow.client.task import drive
from meadow.errors import ConfigError, UpdateError
from meadow.peft_adapters.bank import core_stack, core_tree
from meadow.peft_adapters.layout import CORE
from meadow.peft_adapters.pool import LARGEST, directions
from meadow.strategies.base import Answer, Probe, Probed, Request, Sgd, State, Trained, Turn, Update
from meadow.strategies.messages import INTEGERS, check_contribution, pack_update
from meadow.strategies.pool_lora import PoolLora, on_grid
from meadow.strategies.registry import make
from meadow.strategies.zeroth_order import run_id_of

RANK, SEED, STEPS = 3, 5, 4
TURN = Turn(2, 6, SEED, STEPS, 6 * STEPS)
MIXED: dict[str, Any] = {"scale": -6, "zeroth": ["eve"], "adaptive_scale": False}
MULTIPLIER = round(1e-4 * 2.0**24)


def strategy(**options: Any) -> PoolLora:
    return cast(PoolLora, make("pool_lora", {**MIXED, **options}, SITES, RANK))


def core(seed: int, cores: int = 1, largest: int = 10**6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (cores, RANK, RANK)
    return torch.randint(-largest, largest, shape, generator=generator, dtype=torch.int32)


def stepped(made: PoolLora, parts: list[Update], state: State | None = None) -> State:
    reducer = made.reducer(TURN)
    for part in parts:
        reducer.fold(part)
    return made.step(state or made.init(SEED), reducer.total(), TURN)


def of_bytes(bytes_: list[int], weight: float, sender: str = "eve") -> Update:
    tensors = {"bytes": torch.tensor(bytes_, dtype=torch.int8)}
    return Update(tensors, weight, sender=sender)


# --- the coordinator's half --------------------------------------------------------------------


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
@pytest.mark.parametrize("gain", [1.0, 3.0, 0.0])
def test_a_mixed_round_by_hand(gain: float, cores: str) -> None:
    """Q += (30 dQ_ada + 10 dQ_bob) / 60 - gain 20 M sum(byte u_k) / 60."""
    made, count = strategy(zeroth_gain=gain, cores=cores), 2 if cores == "per_layer" else 1
    ada, bob, bytes_ = core(1, count), core(2, count), [3, -127, 0, 8]
    expected = (30 * ada.double() + 10 * bob.double()) / 60
    k = directions(run_id_of(SEED), b"eve", STEPS, STEPS, RANK * RANK)
    for at, byte in zip(k.tolist(), bytes_, strict=True):
        expected.view(count, -1)[:, at] -= gain * 20 / 60 * MULTIPLIER * byte
    parts = [
        Update({CORE: ada}, 30.0, sender="ada"), Update({CORE: bob}, 10.0, sender="bob"),
        of_bytes(bytes_, 20.0),
    ]  # fmt: skip
    for order in ([0, 1, 2], [2, 0, 1]):
        q = stepped(made, [parts[at] for at in order]).tensors["q"]
        assert float((q.double() - expected).abs().max()) < 2
        assert torch.equal(q, stepped(made, parts).tensors["q"])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 50)), min_size=1, max_size=6))
def test_first_order_clients_among_themselves(clients: list[tuple[bool, int]]) -> None:
    """Q += sum_first n_c dQ_c / n_first + sum_zeroth n_c dQ_c / n, in any order of the clients."""
    made = strategy(zeroth=[f"z{at}" for at in range(6)], first_share="first_order")
    expected = torch.zeros((1, RANK, RANK), dtype=torch.float64)
    rows, of_first = sum(n for _, n in clients), sum(n for first, n in clients if first)
    parts = []
    for at, (first, n) in enumerate(clients):
        if first:
            parts.append(Update({CORE: core(at)}, float(n), sender=f"f{at}"))
            expected += core(at).double() * n / of_first
        else:
            parts.append(of_bytes([at, 5, -9, 0], float(n), f"z{at}"))
            alone = stepped(made, parts[-1:]).tensors["q"]  # exactly what it sent
            expected += alone.double() * n / rows
    q = stepped(made, parts).tensors["q"]
    assert float((q.double() - expected).abs().max()) < 4
    assert torch.equal(q, stepped(made, parts[::-1]).tensors["q"])


def test_one_client_of_either_kind_moves_q_by_exactly_what_it_sent() -> None:
    made, change = strategy(), core(1)
    found = stepped(made, [Update({CORE: change}, 7.0, sender="ada")])
    assert torch.equal(found.tensors["q"], change.long())
    bytes_ = [3, -127, 0, 8]
    q = made.pool(SEED).zero()
    for at, byte in zip(
        directions(run_id_of(SEED), b"eve", STEPS, STEPS, 9).tolist(), bytes_, strict=True
    ):
        q.view(-1)[at] -= MULTIPLIER * byte
    assert torch.equal(stepped(made, [of_bytes(bytes_, 7.0)]).tensors["q"], q)


def test_only_bytes_move_the_scale() -> None:
    made = strategy(adaptive_scale=True)
    parts = [Update({CORE: core(1)}, 1.0, sender="ada")]
    assert stepped(made, parts).data["scale"] == -6
    assert stepped(made, [*parts, of_bytes([127] * 4, 1.0)]).data["scale"] == -4


def test_an_overflow_is_refused_and_never_wraps() -> None:
    full = torch.full((1, RANK, RANK), LARGEST, dtype=torch.int32)
    parts = [Update({CORE: full}, 1.0, sender=name) for name in ("ada", "bob")]
    once = stepped(strategy(), parts)
    assert torch.equal(once.tensors["q"], full.long())
    with pytest.raises(UpdateError, match="outgrown 32 bits"):
        stepped(strategy(), parts, once)
    with pytest.raises(UpdateError, match="out of 32 bits"):
        stepped(strategy(zeroth_gain=2.0**42), [of_bytes([127] * 4, 1.0)])


# --- the client's half -------------------------------------------------------------------------


def answer(request: Request) -> Answer:
    """AdamW by torch on sum |scale U C V^T - 1|^2 / 2, or losses along directions."""
    if isinstance(request, Probe):
        pairs = [(1 + k / 2**13, 1.0) for k in request.directions]
        return Probed(torch.tensor(pairs, dtype=torch.float64), 12, 7)
    assert isinstance(request, Sgd) and request.pool is not None
    cores = core_stack(request.pool, request.adapter).clone().requires_grad_()
    optimizer = torch.optim.AdamW([cores], lr=0.1)
    for _ in range(request.steps):
        loss = torch.zeros(())
        for index in range(len(request.pool.sites)):
            u, v = (torch.from_numpy(part).float() for part in factors(request.pool, index))
            change = request.scale * u @ cores[index if len(cores) > 1 else 0] @ v.T
            loss = loss + (change - 1).square().sum() / 2
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return Trained(core_tree(request.pool, cores.detach()), {}, 2.0, 12, 7)


def worked(
    made: PoolLora, state: State, client: str, steps: int = 0
) -> tuple[Update, State, list[Request]]:
    asked: list[Request] = []

    def respond(request: Request) -> Answer:
        asked.append(request)
        return answer(request)

    turn = replace(TURN, client=client)
    work = made.work(made.broadcast(state, turn), State(data={"steps": steps}), turn)
    update, memory = drive(work, respond)
    return replace(update, sender=client), memory, asked


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
def test_one_first_order_client_is_plain_training_of_the_core(cores: str) -> None:
    """Three rounds of one client with its own AdamW each, rounded to the grid in between."""
    made = strategy(cores=cores)
    state, unit = made.init(SEED), 2.0 ** (-30 + 8)  # an integer of Q, in trained numbers
    pool = made.pool(SEED)
    expected = core_stack(pool, core_tree(pool, state.tensors["q"].double()))
    for _ in range(3):
        update, memory, _ = worked(made, state, "ada")
        state = stepped(made, [update], state)
        request = Sgd(core_tree(pool, expected), STEPS, train=(CORE,), pool=pool, scale=2.0**-8)
        trained = answer(request)
        assert isinstance(trained, Trained)
        expected = core_stack(pool, trained.adapter)
        got = state.tensors["q"].double() * unit
        assert float((got - expected.double()).abs().max()) < 1e-5
        expected = got.float()  # what a coordinator broadcasts
        assert memory.data == {"steps": STEPS}
    assert float(expected.abs().max()) > 0.5


def test_what_a_first_order_client_asks() -> None:
    made = strategy(core_scale=-6)
    state = State({"q": core(3).long()}, made.init(SEED).data)
    update, memory, (request,) = worked(made, state, "ada", steps=9)
    assert isinstance(request, Sgd)
    assert (request.steps, request.first_step, request.total_steps) == (STEPS, 9, 6 * STEPS)
    assert request.train == (CORE,) and request.scale == 2.0**-6
    assert request.pool == made.pool(SEED)
    assert torch.equal(core_stack(made.pool(SEED), request.adapter), core(3).float() * 2.0**-24)
    assert update.tensors[CORE].dtype == torch.int32 and update.weight == 12.0
    assert update.notes == {"loss": 2.0, "examples": 12, "tokens": 7}
    assert memory.data == {"steps": 13}


@pytest.mark.parametrize("exponent", [-2000, -41, 41, 2000])
def test_a_scale_out_of_all_bounds_is_refused_before_any_round(exponent: int) -> None:
    """2.0**2000 and 1 / 2.0**-2000 are no numbers: a traceback at the client."""
    with pytest.raises(ConfigError, match="core_scale"):
        strategy(core_scale=exponent)
    assert strategy(core_scale=40).core_scale == -strategy(core_scale=-40).core_scale


def test_a_zeroth_order_client_asks_for_losses_only() -> None:
    made = strategy()
    update, memory, asked = worked(made, made.init(SEED), "eve", steps=9)
    assert [type(request) for request in asked] == [Probe] * STEPS
    assert update.tensors["bytes"].shape == (STEPS,) and memory.data == {"steps": 13}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-LARGEST, LARGEST), min_size=1, max_size=5))
def test_changes_are_rounded_to_the_nearest_integer(values: list[float]) -> None:
    found = on_grid(torch.tensor(values, dtype=torch.float64))
    assert found.dtype == torch.int32
    assert np.abs(found.double().numpy() - np.array(values)).max() <= 0.5


@pytest.mark.parametrize("value", [2.0**31, -(2.0**31), math.nan, math.inf])
def test_changes_off_the_grid_are_refused(value: float) -> None:
    with pytest.raises(UpdateError, match="outgrown 32 bits"):
        on_grid(torch.tensor([1.0, value], dtype=torch.float64))


# --- bad input ---------------------------------------------------------------------------------


def received(made: PoolLora, client: str, update: Update) -> Update:
    sent, turn = made.broadcast(made.init(SEED), TURN), replace(TURN, client=client)
    found = check_contribution(pack_update(update), made.template(sent, turn), client, INTEGERS)
    made.validate(found, turn)
    return found


def test_each_kind_sends_its_own() -> None:
    made, bytes_ = strategy(), torch.ones(STEPS).char()
    assert received(made, "ada", Update({CORE: core(1)})).sender == "ada"
    assert received(made, "eve", Update({"bytes": bytes_})).sender == "eve"
    with pytest.raises(UpdateError, match="'bytes' is not expected"):
        received(made, "ada", Update({"bytes": bytes_}))
    with pytest.raises(UpdateError, match="'bytes' is missing"):
        received(made, "eve", Update({CORE: core(1)}))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(1, 3, 3).char(), "^ada: a core's change travels as int32"),
        (torch.ones(1, 3, 3), "^ada: only int8 and int32"),
        (torch.ones(1, 3, 3).long(), "^ada: only int8 and int32"),
        (torch.ones(2, 3, 3).int(), "expected"),
    ],
)
def test_other_cores_are_refused(tensor: torch.Tensor, said: str) -> None:
    with pytest.raises(UpdateError, match=said):
        received(strategy(), "ada", Update({CORE: tensor}))


def test_a_byte_out_of_range_is_refused() -> None:
    with pytest.raises(UpdateError, match="^eve: a byte is out of range"):
        received(strategy(), "eve", Update({"bytes": torch.full((STEPS,), -128).char()}))


def test_a_rate_that_the_grid_cannot_hold_is_found_at_once() -> None:
    with pytest.raises(ConfigError, match="on a grid of"):
        strategy(lr=1e-12)
