"""The trainer against plain PEFT: what a client's training gives does not depend on who trains
beside it or on the size of the micro-batch, and losses are means over response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from local_trainings import (
    RECIPE,
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
from peft import LoraConfig, get_peft_model
from small_models import lively_llama
from torch import Tensor, nn

from meadow.client.encode import IGNORED, Example, batch_indices
from meadow.client.trainer import Job
from meadow.config import ClientsConfig
from meadow.peft_adapters.bank import Bank
from meadow.peft_adapters.base_model import sites
from meadow.peft_adapters.layout import FACTORS, Tree
from meadow.strategies.base import Loss

pytest_plugins = ("trainer_fixtures",)

KEYS = ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight")


def by_peft(job: Job[Any], recipe: ClientsConfig = RECIPE, side: Tree | None = None) -> Tree:
    """The job done by PEFT, transformers' own loss, torch's clipping and torch's AdamW.

    FedProx is its definition: mu / 2 |w - w0|^2 is part of the loss.
    """
    base = lively_llama(2)
    for name, weight in dict(base.named_modules()).items():
        if side is not None and f"{name}.lora_A" in side:
            assert isinstance(weight, nn.Linear)
            weight.weight += SCALING * side[f"{name}.lora_B"] @ side[f"{name}.lora_A"]
    rank = next(t.shape[0] for n, t in job.request.adapter.items() if n.endswith("lora_A"))
    names = sorted({name.rpartition(".")[0] for name in job.request.adapter})
    model = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=names, lora_dropout=0.0)
    )
    parameters = {}
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            name = key.removeprefix(KEYS[0]).replace(".default.weight", "")
            with torch.no_grad():
                parameter.copy_(job.request.adapter[name])
            parameter.requires_grad_(name.endswith(job.request.train))
            parameters[name] = parameter
    assert parameters.keys() == job.request.adapter.keys()
    moving = [parameter for parameter in parameters.values() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=recipe.lr, weight_decay=recipe.weight_decay)
    start = [parameter.detach().clone() for parameter in moving]
    for step in range(job.request.steps):
        chosen = batch_indices(len(job.examples), recipe.batch, step, job.seed, job.client)
        loss = peft_loss(model, [job.examples[index] for index in chosen])
        pull = sum((p - p0).square().sum() for p, p0 in zip(moving, start, strict=True))
        optimizer.zero_grad()
        (loss + job.request.proximal / 2 * pull).backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(moving, recipe.clip)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def peft_loss(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Row by row and without padding: the mean over all response tokens of the batch."""
    total, tokens = torch.zeros(()), 0
    for example in examples:
        count = int((example.labels[1:] != IGNORED).sum())
        output = model(input_ids=example.ids[None], labels=example.labels[None])
        total, tokens = total + output.loss * count, tokens + count
    return total / tokens


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("train", [FACTORS, ("lora_A",), ("lora_B",)])
def test_clients_side_by_side_equal_separate_peft_trainings(
    bank: Bank, train: tuple[str, ...], clip: float
) -> None:
    """Four clients, three AdamW steps, float32: at most 1e-6 apart, clipping included."""
    work = jobs(bank.sites, 4, train=train)
    together = trainer(bank, clip=clip).sgd(work)
    for job, trained in zip(work, together, strict=True):
        assert distance(trained.adapter, by_peft(job, replace(RECIPE, clip=clip))) <= 1e-6
        moved = {n for n, t in trained.adapter.items() if not t.equal(job.request.adapter[n])}
        assert moved == {name for name in trained.adapter if name.endswith(train)}


def test_from_loras_start_where_b_is_zero(bank: Bank) -> None:
    """A has no gradient in the first step, and AdamW must not make one of rounding noise."""
    work = []
    for job in jobs(bank.sites, 3):
        adapter = {
            n: torch.zeros_like(t) if n.endswith("lora_B") else t
            for n, t in job.request.adapter.items()
        }
        work.append(replace(job, request=replace(job.request, adapter=adapter)))
    for job, trained in zip(work, trainer(bank).sgd(work), strict=True):
        assert distance(trained.adapter, by_peft(job)) <= 1e-6


def test_clipping_is_per_client(bank: Bank) -> None:
    """A clip over all of them would let the others shrink a client's steps."""
    work = jobs(bank.sites, 3)
    clipped, free = (trainer(bank, clip=clip).sgd(work) for clip in (0.05, 0.0))
    assert all(distance(a.adapter, b.adapter) > 1e-5 for a, b in zip(clipped, free, strict=True))
    alone = trainer(bank, clip=0.05).sgd(work[:1])[0]
    assert distance(clipped[0].adapter, alone.adapter) <= 1e-6


@pytest.mark.parametrize("train", [FACTORS, ("lora_B",)])
def test_slots_side_by_side_equal_one_by_one(bank: Bank, train: tuple[str, ...]) -> None:
    work = jobs(bank.sites, 4, train=train)
    for job, trained in zip(work, trainer(bank).sgd(work), strict=True):
        alone = trainer(bank).sgd([job])[0]
        assert distance(trained.adapter, alone.adapter) <= 1e-6
        assert distance(trained.optimizer, alone.optimizer) <= 1e-6
        assert trained.loss == pytest.approx(alone.loss, abs=1e-6)
        assert (trained.examples, trained.tokens) == (alone.examples, alone.tokens)


