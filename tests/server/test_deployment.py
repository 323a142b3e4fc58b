"""A deployed run over people in memory: it waits, pauses, asks again and forgets whom it has to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from enrolment import approved, new_flower_key, new_identity
from gateways import Quick
from homes import blueprint
from safetensors.torch import load_file

from meadow.client.member import Member
from meadow.client.outbox import Outbox
from meadow.client.task import answer
from meadow.client.trainer import Trainer
from meadow.config import Config, write
from meadow.errors import JournalError, RosterError
from meadow.events import Event
from meadow.file_lock import is_held
from meadow.identity import trust
from meadow.journal import Journal
from meadow.peft_adapters.blueprint import open_blueprint
from meadow.peft_adapters.manifest import verify_manifest
from meadow.server.coordinator import Refusal
from meadow.server.coordinator_home import CoordinatorHome
from meadow.server.deployment import DeployedRun, Inbox, nodes_of, read_inbox, serve
from meadow.server.publishing import Publishing, open_publishing
from meadow.server.registry import Registry
from meadow.server.roster import Roster
from meadow.server.run_beginning import begin, run_identity
from meadow.simulation.engine import Lab, simulate
from meadow.strategies.registry import strategy_of

NAMES = ("ada", "bob", "eve")
OPERATOR = new_identity()


@dataclass
class People:
    """Participants who train on the tiny base in this process; who is present may change."""

    lab: Lab
    config: Config
    folder: Path
    run: str
    present: list[str] = field(default_factory=lambda: list(NAMES))
    silent: set[str] = field(default_factory=set)
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    sent: dict[str, list[bytes]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return sorted(self.present)

    def together(self, cohort: Sequence[str]) -> list[list[str]]:
        return [[name] for name in cohort]

    def ask(
        self,
        verb: str,
        names: Sequence[str],
        payload: Callable[[str], bytes],
        deadline_seconds: float,
        number: int = 0,
    ) -> Iterator[tuple[str, bytes | Refusal]]:
        self.asked.append((verb, tuple(names)))
        for name in names:
            if name in self.present and name not in self.silent:
                member = self._member(name)
                work = member.work if verb == "train" else member.evaluate
                data = work(payload(name))
                if verb == "train":
                    self.sent.setdefault(name, []).append(data)
                yield name, data

    def _member(self, name: str) -> Member:
        lab, config = self.lab, self.config
        person = next(p for p in lab.participants if p.name == name)
        trainer = Trainer(lab.bench.bank, config.clients, lab.bench.pad)
        base = blueprint(config.model.base)
        strategy = strategy_of(config, base.layers, base.digest)
        outbox = Outbox(self.folder / "outbox", name, self.run, Quick())
        return Member(name, strategy, outbox, lambda request: answer(request, person, trainer))


@dataclass
class Stage:
    """A run, its people and what it said."""

    home: CoordinatorHome
    config: Config
    people: People
    journal: Journal
    roster: Roster
    events: list[Event] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    on_sleep: Callable[[int], None] = lambda count: None
    publishing: Publishing | None = None

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        assert len(self.slept) < 200, "it waits for ever"
        self.on_sleep(len(self.slept))

    def run(self) -> DeployedRun:
        inbox = Inbox(self.roster, self.journal, self.events.append)
        base = blueprint(self.config.model.base)
        return DeployedRun(
            self.home, self.config, base, self.journal, self.people, inbox,
            self.events.append, Quick(), self.sleep, self.publishing,
        )  # fmt: skip

    def told(self) -> list[str]:
        return [event.data["text"] for event in self.events if event.kind == "notice"]

    def kinds(self) -> list[tuple[str, int]]:
        return [(event.kind, event.round) for event in self.events]

    def finish(self) -> dict[str, torch.Tensor]:
        run = self.run()
        run.finish(run.rounds())
        tensors: dict[str, torch.Tensor] = load_file(
            self.home.run / "adapter" / "adapter_model.safetensors"
        )
        return tensors


@contextmanager
def opened(folder: Path, config: Config, lab: Lab) -> Iterator[Stage]:
    home, base = CoordinatorHome(folder), blueprint(config.model.base)
    begin(home, config, base, "bb" * 32, OPERATOR, Quick())
    identity = run_identity(config, base)
    with (
        Journal.open(home.run, identity, Quick()) as journal,
        Roster.open(home.roster, Quick()) as roster,
    ):
        people = People(lab, config, folder, journal.run_id)
        yield Stage(home, config, people, journal, roster)


@pytest.fixture
def stage(tiny: Config, lab: Lab, tmp_path: Path) -> Iterator[Stage]:
    torch.set_num_threads(1)
    with opened(tmp_path / "c", tiny, lab) as stage:
        yield stage


# --- a run that goes well ------------------------------------------------------------------------


def test_it_ends_with_the_local_engines_adapter_bit_for_bit(
    stage: Stage, tiny: Config, lab: Lab, tmp_path: Path
) -> None:
    mine = stage.finish()
    local = simulate(tiny, tmp_path / "local", lab)
    theirs = load_file(local.adapter / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert json.loads(stage.home.finished.read_text()) == {"rounds": 2}
    trusted = trust(OPERATOR.public_pem)
    statement = verify_manifest(stage.home.run, trusted)
    assert statement["predicate"]["participants"] == 3
    assert stage.kinds()[-1] == ("run_finished", 2) and stage.told() == []


def test_it_publishes_as_it_goes_and_what_a_crash_left_out(stage: Stage, tmp_path: Path) -> None:
    """Killed between a round's end and its publication; the round is not made again."""
    serve = {"name": "mail", "registry": str(tmp_path / "r"), "publish_every": 1}
    stage.config = stage.config.replace(serve={**serve, "max_loss_increase": 100.0})
    base = blueprint(stage.config.model.base)

    def opened() -> Publishing:
        found = open_publishing(stage.config, base, OPERATOR, stage.events.append, Quick())
        assert found is not None
        return found

    with opened() as stage.publishing, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.publishing, "publish", _killed)
        with pytest.raises(KeyboardInterrupt):
            stage.run().rounds()
    with opened() as stage.publishing:
        stage.finish()
    with Registry.open(tmp_path / "r", OPERATOR) as registry:
        first, second = (registry.verify(version).provenance for version in registry.versions())
        assert registry.resolve("mail").number == 2
        assert second.parents == (registry.resolve("mail@v1").id,)
    assert (first.rounds, second.rounds) == (1, 2)
    assert (first.held_out_rows, first.held_out_digest, first.dtype) == (None, "", "float32")
    assert [verb for verb, _ in stage.people.asked].count("train") == 2
    assert [kind for kind, _ in stage.kinds()][-3:] == ["round_closed", "published", "run_finished"]


