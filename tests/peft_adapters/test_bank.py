"""The bank against dense weights: routing, gradients, rank padding; the base is never written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Net, net
from torch import Tensor

from meadow.peft_adapters.bank import Bank, BankLinear, Slots
from meadow.peft_adapters.layout import FACTORS, Site, Tree

SITES = (Site("first", 6, 4), Site("deep.second", 3, 6))
SCALING = 1.5


def tree(seed: int, rank: int = 2) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{site.name}.{factor}": torch.randn(site.shape(factor, rank), generator=generator) / 2
        for site in SITES
        for factor in FACTORS
    }


def merged(model: Net, x: Tensor, *trees: Tree) -> Tensor:
    """The model's answer with the adapters added to its weights."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for adapter in trees:
        for site in SITES:
            product = adapter[f"{site.name}.lora_B"] @ adapter[f"{site.name}.lora_A"]
            weights[f"{site.name}.weight"] = weights[f"{site.name}.weight"] + SCALING * product
    answer: Tensor = torch.func.functional_call(model, weights, (x,))
    return answer


def filled(bank: Bank, trees: list[Tree], rank: int = 2) -> Slots:
    slots = bank.slots(len(trees), rank)
    for index, adapter in enumerate(trees):
        slots.write(index, adapter)
    return slots


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4), (6, 2, 3, 4)])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_equal_shares_of_the_rows_use_their_slots(shape: tuple[int, ...], count: int) -> None:
    x, trees = torch.randn(shape), [tree(seed) for seed in range(count)]
    model = net()
    bank = Bank(model, SITES, SCALING)
    with bank.using(filled(bank, trees)):
        got = model(x)
    for part, answer, adapter in zip(x.chunk(count), got.chunk(count), trees, strict=True):
        assert close(answer, merged(net(), part, adapter))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.booleans())
def test_routed_rows_use_the_slot_that_each_names(rows: list[int], sequence: bool) -> None:
    x = torch.randn(len(rows), 5, 4) if sequence else torch.randn(len(rows), 4)
    trees = [tree(seed) for seed in range(4)]
    model = net()
    bank = Bank(model, SITES, SCALING)
    slots = filled(bank, trees)
    slots.rows = torch.tensor(rows)
    with bank.using(slots):
        got = model(x)
    for row, slot in enumerate(rows):
        assert close(got[row], merged(net(), x[row], trees[slot]))


@pytest.mark.parametrize("rows", [None, [0, 1]])
def test_rows_that_cannot_be_dealt_out_are_refused(rows: list[int] | None) -> None:
    """Three rows of four positions must not be split through their middle."""
    model = net()
    bank = Bank(model, SITES, SCALING)
    slots = filled(bank, [tree(1), tree(2)])
    slots.rows = None if rows is None else torch.tensor(rows)
    with bank.using(slots), pytest.raises(RuntimeError):
        model(torch.randn(3, 4, 4))


def test_groups_add_up() -> None:
    """Two clients of rank 2 over side adapters of rank 1 of their own."""
    x, trained, sides = torch.randn(4, 3, 4), [tree(1), tree(2)], [tree(3, 1), tree(4, 1)]
    model = net()
    bank = Bank(model, SITES, SCALING)
    with bank.using(filled(bank, trained), filled(bank, sides, 1)):
        got = model(x)
    for at in range(2):
        half = slice(2 * at, 2 * at + 2)
        assert close(got[half], merged(net(), x[half], trained[at], sides[at]))


def test_without_slots_the_model_answers_as_before() -> None:
    model, x = net(), torch.randn(2, 4)
    bank = Bank(model, SITES, SCALING)
    assert torch.equal(model(x), net()(x))
    with pytest.raises(KeyError), bank.using(filled(bank, [tree(1)])):
        assert not torch.equal(model(x), net()(x))
        with bank.using():
            assert torch.equal(model(x), net()(x))
        raise KeyError
    assert torch.equal(model(x), net()(x)) and bank.active == ()


