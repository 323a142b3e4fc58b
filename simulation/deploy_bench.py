"""`meadow bench deploy`: what a real deployment on loopback costs beyond the work itself.

    round_overhead_seconds         a round's wall time less the trainer's own, split by cause
    flower_round_overhead_seconds  the same of plain Flower with a client that reloads its model
    peak_mb_4, _16, _64            peak memory of meadow's coordinator processes, 50 MB each
    wire_bytes, _fedkseed          what a round and participant exchanges with the gateway

Rounds are of one optimiser step over nano, one participant; the model and its rows are the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from . import deploy_memory, deploy_overhead, plain_flower
from .bench_request import BenchRequest, Phase, Report, Row
from .deploy_memory import AT_ONCE, ENGINE, OWN, Load, Peaks
from .deploy_timeline import CAUSES, WORK, Traces, mean_seconds
from .plain_flower import PlainRound

OVERHEAD, FLOWER = "round_overhead_seconds", "flower_round_overhead_seconds"
WIRE = {"wire_bytes": "fedavg_lora", "wire_bytes_fedkseed": "fedkseed"}
FLAT = 1.10
"""The most that 16 or 64 contributions may need, in units of what 4 do."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int = 8
    """The first and the last are not counted."""
    contributions: tuple[int, ...] = (4, 16, 64)
    megabytes: float = 50.0
    """Of a contribution."""

    @property
    def cases(self) -> list[str]:
        return [OVERHEAD, FLOWER, *map(peak_case, self.contributions), *WIRE]


def run(request: BenchRequest, size: Size | None = None) -> Report:
    """Measure the cases asked for; the report and the page, also in its folder.

    Raises ConfigError for an unknown case, for a model (the cases name their own) and for results
    to be reused.
    """
    size = size or Size()
    wanted = request.wanted(size.cases)
    request.refuse_model()
    request.at_once()
    rows = [*_rounds(size, wanted, request.phase), *_peaks(size, wanted, request.phase)]
    rows.sort(key=lambda row: size.cases.index(row["case"]))
    return request.publish(rows, page)


def peak_case(contributions: int) -> str:
    return f"peak_mb_{contributions}"


def _rounds(size: Size, wanted: Sequence[str], phase: Phase) -> list[Row]:
    """Overhead and bytes: of one deployment where both are wanted."""
    rows: list[Row] = []
    plain: list[PlainRound] = []
    if FLOWER in wanted:
        plain = plain_flower.measure(size.rounds - 1, phase)
        rows.append(flower_row(plain))
    for case, strategy in WIRE.items():
        both = strategy == WIRE["wire_bytes"] and OVERHEAD in wanted
        if case in wanted or both:
            traces = deploy_overhead.deploy(strategy, size.rounds, phase)
            rows += [wire_row(case, traces)] if case in wanted else []
            rows += [overhead_row(traces, plain)] if both else []
    return rows


def overhead_row(traces: Traces, plain: Sequence[PlainRound]) -> Row:
    """Mean seconds a round beyond the trainer's own, and how much each cause has of them."""
    rounds = [traces.moments(number).seconds for number in traces.rounds()]
    causes = mean_seconds(rounds)
    totals = [sum(found.values()) - found[WORK] for found in rounds]
    baseline = mean(one.total - one.work for one in plain) if plain else None
    requests = [
        r for r in traces.requests if r["verb"] == "train" and r["round"] in traces.rounds()
    ]
    return {
        **_row(OVERHEAD, mean(totals), "s", baseline),
        "rounds": len(rounds),
        "spread": (max(totals) - min(totals)) / 2,
        "work_seconds": causes.pop(WORK),
        "loading_seconds": mean(float(request["loading_seconds"]) for request in requests),
        "journal_seconds": deploy_overhead.journal_seconds(traces.sizes(traces.rounds()[0])[0]),
        "causes": causes,
    }


def flower_row(plain: Sequence[PlainRound]) -> Row:
    totals = [one.total - one.work for one in plain]
    return {
        **_row(FLOWER, mean(totals), "s", None),
        "rounds": len(plain),
        "spread": (max(totals) - min(totals)) / 2,
        "work_seconds": mean(one.work for one in plain),
        "causes": {
            "loading tokenizer, model and rows": mean(one.loading for one in plain),
            "polls, processes and their imports, transfer": mean(one.rest for one in plain),
        },
    }


def wire_row(case: str, traces: Traces) -> Row:
    """Bytes a round, both directions, beside what message and contribution have themselves."""
    found = [(*traces.bytes(n), *traces.sizes(n)) for n in traces.rounds()]
    up, down, contribution, message = (mean(column) for column in zip(*found, strict=True))
    return {
        **_row(case, up + down, "bytes", contribution + message),
        "rounds": len(found),
        "strategy": WIRE[case],
        "up": up,
        "down": down,
        "contribution": contribution,
        "message": message,
    }


