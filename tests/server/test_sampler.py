"""Tokens are drawn from the distribution that was asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.server.serving.requests import Sampling
from meadow.server.serving.sampler import Chooser, choose

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])


def drawn(count: int = 400, **settings: float) -> set[int]:
    chooser = Chooser(Sampling(1, seed=1, **settings))  # type: ignore[arg-type]
    return {chooser.draw(LOGITS) for _ in range(count)}


def test_filters_leave_what_they_should() -> None:
    """Probabilities are 0.64, 0.24, 0.09, 0.03 and next to none."""
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.6) == {0} and drawn(top_p=0.7) == {0, 1}
    assert drawn(min_p=0.1) == {0, 1, 2} and drawn(min_p=0.2) == {0, 1}
    assert drawn(top_p=0.0) == {0} and drawn(top_k=1) == {0}
    assert drawn(temperature=0.01) == {0}
    assert drawn(temperature=100.0) == {0, 1, 2, 3, 4}


def test_frequencies_are_the_probabilities() -> None:
    chooser, count = Chooser(Sampling(1, temperature=0.5, seed=3)), 4000
    found = torch.zeros(len(LOGITS))
    for _ in range(count):
        found[chooser.draw(LOGITS)] += 1
    expected = (LOGITS / 0.5).softmax(-1)
    assert (found / count - expected).abs().max() < 0.03


@settings(deadline=None)
@given(st.integers())
def test_any_integer_is_a_seed_and_fixes_the_tokens(seed: int) -> None:
    runs = [
        [chooser.draw(LOGITS) for _ in range(20)]
        for chooser in (Chooser(Sampling(1, seed=seed)), Chooser(Sampling(1, seed=seed)))
    ]
    assert runs[0] == runs[1]


def test_without_a_seed_no_two_requests_draw_alike() -> None:
    choosers = [Chooser(Sampling(1, temperature=5.0)) for _ in range(2)]
    one, other = ([chooser.draw(LOGITS) for _ in range(64)] for chooser in choosers)
    assert one != other


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_without_numbers_give_no_token_and_spoil_no_other(
    temperature: float, bad: float
) -> None:
    logits = torch.stack([LOGITS, LOGITS, LOGITS])
    logits[1, 2] = bad
    choosers = [Chooser(Sampling(1, temperature=temperature, top_k=1)) for _ in range(3)]
    assert choose(logits, choosers) == [0, None, 0]


@pytest.mark.parametrize("scale", [1.0, 1e38])
@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-9, 0.5, 2.0])
def test_whatever_the_temperature_and_the_logits_there_is_a_token(
    temperature: float, scale: float
) -> None:
    """Quotients beyond float32's range would leave no probabilities to draw from."""
    sampling = Sampling(1, temperature=temperature, top_p=0.9, top_k=3, min_p=0.01, seed=1)
    (token,) = choose((LOGITS * scale).unsqueeze(0), [Chooser(sampling)])
    assert token in ({0} if temperature < 0.1 or scale > 1 else {0, 1, 2})
