"""What people ask of a deployed run while it goes on: to be forgotten, or let in again."""

from __future__ import annotations

from pathlib import Path

import pytest
from deployment_stage import Stage, killed, opened
from enrolment import approved, new_flower_key, new_identity

from meadow.config import Config
from meadow.errors import RosterError
from meadow.events import Event
from meadow.server.deployment import Inbox, nodes_of, read_inbox
from meadow.simulation.engine import Lab

pytest_plugins = ("deployment_fixtures",)


def test_who_withdraws_is_forgotten_and_asked_no_more(stage: Stage) -> None:
    person = approved(stage.roster, "eve")
    run = stage.run()
    observer = stage.events.append

    def leaving(event: Event) -> None:
        observer(event)
        if event.kind == "round_closed" and event.round == 1:
            stage.roster.note("withdraw", person.key, "")
            stage.people.present = ["ada", "bob"]

    run.observer = leaving
    coordinator = run.rounds()
    assert stage.told() == ["eve withdrew; its contributions are deleted (rounds: 1)"]
    assert stage.journal.contributions(1).keys() == {"ada", "bob"}
    run.finish(coordinator)
    gone = stage.people.sent["eve"][0]
    blobs = [path.read_bytes() for path in (stage.home.run / "blobs").iterdir()]
    assert gone not in blobs and stage.people.sent["ada"][0] in blobs
    assert nodes_of(stage.roster) == {}


def test_a_withdrawal_during_the_last_round_still_counts(stage: Stage) -> None:
    person = approved(stage.roster, "eve")
    run = stage.run()
    coordinator = run.rounds()
    stage.roster.note("withdraw", person.key, "")
    run.finish(coordinator)
    assert stage.told() == ["eve withdrew; its contributions are deleted (rounds: 1, 2)"]


def test_the_inbox_is_read_once_and_a_crash_repeats_nothing_that_shows(stage: Stage) -> None:
    person = approved(stage.roster, "eve")
    stage.roster.note("withdraw", person.key, "")
    inbox = Inbox(stage.roster, stage.journal, stage.events.append)
    real = stage.journal.note
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.journal, "note", killed)
        with pytest.raises(KeyboardInterrupt):
            inbox.read()
    assert stage.journal.note == real
    for _ in range(2):
        inbox.read()
    assert len(stage.told()) == 2  # before the crash and after it; not a third time
    assert [note.kind for note in stage.roster.notes()].count("revoked") == 1


def test_who_came_back_since_by_a_new_invitation_is_not_shut_out(
    stage: Stage, tmp_path: Path
) -> None:
    person = approved(stage.roster, "eve", 1)
    stage.roster.note("withdraw", person.key, "")
    stage.roster.revoke("eve")
    token = stage.roster.invite("eve", 60.0)
    stage.roster.enrol(token, new_identity().public.public_bytes_raw(), new_flower_key())
    stage.roster.approve("eve", 2)
    Inbox(stage.roster, stage.journal, stage.events.append).read()
    assert nodes_of(stage.roster) == {"eve": 2}


def test_only_the_approved_are_asked(stage: Stage) -> None:
    for number, name in enumerate(("ada", "bob", "eve"), start=1):
        approved(stage.roster, name, number)
    stage.roster.suspend("bob")
    stage.roster.revoke("eve")
    stage.roster.invite("max", 60.0)
    assert nodes_of(stage.roster) == {"ada": 1}


def test_a_withdrawal_while_a_round_is_open_leaves_it_out_of_that_round(stage: Stage) -> None:
    """Its answer has arrived already; what the round makes of the others is as if it had not."""
    person = approved(stage.roster, "eve")
    run = stage.run()
    observer = stage.events.append

    def leaving(event: Event) -> None:
        observer(event)
        if (event.kind, event.round, event.data.get("client")) == ("contribution", 1, "eve"):
            stage.roster.note("withdraw", person.key, "")
            stage.people.present = ["ada", "bob"]

    run.observer = leaving
    run.rounds()
    assert stage.told() == ["eve withdrew; its contributions are deleted (rounds: 1)"]
    rows = stage.journal.metrics()
    assert [row["contributions"] for row in rows[1:]] == [2, 2]
    assert rows[1]["refused"] == {"eve": "withdrawn by the participant"}
    assert stage.journal.contributions(1).keys() == {"ada", "bob"}


def test_after_the_end_the_operator_retracts_for_who_asks(
    tiny: Config, lab: Lab, tmp_path: Path
) -> None:
    """No server app works any more, and the participant may have been shut out before."""
    with opened(tmp_path / "c", tiny, lab) as stage:
        approved(stage.roster, "eve")
        stage.finish()
        stage.roster.revoke("eve")
        stage.roster.withdraw("eve")
        with pytest.raises(RosterError, match="max has not enrolled"):
            stage.roster.withdraw("max")
        home, gone = stage.home, stage.people.sent["eve"]
    told: list[Event] = []
    read_inbox(home, told.append)
    read_inbox(home, told.append)
    assert [event.data["text"] for event in told] == [
        "eve withdrew; its contributions are deleted (rounds: 1, 2)"
    ]
    kept = [path.read_bytes() for path in (home.run / "blobs").iterdir()]
    assert kept and not set(gone) & set(kept)
