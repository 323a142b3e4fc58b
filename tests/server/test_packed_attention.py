"""What a step's attention asks of torch: kernels that a GPU has for it, and masks made once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from served_models import small_base, small_runner, windowed_base
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from meadow.peft_adapters.attention_kernels import any_length_at_once
from meadow.server.serving import packed_attention
from meadow.server.serving.kv_rows import Owner
from meadow.server.serving.model_runner import ModelRunner, Work


def by_shape() -> bool:
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]


@dataclass
class Call:
    """Of torch's attention."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    by_shape: bool  # whether cuDNN's may be taken, which plans for each shape
    shares_heads: bool


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    found: list[Call] = []

    def seen(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **others: Any) -> Tensor:
        found.append(Call(query, key, mask, by_shape(), bool(others.get("enable_gqa"))))
        return scaled_dot_product_attention(query, key, value, mask, **others)

    monkeypatch.setattr(packed_attention, "scaled_dot_product_attention", seen)
    yield found


def steps_of(runner: ModelRunner) -> None:
    """A prompt in two segments beside another row that decodes, and a step of both."""
    one, other = (runner.kv.take(Owner(str(at), "t"), range(40)) for at in range(2))
    runner.run([], [Work(one, None, range(3, 10)), Work(other, None, range(3, 8))])
    runner.run([Work(other, None, [5])], [Work(one, None, range(10, 14))])
    runner.run([Work(one, None, [5]), Work(other, None, [6])], [])


@pytest.mark.parametrize("before", [True, False])
def test_no_kernel_is_asked_that_plans_for_each_length(calls: list[Call], before: bool) -> None:
    """And who else uses attention in this process finds its own choice again."""
    enabled = by_shape()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with small_runner() as runner:
            steps_of(runner)
        assert by_shape() is before
        with pytest.raises(ValueError, match="broken"), any_length_at_once():
            raise ValueError("broken")
        assert by_shape() is before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
    assert len(calls) > 8 and not any(call.by_shape for call in calls)


@pytest.mark.parametrize("base", [small_base, lambda: windowed_base(5)])
def test_with_a_mask_heads_are_as_many_as_those_of_keys(calls: list[Call], base: Any) -> None:
    """A GPU's kernels that know masks repeat no keys; they take masks whose rows are aligned."""
    with ModelRunner(base(), rows=3, length=32, slots=1) as runner:
        steps_of(runner)
    masked = [call for call in calls if call.mask is not None]
    assert {call.query.shape[2] > 2 for call in masked} == {True, False}  # prompts, and decoding
    for call in masked:
        assert call.mask is not None and not call.shares_heads
        assert call.query.shape[1] == call.key.shape[1]
        assert all(stride % 8 == 0 for stride in call.mask.stride()[:-1])


def test_layers_share_a_segments_mask(calls: list[Call]) -> None:
    with small_runner() as runner:
        row = runner.kv.take(Owner("", "t"), range(40))
        runner.run([], [Work(row, None, range(3, 10))])
        calls.clear()
        runner.run([], [Work(row, None, range(10, 14))])
    masks = [call.mask for call in calls]
    assert len(masks) == 2 and masks[0] is not None and masks[0] is masks[1]
