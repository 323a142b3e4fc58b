"""Where a deployed round's seconds go, from what its processes write down anyway.

The coordinator's events, the forwarder's list of exchanges and the trainer's status carry times of
one machine's clock; between two of them lies one cause.  A round is taken from its own opening to
that of the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ..errors import DeploymentError
from ..fleet_routes import CONFIRM, FLEET, PULL_MESSAGES

Row = Mapping[str, Any]

_PUSH_MESSAGES, _PUSH_OBJECT = FLEET + "push-messages", FLEET + "push-object"

WORK = "work"
CAUSES = {
    "delivery": "the server app packs the message; the SuperNode's question, held, finds it",
    "transfer_down": "the message travels to the participant",
    "client_process": "Flower starts its client process, which reaches the trainer",
    WORK: "the trainer: checks, steps, packing",
    "hand_over": "the client process ends; the SuperNode sees its answer",
    "transfer_up": "the answer travels to the coordinator",
    "collection": "the server app sees, pulls and checks it; the journal keeps it",
    "combination": "the new state, journaled; the next round opens",
}
"""In the order in which they come; together they are the whole round."""


@dataclass(frozen=True)
class Moments:
    """Unix seconds in one round of one participant."""

    opened: float
    pulled: float
    confirmed: float
    began: float
    done: float
    pushed: float
    sent: float
    counted: float
    next_opened: float

    @property
    def seconds(self) -> dict[str, float]:
        """By cause."""
        times = tuple(vars(self).values())
        spans = (after - before for before, after in zip(times[:-1], times[1:], strict=True))
        return dict(zip(CAUSES, spans, strict=True))


@dataclass(frozen=True)
class Traces:
    """What a finished run of one participant has left."""

    events: Sequence[Row]
    traffic: Sequence[Row]
    requests: Sequence[Row]
    """The trainer's, of its status."""

    @classmethod
    def read(cls, run: Path, participant: Path, status: Row) -> Traces:
        return cls(
            _lines(run / "events.jsonl"), _lines(participant / "traffic.jsonl"), status["recent"]
        )

    def rounds(self) -> range:
        """Those that can be measured: not the first, which also warms up, nor the last, after which
        held-out losses are measured."""
        last = max(int(event["round"]) for event in self.events)
        return range(2, last)

    def moments(self, number: int) -> Moments:
        """Raises DeploymentError where the round did not go by as it does."""
        opened, next_opened = (
            self._event("round_opened", number),
            self._event("round_opened", number + 1),
        )
        request = _first(
            self.requests, lambda r: r["verb"] == "train" and r["round"] == number, "request"
        )
        began, done = float(request["since"]), float(request["since"]) + float(request["seconds"])
        pulled = self._exchange(PULL_MESSAGES, opened, lambda row: row["down"] > 0)
        pushed = self._exchange(_PUSH_MESSAGES, began)
        counted = self._event("contribution", number)
        objects = [
            float(row["time"])
            for row in self.traffic
            if row["path"] == _PUSH_OBJECT and pushed <= row["time"] <= next_opened
        ]
        return Moments(
            opened,
            pulled,
            self._exchange(CONFIRM, pulled),
            began,
            done,
            pushed,
            max(objects, default=pushed),
            counted,
            next_opened,
        )

    def bytes(self, number: int) -> tuple[int, int]:
        """(up, down) of all that the forwarder exchanged in a round: bodies, idle questions and
        heartbeats among them."""
        begin, end = self._event("round_opened", number), self._event("round_opened", number + 1)
        rows = [row for row in self.traffic if begin <= row["time"] < end]
        return sum(int(row["up"]) for row in rows), sum(int(row["down"]) for row in rows)

    def sizes(self, number: int) -> tuple[int, int]:
        """(up, down): the contribution's and the message's own bytes."""
        up = _first(self.events, _is("contribution", number), "contribution")["bytes"]
        down = _first(self.events, _is("round_closed", number), "end")["bytes_down"]
        return int(up), int(down)

    def _event(self, kind: str, number: int) -> float:
        return float(_first(self.events, _is(kind, number), kind)["time"])

    def _exchange(self, path: str, since: float, wanted: Any = lambda row: True) -> float:
        def fits(row: Row) -> bool:
            return bool(row["path"] == path and row["time"] >= since and wanted(row))

        return float(_first(self.traffic, fits, path)["time"])


def mean_seconds(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every cause."""
    return {cause: mean(found[cause] for found in rounds) for cause in CAUSES}


def _is(kind: str, number: int) -> Any:
    return lambda event: event["kind"] == kind and event["round"] == number


def _first(rows: Sequence[Row], fits: Any, what: str) -> Row:
    for row in rows:
        if fits(row):
            return row
    raise DeploymentError(f"the run's traces name no {what}")


def _lines(path: Path) -> list[Row]:
    return list(_parsed(path.read_text(encoding="utf-8")))


def _parsed(text: str) -> Iterator[Row]:
    for line in text.splitlines():
        yield json.loads(line)
