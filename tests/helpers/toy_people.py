"""Invented peers, a strategy of one vector, and a coordinator with a real journal over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from faulty_disk import Numbered

from meadow.config import Config
from meadow.events import Event
from meadow.journal import Journal, RunIdentity
from meadow.peft_adapters.layout import Tree
from meadow.server.coordinator import Coordinator, Refusal
from meadow.strategies.base import Loss, State, Strategy, Turn, Update, Work
from meadow.strategies.messages import pack_update, turn_from_json, unpack_update

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
        number: int = 0,
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
