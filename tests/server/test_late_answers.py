"""Answers that come after their round: counted once, later and for less, or dropped by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import interrupt, steps
from faulty_disk import Faulty, Numbered
from toy_people import CONFIG, IDENTITY, TRIO, Answer, People, Toy, answer_of, honest

from meadow.config import Config
from meadow.errors import QuorumError
from meadow.events import Event
from meadow.journal import Journal
from meadow.server.coordinator import Coordinator, Refusal
from meadow.server.late_answers import Late
from meadow.store import Disk
from meadow.strategies.base import Update
from meadow.strategies.messages import pack_update
from meadow.strategies.staleness import Patient

FOUR = CONFIG.replace(rounds={"count": 4, "quorum": 0.3})


class Lenient(Toy, Patient):
    """The toy's x moves by changes, of which late ones may count."""

    sends_changes = True


@dataclass
class Slow(People):
    """Peers of whom some answer late: `delays` says for (name, round) in which round it comes.

    It is handed over when that round measures; what a process that died had not taken is handed
    over again.
    """

    delays: dict[tuple[str, int], int] = field(default_factory=dict)
    owed: dict[tuple[str, int], Answer] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)

    def ask(  # type: ignore[override]
        self,
        verb: str,
        names: Sequence[str],
        payload: Callable[[str], bytes],
        deadline_seconds: float,
        number: int = 0,
    ) -> Iterator[tuple[str, Answer | Late]]:
        for name, answer in super().ask(verb, names, payload, deadline_seconds, number):
            if verb == "train" and (name, number) in self.delays:
                self.owed[name, number] = answer
            else:
                yield name, answer
        for (name, asked), answer in sorted(self.owed.items() if verb == "evaluate" else ()):
            if self.delays[name, asked] <= number:
                yield name, Late("train", asked, answer)
                del self.owed[name, asked]


def run(
    folder: Path,
    people: People,
    late: int,
    config: Config = FOUR,
    events: list[Event] | None = None,
    disk: Disk | None = None,
) -> Any:
    """The state in the end, and the metrics."""
    told = events if events is not None else []
    with Journal.open(folder, IDENTITY, disk or Numbered(folder.parent)) as journal:
        strategy = Lenient(late=late)
        coordinator = Coordinator(config, strategy, journal, people, observer=told.append)
        coordinator.run()
        return coordinator.state.tensors["x"], journal.metrics()


def reference(rounds: Sequence[Sequence[tuple[str, int]]], power: float = 0.5) -> torch.Tensor:
    """x after rounds that each counted (name, round that it was asked in)."""
    states = [torch.tensor([1.0, 2.0])]
    for number, counted in enumerate(rounds, 1):
        updates = [
            answer_of(name, Update({"x": states[asked - 1]}), asked) for name, asked in counted
        ]
        weights = torch.tensor(
            [u.weight * (1 + number - asked) ** -power
             for u, (_, asked) in zip(updates, counted, strict=True)], dtype=torch.float64
        )  # fmt: skip
        stacked = torch.stack([update.tensors["u"].double() for update in updates])
        states.append(states[-1] + ((weights[:, None] * stacked).sum(0) / weights.sum()).float())
    return states[-1]


def of(number: int, *names: str) -> list[tuple[str, int]]:
    return [(name, number) for name in names]


def late_events(events: Sequence[Event]) -> list[tuple[str, int, int | None]]:
    return [
        (event.data["client"], event.round, event.data.get("counts_in"))
        for event in events
        if event.kind == "late"
    ]


def test_a_late_answer_counts_in_the_next_round_by_the_formula(tmp_path: Path) -> None:
    events: list[Event] = []
    x, metrics = run(tmp_path, Slow(TRIO, delays={("eve", 1): 1}), 1, events=events)
    counted = [of(1, "ada", "bob"), of(2, *TRIO) + of(1, "eve"), of(3, *TRIO), of(4, *TRIO)]
    assert torch.allclose(x, reference(counted), atol=1e-6)
    assert late_events(events) == [("eve", 1, 2)]
    assert [row.get("late") for row in metrics] == [None, None, [[1, "eve"]], None, None]
    assert metrics[2]["contributions"] == 3 and metrics[1]["missing"] == ["eve"]


def test_how_late_it_may_be_is_the_strategys_to_say(tmp_path: Path) -> None:
    """Asked in round 1, there in round 2: two rounds late in round 3."""
    delays = {("eve", 1): 2}
    for late, counts in ((0, None), (1, None), (2, 3), (3, 3)):
        events: list[Event] = []
        x, _ = run(tmp_path / str(late), Slow(TRIO, delays=dict(delays)), late, events=events)
        more = of(1, "eve") if counts else []
        counted = [of(1, "ada", "bob"), of(2, *TRIO), of(3, *TRIO) + more, of(4, *TRIO)]
        assert torch.allclose(x, reference(counted), atol=1e-6)
        assert late_events(events) == [("eve", 1, counts)]


def test_after_the_last_round_nothing_counts(tmp_path: Path) -> None:
    events: list[Event] = []
    run(tmp_path, Slow(TRIO, delays={("eve", 4): 4}), 3, events=events)
    assert late_events(events) == [("eve", 4, None)]


