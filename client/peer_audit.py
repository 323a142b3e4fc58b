"""Looking back: rebuilding a run from its ledger, and measuring one's own records again."""

from __future__ import annotations

import json
import re
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
from ..strategies.records import Head, Record
from .peer_log import EVENTS
from .peer_steps import Stepper

_KEY = re.compile("[0-9a-f]{64}")


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
    """What a peer's log tells, in order; lines that a crash has torn, or a log that is gone, say
    nothing."""
    path = folder / EVENTS
    if not path.exists():
        return
    with explained(path), path.open("rb") as lines:
        for line in lines:  # one by one: the log of a long run is larger than the records
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
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
        if event.get("kind") == "record"
        and isinstance(event.get("round"), int)
        and _is_cut(event.get("cut"))
    }


def _is_cut(found: Any) -> bool:
    """Whether a log that anything may have happened to says keys and numbers."""
    return isinstance(found, dict) and all(
        _KEY.fullmatch(name) and isinstance(count, int) for name, count in found.items()
    )


def audit(
    stepper: Stepper, ledger: Ledger, folder: Path, count: int, rng: Random
) -> Iterator[Audited]:
    """Measure up to `count` of this peer's own records again, chosen at random among those whose
    model all still counts: a fork may have been proven since.

    On the machine that made them all bytes come out the same; another's arithmetic may move some
    by 1.  Raises JournalError where no record can be measured.
    """
    known = cuts(folder)
    logged = [r for r in ledger.chain(stepper.peer).counted() if r.sequence in known]
    if not logged:
        raise JournalError(
            f"{folder} holds no record of this peer with the model that it was measured on",
            "run `meadow peer run` first; events.jsonl must be kept",
        )
    found = ((record, _heads(ledger, known[record.sequence])) for record in logged)
    candidates = [(record, heads) for record, heads in found if heads is not None]
    if not candidates:
        raise JournalError(
            f"all {len(logged)} records of this peer were measured on records that do not count"
            " any more",
            "they were excluded after a proven fork; what is made from now on can be measured",
        )
    chosen = rng.sample(range(len(candidates)), min(count, len(candidates)))
    for index in sorted(chosen):
        yield _measured_again(stepper, ledger, *candidates[index])


def _heads(ledger: Ledger, cut: Mapping[str, int]) -> dict[bytes, Head] | None:
    """Where each chain ended when it had so many records; None where they do not all count."""
    heads = {}
    for name, count in cut.items():
        head = ledger.chain(bytes.fromhex(name)).head_at(count)
        if head is None:
            return None
        heads[bytes.fromhex(name)] = head
    return heads


def _measured_again(
    stepper: Stepper, ledger: Ledger, record: Record, heads: Mapping[bytes, Head]
) -> Audited:
    steps = len(record.steps)
    walked = stepper.walk(ledger.q_at(heads), record.first_step, steps, record.shift)
    said = np.frombuffer(record.steps, np.int8).astype(int)
    difference = np.abs(said - walked.bytes.numpy().astype(int))
    return Audited(record.sequence, steps, int((difference == 0).sum()), int(difference.max()))
