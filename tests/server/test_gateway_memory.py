"""What the gateway keeps in memory: sessions, limits, deliveries; with a clock that is played."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meadow.server.gateway_deliveries import KEPT_SECONDS, MOST_TIMES, Deliveries
from meadow.server.gateway_limits import MOST_AT_ONCE, MOST_NOTES, NOTES_SECONDS, Limits
from meadow.server.gateway_receipts import KEPT_SECONDS as RECEIPT_SECONDS
from meadow.server.gateway_receipts import Receipts
from meadow.server.gateway_refusal import Refusal
from meadow.server.gateway_sessions import IDLE_SECONDS, MOST_PER_KEY, NONCES_KEPT, Sessions
from meadow.server.gateway_superlink import Whole

ANNA, BOB = bytes(32), bytes(31) + b"\1"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def nonce(number: int) -> str:
    return f"{number:032x}"


def test_a_session_ends_after_an_hour_without_use() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    name = sessions.open(ANNA, nonce(0))
    for sequence in range(1, 4):
        clock.now += IDLE_SECONDS - 1
        sessions.admit(name, ANNA, sequence)
    clock.now += IDLE_SECONDS
    with pytest.raises(Refusal, match="unknown session"):
        sessions.require(name, ANNA)


def test_a_key_has_a_bounded_number_of_sessions() -> None:
    sessions = Sessions(Clock())
    others = sessions.open(BOB, nonce(0))
    names = [sessions.open(ANNA, nonce(number)) for number in range(3 * MOST_PER_KEY)]
    for name in names[:-MOST_PER_KEY]:
        with pytest.raises(Refusal):
            sessions.require(name, ANNA)
    for name in names[-MOST_PER_KEY:]:
        sessions.require(name, ANNA)
    sessions.require(others, BOB)


def test_a_nonce_is_good_once_for_each_key() -> None:
    sessions = Sessions(Clock())
    sessions.open(ANNA, nonce(7))
    sessions.open(BOB, nonce(7))
    for number in range(NONCES_KEPT - 1):
        sessions.open(ANNA, nonce(1000 + number))
    with pytest.raises(Refusal, match="before"):
        sessions.open(ANNA, nonce(7))


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=60))
def test_no_number_counts_twice_in_a_session(requests: list[tuple[int, bool]]) -> None:
    sessions = Sessions(Clock())
    names = {True: sessions.open(ANNA, nonce(0)), False: sessions.open(ANNA, nonce(1))}
    admitted: list[tuple[int, bool]] = []
    for sequence, which in requests:
        try:
            sessions.admit(names[which], ANNA, sequence)
        except Refusal:
            continue
        admitted.append((sequence, which))
    assert sorted(admitted) == sorted(set(requests))


def test_requests_at_a_time_are_counted_until_they_end() -> None:
    limits = Limits(Clock())
    for _ in range(3):
        running = [limits.request(ANNA) for _ in range(MOST_AT_ONCE)]
        for one in running:
            one.__enter__()
        with pytest.raises(Refusal), limits.request(ANNA):
            pass
        with limits.request(BOB):
            pass
        for one in running:
            one.__exit__(None, None, None)


def test_notes_are_counted_by_the_hour() -> None:
    clock = Clock()
    limits = Limits(clock)
    for _ in range(MOST_NOTES):
        limits.note(ANNA)
    with pytest.raises(Refusal):
        limits.note(ANNA)
    limits.note(BOB)
    clock.now = NOTES_SECONDS
    limits.note(ANNA)


def test_a_message_is_delivered_a_bounded_number_of_times() -> None:
    """One that fails so often fails for another reason, and others wait."""
    deliveries, message = Deliveries(Clock()), Whole(200, {}, b"message")
    deliveries.keep(ANNA, message)
    assert [deliveries.again(ANNA) for _ in range(MOST_TIMES)] == [message] * 4 + [None]
    assert deliveries.again(ANNA) is None


def test_a_message_is_not_kept_for_ever() -> None:
    clock = Clock()
    deliveries = Deliveries(clock)
    deliveries.keep(ANNA, Whole(200, {}, b"message"))
    clock.now = KEPT_SECONDS + 1
    assert deliveries.again(ANNA) is None


@pytest.mark.parametrize("pulled", [Whole(200, {}, b""), Whole(500, {}, b"no")])
def test_what_is_no_message_is_not_kept(pulled: Whole) -> None:
    deliveries = Deliveries(Clock())
    deliveries.keep(ANNA, pulled)
    assert deliveries.again(ANNA) is None


def test_a_newer_question_takes_the_turn() -> None:
    deliveries = Deliveries(Clock())
    older, others = deliveries.turn(ANNA), deliveries.turn(BOB)
    newer = deliveries.turn(ANNA)
    assert (older(), newer(), others()) == (False, True, True)
    deliveries.keep(ANNA, Whole(200, {}, b"late answer to the older"))
    assert not newer(), "so that it asks again, and is given the message"


def test_a_receipt_holds_while_the_superlink_waits_for_the_objects() -> None:
    clock = Clock()
    receipts, receipt = Receipts(clock), Whole(200, {}, b"send these")
    receipts.keep(ANNA, b"announced", receipt)
    assert receipts.of(BOB, b"announced") is None
    clock.now = RECEIPT_SECONDS
    assert receipts.of(ANNA, b"announced") == receipt
    clock.now += 1
    assert receipts.of(ANNA, b"announced") is None


def test_announcements_of_one_participant_take_turns() -> None:
    """The same one, sent again while the first is at work, waits for its receipt."""
    receipts, order = Receipts(), list[str]()

    async def announce(key: bytes, title: str) -> None:
        async with receipts.turn(key):
            order.append(f"{title} begins")
            await asyncio.sleep(0)
            order.append(f"{title} ends")

    async def all_at_once() -> None:
        await asyncio.gather(announce(ANNA, "a1"), announce(ANNA, "a2"), announce(BOB, "b"))

    asyncio.run(all_at_once())
    assert [step for step in order if step.startswith("a")] == [
        "a1 begins",
        "a1 ends",
        "a2 begins",
        "a2 ends",
    ]
    assert order.index("b begins") < order.index("a1 ends")
