"""Rows of one batch use different adapters, exactly as PEFT's own mixed batch does."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from served_models import all_sites, random_tree, small_base
from torch import Tensor, nn

from meadow.errors import ModelError
from meadow.peft_adapters.layout import Site, Tree
from meadow.peft_adapters.pool import Pool
from meadow.peft_adapters.serving_slots import (
    Place,
    Segment,
    ServingSlots,
    pack,
    padded_rank,
)
from meadow.peft_adapters.slot_group import RunWork

RANKS = {"one": 8, "two": 8, "odd": 3, "wide": 64, "other": 64}
SLOT = {"one": 0, "two": 1, "odd": 2, "wide": 0, "other": 1}
SCALING = 0.5


def place_of(name: str) -> Place:
    return Place(padded_rank(RANKS[name]), SLOT[name])


def place(name: str) -> Place | None:
    """None is the base, PEFT's `__base__`."""
    return place_of(name) if name in RANKS else None


class Both:
    """One base with PEFT's adapters, and one with ours, of the same weights.

    In float64, where what is left of a difference is a fault and no rounding.
    """

    def __init__(self) -> None:
        base: Any = small_base().model.double()
        self.ours: Any = deepcopy(base)
        places = all_sites(small_base())
        self.slots = ServingSlots(self.ours, places, 3, torch.float64)
        self.peft: Any = base
        targets = sorted({site.name.rpartition(".")[2] for site in places})
        for at, (name, rank) in enumerate(RANKS.items()):
            tree = self._tree(places, name, rank, at)
            config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=targets)
            if at:
                self.peft.add_adapter(name, config)
            else:
                self.peft = get_peft_model(base, config, adapter_name=name)
            self._fill(name, tree)
            self.slots.write(place_of(name), pack(tree, SCALING, rank, places, torch.float64))
        self.peft.double().eval()

    def _tree(self, places: list[Site], name: str, rank: int, seed: int) -> Tree:
        if name != "wide":
            return random_tree(places, rank, seed)
        pool = Pool("5f" * 16, "ba" * 32, tuple(places), 64, unit=12)
        return pool.adapter(torch.randint(-9, 9, tuple(pool.zero().shape)), SCALING)

    def _fill(self, name: str, tree: Tree) -> None:
        for key, value in tree.items():
            module, _, factor = key.rpartition(".")
            layer = self.peft.get_submodule(f"base_model.model.{module}.{factor}.{name}")
            layer.weight.data.copy_(value)


@pytest.fixture(scope="module")
def both() -> Both:
    return Both()


NAMES = st.sampled_from([*RANKS, "__base__"])


@settings(max_examples=40, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=9), length=st.integers(1, 5))
@torch.no_grad()
def test_segments_equal_peft_mixed_batch(both: Both, names: list[str], length: int) -> None:
    """Whole prompts of one length, which PEFT's batch can hold too."""
    ids = torch.randint(0, 64, (len(names), length))
    expected = both.peft(input_ids=ids, adapter_names=names).logits
    order = both.slots.compose([], [Segment(place(name), length) for name in names])
    found = both.ours(input_ids=ids[list(order.segments)]).logits
    torch.testing.assert_close(found, expected[list(order.segments)], rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=12))
@torch.no_grad()
def test_decoding_rows_equal_peft_mixed_batch(both: Both, names: list[str]) -> None:
    """One composition follows another: what was gathered before must not show."""
    ids = torch.randint(0, 64, (len(names), 1))
    expected = both.peft(input_ids=ids, adapter_names=names).logits
    order = both.slots.compose([place(name) for name in names], [])
    found = both.ours(input_ids=ids[list(order.decode)]).logits
    torch.testing.assert_close(found, expected[list(order.decode)], rtol=1e-9, atol=1e-9)


class Layer:
    """One linear layer, to see what a composition does."""

    def __init__(self, count: int = 4) -> None:
        linear = nn.Linear(6, 5, bias=False).requires_grad_(False)
        self.model, self.weight, self.site = nn.Sequential(linear), linear.weight, Site("0", 5, 6)
        self.slots = ServingSlots(self.model, [self.site], count, torch.float32)
        self.deltas: dict[Place, Tensor] = {}

    def write(self, at: Place, seed: int) -> None:
        tree = random_tree([self.site], at.rank, seed)
        self.slots.write(at, pack(tree, 0.5, at.rank, [self.site], torch.float32))
        self.deltas[at] = 0.5 * tree["0.lora_B"] @ tree["0.lora_A"]

    def check(self, decode: list[Place | None], segments: list[Segment]) -> None:
        order = self.slots.compose(decode, segments)
        assert sorted(order.decode) == list(range(len(decode)))
        assert sorted(order.segments) == list(range(len(segments)))
        places = [decode[index] for index in order.decode]
        for index in order.segments:
            places += [segments[index].place] * segments[index].length
        x = torch.randn(1, len(places), 6)
        for at, (token, found) in enumerate(zip(x[0], self.model(x)[0], strict=True)):
            own = places[at]
            weight = self.weight if own is None else self.weight + self.deltas[own]
            torch.testing.assert_close(found, weight @ token, rtol=1e-5, atol=1e-5)


