"""A deployed run over people in memory: it waits, pauses and asks again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deployment_stage import NAMES, OPERATOR, People, Stage, killed, opened
from gateways import Quick
from homes import blueprint
from safetensors.torch import load_file

from meadow.config import Config, write
from meadow.errors import JournalError
from meadow.events import Event
from meadow.file_lock import is_held
from meadow.identity import trust
from meadow.peft_adapters.blueprint import open_blueprint
from meadow.peft_adapters.manifest import verify_manifest
from meadow.server.deployment import serve
from meadow.server.publishing import Publishing, open_publishing
from meadow.server.registry import Registry
from meadow.simulation.engine import Lab, simulate

pytest_plugins = ("deployment_fixtures",)


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
        patch.setattr(stage.publishing, "publish", killed)
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
