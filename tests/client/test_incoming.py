"""No message is worked on that is not exactly of the approved run and this participant."""

from __future__ import annotations

import pytest
from homes import NAMES, message, terms_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meadow.client.incoming import read_turn
from meadow.config import Config
from meadow.errors import FormatError
from meadow.strategies.base import Turn
from meadow.terms import Terms


@pytest.fixture(scope="module")
def terms(tiny: Config) -> Terms:
    return Terms.parse(terms_json(tiny))


@pytest.mark.parametrize("round", [1, 2])
def test_a_turn_of_the_run(tiny: Config, terms: Terms, round: int) -> None:
    turn = read_turn(message(tiny, round), terms, "ada", training=True)
    assert turn == Turn(round, 2, 1, 2, 4, "ada", NAMES)


def test_the_base_is_measured_before_round_1(tiny: Config, terms: Terms) -> None:
    assert read_turn(message(tiny, 0), terms, "ada", training=False).round == 0
    with pytest.raises(FormatError, match="no round 0"):
        read_turn(message(tiny, 0), terms, "ada", training=True)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0), st.integers(1, 255), st.binary(max_size=40))
def test_any_changed_byte_and_any_noise(
    tiny: Config, terms: Terms, at: int, change: int, noise: bytes
) -> None:
    """A turn comes out only if it is this run's and this participant's."""
    whole = message(tiny)
    spoilt = bytearray(whole)
    spoilt[at % len(whole)] ^= change
    for body in (bytes(spoilt), noise, whole[: at % len(whole)]):
        try:
            turn = read_turn(body, terms, "ada", training=True)
        except FormatError:
            continue
        approved = (turn.rounds, turn.seed, turn.steps, turn.client)
        assert approved == (2, 1, 2, "ada") and turn.round in (1, 2) and "ada" in turn.cohort
