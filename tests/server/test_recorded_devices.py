"""A recorded step asks nothing of the host: checked on torch's device without numbers.

There whatever comes from the host is of another device, as on a GPU; on a CPU it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from served_models import all_sites, packed_adapter, small_base, windowed_base
from step_recorders import FROM_HOST, TO_HOST, cpu_kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from meadow.peft_adapters.base_model import Base
from meadow.peft_adapters.serving_slots import Place, ServingSlots
from meadow.server.serving.decode_graphs import DecodeGraphs, Recorder, Step
from meadow.server.serving.fixed_step import FixedStep
from meadow.server.serving.kv_rows import KVRows, Owner, Shape
from meadow.server.serving.packed_attention import IMPLEMENTATION, attend
from meadow.server.serving.work import Work

NOWHERE = torch.device("meta")


class DeviceAlone(TorchDispatchMode):
    """Refuses tensors of the host, and numbers that the host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func._schema.name in (FROM_HOST, *TO_HOST):
            raise RuntimeError(f"{func} needs numbers of the host")
        for leaf in tree_leaves((args, kwargs, found)):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                raise RuntimeError(f"{func} with a tensor of the host, {tuple(leaf.shape)}")
        self.operations += 1
        return found


def graphs_of(base: Base, record: Recorder) -> DecodeGraphs:
    """As `ModelRunner` makes them, of a model without numbers."""
    model: Any = base.model.to(NOWHERE)
    model.config._attn_implementation = IMPLEMENTATION
    AttentionInterface.register(IMPLEMENTATION, attend)
    kv = KVRows(Shape(2, 2, 8), 3, 64, NOWHERE, torch.float32, scratch=True)
    places = all_sites(base)
    slots = ServingSlots(model, places, 2, torch.float32, kernels=True)
    for number, place in ((1, Place(64, 0)), (2, Place(8, 1))):
        slots.write(place, packed_adapter(number, tuple(places)))

    def forward(ids: Tensor, positions: Tensor, step: FixedStep) -> Tensor:
        answer = model(
            input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False,
            logits_to_keep=0, packed=step,
        )  # fmt: skip
        logits: Tensor = answer.logits[0].float()
        return logits

    return DecodeGraphs(kv, slots, forward, record, 64)


@pytest.mark.parametrize("base", [small_base, lambda: windowed_base(5)])
def test_a_recorded_step_is_the_devices_alone(base: Callable[[], Base]) -> None:
    """Of rows of two ranks and of the base, with a gap."""
    mode = DeviceAlone()

    def record(step: Step) -> Step:
        with mode:
            found = step()
        return lambda: found

    with cpu_kernels():
        graphs = graphs_of(base(), record)
        rows = [graphs.kv.take(Owner(str(at), "t"), [3]) for at in range(3)]
        batch = [Work(rows[0], Place(64, 0), [5]), Work(rows[2], Place(8, 1), [6])]
        assert graphs.run([*batch, Work(rows[1], None, [7])], at_once=True) is not None
        assert graphs.run(batch, at_once=True) is not None
        assert mode.operations > 100 and len(graphs.recorded) == 1


def test_what_comes_from_the_host_is_noticed() -> None:
    there = torch.zeros(2, device=NOWHERE)
    acts: list[Callable[[], Tensor]] = [
        lambda: there + torch.tensor([1.0, 2.0]).to(NOWHERE),
        lambda: there[torch.tensor([0])],
        lambda: torch.zeros(1).to(NOWHERE, torch.float64),
    ]
    for act in acts:
        with pytest.raises(RuntimeError, match="of the host"), DeviceAlone():
            act()