def _peaks(size: Size, wanted: Sequence[str], phase: Phase) -> list[Row]:
    found = [
        deploy_memory.measure(Load(count, size.megabytes), phase)
        for count in size.contributions
        if peak_case(count) in wanted
    ]
    least = [peaks for peaks in found if peaks.contributions == size.contributions[0]]
    return [peak_row(peaks, least[0].own if least else None) for peaks in found]


def peak_row(peaks: Peaks, least: int | None) -> Row:
    """`least` is the sum of meadow's processes, in bytes, with the fewest contributions."""
    baseline = None if least is None else least / 1e6
    return {
        **_row(peak_case(peaks.contributions), peaks.own / 1e6, "MB", baseline),
        "bar": None if baseline is None else FLAT * baseline,
        "update_mb": peaks.update / 1e6,
        "at_once": min(AT_ONCE, peaks.contributions),
        "processes_mb": {name: peaks.by_process[name] / 1e6 for name in OWN},
        "flower_mb": peaks.engine / 1e6,
        "flower_processes_mb": {name: peaks.by_process[name] / 1e6 for name in ENGINE},
    }


def _row(case: str, value: float, unit: str, baseline: float | None) -> Row:
    return {
        "case": case,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": value / baseline if baseline else None,
        "bar": None,
    }


def page(report: Mapping[str, Any]) -> str:
    """The report as a Markdown page: one table of all cases, then what each is made of."""
    rows = report["rows"]
    head = (
        f"# meadow bench {report['bench']}\n\n`meadow bench {report['bench']}` on"
        f" {report['hardware']}; commit {report['commit']}, {report['date']}. Coordinator and"
        " participant on one machine, TLS between all processes. Baselines: of the overhead, plain"
        " Flower with a client that loads its model for every message (same model, rows and step);"
        " of memory, the fewest contributions; of bytes, message and contribution themselves.\n"
    )
    parts = [head, _cases(rows), _causes(rows), _memory(rows), _wire(rows)]
    return "\n".join(part for part in parts if part)


def _cases(rows: Sequence[Row]) -> str:
    lines = ["| case | value | unit | bar | baseline | ratio |", "|---|--:|---|--:|--:|--:|"]
    for row in rows:
        bar = "" if row["bar"] is None else f"≤ {_number(row['bar'])}"
        cells = (bar, _number(row["baseline"]), _number(row["ratio"]))
        lines.append(
            f"| {row['case']} | {_number(row['value'])} | {row['unit']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def _causes(rows: Sequence[Row]) -> str:
    lines: list[str] = []
    for row in rows:
        if "causes" in row:
            lines += [
                f"### {row['case']}",
                "",
                f"Mean of {row['rounds']} rounds, ± {_number(row['spread'])} s (half their range);"
                f" the work itself took {_number(row['work_seconds'])} s.",
                "",
                "| seconds | cause |",
                "|--:|---|",
                *(f"| {s:.3f} | {_said(cause)} |" for cause, s in row["causes"].items()),
                "",
            ]
        if "journal_seconds" in row:
            lines += [
                f"Loading base and text: {row['loading_seconds']:.3f} s. The journal alone,"
                f" measured apart: {row['journal_seconds']:.3f} s a round.",
                "",
            ]
    return "\n".join(lines)


def _said(cause: str) -> str:
    return f"{cause}: {CAUSES[cause]}" if cause in CAUSES else cause


def _memory(rows: Sequence[Row]) -> str:
    found = [row for row in rows if "flower_mb" in row]
    if not found:
        return ""
    names = [*OWN, *ENGINE]
    lines = [
        "### peak memory, MB",
        "",
        f"The sum of each process's own peak; {ENGINE[0]} and {ENGINE[1]} are Flower's and not"
        " part of the case's value.",
        "",
        f"| contributions of | at once | {' | '.join(names)} |",
        "|--:|--:|" + "--:|" * len(names),
    ]
    for row in found:
        peaks = {**row["processes_mb"], **row["flower_processes_mb"]}
        cells = " | ".join(f"{peaks[name]:,.0f}" for name in names)
        count = row["case"].rpartition("_")[2]
        lines.append(f"| {count} × {row['update_mb']:.1f} MB | {row['at_once']} | {cells} |")
    return "\n".join(lines) + "\n"


def _wire(rows: Sequence[Row]) -> str:
    found = [row for row in rows if "contribution" in row]
    if not found:
        return ""
    lines = [
        "### bytes a round and participant",
        "",
        "Bodies of all exchanges with the gateway, heartbeats and idle questions among them;"
        " HTTP's headers (about 1 kB an exchange) and TLS are not counted.",
        "",
        "| strategy | up | of it the contribution | down | of it the message |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in found:
        cells = (_number(row[key]) for key in ("up", "contribution", "down", "message"))
        lines.append(f"| {row['strategy']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
