"""`meadow demo --quick`: the whole story in a minute, from an installed package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meadow.cli import main
from meadow.identity import own_identity
from meadow.peft_adapters.servable import check_servable
from meadow.server.registry import Registry, default_folder
from meadow.simulation import baselines, demo


def test_the_quick_demo_tells_the_whole_story(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_file = tmp_path / "report.json"
    command = ["demo", "--quick", "--publish", "demo", "--out", str(tmp_path / "demo")]
    assert main([*command, "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["peft_loss"] == pytest.approx(report["federated_loss"], abs=1e-4)
    assert report["federated_loss"] < report["base_loss"]
    assert report["centralised_loss"] == min(report["centralised"]["tried"].values())
    assert len(report["centralised"]["tried"]) == 2 * len(baselines.GRID)
    assert report["share"] == pytest.approx(
        baselines.share(report["base_loss"], report["federated_loss"], report["centralised_loss"])
    )
    assert check_servable(Path(report["adapter"])) == []
    contributions = [
        json.loads(line)
        for line in (tmp_path / "demo" / "events.jsonl").read_text().splitlines()
        if '"kind":"contribution"' in line
    ]
    assert report["bytes_up"] == sum(event["bytes"] for event in contributions)
    with Registry.open(default_folder(), own_identity()) as registry:
        assert registry.resolve("demo").facts["loss"] == report["federated_loss"]
    said = capsys.readouterr()
    printed = said.out
    assert "published demo@v1; prod points to it" in said.err
    assert (
        report["adapter"] in printed.replace("\n", "")
        and "before" in printed
        and "after" in printed
    )


def test_a_finished_demo_is_never_overwritten(tmp_path: Path) -> None:
    wanted = tmp_path / "demo"
    assert demo.free_folder(wanted) == wanted
    wanted.mkdir()
    assert demo.free_folder(wanted) == wanted, "unfinished: to be continued"
    (wanted / demo.REPORT).write_text("{}")
    assert demo.free_folder(wanted) == tmp_path / "demo-2"


def test_share_is_of_the_improvement() -> None:
    assert baselines.share(4.0, 3.0, 2.0) == 0.5
    assert baselines.share(4.0, 2.0, 2.0) == 1.0


@pytest.mark.long(minutes=8)
def test_the_demo_keeps_its_promise(tmp_path: Path) -> None:
    """At least 0.80 of centralised training's improvement, and better than training alone."""
    report_file = tmp_path / "report.json"
    assert main(["demo", "--out", str(tmp_path / "demo"), "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["share"] >= 0.80
    assert report["centralised_loss"] < report["federated_loss"] < report["local_loss"]
    assert report["local_loss"] < report["base_loss"]
    assert report["peft_loss"] == pytest.approx(report["federated_loss"], abs=1e-4)
