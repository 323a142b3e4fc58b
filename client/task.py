"""A task answers a strategy's requests for one client, on its own text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..strategies.base import Answer, Loss, Probe, Request, State, Update, Work
from .encode import Example
from .trainer import Job, R, Trainer


@dataclass(frozen=True)
class Participant:
    """One client's encoded text."""

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    seed: int

    def job(self, request: R) -> Job[R]:
        return Job(request, self.train, self.name, self.seed)


def answer(request: Request, participant: Participant, trainer: Trainer) -> Answer:
    """Do what a strategy asked for."""
    if isinstance(request, Loss):
        return trainer.loss(request, participant.held_out)
    if isinstance(request, Probe):
        return trainer.probe([participant.job(request)])[0]
    return trainer.sgd([participant.job(request)])[0]


def drive(work: Work, respond: Callable[[Request], Answer]) -> tuple[Update, State]:
    """Run the client half to its end, answering each request in turn."""
    try:
        request = next(work)
        while True:
            request = work.send(respond(request))
    except StopIteration as stop:
        update, memory = stop.value
        return update, memory
