"""How a run stands, as its folder tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from enrolment import Clock, approved, enrolled, new_identity
from gateways import Quick
from homes import blueprint

from meadow.config import Config
from meadow.errors import ConfigError
from meadow.events import Event, EventLog
from meadow.server.coordinator_home import CoordinatorHome
from meadow.server.coordinator_status import ONLINE_SECONDS, status_of, text_of
from meadow.server.roster import Roster
from meadow.server.run_beginning import begin
from meadow.store import locked


@pytest.fixture
def home(tiny: Config, tmp_path: Path) -> CoordinatorHome:
    home = CoordinatorHome(tmp_path / "c")
    begin(home, tiny, blueprint(tiny.model.base), "bb" * 32, new_identity(), Quick())
    return home


def test_before_anything_happened(home: CoordinatorHome) -> None:
    found = status_of(home)
    assert (found["running"], found["paused"], found["finished"]) == (False, False, False)
    assert (found["round"], found["rounds"], found["loss"]) == (0, 2, None)
    assert found["participants"] == found["events"] == found["asked"] == []


def test_in_the_middle_of_a_run(home: CoordinatorHome) -> None:
    clock = Clock()
    with Roster.open(home.roster, Quick(), clock) as roster:
        ada = approved(roster, "ada", 1)
        enrolled(roster, "bob")
        roster.touch(ada.key)
        roster.note("refusal", ada.key, "round 1: not at night")
    rows = [{"round": 0, "loss": 3.0}, {"round": 1, "loss": 2.0}, {"round": 2}]
    (home.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = EventLog(home.run / "events.jsonl")
    for number in range(20):
        log(Event("notice", 0, {"text": f"notice {number}"}))
    log.close()
    home.paused.touch()
    clock.now += ONLINE_SECONDS - 1
    with locked(home.lock, ""):
        found = status_of(home, clock)
    assert found["running"] and found["paused"] and not found["finished"]
    assert (found["round"], found["base_loss"], found["loss"]) == (2, 3.0, 2.0)
    online = {person["name"]: person["online"] for person in found["participants"]}
    assert online == {"ada": True, "bob": False}
    assert [(note["name"], note["kind"]) for note in found["asked"]] == [("ada", "refusal")]
    assert found["events"][-1]["text"] == "notice 19" and len(found["events"]) == 8
    clock.now += 2
    assert not any(person["online"] for person in status_of(home, clock)["participants"])
    assert json.loads(json.dumps(found)) == found


def test_another_folder_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no coordinator's folder"):
        status_of(CoordinatorHome(tmp_path))


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Event("round_opened", 3, {"cohort": ["ada", "bob"]}), "round 3 opened: ada, bob"),
        (Event("contribution", 3, {"client": "ada", "bytes": 693_400}), "ada contributed 693.4 kB"),
        (Event("refused", 3, {"client": "ada", "reason": "not finite"}), "not counted: not finite"),
        (Event("late", 3, {"client": "ada"}), "round 3: ada answered too late and is left out"),
        (
            Event("late", 3, {"client": "ada", "counts_in": 5}),
            "round 3: ada answered too late and counts in round 5",
        ),
        (Event("round_closed", 3, {"loss": 2.5}), "round 3 closed: held-out loss 2.5000"),
        (Event("round_closed", 3, {}), "round 3 closed"),
        (Event("run_finished", 3, {"adapter": "x"}), "run finished"),
    ],
)
def test_events_are_lines_for_people(event: Event, text: str) -> None:
    assert text in text_of(event)
