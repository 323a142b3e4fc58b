"""How a deployed run stands, read from its folder: whether or not the coordinator runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from ..display import bytes_text, late_text
from ..events import Event, last_events
from ..store import explained
from .coordinator_home import CoordinatorHome
from .participant import Participant
from .roster import Note, Roster

ONLINE_SECONDS = 90.0
"""Who was heard of since then is online: a SuperNode asks all the time, and `seen` is written
every half minute."""
_EVENTS, _NOTES = 8, 8
_ASKED = ("refusal", "withdraw")


def status_of(home: CoordinatorHome, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """What an operator wants to know.  Raises ConfigError where no run was begun here."""
    config, now = home.config(), clock()
    with Roster.open(home.roster) as roster:
        people, notes = roster.participants(), roster.notes()
    metrics = _metrics(home)
    losses = [row["loss"] for row in metrics if "loss" in row]
    return {
        "folder": str(home.folder),
        "running": home.running,
        "paused": home.paused.exists(),
        "finished": home.finished.exists(),
        "round": metrics[-1]["round"] if metrics else 0,
        "rounds": config.rounds.count,
        "base_loss": losses[0] if losses else None,
        "loss": losses[-1] if losses else None,
        "participants": [_person(person, now) for person in people],
        "asked": [_note(note) for note in notes if note.kind in _ASKED][-_NOTES:],
        "events": [
            {"time": event.data["time"], "text": text_of(event)}
            for event in last_events(home.run / "events.jsonl", _EVENTS)
        ],
    }


def text_of(event: Event) -> str:
    """An event as a line for people."""
    data, number = event.data, event.round
    match event.kind:
        case "round_opened":
            return f"round {number} opened: {', '.join(data['cohort'])}"
        case "contribution":
            return f"round {number}: {data['client']} contributed {bytes_text(data['bytes'])}"
        case "refused":
            return f"round {number}: {data['client']} is not counted: {data['reason']}"
        case "late":
            return f"round {number}: {late_text(data)}"
        case "round_closed":
            loss = f": held-out loss {data['loss']:.4f}" if "loss" in data else ""
            return f"round {number} closed{loss}"
        case "notice":
            return str(data["text"])
    return event.kind.replace("_", " ")


def _metrics(home: CoordinatorHome) -> list[dict[str, Any]]:
    """A row a closed round, round 0 first; none before the run has begun."""
    path = home.run / "metrics.jsonl"
    if not path.exists():
        return []
    with explained(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _person(person: Participant, now: float) -> dict[str, Any]:
    return {
        "name": person.name,
        "status": person.status,
        "fingerprint": person.fingerprint,
        "online": person.status == "approved" and 0 < now - person.seen < ONLINE_SECONDS,
        "seen": person.seen,
        "certificate_expires": person.certificate_expires,
    }


def _note(note: Note) -> dict[str, Any]:
    return {"time": note.time, "kind": note.kind, "name": note.name, "text": note.text}
