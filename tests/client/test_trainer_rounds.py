"""Where a round ends makes no difference: optimiser state, cursor and schedule go on, and a trainer
keeps and changes nothing else.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from local_trainings import (
    RANK,
    SCALING,
    SEED,
    STEPS,
    distance,
    identical,
    jobs,
    text,
    trainer,
    tree,
)
from transformers import LlamaForCausalLM

from meadow.client.task import Participant, answer, drive
from meadow.client.trainer import Job, Trainer, rate_factor
from meadow.config import ClientsConfig
from meadow.peft_adapters.bank import Bank
from meadow.peft_adapters.base_model import sites
from meadow.peft_adapters.layout import FACTORS
from meadow.strategies.base import Loss, Sgd, State, Trained, Turn
from meadow.strategies.registry import make

pytest_plugins = ("trainer_fixtures",)


def split_in_two(worker: Trainer, job: Job[Any], first: int) -> Trained:
    """The job as two calls, the second over what the first one left."""
    head = worker.sgd([replace(job, request=replace(job.request, steps=first))])[0]
    rest = replace(
        job.request, adapter=head.adapter, steps=job.request.steps - first,
        first_step=first, optimizer=head.optimizer,
    )  # fmt: skip
    return worker.sgd([replace(job, request=rest)])[0]


@pytest.mark.parametrize("train", [FACTORS, ("lora_B",)])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_kept_optimiser_state_makes_two_calls_one(
    bank: Bank, train: tuple[str, ...], schedule: str
) -> None:
    """To the bit: adapter, moments and step count."""
    job = jobs(bank.sites, 1, total_steps=STEPS, train=train)[0]
    worker = trainer(bank, schedule=schedule, warmup=1)
    whole, parts = worker.sgd([job])[0], split_in_two(worker, job, 2)
    assert identical(whole.adapter, parts.adapter) and identical(whole.optimizer, parts.optimizer)
    assert all(int(whole.optimizer[f"step/{factor}"]) == STEPS for factor in train)


@pytest.mark.parametrize(
    ("name", "options"),
    [("fedavg_lora", {"refine": "none", "keep_optimizer": True}), ("diloco", {})],
)
def test_rounds_of_one_client_are_plain_local_training(
    bank: Bank, name: str, options: dict[str, Any]
) -> None:
    """Two rounds of three steps against one training of six: to the bit for averaged factors, and
    to the rounding of x - (x - t), which AdamW passes on, for DiLoCo's deltas."""
    strategy, worker = make(name, options, bank.sites, RANK), trainer(bank, schedule="linear")
    person = Participant("ada", text(0), text(1), SEED)
    state, memory = strategy.init(1), State()
    for number in (1, 2):
        turn = Turn(number, 2, 1, STEPS, 2 * STEPS, "ada", ("ada",))
        work = strategy.work(strategy.broadcast(state, turn), memory, turn)
        update, memory = drive(work, lambda request: answer(request, person, worker))
        reducer = strategy.reducer(turn)
        reducer.fold(update)
        state = strategy.step(state, reducer.total(), turn)
    start = strategy.export(strategy.init(1))
    alone = worker.sgd([person.job(Sgd(start, 2 * STEPS, total_steps=2 * STEPS))])[0]
    if name == "fedavg_lora":
        assert identical(strategy.export(state), alone.adapter)
    assert distance(strategy.export(state), alone.adapter) <= 1e-6


def test_a_schedule_or_cursor_that_restarts_would_be_seen(bank: Bank) -> None:
    job = jobs(bank.sites, 1, total_steps=STEPS)[0]
    whole = trainer(bank).sgd([job])[0]
    first = trainer(bank).sgd([replace(job, request=replace(job.request, steps=1))])[0]
    again = replace(job.request, adapter=first.adapter, steps=2, optimizer=first.optimizer)
    assert not identical(whole.adapter, trainer(bank).sgd([replace(job, request=again)])[0].adapter)


def test_a_trainer_keeps_nothing_between_calls(bank: Bank) -> None:
    worker, work = trainer(bank), jobs(bank.sites, 2, train=("lora_B",))
    expected = trainer(bank).sgd(work)
    worker.sgd(jobs(bank.sites, 2, proximal=3.0))
    worker.loss(Loss(tree(bank.sites, 9), tree(bank.sites, 8, 3)), text(1))
    for a, b in zip(expected, worker.sgd(work), strict=True):
        assert identical(a.adapter, b.adapter) and identical(a.optimizer, b.optimizer)


def test_requests_are_not_written_to(bank: Bank) -> None:
    job = jobs(bank.sites, 1)[0]
    start = copy.deepcopy(job.request.adapter)
    first = trainer(bank).sgd([job])[0]
    again = replace(job, request=replace(job.request, optimizer=first.optimizer))
    kept = copy.deepcopy(first.optimizer)
    trainer(bank).sgd([again])
    assert identical(job.request.adapter, start) and identical(first.optimizer, kept)


def test_the_base_is_the_same_to_the_byte(model: LlamaForCausalLM) -> None:
    before = copy.deepcopy(model.state_dict())
    bank = Bank(model, sites(model, "all-linear"), SCALING)
    trainer(bank).sgd(jobs(bank.sites, 3))
    assert bank.active == ()
    bank.detach()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def schedule(name: str, step: int, total: int = 100, warmup: int = 10) -> float:
    recipe = ClientsConfig(schedule=name, warmup=warmup, floor=0.2)  # type: ignore[arg-type]
    return rate_factor(recipe, step, total)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_every_schedule_warms_up_and_never_jumps(name: str) -> None:
    factors = [schedule(name, step) for step in range(120)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0 and max(factors) == 1.0
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert max(a - b for a, b in zip(factors[10:], factors[11:], strict=False)) < 0.06
    assert factors[100:] == pytest.approx([1.0 if name == "constant" else 0.2] * 20)


@pytest.mark.parametrize(("name", "middle"), [("linear", 0.6), ("cosine", 0.6), ("wsd", 1.0)])
def test_schedules_at_the_middle(name: str, middle: float) -> None:
    assert schedule(name, 55) == pytest.approx(middle)


def test_wsd_begins_to_fall_at_four_fifths() -> None:
    assert [schedule("wsd", step, 100, 0) for step in (79, 80, 90)] == pytest.approx([1, 1, 0.6])


def test_a_horizon_within_the_warmup_stays_at_the_peak() -> None:
    assert schedule("cosine", 12, total=10) == 1.0
