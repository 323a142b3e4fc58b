"""Cores between fixed signs against dense merged weights: values, nudges, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import along, dense, factors, random_q, small_pool
from small_models import net
from torch import Tensor

from meadow.peft_adapters.bank import (
    Bank,
    CoreSlots,
    Nudge,
    core_names,
    core_stack,
    core_tree,
)
from meadow.peft_adapters.layout import CORE, Site
from meadow.peft_adapters.pool import Pool

SITES = (Site("deep.second", 3, 6), Site("first", 6, 4))
EPSILON = 2.0**-6


def bank() -> Bank:
    return Bank(net(), SITES, scaling=1.7)  # of LoRA factors only: signs have their own scale


def merged(x: Tensor, *changes: dict[str, Tensor]) -> Tensor:
    """The model's answer in float64 with the changes added to its weights."""
    weights = {name: tensor.double() for name, tensor in net().state_dict().items()}
    for change in changes:
        for name, part in change.items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + part
    answer: Tensor = torch.func.functional_call(net().double(), weights, (x.double(),))
    return answer


def times(change: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: factor * part for name, part in change.items()}


def filled(bank: Bank, pool: Pool, states: list[Tensor]) -> CoreSlots:
    slots = bank.cores(pool, len(states))
    for index, q in enumerate(states):
        slots.write(index, core_tree(pool, q))
    return slots


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got.double(), expected, rtol=1e-5, atol=2e-6)


