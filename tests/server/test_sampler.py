"""Tokens are drawn from the distribution that was asked for."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meadow.server.serving.requests import Sampling
from meadow.server.serving.sampler import Chooser, choose

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])


def draw(chooser: Chooser, logits: Tensor = LOGITS) -> int:
    (token,) = choose(logits.unsqueeze(0), [chooser])
    assert token is not None
    return token


def drawn(count: int = 400, **settings: float) -> set[int]:
    chooser = Chooser(Sampling(1, seed=1, **settings))  # type: ignore[arg-type]
    return {draw(chooser) for _ in range(count)}


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
        found[draw(chooser)] += 1
    expected = (LOGITS / 0.5).softmax(-1)
    assert (found / count - expected).abs().max() < 0.03


@settings(deadline=None)
@given(st.integers())
def test_any_integer_is_a_seed_and_fixes_the_tokens(seed: int) -> None:
    runs = [
        [draw(chooser) for _ in range(20)]
        for chooser in (Chooser(Sampling(1, seed=seed)), Chooser(Sampling(1, seed=seed)))
    ]
    assert runs[0] == runs[1]


def test_every_bit_of_a_seed_counts() -> None:
    seeds = {0, *(1 << bit for bit in range(63))}
    assert len({Chooser(Sampling(1, seed=seed)).chance() for seed in seeds}) == len(seeds)


def test_without_a_seed_no_two_requests_draw_alike() -> None:
    choosers = [Chooser(Sampling(1, temperature=5.0)) for _ in range(2)]
    one, other = ([draw(chooser) for _ in range(64)] for chooser in choosers)
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


RULES: list[dict[str, Any]] = [
    {"temperature": 0.0}, {}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 9}, {"min_p": 0.05}, {},
]  # fmt: skip


def test_neighbours_change_no_token() -> None:
    """Rows of any rules, drawn together and each alone, in any order."""
    logits = 3 * torch.randn(20, len(RULES), 50, generator=torch.Generator().manual_seed(0))

    def choosers() -> list[Chooser]:
        return [Chooser(Sampling(1, seed=at, **own)) for at, own in enumerate(RULES)]

    together, alone, turned = choosers(), choosers(), choosers()[::-1]
    for rows in logits:
        found = choose(rows, together)
        assert found == [draw(own, row) for own, row in zip(alone, rows, strict=True)]
        assert found == choose(rows.flip(0), turned)[::-1]


WAITS = {Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__bool__, Tensor.__float__}


class Far(Tensor):
    """As if on a device: notes what the host asks of it and waits for."""

    asked: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            cls.asked.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def test_only_the_tokens_leave_the_device_and_all_at_once() -> None:
    """A row of logits takes longer to be copied than a step takes, and to be sorted on a host."""
    logits = torch.randn(len(RULES), 50, generator=torch.Generator().manual_seed(0))
    found, wanted = (
        choose(where, [Chooser(Sampling(1, seed=at, **own)) for at, own in enumerate(RULES)])
        for where in (logits.as_subclass(Far), logits)
    )
    assert found == wanted and Far.asked == ["tolist"]
