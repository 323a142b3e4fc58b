"""Looking back: rebuilding a run from its ledger, and measuring one's own records again."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import JournalError
from ..store import explained
from ..strategies.ledger import Ledger
from ..strategies.records import Record
from .peer_log import EVENTS
from .peer_steps import Stepper


@dataclass(frozen=True)
class Replayed:
    """What a ledger's records add up to."""

    q: Tensor
    state_id: str
    records: int
    steps: int
    peers: int


def replay(ledger: Ledger, without: Collection[bytes] = ()) -> Replayed:
    """Sum all records anew, leaving out some peers' if asked to.

    Every signature was checked when the ledger took the record in.  Leaving a peer out retracts
    its bytes; it is not exact unlearning, since the others measured on a model that had them.
    Raises UpdateError where the sum has overflowed.
    """
    q = ledger.rebuild(without)
    heads = [head for peer, head in ledger.heads.items() if peer not in without]
    return Replayed(
        q,
        ledger.charter.pool.state_id(q),
        sum(head.count for head in heads),
        sum(head.steps for head in heads),
        len(heads),
    )


@dataclass(frozen=True)
class Audited:
    """One own record, measured again."""

    sequence: int
    steps: int
    equal: int  # bytes that came out the same
    worst: int  # largest difference


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """What a peer's log tells, in order; lines that a crash has torn say nothing."""
    path = folder / EVENTS
    with explained(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def cuts(folder: Path) -> dict[int, Mapping[str, int]]:
    """By own sequence number, how many records of each peer the model had that it was made on.

    Of a record that a crash prevented and that was made anew, the last says it.
    """
    return {
        event["round"]: event["cut"]
        for event in events(folder)
        if event.get("kind") == "record" and isinstance(event.get("cut"), dict)
    }


def audit(
    stepper: Stepper, ledger: Ledger, folder: Path, count: int, rng: Random
) -> Iterator[Audited]:
    """Measure up to `count` of this peer's own records again, chosen at random.

    On the machine that made them all bytes come out the same; another's arithmetic may move some
    by 1.  Raises JournalError where no record can be measured.
    """
    own = ledger.chain(stepper.peer).counted()
    known = cuts(folder)
    candidates = [record for record in own if record.sequence in known]
    if not candidates:
        raise JournalError(
            f"{folder} holds no record of this peer with the model that it was measured on",
            "run `meadow peer run` first; events.jsonl must be kept",
        )
    for record in sorted(
        rng.sample(candidates, min(count, len(candidates))), key=lambda each: each.sequence
    ):
        yield _measured_again(stepper, ledger, record, known[record.sequence])


def _measured_again(
    stepper: Stepper, ledger: Ledger, record: Record, cut: Mapping[str, int]
) -> Audited:
    heads = {}
    for name, count in cut.items():
        peer = bytes.fromhex(name)
        head = ledger.chain(peer).head_at(count)
        if head is None:
            raise JournalError(
                f"record {record.sequence} was measured on {count} records of {name[:16]}, which"
                " do not count any more",
                "they were excluded after a proven fork: audit another record",
            )
        heads[peer] = head
    steps = len(record.steps)
    walked = stepper.walk(ledger.q_at(heads), record.first_step, steps, record.shift)
    said = np.frombuffer(record.steps, np.int8).astype(int)
    difference = np.abs(said - walked.bytes.numpy().astype(int))
    return Audited(record.sequence, steps, int((difference == 0).sum()), int(difference.max()))