PLACES = st.one_of(st.none(), st.builds(Place, st.sampled_from([8, 32]), st.integers(0, 3)))
SEGMENTS = st.builds(Segment, PLACES, st.integers(1, 3))
BATCHES = st.tuples(st.lists(PLACES, max_size=7), st.lists(SEGMENTS, max_size=4)).filter(any)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(BATCHES, st.booleans()), min_size=1, max_size=8))
@torch.no_grad()
def test_rows_join_and_leave_and_slots_are_refilled(steps: list[Any]) -> None:
    """After any history, each token sees its own adapter as it is now, and no other."""
    layer = Layer()
    for seed, ((decode, segments), refill) in enumerate(steps):
        wanted = {*decode, *(segment.place for segment in segments)} - {None}
        for at in wanted:
            if refill or at not in layer.deltas:
                layer.write(at, seed)
        layer.check(decode, segments)


@torch.no_grad()
def test_the_same_batch_again_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(7)
    batch: list[Place | None] = [None, *(Place(8, slot) for slot in (0, 2, 4, 6))]
    for slot in (0, 2, 4, 6):
        layer.write(Place(8, slot), slot)
    layer.slots.compose(batch, [])
    copied: list[int] = []
    group = layer.slots.group(8)
    own = group._copy

    def copy(row: int, slot: int) -> None:
        copied.append(slot)
        own(row, slot)

    monkeypatch.setattr(group, "_copy", copy)
    layer.check(batch, [])
    assert copied == []
    layer.check([batch[1], batch[3], batch[4]], [])  # one left: the last takes its place
    assert copied == [6]
    layer.check([batch[1], batch[3], batch[4], batch[2]], [])  # it comes back: it alone is copied
    assert copied == [6, 2]
    neighbours: list[Place | None] = [Place(8, slot) for slot in range(4)]
    layer.write(Place(8, 1), 1)
    layer.write(Place(8, 3), 3)
    layer.check(neighbours, [])  # slots that lie together are used where they are
    assert copied == [6, 2]


@torch.no_grad()
def test_tokens_of_the_base_and_layers_left_alone_cost_nothing() -> None:
    base = small_base()
    places = all_sites(base)
    slots = ServingSlots(base.model, places, 2, torch.float32)
    tree = {k: v for k, v in random_tree(places, 8, 1).items() if ".q_proj." in k}
    slots.write(Place(8, 0), pack(tree, 1.0, 8, places, torch.float32))
    slots.compose([None, Place(8, 0), None], [Segment(None, 5)])
    work = {site.name: layer.work for site, layer in zip(places, slots.layers, strict=True)}
    assert {name for name, runs in work.items() if runs} == {
        site.name for site in places if site.name.endswith("q_proj")
    }
    for run in (run for runs in work.values() for run in runs):
        assert isinstance(run, RunWork) and (run.start, run.stop) == (0, 1)


@torch.no_grad()
def test_one_adapter_alone_is_a_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    layer.write(Place(8, 1), 1)
    monkeypatch.delattr(torch, "bmm")
    layer.check([Place(8, 1)] * 5, [Segment(Place(8, 1), 4)])


def test_a_layer_that_sees_only_some_of_the_tokens_is_refused() -> None:
    """Experts, of which each is given its own: nobody could say whose they are."""
    layer = Layer()
    layer.slots.compose([None, None], [])
    layer.model(torch.ones(2, 6))
    with pytest.raises(ModelError, match="not given all tokens"):
        layer.model(torch.ones(1, 1, 6))


def test_detaching_gives_the_layers_back() -> None:
    layer = Layer()
    layer.slots.detach()
    assert isinstance(layer.model[0], nn.Linear)


@pytest.mark.parametrize(
    ("rank", "padded"), [(1, 8), (8, 8), (9, 16), (33, 64), (64, 64), (65, 128)]
)
def test_ranks_are_padded(rank: int, padded: int) -> None:
    assert padded_rank(rank) == padded
