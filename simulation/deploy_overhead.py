"""A deployment of one participant with one step a round: what surrounds the work, and what travels.

The commands are those that people use; see deploy_demo.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..client.home import MEMBERSHIP, SOCKET
from ..client.sources import read_rows
from ..client.trainer_link import STATUS, TrainerLink
from ..config import Config
from ..errors import DeploymentError
from ..journal import Journal, RunIdentity
from ..nano.corpus import PARTICIPANTS
from .deploy_demo import Stage, processes_in
from .deploy_timeline import Traces
from .deploy_trial import trial

NAME = min(PARTICIPANTS)
BATCH, MAX_LENGTH, RATE = 4, 128, 1e-3
"""The one step of a round, here and in the baseline; all rows of the participant are in it."""
_NEVER = 10**6  # rounds

Phase = Callable[[str], None]


def config(strategy: str, rounds: int) -> Config:
    """`rounds` rounds of one step; no held-out losses but before the first and after the last."""
    from ..strategies.registry import STRATEGIES

    rank = STRATEGIES[strategy].customary_rank
    return Config().replace(
        model={"device": "cpu", **({"rank": rank, "alpha": float(rank)} if rank else {})},
        strategy={"name": strategy},
        data={"max_length": MAX_LENGTH, "train_rows": BATCH, "held_out_rows": 1},
        rounds={"count": rounds, "deadline_seconds": 600.0, "evaluate_every": _NEVER},
        clients={"steps": 1, "batch": BATCH, "lr": RATE},
        simulation={"threads": 1},
    )


def write_rows(path: Path) -> None:
    """The participant's text, as JSON lines: one batch to train on, one row held out."""
    mine = [row for row in read_rows("nano", Config().data.chunk) if row.client == NAME]
    kept = [row for row in mine if row.split == "train"][:BATCH]
    kept += [row for row in mine if row.split == "test"][:1]
    rows = ({"prompt": r.prompt, "response": r.response, "split": r.split} for r in kept)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def deploy(strategy: str, rounds: int, phase: Phase) -> Traces:
    """Run it.  Raises DeploymentError where it did not come to its end."""
    with tempfile.TemporaryDirectory(prefix="meadow-") as name:
        folder = Path(name).resolve()
        with trial(config(strategy, rounds), [NAME], folder) as run:
            phase(f"{strategy}: a coordinator and a participant join")
            coordinator, (invitation,) = run.coordinator(1)
            home = run.stage.out / NAME / "home"
            home.mkdir(parents=True)
            write_rows(home.parent / "rows.jsonl")
            joining = ("join", invitation, "--data", "rows.jsonl", "--yes")
            join = run.start(run.stage.participant(NAME, "join", *joining))
            run.until(join.ended, 600.0)
            phase(f"{strategy}: {rounds} rounds of one step")
            run.start(run.stage.participant(NAME, "daemon"))
            run.until(coordinator.ended)
            traces = _traces(run.stage)
        left = processes_in(folder)
        if left:
            raise DeploymentError(f"processes were left behind: {', '.join(left)}")
    return traces


def _traces(stage: Stage) -> Traces:
    """While the participant's trainer still answers."""
    own = next((stage.out / NAME / "home").rglob(MEMBERSHIP)).parent
    with TrainerLink(own / SOCKET, patience=10.0) as link:
        status: dict[str, Any] = json.loads(link.call(STATUS))
    return Traces.read(stage.coordinator / "run", own, status)


def journal_seconds(contribution: int, repeats: int = 5) -> float:
    """What the journal alone takes for a round with one contribution of so many bytes, in a folder
    where the deployment's was; part of `collection` and `combination`."""
    with tempfile.TemporaryDirectory(prefix="meadow-") as name:
        with Journal.open(Path(name) / "run", RunIdentity("c", "b", {})) as journal:
            journal.close_round(0, bytes(contribution), {})
            begun = time.perf_counter()
            for number in range(1, repeats + 1):
                payload = number.to_bytes(4, "big") + bytes(contribution)
                journal.open_round(number, [NAME])
                journal.receive(number, NAME, payload)
                journal.close_round(number, payload[::-1], {})
                journal.prune(2)
            return (time.perf_counter() - begun) / repeats
