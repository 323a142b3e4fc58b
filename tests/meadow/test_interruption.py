"""The first interruption asks to end, the second ends, and afterwards all is as before."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from meadow.interruption import until_interrupted


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_second_ends(number: signal.Signals) -> None:
    stopped, told = threading.Event(), []
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with until_interrupted(stopped.set, lambda: told.append(1)):
        signal.raise_signal(number)
        assert stopped.wait(30) and told == [1]
        assert {each: signal.getsignal(each) for each in before} == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {each: signal.getsignal(each) for each in before} == before


def test_who_was_not_interrupted_keeps_the_handlers() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="of its own"):
        with until_interrupted(lambda: None, lambda: None):
            assert signal.getsignal(signal.SIGINT) is not before
            raise ValueError("of its own")
    assert signal.getsignal(signal.SIGINT) is before