@pytest.mark.parametrize("train", [("lora_A", "lora_B"), ("lora_A",), ("lora_B",)])
def test_gradients_are_those_of_each_slot_alone(train: tuple[str, ...]) -> None:
    x, trees = torch.randn(6, 4), [tree(seed) for seed in range(3)]
    model = net()
    bank = Bank(model, SITES, SCALING)
    slots = filled(bank, trees)
    slots.train(train)
    with bank.using(slots):
        torch.autograd.backward(model(x).square().sum())
    assert set(slots.grads) == set(train)
    for index, part in enumerate(x.chunk(3)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in trees[index].items()}
        torch.autograd.backward(merged(net(), part, leaves).square().sum())
        for factor in train:
            for name, gradient in slots.split(slots.grads[factor][index], factor, 2).items():
                expected = leaves[name].grad
                assert expected is not None and close(gradient, expected), name


def test_gradients_accumulate_until_training_begins_anew() -> None:
    model, x = net(), torch.randn(2, 4)
    bank = Bank(model, SITES, SCALING)
    slots = filled(bank, [tree(1)])
    slots.train(FACTORS)
    seen = []
    for _ in range(2):
        with bank.using(slots):
            model(x).sum().backward()
        seen.append(slots.grads["lora_B"].clone())
    assert close(seen[1], 2 * seen[0]) and bool(seen[0].any())
    slots.train(("lora_B",))
    assert not slots.grads["lora_B"].any() and "lora_A" not in slots.grads


def test_a_smaller_rank_is_padded_and_cut_again() -> None:
    model, x, small = net(), torch.randn(2, 4), tree(5, 1)
    bank = Bank(model, SITES, SCALING)
    slots = filled(bank, [tree(1, 3), tree(2, 3)], 3)
    slots.write(1, small)
    assert slots.read(1, 1).keys() == small.keys()
    assert all(torch.equal(tensor, small[name]) for name, tensor in slots.read(1, 1).items())
    assert not slots.read(1)["first.lora_A"][1:].any()
    slots.train(FACTORS)
    with bank.using(slots):
        got = model(torch.cat([x, x]))
        got.square().sum().backward()
    assert close(got[2:], merged(net(), x, small))
    gradient = slots.split(slots.grads["lora_B"][1], "lora_B", 3)["first.lora_B"]
    assert not gradient[:, 1:].any() and gradient[:, :1].all()  # what was padded stays zero


@pytest.mark.parametrize("factor", FACTORS)
def test_a_flat_row_is_split_and_joined(factor: str) -> None:
    slots = Slots(SITES, 2, 3, "cpu")
    part = {name: tensor for name, tensor in tree(1, 2).items() if name.endswith(factor)}
    row = slots.join(part, factor)
    assert row.shape == slots.flat[factor][0].shape
    back = slots.split(row, factor, 2)
    assert back.keys() == part.keys() and all(torch.equal(back[n], part[n]) for n in part)
    slots.write(0, tree(1, 2))
    assert torch.equal(slots.flat[factor][0], row)


def test_what_is_read_does_not_change_with_the_slot() -> None:
    slots = Slots(SITES, 1, 2, "cpu")
    slots.write(0, tree(1))
    before = slots.read(0)
    slots.write(0, tree(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in tree(1).items())


def test_base_weights_never_change_a_byte() -> None:
    model, x = net(), torch.randn(4, 4)
    names = [parameter.data_ptr() for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bank = Bank(model, SITES, SCALING)
    slots = filled(bank, [tree(1), tree(2)])
    slots.train(FACTORS)
    with bank.using(slots):
        model(x).square().sum().backward()
    assert [parameter.data_ptr() for parameter in model.parameters()] == names
    assert all(parameter.grad is None for parameter in model.parameters())
    bank.detach()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_detached_model_has_its_own_layers_back() -> None:
    model = net()
    own = [model.first, model.deep["second"]]
    bank = Bank(model, SITES, SCALING)
    assert isinstance(model.first, BankLinear) and isinstance(model.deep["second"], BankLinear)
    bank.detach()
    bank.detach()  # once more does no harm
    assert [model.first, model.deep["second"]] == own


def test_a_bf16_base_keeps_its_type_and_float32_factors() -> None:
    model = net().bfloat16()
    bank = Bank(model, SITES, SCALING)
    slots = filled(bank, [tree(1)])
    slots.train(FACTORS)
    x = torch.randn(2, 4).bfloat16()
    with bank.using(slots):
        answer = model(x)
        answer.float().sum().backward()
    assert answer.dtype == torch.bfloat16 and slots.grads["lora_A"].dtype == torch.float32
    expected = merged(net().bfloat16().float(), x.float(), tree(1))
    assert torch.allclose(answer.float(), expected, rtol=0.05, atol=0.05)
