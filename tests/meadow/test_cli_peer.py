"""`meadow peer …` over a tiny base: from a founding to a look back, and how a run is ended."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peer_person import Person, base_of, key_of, log_of, start
from safetensors.torch import load_file
from tiny_peers import adapter_bytes, eventually

from meadow.cli import main
from meadow.client.peer_terms import CHARTERED, terms_of
from meadow.config import load
from meadow.server.registry import Registry, default_folder

pytest_plugins = ("peer_person_fixtures",)


def test_a_run_from_its_founding_to_a_look_back(ada: Person, bob: Person) -> None:
    card = bob.do("card", "--address", "127.0.0.1:7070", "--out", "bob.card")
    assert (card["key"], card["address"]) == (key_of(bob).hex(), "127.0.0.1:7070")
    founded = ada.do("charter", "run.toml", "--founder", bob.folder / "bob.card")
    assert sorted(founded["founders"]) == sorted([key_of(ada).hex(), key_of(bob).hex()])
    report = ada.work()
    assert report["own_records"] == report["records"] == 1 and report["members"] == 2
    assert report["folder"] == "peer" and report["truncated"] == 0
    shown = json.loads((ada.folder / "peer" / "status.json").read_text())
    assert shown["state"] == report["state"]
    out = ada.folder / "again"
    replayed = ada.do("replay", "peer", "--base", base_of(ada), "--out", out, "--state",
                      report["state"][:12])  # fmt: skip
    assert (replayed["state"], replayed["records"], replayed["steps"]) == (report["state"], 1, 2)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == adapter_bytes(
        ada.folder / "peer"
    )
    without = ada.do("replay", "peer", "--base", base_of(ada), "--without", key_of(ada).hex()[:6])
    assert without["records"] == 0 and without["state"] != report["state"]
    verified = ada.do("verify", "run.toml", "--folder", "peer", "--records", "2")
    assert verified["records"] == [{"sequence": 0, "steps": 2, "equal": 2, "worst": 0}]
    assert ada.work()["own_records"] == 1, "the same command goes on"


def test_what_a_ledger_adds_up_to_is_published(worked: Person) -> None:
    replay = ("replay", "peer", "--base", base_of(worked))
    told = worked.do(*replay, "--publish", "letters")
    assert told["published"] == "letters@v1"
    assert worked.do(*replay, "--publish", "letters")["published"] == "letters@v1", "the same one"
    with worked.here(), Registry.open(default_folder(), worked.identity) as registry:
        version = registry.resolve("letters@prod")
        assert str(version) == "letters@v1" and version.facts["rounds"] == 1
        assert registry.verify(version).rank == 8, "the least that servers take"
        published = safetensors.torch.load(registry.files(version).weights)
    own = load_file(worked.folder / "peer" / "adapter" / "adapter_model.safetensors")
    assert own.keys() == published.keys()
    assert all(torch.equal(own[name], published[name]) for name in own)


def test_a_joiner_asks_and_a_member_introduces_it(
    worked: Person, bob: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    (bob.folder / "charter.json").write_bytes((worked.folder / "charter.json").read_bytes())
    asked = bob.do("join", "run.toml", "--out", "bob.request")
    told = worked.do("introduce", bob.folder / "bob.request", "--folder", "peer")
    assert told["peer"] == asked["peer"] and told["introducer"] == key_of(worked).hex()
    (dropped,) = (worked.folder / "peer" / "inbox").iterdir()
    assert dropped.name == f"{asked['peer']}.introduction"
    worked.change("records = 1", "records = 2")
    assert worked.work()["members"] == 2
    assert list((worked.folder / "peer" / "inbox").iterdir()) == []


def test_the_printed_retraction_says_what_it_is_not(
    worked: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    worked.do("replay", "peer", "--base", base_of(worked), "--without", key_of(worked).hex())
    assert "not exact unlearning" in capsys.readouterr().out


def test_a_run_of_other_layers_is_replayed_by_its_charter(ada: Person) -> None:
    ada.change('targets = ["all-linear"]', 'targets = ["q_proj", "up_proj"]')
    ada.do("charter", "run.toml")
    state = ada.work()["state"]
    assert ada.do("replay", "peer", "--base", base_of(ada))["state"] == state


def test_init_writes_what_peers_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "run.toml", "--peer"]) == 0
    config = load(tmp_path / "run.toml")
    assert config.strategy.name == "fedkseed" and {*config.strategy.options} == {*CHARTERED}
    assert terms_of(config).unit == config.strategy.options["unit"]


# --- ending it -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_record_ends_after_it_and_two_at_once(
    ada: Person, number: signal.Signals
) -> None:
    ada.do("charter", "run.toml")
    ada.change("steps = 2", "steps = 1000")
    ada.change("records = 1", "records = 0")
    process = start(ada, "run", "run.toml", "--out", "peer")
    eventually(lambda: "training and gossiping" in log_of(ada))
    process.send_signal(number)
    eventually(lambda: "ending after the record" in log_of(ada))
    assert process.wait() == 0
    shown = json.loads((ada.folder / "peer" / "status.json").read_text())
    assert ada.do("replay", "peer", "--base", base_of(ada))["state"] == shown["state"]
    ada.change("steps = 1000", "steps = 999")
    (ada.folder / "log.txt").unlink()
    process = start(ada, "run", "run.toml", "--out", "peer")
    eventually(lambda: "training and gossiping" in log_of(ada))
    process.send_signal(number)
    eventually(lambda: "ending after the record" in log_of(ada))
    process.send_signal(number)
    assert process.wait() in (0, 130, -number)
    assert "Traceback" not in log_of(ada)
    assert ada.do("replay", "peer", "--base", base_of(ada))["records"] >= shown["records"]
