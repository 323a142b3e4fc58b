"""A participant's batches and their loss, by the plainest means: for what is compared with the
trainer, or asks of the model what the trainer does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..client.encode import IGNORED, Example, batch_indices, collate
from ..client.task import Participant
from .engine import Lab


def batch_of(person: Participant, size: int, step: int) -> list[Example]:
    """The rows that this participant reads in its step, as the trainer deals them."""
    chosen = batch_indices(len(person.train), size, step, person.seed, person.name)
    return [person.train[row] for row in chosen]


def token_losses(lab: Lab, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(losses, counted), each (rows, length - 1): counted is 1 for response tokens, else 0."""
    ids, _, labels = (part.to(lab.base.device) for part in collate(rows, lab.bench.pad))
    logits = lab.base.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.mT, labels[:, 1:], reduction="none")
    return losses, (labels[:, 1:] != IGNORED).to(losses)


def mean_loss(lab: Lab, rows: Sequence[Example]) -> Tensor:
    """The mean over the response tokens of some rows."""
    losses, counted = token_losses(lab, rows)
    return losses.sum() / counted.sum().clamp(min=1)
