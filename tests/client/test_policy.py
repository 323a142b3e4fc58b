"""A participant's rules: read back as written, mistakes named, everything outside refused."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from homes import make_home
from hypothesis import given
from hypothesis import strategies as st

from meadow.client import home
from meadow.client.policy import Policy, Used, parse, write
from meadow.config import Config
from meadow.errors import ConfigError, IdentityError, PolicyError
from meadow.store import Disk
from meadow.strategies.base import Turn
from meadow.terms import Terms

NOON = datetime(2026, 3, 1, 12, 0)
MINUTES = st.integers(0, 24 * 60 - 1)


def turn(**fields: Any) -> Turn:
    return Turn(
        **{"round": 3, "rounds": 9, "seed": 1, "steps": 5, "cohort": ("ada", "bob"), **fields}
    )


def clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


# The file


def texts() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    st.builds(
        Policy,
        coordinator=texts(),
        data=st.lists(texts(), max_size=3),
        data_changes=st.sampled_from(["refuse", "accept"]),
        most_steps=st.integers(0, 10**12),
        most_upload_mb=st.floats(0, 1e12),
        hours=st.lists(st.just("22:00-06:00"), max_size=2),
    )
)
def test_what_is_written_is_read_back(policy: Policy) -> None:
    assert parse(write(policy)) == policy


def test_every_key_is_explained() -> None:
    lines = write(Policy()).splitlines()
    for part in dataclasses.fields(Policy):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{part.name} = "))
        assert lines[at - 1] == f"# {part.metadata['about']}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("most_step = 3", "unknown key most_step (did you mean most_steps?)"),
        ("most_steps = -1", "most_steps is -1 (at least 0)"),
        ("most_steps = 1.5", "expected int"),
        ("least_cohort = 0", "at least 1"),
        ("data = 'x'", "expected list"),
        ("data = [1]", "expected str"),
        ('privacy = "secagg"', "privacy is 'secagg' (one of 'none')"),
        ('data_changes = "maybe"', "one of 'refuse', 'accept'"),
        ('hours = ["9-17"]', "hours has '9-17' (expected \"HH:MM-HH:MM\")"),
        ('hours = ["09:00-25:00"]', "hours has"),
        ("format = 2", "has format 2; this meadow reads format 1"),
        ("data = [", "is not valid TOML"),
        ("[limits]", "unknown key limits"),
    ],
)
def test_mistakes_name_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_its_paths_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "saved").mkdir()
    path, elsewhere = tmp_path / "policy.toml", str(tmp_path / "elsewhere.jsonl")
    sources = ["rows/*.jsonl", "nano", "datasets:hub/name", "datasets:saved", elsewhere]
    Policy(base="base", data=sources).save(path, Disk())
    loaded = Policy.load(path)
    assert loaded.base == str(tmp_path / "base")
    assert loaded.data == [
        f"{tmp_path}/rows/*.jsonl", "nano", "datasets:hub/name", f"datasets:{tmp_path}/saved",
        elsewhere,
    ]  # fmt: skip
    Policy(base="org/model").save(path, Disk())
    assert Policy.load(path).base == "org/model"


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "policy.toml"
    Policy().save(path, Disk())
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(mode)
    with pytest.raises(IdentityError, match="can be changed by others"):
        Policy.load(path)


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no .*meadow client join"):
        Policy.load(tmp_path / "policy.toml")
    (tmp_path / "policy.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        Policy.load(tmp_path / "policy.toml")


# The terms


@pytest.fixture
def terms(tmp_path: Path, tiny: Config) -> Terms:
    clipped = tiny.replace(clients={"clip_update": 0.5})
    return home.terms_in(make_home(tmp_path / "ada", clipped))


def test_nothing_is_approved_by_default(terms: Terms) -> None:
    with pytest.raises(PolicyError, match="a coordinator that was not approved"):
        Policy().check_terms(terms)
    Policy().approving(terms).check_terms(terms)


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ({"terms": "ab" * 32}, False),
        ({"coordinator": "ab" * 32}, False),
        ({"base_digests": ["ab" * 32]}, False),
        ({"most_steps": 1}, False),
        ({"most_steps": 2}, True),
        ({"largest_update": 0.49}, False),
        ({"largest_update": 0.5}, True),
    ],
)
def test_terms_within_the_rules(terms: Terms, rules: dict[str, Any], allowed: bool) -> None:
    policy = dataclasses.replace(Policy().approving(terms), **rules)
    if allowed:
        policy.check_terms(terms)
    else:
        with pytest.raises(PolicyError):
            policy.check_terms(terms)


def test_a_base_that_is_listed(terms: Terms) -> None:
    listed = ["ab" * 32, terms.base_digest]
    dataclasses.replace(Policy().approving(terms), base_digests=listed).check_terms(terms)


def test_a_run_without_a_bound_where_one_is_required(tmp_path: Path, tiny: Config) -> None:
    unclipped = home.terms_in(make_home(tmp_path / "eve", tiny))
    policy = dataclasses.replace(Policy().approving(unclipped), largest_update=9.0)
    with pytest.raises(PolicyError, match="clip_update = 0 .*at most 9 here"):
        policy.check_terms(unclipped)


# A message


@pytest.mark.parametrize(
    ("rules", "fields", "used", "size", "reason"),
    [
        ({"most_steps": 4}, {}, {}, 1, "5 steps a round (at most 4 here)"),
        ({"rounds_a_day": 2}, {}, {"rounds_today": 2}, 1, "3 rounds in 24 hours"),
        ({"least_cohort": 3}, {}, {}, 1, "2 participants (at least 3"),
        ({"least_cohort": 2}, {"cohort": ("ada", "ada")}, {}, 1, "1 participants"),
        ({"most_download_mb": 1}, {}, {}, 1_000_001, "MB of messages"),
        ({"most_download_mb": 1}, {}, {"received": 999_999}, 2, "MB of messages"),
        ({"hours": ["22:00-06:00"]}, {}, {}, 1, "outside the hours"),
    ],
)
def test_a_message_outside_the_rules(
    rules: dict[str, Any], fields: dict[str, Any], used: dict[str, int], size: int, reason: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy(**rules).check_turn(turn(**fields), size, NOON, Used(**used))
    assert reason in str(caught.value)


def test_a_message_at_every_limit() -> None:
    policy = Policy(
        most_steps=5, rounds_a_day=2, least_cohort=2, most_download_mb=1, hours=["12:00-12:01"]
    )
    policy.check_turn(turn(), 500_000, NOON, Used(rounds_today=1, received=500_000))


def test_a_measurement_is_no_training() -> None:
    policy = Policy(most_steps=1, rounds_a_day=1, least_cohort=9)
    policy.check_turn(turn(cohort=()), 1, NOON, Used(rounds_today=5), training=False)
    with pytest.raises(PolicyError, match="hours"):
        Policy(hours=["01:00-02:00"]).check_turn(turn(), 1, NOON, training=False)


def test_an_answer_that_must_not_leave() -> None:
    policy = Policy(most_upload_mb=0.5)
    policy.check_answer(250_000, Used(sent=250_000))
    with pytest.raises(PolicyError, match="MB of answers a round"):
        policy.check_answer(250_001, Used(sent=250_000))


@given(MINUTES, MINUTES, MINUTES)
def test_hours_hold_what_lies_between_their_ends(start: int, length: int, now: int) -> None:
    """Counted in minutes from the start, over midnight; the end is outside, 24:00 is midnight."""
    length = max(1, length)
    end = (start + length) % (24 * 60)
    period = f"{clock(start)}-{clock(end) if end else '24:00'}"
    policy, moment = parse(f'hours = ["{period}"]'), NOON.replace(hour=now // 60, minute=now % 60)
    if (now - start) % (24 * 60) < length:
        policy.check_hours(moment)
    else:
        with pytest.raises(PolicyError):
            policy.check_hours(moment)


def test_one_of_several_periods_is_enough() -> None:
    policy = Policy(hours=["01:00-02:00", "11:00-13:00"])
    policy.check_hours(NOON)
    with pytest.raises(PolicyError, match="01:00-02:00, 11:00-13:00"):
        policy.check_hours(NOON.replace(hour=13))
