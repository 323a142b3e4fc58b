"""A coordinator that finds no quorum, or whose process ends, goes on as if nothing had been."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_people import CONFIG, TRIO, People, always, honest, reference, run

from meadow.errors import QuorumError
from meadow.store import digest_of
from meadow.strategies.base import Update
from meadow.strategies.messages import pack_update

NAN = pack_update(Update({"u": torch.tensor([1.0, math.nan])}))


# Quorum


@pytest.mark.parametrize(
    ("quorum", "silent", "enough"),
    [
        (0.5, 1, True), (0.5, 2, False), (1.0, 1, False),
        (1.0, 0, True), (0.0, 2, True), (0.0, 3, False),
    ],
)  # fmt: skip
def test_quorum(tmp_path: Path, quorum: float, silent: int, enough: bool) -> None:
    people = People(TRIO, dict.fromkeys(TRIO[:silent], always(None)))
    config = CONFIG.replace(rounds={"quorum": quorum})
    if enough:
        assert run(tmp_path, people, config).metrics[1]["contributions"] == 3 - silent
    else:
        with pytest.raises(QuorumError, match=f"round 1 has {3 - silent} of 3 contributions"):
            run(tmp_path, people, config)


def test_a_failed_quorum_names_who_and_why(tmp_path: Path) -> None:
    people = People(TRIO, {"ada": always(NAN), "bob": always(None)})
    with pytest.raises(QuorumError) as caught:
        run(tmp_path, people)
    assert "quorum" in str(caught.value) and "2" in str(caught.value)
    assert "eve" not in str(caught.value)
    assert "ada: ada sent 'u'" in str(caught.value)
    assert "bob: no answer before the deadline" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failed_quorum_of_many_stays_one_line(tmp_path: Path) -> None:
    names = [f"client {number:03d}" for number in range(200)]
    people = People(names, dict.fromkeys(names, always(None)))
    with pytest.raises(QuorumError, match="and 192 more") as caught:
        run(tmp_path, people)
    assert len(str(caught.value)) < 600


def test_the_same_command_goes_on_once_enough_are_back(tmp_path: Path) -> None:
    people = People(TRIO, {"ada": always(None), "bob": always(None)})
    with pytest.raises(QuorumError):
        run(tmp_path, people)
    people.behaviours = {}
    done = run(tmp_path, people)
    assert torch.allclose(done.x, reference([TRIO]), atol=1e-7)
    assert people.trained() == [TRIO, ["ada", "bob"]]  # eve's answer was kept


# Resuming


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("answers", range(6))
def test_resumed_equals_uninterrupted(tmp_path: Path, answers: int, group: int) -> None:
    config = CONFIG.replace(rounds={"count": 2})
    expected = run(tmp_path / "whole", People(TRIO, group=group), config)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", People(TRIO, limit=answers, group=group), config)
    rest = People(TRIO, group=group)
    resumed = run(tmp_path / "cut", rest, config)
    assert torch.equal(resumed.x, expected.x)
    assert resumed.contributions == expected.contributions
    assert resumed.metrics == expected.metrics
    number, inside = divmod(answers, 3)
    done = inside - inside % group  # a group that is not complete is asked as a whole
    assert rest.trained() == [TRIO[done:]] + [TRIO] * (1 - number)


def test_a_resumed_round_keeps_its_cohort_and_its_refusals(tmp_path: Path) -> None:
    people = People(TRIO, {"ada": always(b"garbage")}, limit=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, people)
    later = People([*TRIO, "zoe"])  # ada would now answer well, and zoe is new
    done = run(tmp_path, later)
    assert list(done.refusals[1]) == ["ada"] and list(done.contributions[1]) == ["bob", "eve"]
    assert later.trained() == [["eve"]]


def test_a_finished_run_asks_nobody(tmp_path: Path) -> None:
    first = run(tmp_path, People(TRIO))
    people = People(TRIO)
    again = run(tmp_path, people)
    assert torch.equal(again.x, first.x) and people.asked == []


def test_what_is_journaled_is_what_was_sent(tmp_path: Path) -> None:
    people = People(TRIO)
    done = run(tmp_path, people)
    received = Update({"x": torch.tensor([1.0, 2.0])})
    for turn in people.turns:
        assert done.contributions[1][turn.client] == digest_of(honest(received, replace(turn)))
