"""Rows and page of `meadow bench deploy`; and, in the long tier, all of it at a tiny size.
Figures themselves are measured, not asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deployed_traces import PERIOD, SPANS, traces

from meadow.cli import main
from meadow.errors import ConfigError, DeploymentError
from meadow.server.coordinator_home import CoordinatorHome
from meadow.simulation import deploy_bench, deploy_memory, deploy_overhead, plain_flower
from meadow.simulation.bench_request import BenchRequest
from meadow.simulation.deploy_bench import Size, page
from meadow.simulation.deploy_memory import ENGINE, OWN, Load, Peaks
from meadow.simulation.plain_flower import PlainRound

PAGES = Path(__file__).parents[2] / "docs" / "benchmarks"
SIZE = Size(rounds=4, contributions=(2, 4), megabytes=2.0)
PLAIN = [PlainRound(12.0, 1.0, 3.0), PlainRound(14.0, 1.0, 4.0)]
MB = {"supervisor": 100, "gateway": 50, "server_app": 350, "superlink": 700, "superexec": 80}


def peaks(load: Load, phase: Any = None) -> Peaks:
    """The server app's grows by a MB a contribution."""
    found = {name: size * 10**6 for name, size in MB.items()}
    found["server_app"] += load.contributions * 10**6
    return Peaks(1_900_000, load.contributions, found)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is started; what would be is listed."""
    started: list[str] = []

    def deploy(strategy: str, rounds: int, phase: Any) -> Any:
        started.append(f"{strategy} {rounds}")
        return traces(rounds)

    def measure(rounds: int, phase: Any) -> list[PlainRound]:
        started.append(f"plain {rounds}")
        return PLAIN

    monkeypatch.setattr(deploy_overhead, "deploy", deploy)
    monkeypatch.setattr(plain_flower, "measure", measure)
    monkeypatch.setattr(deploy_memory, "measure", peaks)
    return started


def measured(out: Path, only: str = "", size: Size = SIZE) -> dict[str, dict[str, Any]]:
    report, text = deploy_bench.run(BenchRequest("deploy", out, only=only), size)
    assert report == json.loads((out / "deploy.json").read_text())
    assert text == (out / "deploy.md").read_text()
    return {row["case"]: row for row in report["rows"]}


def test_every_case_has_a_row(stubbed: list[str], tmp_path: Path) -> None:
    rows = measured(tmp_path)
    assert list(rows) == SIZE.cases and stubbed == ["plain 3", "fedavg_lora 4", "fedkseed 4"]
    for row in rows.values():
        assert {"case", "value", "unit", "baseline", "ratio", "bar"} <= set(row)
        if row["baseline"] is not None:
            assert row["ratio"] == pytest.approx(row["value"] / row["baseline"])


def test_the_full_size_is_what_the_issue_asks_for() -> None:
    assert Size().cases[:5] == [
        *("round_overhead_seconds", "flower_round_overhead_seconds"),
        *("peak_mb_4", "peak_mb_16", "peak_mb_64"),
    ]
    assert len(traces(Size().rounds).rounds()) >= 5 and "wire_bytes" in Size().cases
    config = deploy_overhead.config("fedavg_lora", 8)
    assert config.clients.steps == 1 and config.rounds.evaluate_every > 8
    assert config.data.train_rows == config.clients.batch, "both sides' batch is all rows"


def test_the_overhead_is_the_round_without_the_work(stubbed: list[str], tmp_path: Path) -> None:
    row = measured(tmp_path)["round_overhead_seconds"]
    assert row["value"] == pytest.approx(PERIOD - SPANS["work"])
    assert row["work_seconds"] == pytest.approx(SPANS["work"]) and row["rounds"] == 2
    assert sum(row["causes"].values()) == pytest.approx(row["value"]) and row["spread"] < 1e-9
    assert row["baseline"] == 12.0, "plain Flower's: loading is overhead, the step is not"
    assert row["journal_seconds"] > 0


def test_plain_flowers_overhead_is_loading_and_the_rest(stubbed: list[str], tmp_path: Path) -> None:
    row = measured(tmp_path, "flower_round_overhead_seconds")["flower_round_overhead_seconds"]
    assert (row["value"], row["spread"], row["work_seconds"]) == (12.0, 1.0, 1.0)
    assert list(row["causes"].values()) == [3.5, 8.5]


def test_memory_is_that_of_meadows_processes(stubbed: list[str], tmp_path: Path) -> None:
    rows = measured(tmp_path, "peak_mb_2,peak_mb_4")
    assert stubbed == [] and list(rows) == ["peak_mb_2", "peak_mb_4"]
    assert [row["value"] for row in rows.values()] == [502.0, 504.0]
    assert rows["peak_mb_4"]["baseline"] == 502.0
    assert rows["peak_mb_4"]["bar"] == pytest.approx(1.1 * 502.0)
    assert rows["peak_mb_4"]["flower_mb"] == 780.0
    assert set(rows["peak_mb_4"]["processes_mb"]) == set(OWN)


def test_memory_without_the_fewest_has_no_baseline(stubbed: list[str], tmp_path: Path) -> None:
    row = measured(tmp_path, "peak_mb_4")["peak_mb_4"]
    assert (row["baseline"], row["ratio"], row["bar"]) == (None, None, None)


def test_wire_bytes_stand_beside_what_they_carry(stubbed: list[str], tmp_path: Path) -> None:
    row = measured(tmp_path, "wire_bytes")["wire_bytes"]
    assert stubbed == ["fedavg_lora 4"]
    assert (row["up"], row["down"], row["contribution"], row["message"]) == (820, 980, 700, 900)
    assert row["value"] == 1800 and row["baseline"] == 1600


def test_the_page_tells_every_row(stubbed: list[str], tmp_path: Path) -> None:
    rows = measured(tmp_path)
    text = (tmp_path / "deploy.md").read_text()
    assert all(f"| {case} |" in text for case in rows)
    assert "| peak_mb_4 | 504 | MB | ≤ 552 | 502 | 1 |" in text
    assert "| 4 × 1.9 MB | 4 | 100 | 50 | 354 | 700 | 80 |" in text
    assert "| fedavg_lora | 820 | 700 | 980 | 900 |" in text
    assert (
        "| 2.000 | client_process: Flower starts" in text and "| 3.500 | loading tokenizer" in text
    )
    report = {"bench": "deploy", "hardware": "h", "commit": "c", "date": "d", "rows": []}
    assert "###" not in page(report), "nothing is told of what was not measured"


@pytest.mark.parametrize(
    ("model", "only", "said"),
    [("nano", "", "names its own models"), ("", "peak_mb_5", "no case 'peak_mb_5'")],
)
def test_a_mistake_shows_before_anything_starts(
    stubbed: list[str], tmp_path: Path, model: str, only: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        deploy_bench.run(BenchRequest("deploy", tmp_path, model=model, only=only), SIZE)
    assert stubbed == []


def test_the_command_line_knows_it(
    stubbed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "report.json"
    command = ["bench", "deploy", "--only", "wire_bytes", "--out", str(out), "--json", str(file)]
    assert main(command) == 0 and stubbed == ["fedavg_lora 8"]
    assert json.loads(file.read_text()) == json.loads((out / "deploy.json").read_text())
    assert capsys.readouterr().out.split() == (out / "deploy.md").read_text().split()
    assert main(["bench", "deploy", "--only", "wires", "--out", str(out)]) == 2


def test_the_page_in_the_docs_is_what_its_report_says_and_memory_is_flat() -> None:
    report = json.loads((PAGES / "deploy.json").read_text())
    assert (PAGES / "deploy.md").read_text() == page(report)
    rows = {row["case"]: row for row in report["rows"]}
    assert list(rows) == Size().cases
    for case in ("peak_mb_16", "peak_mb_64"):
        assert rows[case]["value"] <= rows[case]["bar"] == 1.1 * rows["peak_mb_4"]["value"]
    own, plain = rows["round_overhead_seconds"], rows["flower_round_overhead_seconds"]
    assert own["loading_seconds"] == 0.0 and own["value"] < plain["value"]


def test_a_run_that_left_nothing_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="nothing was measured of server_app"):
        found = dict.fromkeys((*OWN, *ENGINE), 1) | {"server_app": 0}
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "events.jsonl").write_text(
            '{"kind": "contribution", "round": 1, "bytes": 5}\n'
        )
        deploy_memory.found(CoordinatorHome(tmp_path), found)


@pytest.mark.long(minutes=4)
def test_a_tiny_one_of_real_processes(tmp_path: Path) -> None:
    """All but the deployment that sends single bytes, whose rounds are the same."""
    size = Size(rounds=3, contributions=(3,), megabytes=2.0)
    rows = measured(tmp_path, ",".join(case for case in size.cases if "fedkseed" not in case), size)
    overhead, plain = rows["round_overhead_seconds"], rows["flower_round_overhead_seconds"]
    assert overhead["rounds"] == plain["rounds"] == 1
    assert overhead["loading_seconds"] == 0.0, "the base is warm"
    assert min(overhead["causes"].values()) > -0.01, "in the order in which they are listed"
    assert sum(overhead["causes"].values()) == pytest.approx(overhead["value"])
    assert rows["peak_mb_3"]["update_mb"] == pytest.approx(2.0, rel=0.1)
    assert rows["peak_mb_3"]["at_once"] == 3
    assert all(size > 10 for size in rows["peak_mb_3"]["processes_mb"].values())
    wire = rows["wire_bytes"]
    assert wire["contribution"] < wire["up"] < 1.1 * wire["contribution"] + 20_000
    assert wire["message"] < wire["down"] < 1.1 * wire["message"] + 20_000
