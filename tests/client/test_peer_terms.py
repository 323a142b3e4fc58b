"""What run.toml and charter have to agree on, and the rate as a power of two."""

from __future__ import annotations

import ast
import dataclasses
import math

import pytest
from gossips import charter_of, identity
from hypothesis import given
from hypothesis import strategies as st

from meadow.client.peer_terms import (
    CHARTERED,
    refuse_other_place,
    refuse_other_terms,
    shift_for,
    terms_of,
)
from meadow.config import Config
from meadow.errors import ConfigError
from meadow.strategies.fedkseed import FedKSeed
from meadow.strategies.registry import options_of

ALICE = identity("alice")
CHARTER = dataclasses.replace(charter_of(ALICE), gradient_exponent=-6)  # unit 24
FINE = -6 + 24
ELSEWHERE = {
    "momentum": 0.5,
    "schedule": "cosine",
    "importance": True,
    "combine": "median",
    "adaptive_scale": True,
    "directions": 2,
    "gain": 1.0,
    "lr": 3e-4,
}


def config_with(**options: object) -> Config:
    return Config().replace(strategy={"name": "fedkseed", "options": options})


def test_every_option_is_the_charters_or_a_coordinators() -> None:
    assert {part.name for part in options_of(FedKSeed)} == {*CHARTERED, *ELSEWHERE}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_a_coordinators_helper_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[strategy\] {key} = .* needs a coordinator") as told:
        terms_of(config_with(**{key: ELSEWHERE[key]}))
    neutral = told.value.hint.rpartition(" = ")[2]
    if key != "lr":
        terms_of(config_with(**{key: ast.literal_eval(neutral)}))  # what the hint says is taken


def test_other_strategies_and_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="run fedkseed, not fedavg_lora"):
        terms_of(Config())
    with pytest.raises(ConfigError, match="no option 'momentom'"):
        terms_of(config_with(momentom=0.1))


def test_a_config_that_agrees_with_its_charter_is_taken() -> None:
    config = config_with(epsilon=-10, scale=-6, unit=24).replace(model={"rank": 4})
    refuse_other_terms(config, CHARTER)
    with pytest.raises(ConfigError, match="take the run.toml that came with the charter"):
        refuse_other_terms(config.replace(model={"rank": 8}), CHARTER)


@given(exponent=st.integers(0, 16), members=st.integers(0, 12))
def test_the_shift_falls_with_the_root_of_the_members_and_not_below_zero(
    exponent: int, members: int
) -> None:
    lr = 2.0 ** (exponent - FINE)
    assert shift_for(lr, CHARTER, 4**members) == max(0, exponent - members)


@given(lr=st.floats(2.0 ** (2 - FINE), 2.0 ** (16 - FINE)), members=st.integers(0, 16))
def test_the_shift_is_the_nearest_in_ratio(lr: float, members: int) -> None:
    step = 2.0 ** (shift_for(lr, CHARTER, members) - FINE)
    assert 2**-0.501 <= step / (lr / math.sqrt(max(1, members))) <= 2**0.501


@pytest.mark.parametrize("lr", [1.0, 2.0 ** (-1 - FINE)])
def test_a_rate_off_the_grid_is_refused_with_those_that_are_on_it(lr: float) -> None:
    with pytest.raises(ConfigError, match="not 0 to 16") as told:
        shift_for(lr, CHARTER, 4)
    least, _, most = told.value.hint.removeprefix("between ").removesuffix(" here").split()
    assert shift_for(float(least), CHARTER, 1) == 0 and shift_for(float(most), CHARTER, 1) == 16


@pytest.mark.parametrize(
    ("listen", "address", "says"),
    [
        ("", "ada.example.org:7070", "nothing listens"),
        ("0.0.0.0:7070", "", "no address that others can call"),
        ("[::]:7070", "", "no address that others can call"),
    ],
)
def test_an_address_where_nobody_would_answer_is_refused(
    listen: str, address: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        refuse_other_place(Config().replace(peer={"listen": listen, "address": address}))


@pytest.mark.parametrize(
    ("listen", "address"),
    [("", ""), ("10.0.0.1:7070", ""), ("0.0.0.0:7070", "ada.example.org:7070")],
)
def test_places_that_others_can_call_or_none_are_taken(listen: str, address: str) -> None:
    refuse_other_place(Config().replace(peer={"listen": listen, "address": address}))
