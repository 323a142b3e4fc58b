"""A task answers one client's requests on its own text, in the order in which they come."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from pools import small_pool

from meadow.client.encode import Example
from meadow.client.task import Participant, answer, drive
from meadow.client.trainer import Job, Trainer
from meadow.peft_adapters.layout import Site
from meadow.strategies.base import (
    Answer,
    Loss,
    Measured,
    Probe,
    Probed,
    Request,
    Sgd,
    State,
    Trained,
    Update,
    Work,
)


def example(number: int) -> Example:
    return Example(torch.tensor([number, 1]), torch.tensor([number, 1]))


class Recorder:
    """Stands for a trainer: remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def sgd(self, jobs: list[Job[Any]]) -> list[Trained]:
        self.asked.append(jobs)
        return [Trained({}, {}, 2.5, len(job.examples), 9) for job in jobs]

    def probe(self, jobs: list[Job[Any]]) -> list[Probed]:
        self.asked.append(jobs)
        return [PROBED for _ in jobs]

    def loss(self, request: Loss, examples: object) -> Measured:
        self.asked.append((request, examples))
        return Measured(1.5, 4)


PROBED = Probed(torch.ones(1, 2), 2, 9)
ADA = Participant("ada", [example(1), example(2)], [example(3)], seed=7)


def test_training_reads_the_training_rows_and_measuring_the_others() -> None:
    recorder = Recorder()
    trainer = cast(Trainer, recorder)
    train, measure = Sgd({}, 3), Loss({})
    assert answer(train, ADA, trainer) == Trained({}, {}, 2.5, 2, 9)
    assert answer(measure, ADA, trainer) == Measured(1.5, 4)
    assert recorder.asked == [[Job(train, ADA.train, "ada", 7)], (measure, ADA.held_out)]


def test_probing_reads_the_training_rows() -> None:
    recorder, pool = Recorder(), small_pool((Site("one", 2, 2),))
    probe = Probe(pool, pool.zero(), (3,), 0.5, 6)
    assert answer(probe, ADA, cast(Trainer, recorder)) is PROBED
    assert recorder.asked == [[Job(probe, ADA.train, "ada", 7)]]


def measured_twice(results: list[Answer]) -> Work:
    for _ in range(2):
        results.append((yield Loss({})))
    return Update({}, 3.0), State(data={"seen": 2})


def test_work_is_driven_to_its_end() -> None:
    got: list[Answer] = []
    numbers = iter([1.0, 2.0])
    update, memory = drive(measured_twice(got), lambda request: Measured(next(numbers), 1))
    assert got == [Measured(1.0, 1), Measured(2.0, 1)]
    assert (update.weight, memory.data) == (3.0, {"seen": 2})


def test_work_that_asks_for_nothing_is_done() -> None:
    def silent() -> Work:
        return Update({}, 5.0), State()
        yield Loss({})

    assert drive(silent(), lambda request: Measured(0.0, 0))[0].weight == 5.0


def test_a_failed_answer_ends_the_work() -> None:
    ended = []

    def careful() -> Work:
        try:
            yield Loss({})
        finally:
            ended.append(True)
        raise AssertionError

    def fail(request: Request) -> Answer:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        drive(careful(), fail)
    assert ended == [True]