def test_what_counted_in_time_does_not_count_again(tmp_path: Path) -> None:
    """A question that was asked twice is answered twice, with the same bytes."""

    class Twice(Slow):
        def ask(self, *given: Any, **more: Any) -> Any:
            for name, answer in super().ask(*given, **more):
                if given[0] == "train":
                    assert isinstance(answer, bytes)
                    self.delays[name, given[4]] = given[4]
                    self.owed[name, given[4]] = answer
                yield name, answer

    events: list[Event] = []
    x, _ = run(tmp_path, Twice(TRIO), 2, events=events)
    assert torch.allclose(x, reference([of(number, *TRIO) for number in (1, 2, 3, 4)]), atol=1e-6)
    assert len(late_events(events)) == 12 and {n for _, _, n in late_events(events)} == {None}


def test_what_comes_in_time_after_all_is_not_late(tmp_path: Path) -> None:
    """The round found no quorum and asks again: it counts there, and nowhere else."""
    people = Slow(TRIO, delays={("eve", 1): 0, ("bob", 1): 0})
    config = FOUR.replace(rounds={"quorum": 0.9, "count": 2})
    with Journal.open(tmp_path, IDENTITY) as journal:
        coordinator = Coordinator(config, Lenient(late=2), journal, people)
        with pytest.raises(QuorumError):
            coordinator.run()
        assert journal.keep_late(1, "eve", people.owed["eve", 1], 2)  # type: ignore[arg-type]
        people.delays = {}
        people.owed = {}
        coordinator.run()
        assert journal.late(2) == []
    counted = [of(1, *TRIO), of(2, *TRIO)]
    assert torch.allclose(coordinator.state.tensors["x"], reference(counted), atol=1e-6)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"garbage", "refused"),
        (pack_update(Update({"u": torch.tensor([1.0, float("nan")])})), "refused"),
        (pack_update(Update({"v": torch.ones(2)})), "refused"),
        (Refusal("no"), "late"),
    ],
)
def test_it_is_held_to_what_it_was_asked_for(tmp_path: Path, answer: Answer, kind: str) -> None:
    people = Slow(TRIO, delays={("eve", 1): 1})
    people.behaviours = {
        "eve": lambda received, turn: answer if turn.round == 1 else honest(received, turn)
    }
    events: list[Event] = []
    x, _ = run(tmp_path, people, 2, events=events)
    counted = [of(1, "ada", "bob"), *(of(number, *TRIO) for number in (2, 3, 4))]
    assert torch.allclose(x, reference(counted), atol=1e-6)
    (event,) = [e for e in events if e.kind in ("late", "refused")]
    assert (event.kind, event.round, event.data["client"]) == (kind, 1, "eve")


def test_who_withdraws_takes_late_answers_along(tmp_path: Path) -> None:
    people = Slow(TRIO, delays={("eve", 1): 1})
    with Journal.open(tmp_path, IDENTITY) as journal:
        coordinator = Coordinator(FOUR, Lenient(late=2), journal, people)
        coordinator.round(1)
        ((asked, name, digest),) = journal.late(2)
        assert (asked, name) == (1, "eve") and journal.payload(digest)
        assert journal.retract("eve", "withdrawn") == [1]
        journal.sweep()
        assert journal.late(2) == [] and not (tmp_path / "blobs" / digest).exists()


# --- restarts ------------------------------------------------------------------------------------

RARER = [pytest.param(way, marks=pytest.mark.long) for way in ("before", "after", "full")]
DELAYS = {("eve", 1): 1, ("ada", 1): 2, ("bob", 2): 2, ("eve", 2): 3}
COUNTED = [
    of(1, "bob"),
    of(2, "ada") + of(1, "eve"),
    of(3, *TRIO) + of(1, "ada") + of(2, "bob"),
    of(4, *TRIO) + of(2, "eve"),
]


def program(people: Slow) -> Callable[[Path, Disk], Any]:
    return lambda root, disk: run(root / "run", people, 2, disk=disk)


@pytest.mark.parametrize("way", ["torn", "power", *RARER])
def test_a_coordinator_that_is_ended_anywhere_ends_with_the_same_bits(
    tmp_path: Path, roots: Iterator[Path], way: str
) -> None:
    fresh = partial(Slow, TRIO, delays=DELAYS)
    (tmp_path / "whole").mkdir()
    expected, metrics = program(fresh())(tmp_path / "whole", Numbered(tmp_path / "whole"))
    assert torch.allclose(expected, reference(COUNTED), atol=1e-6)
    places = steps(program(fresh()), tmp_path / "count", way)
    assert len(places) > 20
    for at, root in zip(places, roots, strict=False):
        people = fresh()
        survivor = interrupt(program(people), Faulty(root, at, way))
        found, rows = program(replace(people))(survivor, Numbered(survivor))
        assert torch.equal(found, expected) and rows == metrics


def test_a_journal_of_an_older_meadow_goes_on(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal:
        Coordinator(FOUR, Lenient(late=1), journal, Slow(TRIO)).round(1)
        journal._db.execute("DROP TABLE late")
    x, _ = run(tmp_path, Slow(TRIO, delays={("eve", 2): 2}), 1)
    counted = [of(1, *TRIO), of(2, "ada", "bob"), of(3, *TRIO) + of(2, "eve"), of(4, *TRIO)]
    assert torch.allclose(x, reference(counted), atol=1e-6)
