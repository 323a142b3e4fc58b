"""A reply that does not come holds up nobody but its sender."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.server.reply_collector import Collector, Direct

AT_ONCE = 0.05
"""Seconds in which a wire that does not stall answers; small, so that stalls are seen quickly."""


class Wire:
    """Replies by the id of the question; some stall until they are let through."""

    def __init__(self, replies: dict[str, str], stalled: set[str]) -> None:
        self.replies, self.asked = replies, Counter[str]()
        self.gates = {message_id: threading.Event() for message_id in stalled}

    def pull(self, message_id: str) -> list[str]:
        self.asked[message_id] += 1
        if gate := self.gates.get(message_id):
            gate.wait(60)
        return [self.replies.pop(message_id)] if message_id in self.replies else []


@pytest.fixture
def wire() -> Iterator[Callable[..., Wire]]:
    wires: list[Wire] = []

    def make(replies: dict[str, str], *stalled: str) -> Wire:
        wires.append(Wire(replies, set(stalled)))
        return wires[-1]

    yield make
    for made in wires:
        for gate in made.gates.values():
            gate.set()


def until(collector: Collector[str], ids: list[str], count: int) -> dict[str, str]:
    """What has come once there are so many."""
    found: dict[str, str] = {}
    end = time.monotonic() + 60
    while len(found) < count and time.monotonic() < end:
        found |= dict(collector.of([i for i in ids if i not in found]))
    return found


def test_who_stalls_is_passed_by_and_taken_up_when_it_comes(wire: Callable[..., Wire]) -> None:
    line = wire({"a": "late", "b": "now", "c": "now"}, "a")
    collector = Collector(line.pull, AT_ONCE)
    assert dict(collector.of("abc")) == {"b": "now", "c": "now"}
    assert dict(collector.of("a")) == {}
    line.gates["a"].set()
    assert until(collector, ["a"], 1) == {"a": "late"}
    assert line.asked["a"] == 1, "the call that stalled is the one that brought it"


def test_only_so_many_may_stall_at_a_time(wire: Callable[..., Wire]) -> None:
    line = wire(dict.fromkeys("abcd", "x"), "a", "b", "c")
    collector = Collector(line.pull, AT_ONCE, most_slow=2)
    assert dict(collector.of("abcd")) == {} and line.asked == {"a": 1, "b": 1}
    for gate in line.gates.values():
        gate.set()
    assert set(until(collector, list("abcd"), 4)) == set("abcd")


def test_a_failure_is_its_askers(wire: Callable[..., Wire]) -> None:
    gate = threading.Event()

    def pull(message_id: str) -> list[str]:
        if message_id == "slow":
            gate.wait(60)
        raise TimeoutError(message_id)  # also what a future raises that is not done

    collector: Collector[str] = Collector(pull, AT_ONCE)
    with pytest.raises(TimeoutError, match="quick"):
        list(collector.of(["quick"]))
    assert list(collector.of(["slow"])) == []
    gate.set()
    with pytest.raises(TimeoutError, match="slow"):
        until(collector, ["slow"], 1)


def test_one_reply_at_a_time_is_kept(wire: Callable[..., Wire]) -> None:
    class Reply: ...

    alive: weakref.WeakSet[Reply] = weakref.WeakSet()

    def pull(message_id: str) -> list[Reply]:
        made = Reply()
        alive.add(made)
        return [made]

    most = 0
    for _, reply in Collector(pull).of(map(str, range(20))):
        del reply
        most = max(most, len(alive))
    assert most <= 2, "the one that is handed over, and the one that the thread lets go of"


def test_a_direct_look_is_made_on_this_thread() -> None:
    threads: list[int] = []

    def pull(message_id: str) -> list[str]:
        threads.append(threading.get_ident())
        return [message_id]

    assert list(Direct(pull).of("ba")) == [("a", "a"), ("b", "b")]
    assert set(threads) == {threading.get_ident()}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["there", "stalls", "silent"]), max_size=6))
def test_every_reply_comes_once(kinds: list[str]) -> None:
    ids = {str(number): kind for number, kind in enumerate(kinds)}
    replies = {i: f"of {i}" for i, kind in ids.items() if kind != "silent"}
    line = Wire(dict(replies), {i for i, kind in ids.items() if kind == "stalls"})
    collector = Collector(line.pull, 0.01, most_slow=3)
    first = list(collector.of(ids))
    for gate in line.gates.values():
        gate.set()
    missing = [i for i in ids if i not in dict(first)]
    rest = until(collector, missing, len(replies) - len(first))
    assert sorted(first + list(rest.items())) == sorted(replies.items())
