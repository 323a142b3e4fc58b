"""What the coordinator does not count: bad answers, wrong integers, more than was asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import Numbered
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_people import CONFIG, IDENTITY, TRIO, Answer, People, Toy, always, reference, run

from meadow.errors import UpdateError
from meadow.events import Event
from meadow.journal import Journal
from meadow.server.coordinator import Coordinator, Refusal
from meadow.strategies.base import Reducer, State, Turn, Update
from meadow.strategies.messages import pack_update
from meadow.strategies.pool_strategy import Gather
from meadow.wire import encode

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


@pytest.mark.parametrize("reason", ["\x1b]0;owned\x07\x1b[2J" * 3, "one\nand another", "x" * 10**6])
def test_a_reason_is_one_line_whatever_was_sent(tmp_path: Path, reason: str) -> None:
    """It is shown in the operator's terminal, and kept with the round for good."""
    done = run(tmp_path, People(TRIO, {"eve": always(Refusal(reason))}))
    (event,) = done.of_kind("refused")
    for told in (event.data["reason"], done.refusals[1]["eve"], done.metrics[1]["refused"]["eve"]):
        assert told.isprintable() and 0 < len(told) <= 500
