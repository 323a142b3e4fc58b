"""`meadow demo --deploy`: real processes, TLS and enrolment end in the local engine's adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meadow.cli import main
from meadow.client.outgoing_log import read, verify
from meadow.errors import ConfigError, DeploymentError
from meadow.peft_adapters.servable import check_servable
from meadow.simulation import deploy_demo


def test_a_folder_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        deploy_demo.run(tmp_path)


def test_a_process_that_is_left_behind_is_found(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)", str(tmp_path)]
    with subprocess.Popen(command) as left:
        found = deploy_demo.processes_in(tmp_path)
        left.kill()
    assert len(found) == 1 and str(tmp_path) in found[0]
    assert deploy_demo.processes_in(tmp_path) == []


def test_a_command_that_fails_ends_the_demo_with_its_last_words(tmp_path: Path) -> None:
    failing = deploy_demo.Process("joining", ["client", "join", "no-word", "--data", "x"], tmp_path)
    failing.start()
    with pytest.raises(DeploymentError, match=r"joining ended \(2\).*not an invitation"):
        deploy_demo._until([failing], lambda: False)


def test_what_gets_nowhere_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy_demo, "PATIENCE", 0.0)
    with pytest.raises(DeploymentError, match="did not get there"):
        deploy_demo._until([], lambda: False)


@pytest.mark.long(minutes=3)
def test_the_demo_ends_in_the_local_engines_adapter(short_path: Path) -> None:
    out = short_path / "demo"
    assert main(["demo", "--deploy", "--out", str(out), "--json", str(short_path / "r.json")]) == 0
    report = json.loads((short_path / "r.json").read_text())
    assert report["equal"] and report["tensors"] == 70
    assert report["loss"] < report["base_loss"] - 0.05
    check_servable(Path(report["adapter"]))
    assert deploy_demo.processes_in(out) == []
    for name in report["participants"]:
        log = out / name / "home" / "clients" / name / "outgoing.jsonl"
        assert verify(log) == len(read(log)) > 0
        trained = {entry.round for entry in read(log) if entry.kind == "train"}
        assert trained == set(range(1, report["rounds"] + 1))