# --- waiting -------------------------------------------------------------------------------------


def test_a_run_begins_once_all_who_were_invited_are_online(stage: Stage) -> None:
    stage.config = stage.config.replace(coordinator={"invite": list(NAMES)})
    stage.people.present = ["ada"]
    run = stage.run()

    def arrive(count: int) -> None:
        stage.people.present = ["ada", *NAMES[1 : 1 + count // 2]]

    stage.on_sleep = arrive
    run.finish(run.rounds())
    assert stage.told()[:2] == ["1 of 3 participants are online", "2 of 3 participants are online"]
    assert stage.people.asked[0] == ("evaluate", NAMES)


def test_after_a_restart_it_does_not_wait_for_who_has_left(stage: Stage) -> None:
    stage.config = stage.config.replace(coordinator={"invite": list(NAMES)})
    first = stage.run()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(first, "_round", _stopping(first._round))
        first.rounds()
    stage.people.present = ["bob"]
    stage.finish()
    assert stage.slept == [] and stage.people.asked[-1] == ("evaluate", ("bob",))


def _stopping(real: Callable[[Any], None]) -> Callable[[Any], None]:
    """The process is killed once the first round is closed."""

    def once(coordinator: Any) -> None:
        real(coordinator)
        raise KeyboardInterrupt

    return once


def test_a_run_whose_rounds_are_done_needs_nobody_to_be_finished(stage: Stage) -> None:
    before = stage.finish()
    stage.home.finished.unlink()  # as if killed just before
    stage.people.present = []
    after = stage.finish()
    assert stage.slept == [] and stage.home.finished.exists()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_while_paused_no_round_begins(stage: Stage) -> None:
    stage.home.paused.touch()

    def resume(count: int) -> None:
        assert stage.people.asked == []
        if count == 5:
            stage.home.paused.unlink()

    stage.on_sleep = resume
    stage.finish()
    assert stage.told() == ["paused", "resumed"] and len(stage.slept) == 5


def test_a_pause_takes_effect_between_rounds(stage: Stage) -> None:
    run = stage.run()
    observer = stage.events.append

    def pausing(event: Event) -> None:
        observer(event)
        if event.kind == "round_opened" and event.round == 1:
            stage.home.paused.touch()

    run.observer = pausing
    stage.on_sleep = lambda count: stage.home.paused.unlink()
    run.finish(run.rounds())
    kinds = stage.kinds()
    assert kinds.index(("round_closed", 1)) < kinds.index(("notice", 0))
    assert kinds.index(("notice", 0)) < kinds.index(("round_opened", 2))


# --- quorum --------------------------------------------------------------------------------------


def test_a_round_without_quorum_is_tried_again_with_who_is_there_then(stage: Stage) -> None:
    """ada's answer is kept and repeated by nobody; bob comes back, eve has left for good."""
    stage.people.silent = {"bob", "eve"}

    def back(count: int) -> None:
        if stage.slept[-1] == stage.config.coordinator.retry_seconds:
            stage.people.silent, stage.people.present = set(), ["ada", "bob"]

    stage.on_sleep = back
    stage.finish()
    (text,) = stage.told()
    assert "round 1 has 1 of 3 contributions, quorum 2" in text and "again in 30 s" in text
    trained = [names for verb, names in stage.people.asked if verb == "train"]
    assert trained[:2] == [NAMES, ("bob",)]
    assert len(stage.people.sent["ada"]) == 2 == len(stage.people.sent["bob"])
    rows = stage.journal.metrics()
    assert [row["contributions"] for row in rows[1:]] == [2, 2]


def test_nobody_at_all_is_no_end_either(stage: Stage) -> None:
    stage.people.silent = set(NAMES)

    def back(count: int) -> None:
        if count == 3:
            stage.people.silent = set()

    stage.on_sleep = back
    stage.finish()
    assert stage.slept == [30.0, 30.0, 30.0] and len(stage.told()) == 3


# --- the inbox -----------------------------------------------------------------------------------


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
        patch.setattr(stage.journal, "note", _killed)
        with pytest.raises(KeyboardInterrupt):
            inbox.read()
    assert stage.journal.note == real
    for _ in range(2):
        inbox.read()
    assert len(stage.told()) == 2  # before the crash and after it; not a third time
    assert [note.kind for note in stage.roster.notes()].count("revoked") == 1


def _killed(*arguments: object) -> None:
    raise KeyboardInterrupt


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


# --- the process ---------------------------------------------------------------------------------


def test_serving_claims_the_run_and_leaves_its_traces(
    tiny: Config, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, registry_folder = tmp_path / "c", tmp_path / "registry"
    config = tiny.replace(serve={"name": "mail", "registry": str(registry_folder), "alias": ""})
    with opened(folder, config, lab) as stage:
        home, run_id = stage.home, stage.journal.run_id
    claims: list[bool] = []

    def looking(model: Any) -> Any:
        """At a large base this takes longer than a server app is waited for."""
        claims.append(is_held(home.server_app_lock))
        return open_blueprint(model)

    monkeypatch.setattr("meadow.server.deployment.open_blueprint", looking)

    def peers_of(nodes: Any, lives: int) -> Any:
        assert lives == 1
        claims.append(is_held(home.server_app_lock) and home.server_app.exists())
        with pytest.raises(JournalError, match="its server app runs already"):
            serve(folder, peers_of)
        return People(lab, config, folder, run_id)

    serve(folder, peers_of)
    assert (
        claims == [True, True]
        and not is_held(home.server_app_lock)
        and not home.server_app.exists()
    )
    rows = [json.loads(line) for line in (home.run / "events.jsonl").read_text().splitlines()]
    assert rows[0]["kind"] == "run_started" and rows[-1]["kind"] == "run_finished"
    metrics = (home.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in metrics] == [0, 1, 2]
    assert dataclasses.asdict(home.config()) == dataclasses.asdict(config)
    with Registry.open(registry_folder, home.identity()) as registry:
        assert registry.verify("mail@v1").provenance.run_id == run_id


def test_why_a_server_app_ends_is_told_to_the_operator(
    tiny: Config, lab: Lab, tmp_path: Path
) -> None:
    with opened(tmp_path / "c", tiny, lab) as stage:
        home = stage.home
    home.settings.write_text(write(tiny.replace(rounds={"seed": 9})))
    with pytest.raises(JournalError, match="with other settings"):
        serve(home.folder, lambda nodes, lives: pytest.fail("nobody is to be asked"))
    (row,) = [json.loads(line) for line in (home.run / "events.jsonl").read_text().splitlines()]
    assert row["kind"] == "notice" and row["text"].startswith("the server app ends: ")
    assert "with other settings" in row["text"] and not is_held(home.server_app_lock)
