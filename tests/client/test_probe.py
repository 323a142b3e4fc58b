"""Losses at both signs of a pool's directions, against weights merged in float64."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pools import along, dense, random_q, small_pool
from small_models import lively_llama
from torch import Tensor

from meadow.client.encode import IGNORED, Example, batch_indices
from meadow.client.trainer import Job, Trainer
from meadow.config import ClientsConfig
from meadow.errors import ModelError
from meadow.peft_adapters.bank import Bank, core_stack, core_tree
from meadow.peft_adapters.base_model import sites
from meadow.peft_adapters.layout import CORE
from meadow.peft_adapters.pool import Pool
from meadow.strategies.base import Probe, Sgd

SEED, EPSILON = 11, 2.0**-7
RECIPE = ClientsConfig(batch=4, lr=2e-3, clip=0.5, weight_decay=0.01)
Changes = dict[str, Tensor]


@pytest.fixture
def bank() -> Bank:
    model = lively_llama(1)
    return Bank(model, sites(model, "all-linear"), 1.0)


def pool_of(bank: Bank, **more: Any) -> Pool:
    return small_pool(tuple(sorted(bank.sites, key=lambda site: site.name)), unit=12, **more)


def trainer(bank: Bank, **changes: Any) -> Trainer:
    return Trainer(bank, replace(RECIPE, **changes), pad=0)


def text(client: int, rows: int = 7) -> list[Example]:
    generator = torch.Generator().manual_seed(100 + client)
    examples = []
    for row in range(rows):
        ids = torch.randint(1, 48, (3 + (5 * client + 3 * row) % 11,), generator=generator)
        labels = ids.clone()
        labels[: 1 + row % 2] = IGNORED
        examples.append(Example(ids, labels))
    return examples


def job(bank: Bank, client: int, directions: Sequence[int], step: int = 0, **pool: Any) -> Job[Any]:
    made = pool_of(bank, **pool)
    request = Probe(made, random_q(made, client, 60), tuple(directions), EPSILON, step)
    return Job(request, text(client), f"client-{client}", SEED)


def expected_losses(asked: Job[Any], batch: int = 4) -> Tensor:
    """(directions, 2) by a model in float64, row by row, each weight changed by hand."""
    request = asked.request
    chosen = batch_indices(len(asked.examples), batch, request.step, asked.seed, asked.client)
    rows, share = [asked.examples[i] for i in chosen], batch // len(request.directions)
    at, found = dense(request.pool, request.q), []
    for number, k in enumerate(request.directions):
        moved, mine = along(request.pool, k), rows[number * share : (number + 1) * share]
        found.append([mean_loss(mine, at, moved, sign * EPSILON) for sign in (1, -1)])
    return torch.tensor(found, dtype=torch.float64)


def mean_loss(rows: list[Example], at: Changes, moved: Changes, amount: float) -> float:
    model, total, tokens = lively_llama(1).double(), 0.0, 0
    for name, change in at.items():
        model.get_submodule(name).weight += change + amount * moved[name]
    for row in rows:
        places = row.labels[1:] != IGNORED
        logits = model(input_ids=row.ids[None]).logits[0, :-1].log_softmax(-1)
        total -= float(logits[places].gather(1, row.labels[1:][places][:, None]).sum())
        tokens += int(places.sum())
    return total / max(tokens, 1)


def close(got: Tensor, expected: Tensor) -> bool:
    assert got.dtype == torch.float64 and got.shape == expected.shape
    return torch.allclose(got, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
@pytest.mark.parametrize("directions", [[5], [5, 0], [8, 3, 3, 1]])
def test_losses_are_those_of_merged_weights(bank: Bank, directions: list[int], cores: Any) -> None:
    asked = job(bank, 1, directions, step=2, cores=cores)
    (probed,) = trainer(bank).probe([asked])
    expected = expected_losses(asked)
    assert close(probed.losses, expected)
    assert float((expected[:, 0] - expected[:, 1]).abs().min()) > 1e-4  # a difference to be seen
    chosen = batch_indices(7, 4, 2, SEED, "client-1")
    assert probed.tokens == sum(
        int((asked.examples[i].labels[1:] != IGNORED).sum()) for i in chosen
    )
    assert probed.examples == 7


def test_clients_side_by_side_equal_each_alone(bank: Bank) -> None:
    """Other states, directions, numbers of directions and steps; one pool."""
    work = [
        job(bank, 0, [1]), job(bank, 1, [2, 7], step=3), job(bank, 2, [0, 4, 8, 5], step=1),
    ]  # fmt: skip
    for asked, probed in zip(work, trainer(bank).probe(work), strict=True):
        (alone,) = trainer(bank).probe([asked])
        assert close(probed.losses, alone.losses) and close(probed.losses, expected_losses(asked))
        assert (probed.tokens, probed.examples) == (alone.tokens, alone.examples)


def test_a_step_moves_the_cursor(bank: Bank) -> None:
    found = [trainer(bank).probe([job(bank, 1, [2], step=step)])[0] for step in (0, 1)]
    assert not torch.allclose(found[0].losses, found[1].losses, atol=1e-4)


def test_rows_without_response_tokens_have_no_loss(bank: Bank) -> None:
    """Of two directions, one has only such rows: its losses are zero, the other's are as ever."""
    asked = job(bank, 1, [2, 7])
    chosen = batch_indices(7, 4, 0, SEED, "client-1")
    for index in chosen[:2]:
        asked.examples[index].labels[:] = IGNORED
    (probed,) = trainer(bank).probe([asked])
    assert probed.losses[0].tolist() == [0.0, 0.0]
    assert close(probed.losses, expected_losses(asked)) and probed.losses[1].min() > 0


