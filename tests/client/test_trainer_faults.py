"""A trainer whose memory runs out or whose figures are not finite: it goes on with fewer rows and
the same results, or names the client.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from local_trainings import RECIPE, distance, jobs, text, trainer, tree
from torch import Tensor, nn

from meadow.client.trainer import Trainer
from meadow.errors import ModelError, PolicyError, UpdateError
from meadow.peft_adapters.bank import Bank
from meadow.strategies.base import Loss

pytest_plugins = ("trainer_fixtures",)


class Tight:
    """Lets a model's forward pass run out of memory above so many rows, before or after the
    layers have run."""

    def __init__(self, model: nn.Module, rows: int, error: type[RuntimeError], said: str) -> None:
        self.rows, self.error, self.said, self.seen = rows, error, said, list[int]()
        self.handle = model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.seen.append(len(kwargs["input_ids"]))
        if self.seen[-1] > self.rows:
            raise self.error(self.said)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory"),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_micro_batch_and_nothing_else(
    bank: Bank, error: type[RuntimeError], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    work = jobs(bank.sites, 1)
    expected = trainer(bank).sgd(work)[0]
    tight = Tight(bank.model, 1, error, said)
    small = trainer(bank)
    with caplog.at_level(logging.WARNING):
        got = small.sgd(work)[0]
    assert tight.seen[:3] == [4, 2, 1] and set(tight.seen[3:]) == {1} and small.micro == 1
    assert distance(got.adapter, expected.adapter) <= 1e-6
    assert [record.message for record in caplog.records] == [
        f"out of memory: micro-batch is now {rows} rows; results stay the same" for rows in (2, 1)
    ]


def test_out_of_memory_halves_the_evaluated_batch_too(bank: Bank) -> None:
    adapter, examples = tree(bank.sites, 1), text(5)
    expected = trainer(bank).loss(Loss(adapter), examples)
    Tight(bank.model, 2, torch.OutOfMemoryError, "out of memory")
    small = trainer(bank)
    got = small.loss(Loss(adapter), examples)
    assert got.tokens == expected.tokens and got.loss == pytest.approx(expected.loss, abs=1e-6)
    assert small.evaluated == 2


def test_memory_that_runs_out_within_a_batch_counts_no_row_twice(bank: Bank) -> None:
    """The first micro-batch has left its gradients when the second one fails."""
    work = jobs(bank.sites, 1)
    expected = trainer(bank).sgd(work)[0]
    calls = iter([False, True])

    def fail(*_: Any) -> None:
        if next(calls, False):
            raise torch.OutOfMemoryError("out of memory")

    bank.model.register_forward_hook(fail)
    small = trainer(bank, micro_batch=2)
    assert distance(small.sgd(work)[0].adapter, expected.adapter) <= 1e-6
    assert small.micro == 1


def test_not_even_one_row_fits(bank: Bank) -> None:
    Tight(bank.model, 0, torch.OutOfMemoryError, "out of memory")
    with pytest.raises(ModelError, match="not enough memory for a micro-batch of one row"):
        trainer(bank).sgd(jobs(bank.sites, 1))


def test_other_errors_are_not_taken_for_want_of_memory(bank: Bank) -> None:
    Tight(bank.model, 0, RuntimeError, "shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trainer(bank).sgd(jobs(bank.sites, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_client(bank: Bank, value: float) -> None:
    work = jobs(bank.sites, 3)
    work[1].request.adapter[f"{bank.sites[0].name}.lora_A"][0, 0] = value
    with pytest.raises(UpdateError, match=r"^client-1: the training loss is nan .a smaller"):
        trainer(bank).sgd(work)


def test_a_gradient_that_is_not_finite_names_its_client(bank: Bank) -> None:
    """A finite loss can have one: here by a hook on the second client's rows."""
    work = jobs(bank.sites, 3)

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        factor = torch.ones(len(output), 1, 1)
        factor[4:8] = torch.inf
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
        return output

    bank.model.get_submodule(bank.sites[0].name).register_forward_hook(spoil)
    with pytest.raises(UpdateError, match="^client-1: the gradient is not finite"):
        trainer(bank).sgd(work)


def test_a_measurement_can_be_ended_between_two_passes(bank: Bank) -> None:
    """Where it takes longer than its participant allows, say; what comes after is not disturbed."""
    told: list[int] = []

    def progress(steps: int) -> None:
        told.append(steps)
        if len(told) == 3:
            raise PolicyError("long enough")

    request, rows = Loss(tree(bank.sites, 5)), text(0, 9)
    expected = trainer(bank).loss(request, rows)
    measuring = Trainer(bank, RECIPE, 0, progress)
    measuring.evaluated = 2
    with pytest.raises(PolicyError, match="long enough"):
        measuring.loss(request, rows)
    assert told == [0, 0, 0]
    assert trainer(bank).loss(request, rows) == expected
