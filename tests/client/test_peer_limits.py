"""Buckets hold to their rate over any history, and places are given back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meadow.client.peer_limits import Allowance, Counts, PeerLimits, Slots, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_the_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(rate=2.0, burst=4.0, clock=clock)
    for _ in range(4):
        assert bucket.wait(1.0) == 0.0
        bucket.take(1.0)
    assert bucket.wait(1.0) == pytest.approx(0.5)
    clock.now += 0.5
    assert bucket.wait(1.0) == 0.0
    clock.now += 100.0
    bucket.take(4.0)
    assert bucket.wait() == 0.0 and bucket.wait(1.0) == pytest.approx(0.5)


def test_a_debt_is_paid_first() -> None:
    clock = Clock()
    bucket = TokenBucket(rate=10.0, burst=5.0, clock=clock)
    bucket.take(25.0)
    assert bucket.wait() == pytest.approx(2.0)
    assert bucket.wait(100.0) == pytest.approx(2.5)  # more than the burst is never there
    clock.now += 2.0
    assert bucket.wait() == pytest.approx(0.0, abs=1e-9)


@given(
    st.floats(0.5, 100.0),
    st.floats(1.0, 50.0),
    st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 5.0)), max_size=60),
)
def test_over_any_time_no_more_than_burst_and_rate(
    rate: float, burst: float, demands: list[tuple[float, float]]
) -> None:
    """Who always waits as told takes at most burst + rate * time, plus one last request."""
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    taken = 0.0
    for pause, amount in demands:
        clock.now += pause
        if bucket.wait() == 0.0:
            assert taken <= burst + rate * (clock.now - 1000.0) + 1e-6
            bucket.take(amount)
            taken += amount


LIMITS = PeerLimits(
    concurrent=2, requests_per_second=1.0, request_burst=3.0, bytes_per_second=10, byte_burst=20
)


def test_requests_bytes_and_places_are_each_limited() -> None:
    clock = Clock()
    allowance = Allowance(LIMITS, clock)
    assert allowance.enter() == 0.0 and allowance.enter() == 0.0
    assert allowance.enter() > 0.0  # both places are taken
    allowance.leave(0)
    assert allowance.enter() == 0.0
    allowance.leave(0)
    assert allowance.enter() == pytest.approx(1.0)  # three requests are the burst
    clock.now += 1.0
    assert allowance.enter() == 0.0
    clock.now += 10.0
    allowance.leave(120)
    assert allowance.enter() == pytest.approx(10.0)  # 100 bytes of debt at 10 a second
    clock.now += 10.0
    assert allowance.enter() == pytest.approx(0.0, abs=1e-9)


def test_waiting_as_told_always_helps() -> None:
    """Being turned away costs nothing, however often one asks."""
    clock = Clock()
    allowance = Allowance(LIMITS, clock)
    for _ in range(3):
        assert allowance.enter() == 0.0
        allowance.leave(0)
    wait = [allowance.enter() for _ in range(50)][-1]
    clock.now += wait
    assert allowance.enter() == 0.0


def test_counts_are_by_peer_and_name() -> None:
    counts = Counts()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: counts.add(b"ab"[n % 2 :][:1], "bytes", n), range(100)))
    counts.add(b"a", "answered")
    assert counts.of(b"a") == {"answered": 1, "bytes": sum(range(0, 100, 2))}
    assert counts.of(b"nobody") == {}
    assert counts.total("bytes") == sum(range(100))


def test_places_come_back_after_errors() -> None:
    slots = Slots(1)
    with pytest.raises(KeyError), slots.one(1.0) as taken:
        assert taken
        with slots.one(0.0) as second:
            assert not second
        raise KeyError
    with slots.one(-5.0) as again:
        assert again
