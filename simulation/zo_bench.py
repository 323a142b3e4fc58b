"""`meadow bench zo` and `meadow bench zo-learning`: reports and pages of zeroth-order figures."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import zo_learning, zo_speed
from .bench import kept_in, publish, wanted_of

NAMES = ("zo", "zo-learning")


def run(
    name: str,
    out: Path,
    model: str,
    seeds: int,
    only: str,
    phase: Callable[[str], None],
    reuse: Collection[str] = (),
) -> tuple[dict[str, Any], str]:
    """Measure the cases that `only` names (empty: all); the report and the page, also in `out`.

    Raises ConfigError for an unknown case, and for a model: the cases name their own.
    """
    if model:
        raise ConfigError(f"bench {name} names its own models", "leave --model out")
    out.mkdir(parents=True, exist_ok=True)  # a mistake in --out shows before hours of measuring
    if name == "zo":
        wanted = wanted_of(name, only, zo_speed.CASES)
        return publish(name, out, zo_speed.run(phase, wanted), speed_page)
    wanted = wanted_of(name, only, list(zo_learning.CASES))
    kept = kept_in(out, reuse)
    rows = zo_learning.run(phase, kept, wanted, seeds)
    return publish(name, out, rows, learning_page, kept.others)


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