def test_mixed_ranks_share_a_pass(bank: Bank) -> None:
    ranks = (1, 4, 2)
    work = [
        replace(job, request=replace(job.request, adapter=tree(bank.sites, index, rank)))
        for index, (job, rank) in enumerate(zip(jobs(bank.sites, 3), ranks, strict=True))
    ]
    for job, trained in zip(work, trainer(bank).sgd(work), strict=True):
        assert distance(trained.adapter, by_peft(job)) <= 1e-6
        assert distance(trained.optimizer, trainer(bank).sgd([job])[0].optimizer) <= 1e-6


def test_a_side_adapter_lies_frozen_under_the_trained_one(bank: Bank) -> None:
    """Each client's own, of another rank than what it trains."""
    sides = [tree(bank.sites, 50 + index, 2) for index in range(2)]
    work = [
        replace(job, request=replace(job.request, side=side))
        for job, side in zip(jobs(bank.sites, 2), sides, strict=True)
    ]
    before = [{name: tensor.clone() for name, tensor in side.items()} for side in sides]
    for job, side, trained in zip(work, sides, trainer(bank).sgd(work), strict=True):
        assert distance(trained.adapter, by_peft(job, side=side)) <= 2e-6  # merged: W + B A rounds
    assert all(identical(side, copied) for side, copied in zip(sides, before, strict=True))


def test_fedprox_pulls_as_its_term_in_the_loss_does(bank: Bank) -> None:
    job = jobs(bank.sites, 1, proximal=5.0)[0]
    beside = replace(jobs(bank.sites, 2)[1], client="other")
    pulled, free = trainer(bank).sgd([job, beside])
    assert distance(pulled.adapter, by_peft(job)) <= 1e-6
    assert distance(free.adapter, by_peft(beside)) <= 1e-6
    assert distance(pulled.adapter, by_peft(jobs(bank.sites, 1)[0])) > 1e-4


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(bank: Bank, micro: int) -> None:
    work = jobs(bank.sites, 2)
    whole, parts = trainer(bank).sgd(work), trainer(bank, micro_batch=micro).sgd(work)
    for a, b in zip(whole, parts, strict=True):
        assert distance(a.adapter, b.adapter) <= 1e-6
        assert a.loss == pytest.approx(b.loss, abs=1e-6)


def test_unlike_jobs_do_not_share_a_pass(bank: Bank) -> None:
    first, second = jobs(bank.sites, 2)
    for change in ({"steps": 5}, {"train": ("lora_B",)}, {"side": tree(bank.sites, 7)}):
        other = replace(second, request=replace(second.request, **change))
        with pytest.raises(ValueError, match="equal steps, factors, side and pool"):
            trainer(bank).sgd([first, other])


def test_the_training_loss_is_the_mean_over_steps(bank: Bank) -> None:
    """Without learning it is that of the batches; tokens and rows are counted."""
    job = jobs(bank.sites, 1)[0]
    trained = trainer(bank, lr=1e-12, weight_decay=0.0).sgd([job])[0]
    batches = [
        [job.examples[at] for at in batch_indices(7, RECIPE.batch, step, SEED, job.client)]
        for step in range(STEPS)
    ]
    means = [trainer(bank).loss(Loss(job.request.adapter), batch).loss for batch in batches]
    assert trained.loss == pytest.approx(sum(means) / STEPS, abs=1e-5)
    counts = [int((row.labels[1:] != IGNORED).sum()) for batch in batches for row in batch]
    assert (trained.tokens, trained.examples) == (sum(counts), 7)


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_the_measured_loss_is_the_mean_over_response_tokens(bank: Bank, rows: int) -> None:
    adapter, side, examples = tree(bank.sites, 1), tree(bank.sites, 2, 1), text(2)
    measuring = trainer(bank)
    measuring.evaluated = rows
    measured = measuring.loss(Loss(adapter, side), examples)
    merged = lively_llama(2)
    for part in (adapter, side):
        for site in bank.sites:
            product = part[f"{site.name}.lora_B"] @ part[f"{site.name}.lora_A"]
            merged.get_submodule(site.name).weight += SCALING * product
    with torch.no_grad():
        expected = float(peft_loss(merged, examples))
    assert measured.loss == pytest.approx(expected, abs=1e-5)
    assert measured.tokens == sum(int((e.labels[1:] != IGNORED).sum()) for e in examples)


def test_no_attention_plans_for_each_length_of_a_batch(bank: Bank) -> None:
    """As a GPU's does that torch would take first: for longer than a step takes."""
    found: list[bool] = []

    def note(*_: object) -> None:
        found.append(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]

    with bank.model.register_forward_pre_hook(note):
        trainer(bank).loss(Loss(tree(bank.sites, 1)), text(2))
    assert found == [False] * len(found) and found
    note()
    assert found[-1]


def test_nothing_to_measure_is_no_loss(bank: Bank) -> None:
    measured = trainer(bank).loss(Loss(tree(bank.sites, 1)), [])
    assert (measured.loss, measured.tokens) == (0.0, 0)


def test_a_bf16_base_trains_float32_factors() -> None:
    model = lively_llama(2).bfloat16()
    bank = Bank(model, sites(model, "all-linear"), SCALING)
    job = jobs(bank.sites, 1)[0]
    trained = trainer(bank).sgd([job])[0]
    assert {tensor.dtype for tensor in trained.adapter.values()} == {torch.float32}
    assert 1e-4 < distance(trained.adapter, job.request.adapter)
    assert distance(trained.adapter, by_peft(job)) < 2 * STEPS * RECIPE.lr