def test_a_direction_weighs_its_rows_by_their_tokens(bank: Bank) -> None:
    asked = job(bank, 1, [4])
    short = asked.examples[batch_indices(7, 4, 0, SEED, "client-1")[0]]
    short.labels[:-1] = IGNORED
    (probed,) = trainer(bank).probe([asked])
    assert close(probed.losses, expected_losses(asked))


class Tight:
    """A model's forward pass runs out of memory above so many rows."""

    def __init__(self, bank: Bank, rows: int) -> None:
        self.rows, self.seen = rows, list[int]()
        bank.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: object, args: Any, kwargs: Any) -> None:
        self.seen.append(len(kwargs["input_ids"]))
        if self.seen[-1] > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("directions", [[5], [5, 0], [8, 3, 3, 1]])
def test_out_of_memory_halves_the_pass_and_nothing_else(
    bank: Bank, directions: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    work = [job(bank, 0, directions), job(bank, 1, directions)]
    whole = trainer(bank).probe(work)
    tight, worker = Tight(bank, 6), trainer(bank)
    with caplog.at_level(logging.WARNING):
        parts = worker.probe(work)
    assert tight.seen == [16, 8, 4, 4, 4, 4] and worker.probed == 1
    for one, other in zip(whole, parts, strict=True):
        assert close(one.losses, other.losses) and one.tokens == other.tokens
    assert [record.message for record in caplog.records] == [
        f"out of memory: probed batch is now {rows} rows; results stay the same" for rows in (2, 1)
    ]


def test_memory_may_end_in_the_middle_of_a_batch(bank: Bank) -> None:
    """Three rows a pass of a batch of four: the second pass is a short one."""
    asked, worker = job(bank, 1, [3, 6]), trainer(bank)
    worker.probed = 3
    assert close(worker.probe([asked])[0].losses, expected_losses(asked))


def test_not_even_one_row_fits(bank: Bank) -> None:
    Tight(bank, 1)
    with pytest.raises(ModelError, match="not enough memory for a probed batch of one row"):
        trainer(bank).probe([job(bank, 0, [1])])


def test_a_loss_that_is_not_finite_comes_through(bank: Bank) -> None:
    """For one client and one direction only; what it means is the strategy's to say."""
    work = [job(bank, 0, [1, 2]), job(bank, 1, [3, 4])]
    clean = trainer(bank).probe(work)

    def spoil(module: object, args: Any, output: Any) -> None:
        output.logits[8 + 2 : 8 + 4] = torch.nan  # the second client's, at +: its second direction

    bank.model.register_forward_hook(spoil)
    first, second = trainer(bank).probe(work)
    assert close(first.losses, clean[0].losses)
    assert math.isnan(second.losses[1, 0])
    assert close(second.losses[0], clean[1].losses[0])
    assert close(second.losses[1, 1:], clean[1].losses[1, 1:])


def test_the_next_pass_is_not_nudged(bank: Bank) -> None:
    worker, ids = trainer(bank), torch.tensor([[1, 2, 3]])
    before = bank.model(input_ids=ids).logits
    worker.probe([job(bank, 0, [1])])
    assert torch.equal(bank.model(input_ids=ids).logits, before)
    again = [worker.probe([job(bank, 0, [1])])[0].losses for _ in range(2)]
    assert torch.equal(again[0], again[1])


def test_what_cannot_share_a_pass_is_refused(bank: Bank) -> None:
    with pytest.raises(ValueError, match="same pool"):
        trainer(bank).probe([job(bank, 0, [1]), job(bank, 1, [1], cores="per_layer")])
    with pytest.raises(ValueError, match="dealt evenly"):
        trainer(bank).probe([job(bank, 0, [1, 2, 3])])


# --- backpropagation into the core -------------------------------------------------------------


def core_job(bank: Bank, client: int, scale: float = 2.0**-6, **pool: Any) -> Job[Any]:
    made = pool_of(bank, **pool)
    start = core_tree(made, random_q(made, client, 60).double() / 60)
    request = Sgd(start, 3, train=(CORE,), pool=made, scale=scale)
    return Job(request, text(client), f"client-{client}", SEED)


def by_hand(asked: Job[Any]) -> Tensor:
    """The cores after AdamW on a float64 model whose weights are W0 + scale U C V^T."""
    from pools import factors

    request, sequence = asked.request, range(asked.request.steps)
    cores = core_stack(request.pool, request.adapter).double().requires_grad_()
    optimizer = torch.optim.AdamW([cores], lr=RECIPE.lr, weight_decay=RECIPE.weight_decay)
    model = lively_llama(1).double()
    signs = [
        [torch.from_numpy(factor).double() for factor in factors(request.pool, index)]
        for index in range(len(request.pool.sites))
    ]
    for step in sequence:
        chosen = batch_indices(len(asked.examples), 4, step, asked.seed, asked.client)
        weights = dict(model.state_dict())
        for index, site in enumerate(request.pool.sites):
            core = cores[index if len(cores) > 1 else 0]
            u, v = signs[index]
            name = f"{site.name}.weight"
            weights[name] = weights[name] + request.scale * u @ core @ v.T
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for row in (asked.examples[i] for i in chosen):
            kwargs = {"input_ids": row.ids[None], "labels": row.labels[None]}
            count = int((row.labels[1:] != IGNORED).sum())
            total = total + torch.func.functional_call(model, weights, (), kwargs).loss * count
            tokens += count
        optimizer.zero_grad()
        torch.autograd.backward(total / tokens)
        torch.nn.utils.clip_grad_norm_([cores], RECIPE.clip)
        optimizer.step()
    return cores.detach()


@pytest.mark.parametrize("cores", ["shared", "per_layer"])
def test_training_a_core_is_adamw_on_the_core(bank: Bank, cores: Any) -> None:
    work = [core_job(bank, client, cores=cores) for client in range(2)]
    for asked, trained in zip(work, trainer(bank).sgd(work), strict=True):
        got = core_stack(asked.request.pool, trained.adapter)
        start = core_stack(asked.request.pool, asked.request.adapter)
        assert torch.allclose(got.double(), by_hand(asked), rtol=0, atol=1e-5)
        assert float((got - start).abs().max()) > 1e-3
        (alone,) = trainer(bank).sgd([asked])
        assert torch.allclose(core_stack(asked.request.pool, alone.adapter), got, atol=1e-6)


@pytest.mark.parametrize("change", [{"scale": 2.0**-5}, {"cores": "per_layer"}])
def test_other_cores_do_not_share_a_pass(bank: Bank, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need equal"):
        trainer(bank).sgd([core_job(bank, 0), core_job(bank, 1, **change)])


def test_base_weights_never_change_a_byte(bank: Bank) -> None:
    def weights() -> list[bytes]:
        state = sorted(bank.model.state_dict().items())
        return [tensor.numpy().tobytes() for _, tensor in state]

    before = weights()
    trainer(bank).probe([job(bank, 0, [1, 2])])
    trainer(bank).sgd([core_job(bank, 0)])
    assert weights() == before
