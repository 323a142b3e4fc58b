"""The meeting point: requests of a group are answered in one pass, whoever comes late or fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import small_pool

from meadow.client.task import Participant
from meadow.client.trainer import Job
from meadow.errors import DataError, UpdateError
from meadow.peft_adapters.layout import Site
from meadow.simulation.fused import Rendezvous
from meadow.strategies.base import Loss, Measured, Probe, Probed, Request, Sgd, Trained


class Recorder:
    """Stands for the trainer: `first_step` comes back as the loss; a guilty client fails a pass."""

    def __init__(self, guilty: str = "", error: type[Exception] = UpdateError) -> None:
        self.passes: list[list[str]] = []
        self.guilty, self.error = guilty, error

    def sgd(self, jobs: Sequence[Job[Any]]) -> list[Trained]:
        self.passes.append([job.client for job in jobs])
        if any(job.client == self.guilty for job in jobs):
            raise self.error(f"{self.guilty}: the training loss is nan")
        return [Trained({}, {}, float(job.request.first_step), 1, 1) for job in jobs]

    def probe(self, jobs: Sequence[Job[Any]]) -> list[Probed]:
        self.passes.append([job.client for job in jobs])
        if any(job.client == self.guilty for job in jobs):
            raise self.error(f"{self.guilty}: the training loss is nan")
        return [Probed(torch.tensor(job.request.step), 1, 1) for job in jobs]

    def loss(self, request: Loss, examples: Sequence[object]) -> Measured:
        self.passes.append(["loss"])
        return Measured(1.0, 1)


def person(name: str) -> Participant:
    return Participant(name, [], [], 0)


Script = list[Request]


def together(trainer: Recorder, scripts: dict[str, Script]) -> dict[str, list[object]]:
    """Run each client's requests in its own thread; the answers, an error as itself."""
    meeting = Rendezvous(trainer)  # type: ignore[arg-type]
    meeting.open(len(scripts))
    answers: dict[str, list[object]] = {name: [] for name in scripts}

    def live(name: str) -> None:
        respond = meeting.responder(person(name))
        try:
            for request in scripts[name]:
                answers[name].append(respond(request))
        except Exception as error:
            answers[name].append(str(error))
        finally:
            meeting.leave()

    threads = [threading.Thread(target=live, args=(name,), daemon=True) for name in scripts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "someone waits for ever"
    return answers


STEP = Sgd({}, steps=3)
POOL = small_pool((Site("one", 2, 2),))
PROBE = Probe(POOL, POOL.zero(), (1,), 0.5, 0)


def losses(answers: list[object]) -> list[float]:
    return [answer.loss for answer in answers if isinstance(answer, Trained | Measured)]


def test_like_requests_share_a_pass_in_the_order_of_names() -> None:
    trainer = Recorder()
    scripts: dict[str, Script] = {
        name: [replace(STEP, first_step=number)]
        for number, name in enumerate(("eve", "bob", "ada"))
    }
    answers = together(trainer, scripts)
    assert trainer.passes == [["ada", "bob", "eve"]]
    assert {name: losses(found) for name, found in answers.items()} == {
        "eve": [0.0], "bob": [1.0], "ada": [2.0],
    }  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [replace(STEP, steps=4), replace(STEP, train=("lora_B",)), replace(STEP, side={}), Loss({})],
)
def test_unlike_requests_do_not(other: Request) -> None:
    trainer = Recorder()
    answers = together(trainer, {"ada": [STEP], "bob": [other], "eve": [STEP]})
    assert ["ada", "eve"] in trainer.passes and len(trainer.passes) == 2
    assert all(len(losses(found)) == 1 for found in answers.values())


def test_probes_of_one_pool_share_a_pass_whatever_they_probe() -> None:
    trainer = Recorder()
    scripts: dict[str, Script] = {
        "ada": [replace(PROBE, step=1)],
        "bob": [replace(PROBE, step=2, directions=(0, 3), epsilon=0.25, q=POOL.zero() + 1)],
        "eve": [STEP],
        "zoe": [replace(PROBE, step=4, pool=replace(POOL, unit=9))],
    }
    answers = together(trainer, scripts)
    assert sorted(trainer.passes) == [["ada", "bob"], ["eve"], ["zoe"]]
    steps = [found.losses for name in ("ada", "bob", "zoe") for found in answers[name]]  # type: ignore[attr-defined]
    assert [int(step) for step in steps] == [1, 2, 4]


def test_only_the_guilty_ones_probe_fails() -> None:
    trainer = Recorder("bob")
    answers = together(trainer, {name: [PROBE, PROBE] for name in ("ada", "bob", "eve")})
    assert answers["bob"] == ["bob: the training loss is nan"]
    assert len(answers["ada"]) == len(answers["eve"]) == 2
    assert trainer.passes == [
        ["ada", "bob", "eve"], ["ada"], ["bob"], ["eve"], ["ada", "eve"],
    ]  # fmt: skip


@pytest.mark.parametrize("error", [UpdateError, DataError, ZeroDivisionError])
def test_only_the_guilty_one_fails(error: type[Exception]) -> None:
    trainer = Recorder("bob", error)
    answers = together(trainer, {name: [STEP] for name in ("ada", "bob", "eve")})
    assert answers["bob"] == ["bob: the training loss is nan"]
    assert losses(answers["ada"]) == losses(answers["eve"]) == [0.0]
    assert trainer.passes == [["ada", "bob", "eve"], ["ada"], ["bob"], ["eve"]]


def test_who_has_finished_is_not_waited_for() -> None:
    trainer = Recorder()
    answers = together(trainer, {"ada": [STEP] * 3, "bob": [STEP], "eve": []})
    assert [len(found) for found in answers.values()] == [3, 1, 0]
    assert trainer.passes == [["ada", "bob"], ["ada"], ["ada"]]


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.booleans(), max_size=4), min_size=1)
)
def test_everyone_gets_each_answer_whatever_they_ask(plan: dict[str, list[bool]]) -> None:
    scripts: dict[str, Script] = {
        name: [replace(STEP, first_step=at) if sgd else Loss({}) for at, sgd in enumerate(kinds)]
        for name, kinds in plan.items()
    }
    answers = together(Recorder(), scripts)
    assert {name: losses(found) for name, found in answers.items()} == {
        name: [float(at) if sgd else 1.0 for at, sgd in enumerate(kinds)]
        for name, kinds in plan.items()
    }


def test_a_meeting_serves_one_group_after_another() -> None:
    trainer, counts = Recorder(), (3, 1, 2)
    meeting = Rendezvous(trainer)  # type: ignore[arg-type]
    for count in counts:
        meeting.open(count)
        threads = [
            threading.Thread(target=visit(meeting, str(n)), daemon=True) for n in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert [len(names) for names in trainer.passes] == list(counts)


def visit(meeting: Rendezvous, name: str) -> Callable[[], None]:
    def run() -> None:
        meeting.responder(person(name))(STEP)
        meeting.leave()

    return run
