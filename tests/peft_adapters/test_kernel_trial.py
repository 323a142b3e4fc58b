"""A machine with a GPU and Triton may still have no kernels: then torch computes, and says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from meadow.peft_adapters import philox, serving_slots
from meadow.peft_adapters.kernel_trial import holds
from meadow.peft_adapters.serving_slots import has_kernels, kernel_is_right
from meadow.peft_adapters.slot_tokens import Kernel, Tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable.\nand a trace"


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine with Triton, which was not tried out so far."""
    monkeypatch.setattr(serving_slots, "_TRITON", True)
    monkeypatch.setattr(philox, "_TRITON", True)
    for tried in (serving_slots._work, philox._kernel_works):
        tried.cache_clear()
    yield
    for tried in (serving_slots._work, philox._kernel_works):
        tried.cache_clear()


def test_what_does_not_compile_is_tried_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[object] = []

    def fails(*given: object) -> bool:
        tries.append(given)
        raise RuntimeError(NO_COMPILER)

    monkeypatch.setattr(serving_slots, "kernel_is_right", fails)
    with caplog.at_level(logging.WARNING):
        assert not any(has_kernels(GPU, torch.bfloat16) for _ in range(3))
    assert len(tries) == 1
    (said,) = [record.getMessage() for record in caplog.records]
    assert "without Triton" in said and "C compiler" in said and "trace" not in said


def test_signs_are_then_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def signs(*given: object) -> Tensor:
        asked.append(str(given[-1]))
        return torch.zeros(0)

    monkeypatch.setattr(philox, "kernel_is_right", lambda device: False)
    monkeypatch.setattr(philox, "_signs", signs)
    philox.signs(1, 2, 3, 4, "cuda")
    assert asked == ["cuda"]


def broken(x: Tensor, y: Tensor, a: Tensor, b: Tensor, tokens: Tokens) -> None:
    """Leaves the adapter out."""


def by_torch(x: Tensor, y: Tensor, a: Tensor, b: Tensor, tokens: Tokens) -> None:
    y += (x @ a[0].mT) @ b[0]


@pytest.mark.parametrize(("kernel", "right"), [(broken, False), (by_torch, True)])
@pytest.mark.parametrize("dtype", serving_slots._KERNELS)
def test_a_wrong_result_is_noticed(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, right: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(serving_slots, "_kernel", lambda: kernel)
    assert kernel_is_right(CPU, dtype) is right
    assert holds(lambda: kernel_is_right(CPU, dtype), "adapters") is right
