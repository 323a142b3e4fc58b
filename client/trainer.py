"""The trainer: answers a strategy's requests on one base model, for one client or several.

Several clients with the same number of steps train side by side in one forward and backward pass,
each in its own slot of the bank, exactly as if alone: the loss is the sum of per-client means,
gradients are clipped per client, and each slot has its own AdamW.  One client is the case N = 1.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..config import ClientsConfig
from ..errors import ModelError, UpdateError
from ..peft_adapters.attention_kernels import any_length_at_once
from ..peft_adapters.bank import Bank, CoreSlots, Group, Nudge, core_tree
from ..peft_adapters.layout import Tree, rank_of
from ..peft_adapters.pool import Pool
from ..strategies.base import Loss, Measured, Probe, Probed, Sgd, Trained
from .encode import IGNORED, Example, batch_indices, collate

log = logging.getLogger(__name__)

# The bank's leaves are strided views on purpose; torch notes that once and means no error by it.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

MOMENTS = ("exp_avg", "exp_avg_sq")


R = TypeVar("R", Sgd, Probe)


@dataclass(frozen=True)
class Job(Generic[R]):
    """One client's share of a pass."""

    request: R
    examples: Sequence[Example]
    client: str
    seed: int


def rate_factor(recipe: ClientsConfig, step: int, total: int) -> float:
    """The schedule at a client's cumulative step (from 0), as a factor of the peak rate.

    "wsd" stays until 80 % of `total` and then falls linearly; beyond `total` all stay at the floor.
    """
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.schedule == "constant" or total <= recipe.warmup:
        return 1.0
    done = min(1.0, (step - recipe.warmup) / (total - recipe.warmup))
    if recipe.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif recipe.schedule == "linear":
        left = 1 - done
    else:
        left = min(1.0, (1 - done) / 0.2)
    return recipe.floor + (1 - recipe.floor) * left


