"""Recorders of steps for a CPU, and a kernel over slots that they can record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meadow.peft_adapters import serving_slots
from meadow.peft_adapters.slot_tokens import Tokens
from meadow.server.serving.decode_graphs import Step

FROM_HOST, TO_HOST = "aten::lift_fresh", ("aten::_local_scalar_dense", "aten::nonzero")


def again(step: Step) -> Step:
    """Does the step itself again, Python and all."""
    for _ in range(2):
        step()
    return step


def tape(step: Step) -> Step:
    """As a CUDA graph does: the same operations on the same addresses, and nothing of Python.

    What a capture refuses is refused: numbers of the host, and waiting for the device's.
    """
    for _ in range(2):
        step()
    recording = _Tape()
    with recording:
        result = step()

    def replay() -> Tensor:
        for call in recording.calls:
            _do_again(*call)
        return result

    return replay


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == FROM_HOST or name in TO_HOST:
            raise RuntimeError(f"{name} while a step is recorded")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def _do_again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    if func._schema.is_mutable:
        func(*args, **kwargs)
        return
    given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    kept = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if all(_address(leaf) in given for leaf in kept):
        return  # views
    found = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
    for old, new in zip(kept, found, strict=True):
        old.copy_(new)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def product(x: Tensor, y: Tensor, a: Tensor, b: Tensor, tokens: Tokens) -> None:
    """What kernels over slots compute (`slot_tokens.Kernel`), in operations on tensors alone."""
    order, (slots, firsts, counts) = tokens.order.long(), tokens.blocks.long().unbind(1)
    at = torch.arange(tokens.size, device=x.device)
    mine = at < counts.unsqueeze(1)
    own = order[(firsts.unsqueeze(1) + at).clamp(max=len(order) - 1)]  # (blocks, size)
    found = torch.bmm(torch.bmm(x[own], a[slots].mT), b[slots])
    y.index_add_(0, own.flatten(), found.where(mine.unsqueeze(2), 0).flatten(0, 1))


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """`ServingSlots` finds `product` where Triton's kernels would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_slots, "_kernel", lambda: product)
        yield