def pool_of(cores: Any = "shared", rank: int = 3) -> Pool:
    return small_pool(SITES, rank, cores=cores, unit=12)


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4), (6, 2, 3, 4)])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_equal_shares_of_the_rows_use_their_cores(
    cores: Any, shape: tuple[int, ...], count: int
) -> None:
    pool, x, filled_bank = pool_of(cores), torch.randn(shape), bank()
    states = [random_q(pool, seed, 400) for seed in range(count)]
    with filled_bank.using(filled(filled_bank, pool, states)):
        got = filled_bank.model(x)
    for part, answer, q in zip(x.chunk(count), got.chunk(count), states, strict=True):
        assert close(answer, merged(part, dense(pool, q)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from([-4.0, -1.0, 0.0, 1.0, 2.0])),
             min_size=1, max_size=4),
    st.sampled_from(["shared", "per_layer"]),
    st.booleans(),
)  # fmt: skip
def test_every_row_moves_along_its_own_direction(
    count: int, rows: list[tuple[int, float]], cores: Any, sequence: bool
) -> None:
    """Each client's rows at its own state, each row at its own direction and amount."""
    pool, filled_bank = pool_of(cores), bank()
    states = [random_q(pool, seed, 400) for seed in range(count)]
    x = torch.randn(count * len(rows), *([5] if sequence else []), 4)
    slots = filled(filled_bank, pool, states)
    k = torch.tensor([k for k, _ in rows] * count)
    amount = torch.tensor([EPSILON * size for _, size in rows] * count)
    slots.nudge = Nudge(k // 3, k % 3, amount)
    with filled_bank.using(slots), torch.no_grad():
        got = filled_bank.model(x)
    for row in range(len(x)):
        moved = times(along(pool, int(k[row])), float(amount[row]))
        assert close(got[row], merged(x[row], dense(pool, states[row // len(rows)]), moved))


def test_a_nudge_of_nothing_is_no_nudge() -> None:
    pool, x, filled_bank = pool_of(), torch.randn(2, 4), bank()
    slots = filled(filled_bank, pool, [random_q(pool, 1, 400)])
    with filled_bank.using(slots), torch.no_grad():
        plain = filled_bank.model(x)
        slots.nudge = Nudge(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.zeros(2))
        assert torch.equal(filled_bank.model(x), plain)
        slots.nudge = Nudge(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([0.1, -0.1]))
        assert not torch.equal(filled_bank.model(x), plain)


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_cores_gradient_is_the_projected_dense_one(cores: Any, count: int) -> None:
    """dL/dC = scale U^T (dL/dW) V: of each matrix, or their sum where they share a core."""
    pool, x, filled_bank = pool_of(cores), torch.randn(6, 4), bank()
    states, scale = [random_q(pool, seed, 3) for seed in range(count)], 2.0**-5
    slots = filled_bank.cores(pool, count, scale)
    for index, q in enumerate(states):
        slots.write(index, core_tree(pool, q))
    slots.train((CORE,))
    with filled_bank.using(slots):
        filled_bank.model(x).square().sum().backward()
    for index, part in enumerate(x.chunk(count)):
        change = {
            n: (w * 2.0**pool.unit * scale).requires_grad_()
            for n, w in dense(pool, states[index]).items()
        }
        torch.autograd.backward(merged(part, change).square().sum())
        projected = []
        for at, site in enumerate(SITES):
            u, v = (torch.from_numpy(factor).double() for factor in factors(pool, at))
            gradient = change[site.name].grad
            assert gradient is not None
            projected.append(scale * u.T @ gradient @ v)
        expected = torch.stack(projected if cores == "per_layer" else [sum(projected)])  # type: ignore[list-item]
        row = slots.split(slots.grads[CORE][index], CORE, None)
        assert torch.allclose(core_stack(pool, row).double(), expected, rtol=1e-4, atol=1e-5)


def test_scale_is_the_pools_unit_unless_it_is_named() -> None:
    pool, filled_bank, x = pool_of(), bank(), torch.randn(2, 4)
    q = random_q(pool, 1, 400)
    named = filled_bank.cores(pool, 1, 2.0**-8)
    named.write(0, core_tree(pool, q.double() / 16))
    with filled_bank.using(named):
        assert close(filled_bank.model(x), merged(x, dense(pool, q)))


def test_cores_lie_over_ordinary_adapters() -> None:
    pool, filled_bank, x = pool_of(), bank(), torch.randn(2, 4)
    q = random_q(pool, 1, 400)
    slots = filled_bank.slots(1, 2)
    factor = {
        f"{site.name}.{name}": torch.randn(site.shape(name, 2))
        for site in SITES for name in ("lora_A", "lora_B")
    }  # fmt: skip
    slots.write(0, factor)
    change = {
        s.name: 1.7 * factor[f"{s.name}.lora_B"].double() @ factor[f"{s.name}.lora_A"].double()
        for s in SITES
    }
    with filled_bank.using(filled(filled_bank, pool, [q]), slots):
        assert close(filled_bank.model(x), merged(x, dense(pool, q), change))


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
def test_cores_are_named_and_come_back(cores: Any) -> None:
    pool = pool_of(cores)
    q = random_q(pool, 1, 2**20)
    tree = core_tree(pool, q)
    names = ["deep.second", "first"] if cores == "per_layer" else ["pool"]
    assert core_names(pool) == names and list(tree) == [f"{name}.core" for name in names]
    slots = CoreSlots(pool, 2, "cpu")
    slots.write(1, tree)
    back = slots.read(1)
    assert all(torch.equal(back[name], tensor) for name, tensor in tree.items())
    assert torch.equal(core_stack(pool, back), q.float())
    joined = slots.join(tree, CORE)
    assert torch.equal(joined, slots.flat[CORE][1])
    assert core_stack(pool, slots.split(joined, CORE, None)).equal(q.float())


def test_a_bf16_base_keeps_its_type() -> None:
    pool = pool_of()
    half = Bank(net().bfloat16(), SITES, 1.0)
    q, x = random_q(pool, 1, 400), torch.randn(2, 4).bfloat16()
    slots = filled(half, pool, [q])
    slots.nudge = Nudge(torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([0.25, -0.25]))
    with half.using(slots), torch.no_grad():
        got = half.model(x)
    assert got.dtype == torch.bfloat16
    for row, (k, amount) in enumerate(((2, 0.25), (3, -0.25))):
        expected = merged(x[row], dense(pool, q), times(along(pool, k), amount))
        assert torch.allclose(got[row].double(), expected, rtol=0.05, atol=0.08)


def test_base_weights_never_change_a_byte() -> None:
    filled_bank, pool, x = bank(), pool_of(), torch.randn(2, 4)
    slots = filled(filled_bank, pool, [random_q(pool, 1, 400)])
    before = {name: tensor.clone() for name, tensor in filled_bank.model.state_dict().items()}
    slots.train((CORE,))
    with filled_bank.using(slots):
        filled_bank.model(x).sum().backward()
    assert all(parameter.grad is None for parameter in filled_bank.model.parameters())
    after = filled_bank.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