class Trainer:
    """Trains and measures adapters over `bank`'s model; keeps nothing of a client between calls."""

    def __init__(
        self,
        bank: Bank,
        recipe: ClientsConfig,
        pad: int,
        progress: Callable[[int], None] = lambda steps: None,
    ) -> None:
        self.bank, self.recipe, self.pad, self.progress = bank, recipe, pad, progress
        self.device = next(bank.model.parameters()).device
        self.micro = recipe.micro_batch or recipe.batch
        self.evaluated = 32  # rows a forward pass without gradients
        self.probed = recipe.batch  # rows at both signs a pass
        self._cache: dict[tuple[str, int, int, Pool | None, float], Group] = {}

    def sgd(self, jobs: Sequence[Job[Sgd]]) -> list[Trained]:
        """Train every job's adapter; all ask for the same steps, factors and pool.

        Raises UpdateError, naming the client, where a loss or gradient is not finite.
        """
        requests = [job.request for job in jobs]
        first = requests[0]
        if any(shared_pass(request) != shared_pass(first) for request in requests):
            raise ValueError("jobs that train together need equal steps, factors, side and pool")
        ranks = [None if r.pool else rank_of(r.adapter) for r in requests]
        slots = self._load("train", [r.adapter for r in requests], first.pool, first.scale)
        slots.train(first.train)
        start = {factor: slots.flat[factor].clone() for factor in first.train}
        optimizer = self._optimizer(slots, jobs)
        losses, tokens = torch.zeros(len(jobs), dtype=torch.float64), [0] * len(jobs)
        with self._in_use(slots, [request.side for request in requests]):
            for step in range(first.steps):
                batches = [self._batch(job, job.request.first_step + step) for job in jobs]
                losses += self._backward(slots, batches, jobs)
                tokens = [n + response_tokens(b) for n, b in zip(tokens, batches, strict=True)]
                self._finish(slots, start, jobs)
                self._set_rates(optimizer, requests, step)
                optimizer.step()
                self.progress(len(jobs))
        return [
            Trained(
                slots.read(index, ranks[index]),
                self._moments(optimizer, slots, index, first.train, ranks[index]),
                float(losses[index]) / first.steps,
                len(job.examples),
                tokens[index],
            )
            for index, job in enumerate(jobs)
        ]

    def probe(self, jobs: Sequence[Job[Probe]]) -> list[Probed]:
        """Losses at both signs of every job's directions, all in one forward pass.

        A loss may be infinite or NaN: what that means is the strategy's to say.
        """
        first = jobs[0].request
        if any(job.request.pool != first.pool for job in jobs):
            raise ValueError("jobs that are probed together need the same pool")
        if any(self.recipe.batch % len(job.request.directions) for job in jobs):
            raise ValueError("a batch is dealt evenly to its directions")
        trees = [core_tree(job.request.pool, job.request.q) for job in jobs]
        cores = self._load("probe", trees, first.pool)
        assert isinstance(cores, CoreSlots)
        cores.train(())
        batches = [self._batch(job, job.request.step) for job in jobs]
        with self._in_use(cores, []), torch.no_grad():
            sums = self._both_signs(cores, batches, [job.request for job in jobs])
        self.progress(len(jobs))
        answers = []
        for job, batch, rows in zip(jobs, batches, sums, strict=True):
            counts = torch.tensor([response_tokens([row]) for row in batch], dtype=torch.float64)
            shares = rows.view(len(job.request.directions), -1, 2).sum(1)
            weights = counts.view(len(job.request.directions), -1).sum(1, keepdim=True)
            answers.append(
                Probed(shares / weights.clamp(min=1), len(job.examples), int(counts.sum()))
            )
        return answers

    def _both_signs(
        self, cores: CoreSlots, batches: list[list[Example]], requests: Sequence[Probe]
    ) -> Tensor:
        """Summed response losses of every row at + and - epsilon: float64 (jobs, rows, 2)."""
        size = len(batches[0])
        parts, start = [], 0
        while start < size:
            share = slice(start, min(start + self.probed, size))
            chosen = [batch[share] for batch in batches]
            rows = [row for batch in chosen for row in (*batch, *batch)]  # + and - of each job
            cores.nudge = self._nudge(requests, range(*share.indices(size)), size)
            try:
                sums = self._token_losses(rows).double().sum(1).cpu()
            except RuntimeError as error:
                self.probed = self._halved(share.stop - start, "probed batch", error)
                continue
            finally:
                cores.nudge = None
            parts.append(sums.view(len(batches), 2, -1).mT)
            start = share.stop
        return torch.cat(parts, 1)

    def _nudge(self, requests: Sequence[Probe], rows: Sequence[int], size: int) -> Nudge:
        """The direction and the signed epsilon of each row, in the order of `_both_signs`."""
        k, amount = [], []
        for request in requests:
            own = [request.directions[row * len(request.directions) // size] for row in rows]
            k += own + own
            epsilon = [request.epsilon] * len(rows)
            amount += epsilon + [-e for e in epsilon]
        along = torch.tensor(k, device=self.device)
        rank = requests[0].pool.rank
        return Nudge(along // rank, along % rank, torch.tensor(amount, device=self.device))

    def loss(self, request: Loss, examples: Sequence[Example]) -> Measured:
        """Mean loss over the response tokens of `examples` (0 where there are none)."""
        slots = self._load("measure", [request.adapter])
        slots.train(())
        ordered = sorted(examples, key=lambda example: len(example.ids))
        total, tokens = 0.0, response_tokens(examples)
        with self._in_use(slots, [request.side]), torch.no_grad():
            while ordered:
                self.progress(0)  # it may have to stop here
                chunk = ordered[: self.evaluated]
                try:
                    total += float(self._token_losses(chunk).double().sum())
                except RuntimeError as error:
                    self.evaluated = self._halved(self.evaluated, "evaluated batch", error)
                    continue
                ordered = ordered[len(chunk) :]
        return Measured(total / max(tokens, 1), tokens)

    def _batch(self, job: Job[Any], step: int) -> list[Example]:
        """The rows of a client's cumulative step."""
        chosen = batch_indices(len(job.examples), self.recipe.batch, step, job.seed, job.client)
        return [job.examples[index] for index in chosen]

    def _backward(
        self, slots: Group, batches: list[list[Example]], jobs: Sequence[Job[Sgd]]
    ) -> Tensor:
        """Accumulate the gradients of one effective batch; its mean loss per job (jobs,).

        Where memory runs out the micro-batch is halved and the batch begun again: the effective
        batch, and with it the result up to rounding, stays the same.
        """
        while True:
            for gradient in slots.grads.values():
                gradient.zero_()
            try:
                losses = self._accumulate(batches)
                break
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                self.micro = self._halved(self.micro, "micro-batch", error)
        for job, loss in zip(jobs, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise UpdateError(
                    f"{job.client}: the training loss is {loss}", "a smaller [clients] lr may help"
                )
        return losses

    def _accumulate(self, batches: list[list[Example]]) -> Tensor:
        counts = torch.tensor(
            [max(1, response_tokens(batch)) for batch in batches], dtype=torch.float64
        )
        losses = torch.zeros(len(batches), dtype=torch.float64)
        for start in range(0, len(batches[0]), self.micro):
            rows = [example for batch in batches for example in batch[start : start + self.micro]]
            sums = self._token_losses(rows).view(len(batches), -1).sum(1)
            means = sums / counts.to(sums)
            means.sum().backward()  # type: ignore[no-untyped-call]
            losses += means.detach().double().cpu()
        return losses

    def _halved(self, rows: int, what: str, error: RuntimeError) -> int:
        """Half as many rows for the next try; any other fault than lack of memory is raised."""
        if not _is_out_of_memory(error):
            raise error
        if rows == 1:
            raise ModelError(
                f"not enough memory for a {what} of one row",
                "a smaller model, [data] max_length or quantised base",
            ) from error
        log.warning(
            "out of memory: %s is now %d rows; results stay the same", what, (rows + 1) // 2
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return (rows + 1) // 2

    def _token_losses(self, rows: Sequence[Example]) -> Tensor:
        """Loss at every position (rows, length - 1), zero outside the response."""
        ids, _, labels = (tensor.to(self.device) for tensor in collate(rows, self.pad))
        with any_length_at_once():  # the backward pass takes the same kernels
            logits = self.bank.model(input_ids=ids, use_cache=False).logits
        # The labels move, not the logits, which are the largest tensor there is: no copy of them.
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), following.flatten(), reduction="none"
        )
        return losses.view(len(rows), -1)[:, :-1].contiguous()

    def _finish(self, slots: Group, start: dict[str, Tensor], jobs: Sequence[Job[Sgd]]) -> None:
        """FedProx's pull and the clip, per client."""
        mu = torch.tensor([job.request.proximal for job in jobs], device=self.device)
        if bool(mu.any()):
            for factor, gradient in slots.grads.items():
                gradient += mu[:, None] * (slots.flat[factor] - start[factor])
        norms = sum(gradient.square().sum(1) for gradient in slots.grads.values())
        assert isinstance(norms, Tensor)
        for job, norm in zip(jobs, norms.tolist(), strict=True):
            if not math.isfinite(norm):
                raise UpdateError(
                    f"{job.client}: the gradient is not finite", "a smaller [clients] lr may help"
                )
        if self.recipe.clip > 0:
            scale = (self.recipe.clip / (norms.sqrt() + 1e-6)).clamp(max=1.0)
            for gradient in slots.grads.values():
                gradient *= scale[:, None]

    def _set_rates(self, optimizer: torch.optim.AdamW, requests: Sequence[Sgd], step: int) -> None:
        for group, request in zip(optimizer.param_groups, requests, strict=True):
            done = request.first_step + step
            group["lr"] = self.recipe.lr * rate_factor(self.recipe, done, request.total_steps)

    def _optimizer(self, slots: Group, jobs: Sequence[Job[Sgd]]) -> torch.optim.AdamW:
        """One parameter group a client: its row of each moving factor's buffer."""
        groups, kept = [], {}
        for index, job in enumerate(jobs):
            group = []
            for factor in job.request.train:
                row = torch.nn.Parameter(slots.flat[factor][index])
                row.grad = slots.grads[factor][index]
                group.append(row)
                if job.request.optimizer:
                    kept[row] = self._kept(slots, job.request.optimizer, factor)
            groups.append({"params": group})
        optimizer = torch.optim.AdamW(
            groups, lr=self.recipe.lr, weight_decay=self.recipe.weight_decay
        )
        for row, state in kept.items():
            optimizer.state[row] = state
        return optimizer

    @staticmethod
    def _kept(slots: Group, state: Tree, factor: str) -> Tree:
        moments = {
            moment: slots.join(
                {n.partition("/")[2]: t for n, t in state.items() if n.startswith(f"{moment}/")},
                factor,
            )
            for moment in MOMENTS
        }
        return {"step": state[f"step/{factor}"].clone(), **moments}

    @staticmethod
    def _moments(
        optimizer: torch.optim.AdamW,
        slots: Group,
        index: int,
        train: Sequence[str],
        rank: int | None,
    ) -> Tree:
        tree: Tree = {}
        for factor, row in zip(train, optimizer.param_groups[index]["params"], strict=True):
            state = optimizer.state[row]
            tree[f"step/{factor}"] = state["step"].clone()
            for moment in MOMENTS:
                tree |= {
                    f"{moment}/{n}": t for n, t in slots.split(state[moment], factor, rank).items()
                }
        return tree

    def _load(
        self, purpose: str, trees: Sequence[Tree], pool: Pool | None = None, scale: float = 0.0
    ) -> Group:
        """Slots that hold these trees: adapters, padded to the widest, or cores of a pool."""
        widest = 0 if pool else max(rank_of(tree) for tree in trees)
        key = (purpose, len(trees), widest, pool, scale)
        if key not in self._cache:
            self._cache[key] = (
                self.bank.cores(pool, len(trees), scale or None)
                if pool
                else self.bank.slots(len(trees), widest)
            )
        slots = self._cache[key]
        for index, tree in enumerate(trees):
            slots.write(index, tree)
        return slots

    @contextmanager
    def _in_use(self, slots: Group, sides: Sequence[Tree | None]) -> Iterator[None]:
        trees = [side for side in sides if side is not None]
        groups = [slots, *([self._load("side", trees)] if trees else [])]
        with self.bank.using(*groups):
            yield


def shared_pass(request: Sgd) -> tuple[object, ...]:
    """Requests for which this agrees may train side by side."""
    return request.steps, request.train, request.side is None, request.pool, request.scale


def response_tokens(examples: Sequence[Example]) -> int:
    """Positions whose token is predicted: labelled, and not the first."""
    return sum(int((example.labels[1:] != IGNORED).sum()) for example in examples)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in text
        or "out of memory" in text
    )
