"""`meadow bench zo` and `meadow bench zo-learning`: reports and pages of zeroth-order figures."""

from __future__ import annotations

from typing import Any

from . import zo_learning, zo_speed
from .bench_request import BenchRequest, Report

NAMES = ("zo", "zo-learning")


def run(request: BenchRequest) -> Report:
    """Measure the cases asked for; the report and the page, also in its folder.

    Raises ConfigError for an unknown case, and for a model: the cases name their own.
    """
    request.refuse_model()
    if request.name == "zo":
        wanted = request.wanted(zo_speed.CASES)
        request.at_once()
        return request.publish(zo_speed.run(request.phase, wanted), speed_page)
    wanted = request.wanted(list(zo_learning.CASES))
    kept = request.kept()
    rows = zo_learning.run(request.phase, kept, wanted, request.seeds)
    return request.publish(rows, learning_page, kept.others)


def speed_page(report: dict[str, Any]) -> str:
    """One table: value, bar and baseline of every case."""
    shape = next((row["shape"] for row in report["rows"] if "shape" in row), "")
    lines = [
        *_head(report, "CPU time of one thread, medians."),
        f"Model: {shape}." if shape else "",
        "",
        "| case | value | in units of | bar | baseline | ratio to it |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for row in report["rows"]:
        bar = "" if row.get("bar") is None else f"≤ {row['bar']:,g}"
        baseline, ratio = (_number(row[key]) for key in ("baseline", "ratio"))
        lines.append(
            f"| {row['case']} | {_number(row['value'])} | {row['unit']} | {bar} | {baseline} |"
            f" {ratio} |"
        )
    return "\n".join(lines) + "\n"


def learning_page(report: dict[str, Any]) -> str:
    about = "A cell is the mean over the seeds ± half their range; differences are paired by seed."
    return "\n".join(_head(report, about)) + "\n" + zo_learning.markdown(report["rows"])


def _head(report: dict[str, Any], about: str) -> list[str]:
    return [
        f"# meadow bench {report['bench']}",
        "",
        f"`meadow bench {report['bench']}` on {report['hardware']}; commit {report['commit']},"
        f" {report['date']}. {about}",
        "",
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
