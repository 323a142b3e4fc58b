"""The coordinator alone: invented peers, a strategy of one vector, a real journal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import Numbered
from hypothesis import given, settings
from hypothesis import strategies as st

from meadow.config import Config
from meadow.errors import QuorumError, UpdateError
from meadow.events import Event
from meadow.journal import Journal, RunIdentity
from meadow.peft_adapters.layout import Tree
from meadow.server.coordinator import Coordinator, Refusal, sample
from meadow.store import digest_of
from meadow.strategies.base import Loss, Reducer, State, Strategy, Turn, Update, Work
from meadow.strategies.messages import pack_update, turn_from_json, unpack_update
from meadow.strategies.pool_strategy import Gather
from meadow.wire import encode

IDENTITY = RunIdentity("config", "base", {})
Answer = bytes | Refusal
Behaviour = Callable[[Update, Turn], Answer | None]
"""What a peer answers to what it received; None: nothing, ever."""


class Toy(Strategy):
    """x moves by the weighted mean of what the clients send."""

    def init(self, seed: int) -> State:
        return State({"x": torch.tensor([1.0, 2.0])})

    def broadcast(self, state: State, turn: Turn) -> Update:
        return Update({"x": state.tensors["x"]})

    def work(self, received: Update, memory: State, turn: Turn) -> Work:
        raise NotImplementedError

    def step(self, state: State, total: Update, turn: Turn) -> State:
        return State({"x": state.tensors["x"] + total.tensors["u"]})

    def export(self, state: State) -> Tree:
        return {}

    def own(self, received: Update, memory: State, turn: Turn) -> Loss:
        raise NotImplementedError

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        return {"u": (2,)}


def answer_of(client: str, received: Update, round: int) -> Update:
    """A client's honest answer: a function of its name, the round and what it received."""
    u = torch.sin(received.tensors["x"] * ord(client[0]) + round)
    return Update({"u": u}, weight=float(ord(client[1])), notes={"loss": 0.5, "tokens": 3})


def honest(received: Update, turn: Turn) -> bytes:
    return pack_update(answer_of(turn.client, received, turn.round))


def always(answer: Answer | None) -> Behaviour:
    return lambda received, turn: answer


