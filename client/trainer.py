"""The trainer: answers `Sgd` and `Loss` requests on one base model, for one client or several.

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

import torch
from torch import Tensor

from ..config import ClientsConfig
from ..errors import ModelError, UpdateError
from ..peft_adapters.bank import Bank, Slots
from ..peft_adapters.layout import Tree, rank_of
from ..strategies.base import Loss, Measured, Sgd, Trained
from .encode import Example, batch_indices, collate

log = logging.getLogger(__name__)

# The bank's leaves are strided views on purpose; torch notes that once and means no error by it.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Job:
    """One client's share of a training pass."""

    request: Sgd
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
        self._cache: dict[tuple[str, int, int], Slots] = {}

    def sgd(self, jobs: Sequence[Job]) -> list[Trained]:
        """Train every job's adapter; all ask for the same steps and factors.

        Raises UpdateError, naming the client, where a loss or gradient is not finite.
        """
        requests = [job.request for job in jobs]
        first = requests[0]
        if any(
            (r.steps, r.train, r.side is None) != (first.steps, first.train, first.side is None)
            for r in requests
        ):
            raise ValueError("jobs that train together need equal steps, factors and side adapters")
        ranks = [rank_of(request.adapter) for request in requests]
        slots = self._load("train", [request.adapter for request in requests], max(ranks))
        slots.train(first.train)
        start = {factor: slots.flat[factor].clone() for factor in first.train}
        optimizer = self._optimizer(slots, jobs)
        losses = torch.zeros(len(jobs), dtype=torch.float64)
        tokens = [0] * len(jobs)
        with self._in_use(slots, [request.side for request in requests]):
            for step in range(first.steps):
                batches = [self._batch(job, step) for job in jobs]
                losses += self._backward(slots, batches, jobs)
                tokens = [n + response_tokens(b) for n, b in zip(tokens, batches, strict=True)]
                self._finish(slots, start, jobs)
                for group, request in zip(optimizer.param_groups, requests, strict=True):
                    factor = rate_factor(
                        self.recipe, request.first_step + step, request.total_steps
                    )
                    group["lr"] = self.recipe.lr * factor
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

    def loss(self, request: Loss, examples: Sequence[Example]) -> Measured:
        """Mean loss over the response tokens of `examples` (0 where there are none)."""
        slots = self._load("measure", [request.adapter], rank_of(request.adapter))
        slots.train(())
        ordered = sorted(examples, key=lambda example: len(example.ids))
        total, tokens = 0.0, response_tokens(examples)
        with self._in_use(slots, [request.side]), torch.no_grad():
            while ordered:
                chunk = ordered[: self.evaluated]
                try:
                    total += float(self._token_losses(chunk).double().sum())
                except RuntimeError as error:
                    self.evaluated = self._halved(self.evaluated, "evaluated batch", error)
                    continue
                ordered = ordered[len(chunk) :]
        return Measured(total / max(tokens, 1), tokens)

    def _batch(self, job: Job, step: int) -> list[Example]:
        cursor = job.request.first_step + step
        chosen = batch_indices(len(job.examples), self.recipe.batch, cursor, job.seed, job.client)
        return [job.examples[index] for index in chosen]

    def _backward(self, slots: Slots, batches: list[list[Example]], jobs: Sequence[Job]) -> Tensor:
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
        logits = self.bank.model(input_ids=ids, use_cache=False).logits
        flat = logits[:, :-1].flatten(0, 1).float()
        losses = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="none")
        return losses.view(len(rows), -1)

    def _finish(self, slots: Slots, start: dict[str, Tensor], jobs: Sequence[Job]) -> None:
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

    def _optimizer(self, slots: Slots, jobs: Sequence[Job]) -> torch.optim.AdamW:
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
    def _kept(slots: Slots, state: Tree, factor: str) -> Tree:
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
        optimizer: torch.optim.AdamW, slots: Slots, index: int, train: Sequence[str], rank: int
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

    def _load(self, purpose: str, adapters: Sequence[Tree], rank: int) -> Slots:
        key = (purpose, len(adapters), rank)
        if key not in self._cache:
            self._cache[key] = self.bank.slots(len(adapters), rank)
        slots = self._cache[key]
        for index, adapter in enumerate(adapters):
            slots.write(index, adapter)
        return slots

    @contextmanager
    def _in_use(self, slots: Slots, sides: Sequence[Tree | None]) -> Iterator[None]:
        trees = [side for side in sides if side is not None]
        groups = [slots]
        if trees:
            widest = max(
                t.shape[0] for tree in trees for n, t in tree.items() if n.endswith(".lora_A")
            )
            groups.append(self._load("side", trees, widest))
        with self.bank.using(*groups):
            yield


def response_tokens(examples: Sequence[Example]) -> int:
    """Positions whose token is predicted: labelled, and not the first."""
    return sum(int((example.labels[1:] != -100).sum()) for example in examples)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in text
        or "out of memory" in text
    )
