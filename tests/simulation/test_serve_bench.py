"""The benchmark's cases on tiny models: that they measure what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meadow.errors import ConfigError
from meadow.simulation import serve_bench
from meadow.simulation.bench_request import BenchRequest
from meadow.simulation.random_llama import Size as Shape
from meadow.simulation.serve_bench import CASES, Size, run
from meadow.simulation.serve_swaps import measure_swaps

SHAPE = Shape(32, 48, 1, 2, vocabulary=128, length=128)
SMALL = Size(SHAPE, SHAPE, repeats=1, swaps=6, adapters=12, requests=30)


@pytest.mark.long
def test_every_case_is_measured_and_nothing_fails(tmp_path: Path) -> None:
    phases: list[str] = []
    report, page = run(BenchRequest("serve", tmp_path, phases.append), SMALL)
    rows = {row["case"]: row for row in report["rows"]}
    assert tuple(rows) == CASES and phases
    assert all(name in page for name in CASES)
    assert rows["over_peft_27m"]["different_answers"] == 0
    for case in ("failed_during_swaps", "mixed_versions", "adapters_2000_failed"):
        assert rows[case]["value"] == 0 and rows[case]["baseline"] > 0, rows[case]
    assert all(row["ratio"] > 0 for case, row in rows.items() if "share" in case)
    assert json.loads((tmp_path / "serve.json").read_text()) == report


def test_one_case_alone_and_mistakes(tmp_path: Path) -> None:
    report, _ = run(BenchRequest("serve", tmp_path, only="mixed_versions"), SMALL)
    assert [row["case"] for row in report["rows"]] == ["mixed_versions"]
    for only, model in (("nothing", ""), ("", "nano")):
        with pytest.raises(ConfigError):
            run(BenchRequest("serve", tmp_path, model=model, only=only), SMALL)


def test_every_move_is_seen_and_versions_can_be_told_apart() -> None:
    """Else the count of mixed answers could not be but 0."""
    found = measure_swaps(8, versions=4)
    assert found.distinct == found.versions == 4
    assert found.answers > 8 and found.failed == found.mixed == 0, found.first_error


@pytest.mark.long
def test_no_version_is_mixed_with_another_during_200_swaps() -> None:
    found = measure_swaps(200)
    assert found.failed == found.mixed == 0, found.first_error
    assert found.distinct == found.versions == 6


@pytest.mark.long
def test_a_thousand_flips_under_load_fail_nobody() -> None:
    """As fast as the registry takes them; how many answers fit in between is the machine's."""
    found = measure_swaps(1000, awaited=False)
    assert found.failed == found.mixed == 0, found.first_error
    assert found.versions > 3


def test_the_cases_that_others_name_are_there() -> None:
    assert serve_bench.CASES == (
        "base_share_27m", "base_share_105m", "base_share_27m_rank64_mix", "churn_share_27m",
        "over_peft_27m", "failed_during_swaps", "mixed_versions", "adapters_2000_failed",
    )  # fmt: skip


def test_the_page_in_the_docs_is_what_its_report_says_and_keeps_the_bars() -> None:
    pages = Path(__file__).parents[2] / "docs" / "benchmarks"
    report = json.loads((pages / "serve.json").read_text())
    assert (pages / "serve.md").read_text() == serve_bench.page(report)
    found = {row["case"]: row["value"] for row in report["rows"]}
    least = {"base_share_27m": 0.85, "base_share_105m": 0.9, "churn_share_27m": 0.8}
    assert all(found[case] >= bar for case, bar in (least | {"over_peft_27m": 1.7}).items())
    for case in ("failed_during_swaps", "mixed_versions", "adapters_2000_failed"):
        assert found[case] == 0
