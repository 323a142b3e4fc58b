"""The trainer against plain PEFT: what a client's training gives does not depend on who trains
beside it, on the size of the micro-batch, or on where a round ends."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import lively_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from meadow.client.encode import IGNORED, Example, batch_indices
from meadow.client.task import Participant, answer, drive
from meadow.client.trainer import Job, Trainer, rate_factor
from meadow.config import ClientsConfig
from meadow.errors import ModelError, PolicyError, UpdateError
from meadow.peft_adapters.bank import Bank
from meadow.peft_adapters.base_model import sites
from meadow.peft_adapters.layout import FACTORS, Site, Tree
from meadow.strategies.base import Loss, Sgd, State, Trained, Turn
from meadow.strategies.registry import make

RANK, SCALING, STEPS, SEED = 4, 2.0, 3, 11
RECIPE = ClientsConfig(steps=STEPS, batch=4, lr=2e-3, clip=0.5, weight_decay=0.01)
KEYS = ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight")


@pytest.fixture
def model() -> LlamaForCausalLM:
    return lively_llama(2)


@pytest.fixture
def bank(model: LlamaForCausalLM) -> Bank:
    return Bank(model, sites(model, "all-linear"), SCALING)


def trainer(bank: Bank, **changes: Any) -> Trainer:
    return Trainer(bank, replace(RECIPE, **changes), pad=0)


def text(client: int, rows: int = 7) -> list[Example]:
    """Rows of 3 to 20 tokens; each client has lengths and words of its own."""
    generator = torch.Generator().manual_seed(100 + client)
    examples = []
    for row in range(rows):
        length = 3 + (5 * client + 3 * row) % 18
        low = 8 * client % 32
        ids = torch.randint(low, low + 16, (length,), generator=generator)
        labels = ids.clone()
        labels[: 1 + row % 2] = IGNORED
        examples.append(Example(ids, labels))
    return examples


def tree(layers: Sequence[Site], seed: int, rank: int = RANK) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{site.name}.{factor}": torch.randn(site.shape(factor, rank), generator=generator) * 0.1
        for site in layers
        for factor in FACTORS
    }


def jobs(layers: Sequence[Site], count: int, **request: Any) -> list[Job[Any]]:
    return [
        Job(Sgd(tree(layers, index), STEPS, **request), text(index), f"client-{index}", SEED)
        for index in range(count)
    ]


def distance(first: Tree, second: Tree) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def identical(first: Tree, second: Tree) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


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
