"""A step that cannot be recorded while requests run is computed, as are all that come after it."""

from __future__ import annotations

import logging

import pytest
from served_models import Desk, small_base, tokens_of
from step_recorders import cpu_kernels, tape

from meadow.server.serving.decode_graphs import Recorder, Step
from meadow.server.serving.engine_stats import snapshot
from meadow.server.serving.metrics import _engine
from meadow.server.serving.model_runner import ModelRunner
from meadow.server.serving.requests import Sampling


class Breaking:
    """Records so many steps, and then fails in the middle of one, as if memory ran out."""

    def __init__(self) -> None:
        self.left, self.failures = 10**6, 0

    def __call__(self, step: Step) -> Step:
        self.left -= 1
        if self.left >= 0:
            return tape(step)
        self.failures += 1
        step()
        raise RuntimeError("CUDA out of memory\nand a trace")


def answers(recorder: Recorder | None) -> tuple[list[list[int]], Desk, ModelRunner]:
    """Of requests of adapters and the base that join and leave: steps of several kinds."""
    with ModelRunner(
        small_base(), rows=4, length=64, slots=2, kernels=recorder is not None, recorder=recorder
    ) as runner:
        if isinstance(recorder, Breaking):
            assert runner.graphs is not None
            recorder.left, runner.graphs.patience = 1, 1
        desk, heard = Desk(runner, slots=2, prefill_tokens=8), []
        for number in range(6):
            sampling = Sampling(6 + number, temperature=0, ignore_eos=True)
            heard.append(desk.ask([2 + number] * (1 + 3 * number), sampling, number % 4)[1])
            for _ in range(2 * number):
                desk.batcher.step()
        desk.finish()
        return [tokens_of(events) for events in heard], desk, runner


def test_requests_get_the_same_tokens_and_one_line_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted, plain, _ = answers(None)
    breaking = Breaking()
    with cpu_kernels(), caplog.at_level(logging.WARNING):
        found, desk, runner = answers(breaking)
    assert found == wanted and all(found)
    assert breaking.failures == 1 and runner.graphs is not None and runner.graphs.failed
    (said,) = [record.getMessage() for record in caplog.records]
    assert "could not be recorded" in said and said.endswith("CUDA out of memory")
    stats, before = snapshot(desk.batcher), snapshot(plain.batcher)
    assert stats.recording_failed and 0 < stats.replayed_steps < stats.steps
    assert not before.recording_failed and before.replayed_steps == 0
    lines = list(_engine("small", stats))
    assert 'meadow:recording_failed{model_name="small"} 1' in lines
    replayed = f'meadow:engine_steps_replayed_total{{model_name="small"}} {stats.replayed_steps}'
    assert replayed in lines and 'meadow:recording_failed{model_name="small"} 0' in list(
        _engine("small", before)
    )
