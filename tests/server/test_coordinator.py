"""The coordinator alone: rounds that go well, who is asked, and what a deployed run adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_people import CONFIG, IDENTITY, TRIO, Answer, People, Toy, always, honest, reference, run

from meadow.errors import QuorumError
from meadow.journal import Journal
from meadow.server.coordinator import Coordinator, Refusal, sample
from meadow.strategies.base import Turn, Update
from meadow.strategies.messages import pack_update, unpack_update

# Rounds that go well


def test_two_rounds_equal_the_formula(tmp_path: Path) -> None:
    people = People(TRIO)
    done = run(tmp_path, people, CONFIG.replace(rounds={"count": 2}))
    assert torch.allclose(done.x, reference([TRIO, TRIO]), atol=1e-7)
    assert people.trained() == [TRIO, TRIO]
    assert [row["round"] for row in done.metrics] == [0, 1, 2]
    assert done.metrics[1]["train_loss"] == dict.fromkeys(TRIO, 0.5)
    assert [len(done.of_kind(kind)) for kind in ("round_opened", "contribution", "round_closed")] \
        == [2, 6, 2]  # fmt: skip


def test_bytes_are_counted_exactly(tmp_path: Path) -> None:
    people = People(["ada", "b", "a much longer name than the others'"])
    people.behaviours = {"b": lambda received, turn: pack_update(Update({"u": torch.ones(2)}))}
    row = run(tmp_path, people).metrics[1]
    assert row["bytes_down"] == sum(size for sizes in people.sizes.values() for size in sizes)
    received = Update({"x": torch.tensor([1.0, 2.0])})
    turns = {turn.client: turn for turn in people.turns}
    sent = [people.behaviours.get(name, honest)(received, turns[name]) for name in people.names()]
    assert row["bytes_up"] == sum(len(answer) for answer in sent if answer is not None)


def test_the_held_out_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    tokens = {"ada": 1, "bob": 5, "eve": 0}  # eve has no held-out rows
    people = People(TRIO, loss=lambda name: pack_update(
        Update({}, notes={"loss": float(ord(name[0])), "tokens": tokens[name]})))  # fmt: skip
    row = run(tmp_path, people).metrics[1]
    assert row["loss"] == pytest.approx((ord("a") + 5 * ord("b")) / 6)
    assert row["losses"] == {"ada": ord("a"), "bob": ord("b")}


@pytest.mark.parametrize(
    "reply",
    [
        Refusal("disk on fire"), b"", b"\xff" * 40, pack_update(Update({})),
        pack_update(Update({}, notes={"loss": "low", "tokens": 3})),
        pack_update(Update({}, notes={"loss": 10**400, "tokens": 3})),
        pack_update(Update({}, notes={"loss": 1.0, "tokens": -3})),
    ],
)  # fmt: skip
def test_a_bad_measurement_is_left_out_and_told(tmp_path: Path, reply: Answer) -> None:
    people = People(["ada", "robert"])
    good = people.loss("robert")
    people.loss = lambda name: reply if name == "ada" else good
    done = run(tmp_path, people)
    assert done.metrics[1]["losses"] == {"robert": 6.0} and done.metrics[1]["loss"] == 6.0
    assert all("ada" in event.data["text"] for event in done.of_kind("notice"))
    assert len(done.of_kind("notice")) == 2


def test_evaluation_may_be_rarer_but_never_skips_the_last_round(tmp_path: Path) -> None:
    config = CONFIG.replace(rounds={"count": 5, "evaluate_every": 2})
    rows = run(tmp_path, People(TRIO), config).metrics
    assert [row["round"] for row in rows if "loss" in row] == [0, 2, 4, 5]


def test_arrival_does_not_change_the_fold(tmp_path: Path) -> None:
    def rotated(names: list[str]) -> list[str]:
        return names[1:] + names[:1]

    config, names = (
        CONFIG.replace(rounds={"count": 3}),
        [f"{letter}{letter}" for letter in "abcdefg"],
    )
    forward = run(tmp_path / "1", People(names), config)
    for number, order in enumerate((rotated, lambda names: names[::-1]), start=2):
        other = run(tmp_path / str(number), People(names, order=order), config)
        assert torch.equal(other.x, forward.x)
        assert [list(other.contributions[n]) for n in (1, 2, 3)] == [names] * 3


def test_old_rounds_are_pruned(tmp_path: Path) -> None:
    few = run(tmp_path / "few", People(TRIO), CONFIG.replace(rounds={"count": 3}))
    many = run(tmp_path / "many", People(TRIO), CONFIG.replace(rounds={"count": 9}))
    assert few.blobs == many.blobs == 2 * (1 + len(TRIO))
    assert list(many.contributions[1]) == TRIO  # the rows, with the digests, stay


# Sampling and joining


@given(
    st.sets(st.text(min_size=1, max_size=5), min_size=1, max_size=30),
    st.floats(1e-6, 1), st.integers(0, 99), st.integers(1, 99),
)  # fmt: skip
def test_a_cohort_is_fixed_and_has_the_right_size(
    names: set[str], fraction: float, seed: int, round: int
) -> None:
    cohort = sample(sorted(names), fraction, seed, round)
    assert cohort == sorted(set(cohort)) and set(cohort) <= names
    assert len(cohort) in {
        math.ceil(fraction * len(names)),
        math.ceil(fraction * len(names) - 1e-9),
    }
    assert cohort == sample(sorted(names, reverse=True), fraction, seed, round)


def test_cohorts_are_the_same_on_every_machine() -> None:
    assert [sample("abcdefgh", 0.25, seed=1, round=number) for number in (1, 2, 3)] == [
        ["b", "d"], ["c", "h"], ["a", "b"],
    ]  # fmt: skip


def test_everyone_has_a_turn_in_the_long_run() -> None:
    names = [str(number) for number in range(20)]
    turns = [name for round in range(1, 401) for name in sample(names, 0.1, 7, round)]
    assert all(20 <= turns.count(name) <= 65 for name in names)  # 40 expected


def test_a_newcomer_is_told_the_round_of_its_joining(tmp_path: Path) -> None:
    people = People(["ada"])

    def later(received: Update, turn: Turn) -> bytes:
        people.present = TRIO if turn.round == 2 else people.present
        return honest(received, turn)

    people.behaviours["ada"] = later
    done = run(tmp_path, people, CONFIG.replace(rounds={"count": 4}))
    assert done.joined == {"ada": 1, "bob": 3, "eve": 3}
    assert {(turn.client, turn.joined) for turn in people.turns} == set(done.joined.items())
    assert [list(done.contributions[n]) for n in (2, 3)] == [["ada"], TRIO]


def test_the_schedule_horizon_counts_only_sampled_rounds(tmp_path: Path) -> None:
    people = People(TRIO)
    config = CONFIG.replace(rounds={"count": 10, "fraction": 0.3}, clients={"steps": 7})
    run(tmp_path, people, config)
    assert {(turn.steps, turn.total_steps) for turn in people.turns} == {(7, 21)}
    assert [len(names) for names in people.trained()] == [1] * 10


# --- a deployed run: spare participants, and rounds that find no quorum --------------------------


def test_a_round_with_spare_participants_closes_without_the_slowest(tmp_path: Path) -> None:
    config = CONFIG.replace(rounds={"count": 1, "fraction": 0.5, "spare": 0.5})
    people = People(["ada", "bob", "cyd", "dan"], order=lambda names: names[::-1])
    found = run(tmp_path, people, config)
    cohort = found.metrics[1]["missing"] + list(found.metrics[1]["train_loss"])
    assert len(cohort) == 3 and len(found.metrics[1]["train_loss"]) == 2
    assert found.metrics[1]["missing"] == [min(cohort)]  # the last to answer
    assert torch.allclose(found.x, reference([sorted(found.metrics[1]["train_loss"])]))


def test_the_quorum_is_of_those_who_are_wanted(tmp_path: Path) -> None:
    config = CONFIG.replace(rounds={"count": 1, "fraction": 0.5, "spare": 1.0, "quorum": 0.5})
    names = ["ada", "bob", "cyd", "dan"]
    people = People(names, dict.fromkeys(names[1:], always(None)))
    assert run(tmp_path, people, config).metrics[1]["contributions"] == 1


def test_a_round_without_quorum_can_ask_others_and_keeps_who_has_answered(tmp_path: Path) -> None:
    config = CONFIG.replace(rounds={"count": 1, "quorum": 0.9})
    people = People(["ada", "bob"], {"bob": always(None)})
    with Journal.open(tmp_path, IDENTITY) as journal:
        coordinator = Coordinator(config, Toy(), journal, people)
        with pytest.raises(QuorumError):
            coordinator.run()
        people.present = ["ada", "eve"]  # bob is gone for good
        coordinator.recast()
        assert journal.current() is not None
        coordinator.run()
        assert torch.allclose(coordinator.state.tensors["x"], reference([["ada", "eve"]]))
        assert [names for verb, names in people.asked if verb == "train"][-1] == ["eve"]


def test_a_message_says_whose_run_it_is(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Told(People):
        def ask(self, verb: str, names: Sequence[str], payload: Any, *more: Any) -> Any:
            seen.extend(unpack_update(payload(name))[1] for name in names)
            return super().ask(verb, names, payload, *more)

    run(tmp_path, Told(["ada"]), CONFIG.replace(rounds={"count": 1}))
    with Journal.open(tmp_path, IDENTITY) as journal:
        assert {header["run"] for header in seen} == {journal.run_id}
    digests = {header["config"] for header in seen}
    assert digests == {CONFIG.replace(rounds={"count": 1}).shared().digest()}