@dataclass
class People:
    """Peers in memory.  `order` rearranges the answers; a peer without a behaviour is honest."""

    present: list[str]
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    order: Callable[[list[str]], list[str]] = list
    loss: Callable[[str], Answer] = lambda name: pack_update(
        Update({}, notes={"loss": float(len(name)), "tokens": 2})
    )
    group: int = 1
    asked: list[tuple[str, list[str]]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    limit: int = 10**6  # so many answers, and then the coordinator's process dies

    def names(self) -> list[str]:
        return sorted(self.present)

    def together(self, cohort: Sequence[str]) -> list[list[str]]:
        names = list(cohort)
        return [names[at : at + self.group] for at in range(0, len(names), self.group)]

    def ask(
        self,
        verb: str,
        names: Sequence[str],
        payload: Callable[[str], bytes],
        deadline_seconds: float,
    ) -> Iterator[tuple[str, Answer]]:
        self.asked.append((verb, list(names)))
        sent = {name: payload(name) for name in names}
        for name in self.order(list(names)):
            answer = self.loss(name) if verb == "evaluate" else self.train(name, sent[name])
            if answer is not None:
                yield name, answer

    def train(self, name: str, sent: bytes) -> Answer | None:
        received, header = unpack_update(sent)
        self.turns.append(turn_from_json(header["turn"]))
        self.sizes.setdefault(name, []).append(len(sent))
        if self.limit == 0:
            raise KeyboardInterrupt
        self.limit -= 1
        return self.behaviours.get(name, honest)(received, self.turns[-1])

    def trained(self) -> list[list[str]]:
        return [names for verb, names in self.asked if verb == "train"]


@dataclass
class Run:
    x: torch.Tensor
    metrics: list[dict[str, Any]]
    events: list[Event]
    contributions: dict[int, dict[str, str]]
    refusals: dict[int, dict[str, str]]
    blobs: int
    joined: dict[str, int]

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


CONFIG = Config().replace(rounds={"count": 1})
TRIO = ["ada", "bob", "eve"]


def run(folder: Path, people: People, config: Config = CONFIG) -> Run:
    events: list[Event] = []
    rounds = range(config.rounds.count + 1)
    with Journal.open(folder, IDENTITY, Numbered(folder.parent)) as journal:
        coordinator = Coordinator(config, Toy(), journal, people, observer=events.append)
        state = coordinator.run()
        return Run(
            state.tensors["x"], journal.metrics(), events,
            {number: journal.contributions(number) for number in rounds},
            {number: journal.refusals(number) for number in rounds},
            len(list((folder / "blobs").iterdir())), journal.get("joined"),
        )  # fmt: skip


def reference(cohorts: Sequence[Sequence[str]]) -> torch.Tensor:
    """x after rounds with these contributors, computed without meadow's reducer."""
    x = torch.tensor([1.0, 2.0])
    for number, cohort in enumerate(cohorts, start=1):
        updates = [answer_of(name, Update({"x": x}), number) for name in cohort]
        weights = torch.tensor([update.weight for update in updates], dtype=torch.float64)
        stacked = torch.stack([update.tensors["u"].double() for update in updates])
        x = x + ((weights[:, None] * stacked).sum(0) / weights.sum()).float()
    return x


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


# Refusals


def of(**tensors: torch.Tensor) -> bytes:
    return pack_update(Update(tensors))


def with_meta(**meta: Any) -> bytes:
    return encode({"u": torch.ones(2)}, {"weight": 1.0, "count": 1, "notes": {}, **meta})


def declared(shape: str) -> bytes:
    """An update whose header declares another shape than it carries."""
    return of(u=torch.ones(2)).replace(b'"shape":[2]', shape.encode())


BAD: dict[str, tuple[Answer, str]] = {
    "nan": (of(u=torch.tensor([1.0, math.nan])), "eve sent 'u' with a value that is not finite"),
    "infinity": (of(u=torch.tensor([1.0, -math.inf])), "not finite"),
    "shape": (of(u=torch.ones(3)), r"shape \(3,\), expected \(2,\)"),
    "type": (of(u=torch.ones(2, dtype=torch.float64)), "only float32 and bfloat16"),
    "missing": (of(), "'u' is missing"),
    "extra": (of(u=torch.ones(2), w=torch.ones(1)), "'w' is not expected"),
    "giant": (declared('"shape":[99999999999]'), "header|declares"),
    "negative": (declared('"shape":[-2]'), "impossible shape|header"),
    "weight below zero": (with_meta(weight=-1.0), "weight -1.0"),
    "infinite weight": (with_meta(weight="inf"), "weight inf"),
    "weight beyond floats": (with_meta(weight=10**400), "lacks its weight"),
    "no weight": (encode({"u": torch.ones(2)}, {"count": 1, "notes": {}}), "lacks its weight"),
    "two at once": (with_meta(count=2), "count 2"),
    "garbage": (b"\x00\xff" * 50, "header"),
    "nothing": (b"", "header"),
    "cut short": (of(u=torch.ones(2))[:-1], "declares"),
    "another format": (of(u=torch.ones(2)).replace(b'"meadow":"1"', b'"meadow":"9"'), "format '9'"),
    "an error": (Refusal("the training loss is nan"), "the training loss is nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_is_named_counted_and_kept_out(tmp_path: Path, case: str) -> None:
    bad, reason = BAD[case]
    done = run(tmp_path, People(TRIO, {"eve": always(bad)}))
    assert torch.allclose(done.x, reference([["ada", "bob"]]), atol=1e-7)
    assert list(done.contributions[1]) == ["ada", "bob"] and list(done.refusals[1]) == ["eve"]
    (event,) = done.of_kind("refused")
    assert event.data == {"client": "eve", "reason": done.refusals[1]["eve"]}
    assert done.metrics[1]["refused"] == done.refusals[1]
    assert done.metrics[1]["contributions"] == 2 and done.metrics[1]["missing"] == []
    assert re.search(reason, event.data["reason"])
    assert "\n" not in event.data["reason"] and len(event.data["reason"]) < 300


@settings(deadline=None, max_examples=20)
@given(st.binary(max_size=200))
def test_no_bytes_at_all_stop_the_round(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes
) -> None:
    good = pack_update(Update({"u": torch.ones(2)}))
    for bad in (noise, good[:40] + noise, noise + good):
        folder = tmp_path_factory.mktemp("noise")
        done = run(folder, People(TRIO, {"eve": always(bad)}))
        assert list(done.refusals[1]) == ["eve"] or bad == good


def test_notes_that_are_no_numbers_are_not_told(tmp_path: Path) -> None:
    notes = {"loss": ["much", "text"], "examples": 4, "tokens": None, "more": "text"}
    done = run(tmp_path, People(TRIO, {"eve": always(with_meta(notes=notes))}))
    assert done.metrics[1]["train_loss"] == {"ada": 0.5, "bob": 0.5, "eve": None}
    (event,) = [event for event in done.of_kind("contribution") if event.data["client"] == "eve"]
    assert event.data.keys() == {"client", "bytes", "examples"}


def test_one_who_never_answers_is_missing_and_asked_nothing_more(tmp_path: Path) -> None:
    """In that round; it costs one deadline, not two."""
    people = People(TRIO, {"bob": always(None)})
    done = run(tmp_path, people)
    assert people.asked == [("evaluate", TRIO), ("train", TRIO), ("evaluate", ["ada", "eve"])]
    assert done.metrics[1]["missing"] == ["bob"] and done.metrics[1]["refused"] == {}
    assert torch.allclose(done.x, reference([["ada", "eve"]]), atol=1e-7)


def test_zero_weight_for_all_changes_nothing(tmp_path: Path) -> None:
    cold = always(pack_update(Update({"u": torch.ones(2)}, weight=0.0)))
    done = run(tmp_path, People(TRIO, dict.fromkeys(TRIO, cold)))
    assert done.x.tolist() == [1.0, 2.0] and done.metrics[1]["contributions"] == 3


def test_a_sum_that_overflows_changes_nothing(tmp_path: Path) -> None:
    class Amplifying(Toy):
        def step(self, state: State, total: Update, turn: Turn) -> State:
            return State({"x": total.tensors["u"] * 1e30})

    huge = always(pack_update(Update({"u": torch.full((2,), 1e38)})))
    events: list[Event] = []
    with Journal.open(tmp_path, IDENTITY, Numbered(tmp_path.parent)) as journal:
        peers = People(TRIO, {"eve": huge})
        state = Coordinator(CONFIG, Amplifying(), journal, peers, observer=events.append).run()
    assert state.tensors["x"].tolist() == [1.0, 2.0]
    (notice,) = [event.data["text"] for event in events if event.kind == "notice"]
    assert notice.startswith("round 1 changes nothing")


def test_a_step_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    class Overflowing(Toy):
        def step(self, state: State, total: Update, turn: Turn) -> State:
            raise UpdateError("a number has outgrown 32 bits")

    events: list[Event] = []
    with Journal.open(tmp_path, IDENTITY, Numbered(tmp_path.parent)) as journal:
        coordinator = Coordinator(
            CONFIG, Overflowing(), journal, People(TRIO), observer=events.append
        )
        assert coordinator.run().tensors["x"].tolist() == [1.0, 2.0]
        assert len(journal.contributions(1)) == 3
    (notice,) = [event.data["text"] for event in events if event.kind == "notice"]
    assert notice == "round 1 changes nothing: a number has outgrown 32 bits"


# Integers


class Bytes(Toy):
    """x moves by the sum of the bytes, each times its sender's first letter."""

    integers = True

    def template(self, sent: Update, turn: Turn) -> Mapping[str, tuple[int, ...]]:
        return {"b": (2,)}

    def validate(self, update: Update, turn: Turn) -> None:
        if int(update.tensors["b"].min()) < -127:
            raise UpdateError(f"{update.sender}: a byte is out of range")

    def reducer(self, turn: Turn) -> Reducer:
        return Gather()

    def step(self, state: State, total: Update, turn: Turn) -> State:
        moved = [p.tensors["b"].float() * ord(p.sender[0]) for p in total.parts]
        return State({"x": state.tensors["x"] + torch.stack(moved).sum(0)})


def counted(folder: Path, answers: Mapping[str, bytes]) -> tuple[torch.Tensor, dict[str, str]]:
    """x after one round of `Bytes`, and who was refused and why."""
    people = People(TRIO, {name: always(answer) for name, answer in answers.items()})
    with Journal.open(folder, IDENTITY, Numbered(folder.parent)) as journal:
        state = Coordinator(CONFIG, Bytes(), journal, people).run()
        return state.tensors["x"], journal.refusals(1)


def test_a_strategy_of_integers_knows_who_sent_each_of_them(tmp_path: Path) -> None:
    """By whom they came, in the cohort's order, whatever a message says of its sender."""
    sent = {
        name: pack_update(Update({"b": torch.tensor([at, -127]).char()}, sender="zoe"))
        for at, name in enumerate(TRIO)
    }
    x, refused = counted(tmp_path, sent)
    letters = [ord(name[0]) for name in TRIO]
    assert x.tolist() == [1.0 + letters[1] + 2 * letters[2], 2.0 - 127 * sum(letters)]
    assert refused == {}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (of(b=torch.tensor([0, -128]).char()), "^eve: a byte is out of range$"),
        (of(b=torch.ones(2)), "^eve: only int8 and int32 tensors are accepted$"),
        (of(b=torch.ones(2).long()), "^eve: only int8 and int32 tensors are accepted$"),
        (of(b=torch.ones(3).char()), r"shape \(3,\), expected \(2,\)"),
    ],
)
def test_integers_that_cannot_be_true_are_refused_by_name(
    tmp_path: Path, answer: bytes, reason: str
) -> None:
    good = pack_update(Update({"b": torch.ones(2).char()}))
    x, refused = counted(tmp_path, {"ada": good, "bob": good, "eve": answer})
    assert list(refused) == ["eve"] and re.search(reason, refused["eve"])
    assert x.tolist() == [1.0 + ord("a") + ord("b"), 2.0 + ord("a") + ord("b")]


# More than was asked for


@pytest.mark.parametrize("second", ["same", "other", "bad"])
def test_a_second_answer_does_not_count(tmp_path: Path, second: str) -> None:
    class Stutter(People):
        def ask(self, verb: str, *args: Any) -> Iterator[tuple[str, Answer]]:
            for name, reply in super().ask(verb, *args):
                yield name, reply
                if verb == "train" and name == "bob":
                    other = pack_update(Update({"u": torch.full((2,), 9.0)}))
                    yield name, {"same": reply, "other": other, "bad": b"garbage"}[second]

    done = run(tmp_path, Stutter(TRIO))
    assert torch.allclose(done.x, reference([TRIO]), atol=1e-7)
    assert done.metrics[1]["contributions"] == 3
    assert list(done.refusals[1]) == ([] if second == "same" else ["bob"])
    assert len(done.of_kind("contribution")) == 3


def test_an_answer_of_someone_who_was_not_asked_does_not_count(tmp_path: Path) -> None:
    class Intruded(People):
        def ask(self, verb: str, *args: Any) -> Iterator[tuple[str, Answer]]:
            if verb == "train":
                yield "mallory", pack_update(Update({"u": torch.full((2,), 9.0)}))
            yield from super().ask(verb, *args)

    done = run(tmp_path, Intruded(TRIO))
    assert torch.allclose(done.x, reference([TRIO]), atol=1e-7)
    assert "was not asked" in done.refusals[1]["mallory"]


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
    people = People(TRIO, {"ada": always(BAD["nan"][0]), "bob": always(None)})
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
        def ask(self, verb: str, names: Sequence[str], payload: Any, seconds: float) -> Any:
            seen.extend(unpack_update(payload(name))[1] for name in names)
            return super().ask(verb, names, payload, seconds)

    run(tmp_path, Told(["ada"]), CONFIG.replace(rounds={"count": 1}))
    with Journal.open(tmp_path, IDENTITY) as journal:
        assert {header["run"] for header in seen} == {journal.run_id}
    digests = {header["config"] for header in seen}
    assert digests == {CONFIG.replace(rounds={"count": 1}).shared().digest()}
