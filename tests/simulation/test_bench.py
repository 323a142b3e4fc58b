"""The benchmark's arithmetic and pages; the figures themselves are measured, not asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from meadow.cli import main
from meadow.config import Config
from meadow.errors import DataError, UpdateError
from meadow.simulation import baselines, bench, zo_bench, zo_learning, zo_speed
from meadow.simulation.bench_request import BenchRequest
from meadow.simulation.engine import Lab

PAGES = Path(__file__).parents[2] / "docs" / "benchmarks"


@pytest.mark.parametrize("name", ["strategies", "refine"])
def test_the_page_in_the_docs_is_what_the_report_says(name: str) -> None:
    report = json.loads((PAGES / f"{name}.json").read_text())
    assert (PAGES / f"{name}.md").read_text() == bench.page(report)
    assert {"bench", "hardware", "commit", "rows"} <= set(report)
    for row in report["rows"]:
        assert {"case", "value", "unit", "baseline", "ratio"} <= set(row)


@pytest.mark.parametrize("case", ["dolly_small", "tinyshakespeare"])
@pytest.mark.parametrize("arm", ["fedavg_lora", "diloco"])
def test_the_recorded_shares_are_what_the_project_promises(case: str, arm: str) -> None:
    rows = json.loads((PAGES / "strategies.json").read_text())["rows"]
    row = next(row for row in rows if row["case"] == f"{case}/{arm}")
    assert row["seeds"] == 3 and row["value"] >= 0.85


def test_the_zeroth_order_page_is_what_its_report_says_and_keeps_its_bars() -> None:
    report = json.loads((PAGES / "zo.json").read_text())
    assert (PAGES / "zo.md").read_text() == zo_bench.speed_page(report)
    assert [row["case"] for row in report["rows"]] == list(zo_speed.CASES)
    barred = [row for row in report["rows"] if row["bar"] is not None]
    assert len(barred) == 6 and all(row["value"] <= row["bar"] for row in barred)


def test_the_learning_page_is_what_its_report_says() -> None:
    report = json.loads((PAGES / "zo-learning.json").read_text())
    assert (PAGES / "zo-learning.md").read_text() == zo_bench.learning_page(report)
    assert {row["case"].split(",")[0] for row in report["rows"]} == set(zo_learning.CASES)
    for row in report["rows"]:
        assert {"case", "value", "unit", "baseline", "ratio", "spread", "lr"} <= set(row)
        assert row["seeds"] == _seeds(row["case"])


def _seeds(case: str) -> int:
    if case.startswith("fresh_or_pool, nano"):
        return 10
    return 5 if case.startswith(("federated_or_alone", "mixed_order")) else 3


def test_a_pool_learns_what_fresh_gaussian_directions_do() -> None:
    rows = json.loads((PAGES / "zo-learning.json").read_text())["rows"]
    shares = {row["case"]: row["value"] for row in rows if row["bar"] is not None}
    assert shares["fresh_or_pool, nano/pool, r = 64, a direction a row"] >= 0.95
    assert shares["federated_or_alone, nano/8 clients"] >= 0.90


@pytest.mark.parametrize("text", ["nano", "dolly_small"])
def test_some_pool_of_cores_learns_nearly_what_factors_do(text: str) -> None:
    rows = json.loads((PAGES / "zo-learning.json").read_text())["rows"]
    pools = [
        row["value"] for row in rows if row["case"].startswith(f"cores_or_factors, {text}/pool")
    ]
    assert len(pools) == 4 and max(pools) >= 0.85


def test_rows_are_means_and_half_ranges_over_the_seeds() -> None:
    losses = {"base": [4.0, 4.0], "alone": [3.5, 3.5], "centralised": [2.0, 3.0], "x": [3.0, 3.2]}
    rows = {row["case"]: row for row in bench._rows("c", losses, {"x": 0.1}, {"x": 8})}
    assert rows["c/x"]["value"] == pytest.approx((0.5 + 0.8) / 2)
    assert rows["c/x"]["spread"] == pytest.approx(0.15)
    assert rows["c/x"]["loss"] == pytest.approx(3.1) and rows["c/x"]["bytes_up"] == 8
    assert rows["c/centralised"]["value"] == 1.0 and rows["c/base"]["value"] == 0.0


def test_every_arm_chooses_its_rate_on_the_first_seed_and_keeps_it(
    tiny: Config, tmp_path: Path
) -> None:
    said: list[str] = []
    case = bench._Case("tiny", tiny, tmp_path, said.append, BenchRequest("x", tmp_path).kept())
    arms = [bench.Arm("fedavg_lora", "fedavg_lora", {})]
    case.measure(1, arms)
    chosen = dict(case.chosen)
    assert set(chosen) == {"centralised", "alone", "fedavg_lora"}
    assert set(chosen.values()) <= set(bench.rates_of(tiny)) and len(bench.rates_of(tiny)) == 5
    case.measure(2, arms)
    assert case.chosen == chosen
    rows = {row["case"]: row for row in case.rows()}
    assert [row["seeds"] for row in rows.values()] == [2] * 4
    assert rows["tiny/alone"]["lr"] == chosen["alone"] and rows["tiny/base"]["lr"] is None
    assert said[:3] == [f"tiny, seed 1: {name}" for name in ("centralised", "alone", "fedavg_lora")]


def test_a_rate_at_which_training_diverges_is_no_choice() -> None:
    def diverging() -> dict[str, Any]:
        raise UpdateError("the training loss is nan")

    assert bench.unless_diverged(diverging) is None
    assert bench.unless_diverged(lambda: {"loss": math.inf}) is None
    assert bench.unless_diverged(lambda: {"loss": 2.0}) == {"loss": 2.0}


def test_baselines_spend_the_federations_work(lab: Lab, tiny: Config) -> None:
    made: list[int] = []
    pooled = baselines.centralised(lab, tiny, [1e-2, 2e-2], made.append)
    work = len(lab.participants) * tiny.rounds.count * tiny.clients.steps
    assert sum(made) == 4 * work, "two ways at two rates, each the federation's whole work"
    assert len(pooled.tried) == 4 and pooled.loss == min(pooled.tried.values())
    made.clear()
    alone = baselines.local_only(lab, tiny, made.append)
    assert sum(made) == work and set(alone.losses) == {person.name for person in lab.participants}


def test_missing_text_and_unknown_cases_are_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEADOW_DATA", str(tmp_path))
    with pytest.raises(DataError, match="MEADOW_DATA"):
        bench.run(BenchRequest("strategies", tmp_path, model="nano", seeds=1))


@pytest.mark.parametrize("name", ["zo", "deploy", "serve"])
def test_a_bench_that_keeps_no_results_reuses_none(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", name, "--reuse", "abc1234", "--out", str(tmp_path / "bench")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"bench {name} keeps no results" in said and "leave --reuse out" in said
    assert not (tmp_path / "bench").exists()


def test_a_report_names_every_commit_that_measured_some_of_it(tmp_path: Path) -> None:
    report, text = BenchRequest("x", tmp_path).publish([], lambda told: told["commit"], ["abc1234"])
    assert text == report["commit"] and text.endswith(" and abc1234")
