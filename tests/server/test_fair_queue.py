"""The virtual token counter, as its paper bounds it: fair, lifted, and never idle without need."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.server.serving.fair_queue import (
    INPUT_WEIGHT,
    OUTPUT_WEIGHT,
    FairQueue,
    kv_peak,
)


@dataclass(eq=False)
class Request:
    tenant: str
    input_length: int
    output: int
    aborted: bool = False


@dataclass
class Machine:
    """A batch of so many rows, and what each tenant was served."""

    rows: int
    queue: FairQueue[Request] = field(default_factory=FairQueue)
    running: list[Request] = field(default_factory=list)
    service: Counter[str] = field(default_factory=Counter)
    left: dict[int, int] = field(default_factory=dict)

    def step(self) -> None:
        for request in self.queue.admit(lambda _: len(self.running) < self.rows):
            self.running.append(request)
            self.left[id(request)] = request.output
            self.service[request.tenant] += INPUT_WEIGHT * request.input_length
        for request in list(self.running):
            self.queue.charge(request.tenant)
            self.service[request.tenant] += OUTPUT_WEIGHT
            self.left[id(request)] -= 1
            if not self.left[id(request)]:
                self.running.remove(request)


SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30))


@settings(max_examples=100, deadline=None)
@given(
    one=st.lists(SIZES, min_size=1, max_size=3),
    other=st.lists(SIZES, min_size=1, max_size=3),
    rows=st.integers(1, 8),
)
def test_of_two_that_always_wait_neither_gets_far_ahead(
    one: list[tuple[int, int]], other: list[tuple[int, int]], rows: int
) -> None:
    """Theorem 4.8 of the paper: at most 2 max(w_p L_input, w_q M), M the tokens of a full batch,
    however different their requests are."""
    machine = Machine(rows)
    kinds = {"one": deque(one), "other": deque(other)}
    longest = max(length for length, _ in [*one, *other])
    full = rows * max(length + output for length, output in [*one, *other])
    bound = 2 * max(INPUT_WEIGHT * longest, OUTPUT_WEIGHT * full)
    for _ in range(400):
        for tenant, sizes in kinds.items():
            while sum(request.tenant == tenant for request in machine.queue) < rows + 1:
                machine.queue.arrive(Request(tenant, *sizes[0]))
                sizes.rotate()
        machine.step()
        assert abs(machine.service["one"] - machine.service["other"]) <= bound


def test_a_flood_does_not_delay_who_asks_for_little() -> None:
    machine = Machine(1)
    for _ in range(100):
        machine.queue.arrive(Request("greedy", 10, 10))
    for _ in range(35):
        machine.step()
    modest = Request("modest", 10, 10)
    machine.queue.arrive(modest)
    for _ in range(12):
        machine.step()
    assert modest not in machine.queue


def test_a_pause_saves_up_no_turns() -> None:
    """Who comes back is lifted to the least of those that wait, and not to more."""
    queue: FairQueue[Request] = FairQueue()
    for tenant, served in (("a", 500.0), ("b", 300.0), ("c", 900.0)):
        queue.arrive(Request(tenant, 1, 1))
        queue.served[tenant] = served
    queue.arrive(Request("new", 1, 1))
    assert queue.served["new"] == 300.0
    queue.served["late"] = 700.0
    queue.arrive(Request("late", 1, 1))
    assert queue.served["late"] == 700.0  # nobody is set back
    queue.arrive(Request("a", 1, 1))
    assert queue.served["a"] == 500.0  # it waits already


def test_who_comes_when_nobody_waits_is_lifted_to_who_waited_last() -> None:
    """Algorithm 2 of the paper, lines 6 to 8."""
    machine = Machine(1)
    machine.queue.arrive(Request("runs", 50, 50))
    machine.step()
    machine.queue.arrive(Request("new", 1, 1))
    assert machine.queue.served == {"runs": 52.0, "new": 52.0}
    machine.queue.served["late"] = 70.0
    list(machine.queue.admit(lambda _: True))
    machine.queue.arrive(Request("late", 1, 1))
    assert machine.queue.served["late"] == 70.0  # nobody is set back


def test_a_newcomers_flood_does_not_make_up_for_hours_in_which_it_was_away() -> None:
    """One who keeps all rows busy leaves the queue empty again and again; whoever comes then has
    no claim to all that this one was ever served."""
    machine = Machine(2)

    def go_on(steps: int) -> None:
        for _ in range(steps):
            while len(machine.running) + len(machine.queue) < 2:
                machine.queue.arrive(Request("steady", 5, 10))
            machine.step()

    go_on(500)
    machine.service.clear()
    for _ in range(200):
        machine.queue.arrive(Request("flood", 5, 10))
    for _ in range(100):
        if not any(request.tenant == "steady" for request in machine.queue):
            machine.queue.arrive(Request("steady", 5, 10))
        machine.step()
    bound = 2 * OUTPUT_WEIGHT * 2 * 15
    assert abs(machine.service["steady"] - machine.service["flood"]) <= bound


@settings(max_examples=100, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.sampled_from("abc"), SIZES, st.integers(0, 5)), max_size=30),
    rows=st.integers(1, 4),
)
def test_no_row_is_idle_while_anybody_waits(
    arrivals: list[tuple[str, tuple[int, int], int]], rows: int
) -> None:
    machine, total = Machine(rows), 0
    for tenant, (length, output), steps in arrivals:
        machine.queue.arrive(Request(tenant, length, output))
        total += length * INPUT_WEIGHT + output * OUTPUT_WEIGHT
        for _ in range(steps):
            machine.step()
            assert not len(machine.queue) or len(machine.running) >= rows - _just_left(machine)
    while machine.running or len(machine.queue):
        before = len(machine.queue), len(machine.running)
        machine.step()
        assert before != (0, 0)
    assert machine.service.total() == total


def _just_left(machine: Machine) -> int:
    """Rows whose requests ended in this very step."""
    return sum(left == 0 for left in machine.left.values())


def test_within_a_tenant_the_first_comes_first_and_nothing_is_skipped() -> None:
    queue: FairQueue[Request] = FairQueue()
    large, small = Request("a", 50, 1), Request("a", 1, 1)
    other = Request("b", 1, 1)
    for request in (large, small, other):
        queue.arrive(request)
    assert list(queue.admit(lambda request: request.input_length < 10)) == []
    assert list(queue.admit(lambda request: True)) == [large, other, small]


def test_what_was_aborted_is_taken_out() -> None:
    queue: FairQueue[Request] = FairQueue()
    first, second = Request("a", 5, 1), Request("a", 7, 1)
    queue.arrive(first)
    queue.arrive(second)
    first.aborted = True
    assert queue.drop() == [first] and queue.drop() == []
    assert list(queue.admit(lambda request: True)) == [second]
    assert queue.served["a"] == 7.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_the_peak_is_what_running_them_holds(pairs: list[tuple[int, int]]) -> None:
    """Played out step by step: each grows by a token until it ends and gives back all."""
    most, now = 0, list(pairs)
    while now:
        now = [(length + 1, left - 1) for length, left in now]
        most = max(most, sum(length for length, _ in now))
        now = [pair for pair in now if pair[1]]
    assert kv_peak(iter(pairs)) == most
