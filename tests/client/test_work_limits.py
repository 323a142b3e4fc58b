"""Work ends at the first step beyond a limit."""

from __future__ import annotations

import threading

import pytest

from meadow.client.policy import Policy
from meadow.client.work_limits import Stopping, WorkLimits, resident_mb
from meadow.errors import PolicyError


def test_steps() -> None:
    limits = WorkLimits(Policy(most_steps=3), threading.Event())
    limits.step(1)
    limits.step(2)
    with pytest.raises(PolicyError, match="more than 3 steps"):
        limits.step(1)


def test_seconds() -> None:
    now = [50.0]
    limits = WorkLimits(Policy(most_seconds=2), threading.Event(), lambda: now[0])
    now[0] = 52.0
    limits.check()
    now[0] = 52.1
    with pytest.raises(PolicyError, match="more than 2 seconds"):
        limits.check()


def test_memory() -> None:
    used = [100.0]
    limits = WorkLimits(Policy(most_memory_mb=100), threading.Event(), memory=lambda: used[0])
    limits.check()
    used[0] = 100.1
    with pytest.raises(PolicyError, match="more than 100 MB"):
        limits.step(0)


def test_no_limits() -> None:
    limits = WorkLimits(Policy(), threading.Event(), lambda: 1e9, lambda: 1e9)
    limits.step(10**9)
    assert limits.steps == 10**9


def test_stopping_is_no_refusal() -> None:
    stop = threading.Event()
    limits = WorkLimits(Policy(), stop)
    stop.set()
    with pytest.raises(Stopping):
        limits.step(1)


def test_resident_memory_is_this_process() -> None:
    before = resident_mb()
    block = bytearray(b"x") * 50_000_000
    assert 40 < resident_mb() - before < 200
    assert 5 < before < 100_000 and len(block) == 50_000_000
