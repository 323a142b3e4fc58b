"""`meadow bench serve`: what many adapters cost a server, and whether any request suffers.

    base_share_27m, _105m      throughput of 16 rows over 16 adapters in units of the base's
    base_share_27m_rank64_mix  the same with half the adapters of rank 64, half of 8
    churn_share_27m            the same with requests that join and leave all the time
    over_peft_27m              throughput in units of PEFT's mixed batch; tokens are compared
    failed_during_swaps        requests that fail while an alias moves 200 times
    mixed_versions             answers then that are not their version's, token by token
    adapters_2000_failed       requests that fail with 2,000 adapters drawn by a power law

Models are random llamas.  Throughput is judged in CPU time of one process that runs both sides in
turns on one thread, prompts included.  The last three run the whole engine over a real registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .bench_request import BenchRequest, Phase, Report, Row
from .one_thread import one_thread
from .random_llama import M27, M105
from .random_llama import Size as Shape
from .serve_batches import Load, Shares, over_peft, share_of_base
from .serve_swaps import Many, Swaps, measure_many, measure_swaps

SHARE_27, SHARE_105, MIX = "base_share_27m", "base_share_105m", "base_share_27m_rank64_mix"
CHURN, PEFT = "churn_share_27m", "over_peft_27m"
FAILED, MIXED, MANY = "failed_during_swaps", "mixed_versions", "adapters_2000_failed"
CASES = (SHARE_27, SHARE_105, MIX, CHURN, PEFT, FAILED, MIXED, MANY)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    small: Shape = M27
    large: Shape = M105
    repeats: int = 7
    swaps: int = 200
    adapters: int = 2000
    requests: int = 3000


def run(request: BenchRequest, size: Size | None = None) -> Report:
    """Measure the cases asked for; the report and the page, also in its folder.

    Raises ConfigError for an unknown case, for a model (the cases name their own) and for results
    to be reused.
    """
    size, wanted = size or Size(), request.wanted(CASES)
    request.refuse_model()
    request.at_once()
    with one_thread():
        rows = [*_throughput(size, wanted, request.phase)]
        rows += _under_load(size, wanted, request.phase)
        return request.publish(rows, page)


def _throughput(size: Size, wanted: Sequence[str], phase: Phase) -> Iterator[Row]:
    plain = Load(size.small, (8,) * 16, repeats=size.repeats)
    leaving = tuple(8 + 7 * at % 17 for at in range(64))  # answers of 8 to 24 tokens
    loads = {
        SHARE_27: plain,
        SHARE_105: replace(plain, size=size.large, answers=(12,) * 16),
        MIX: replace(plain, ranks=(8, 64) * 8),
        CHURN: replace(plain, answers=leaving),
    }
    for case, load in loads.items():
        if case in wanted:
            phase(case)
            yield _share_row(case, share_of_base(load), "of base")
    if PEFT in wanted:
        phase(PEFT)
        shares, different = over_peft(plain)
        yield {**_share_row(PEFT, shares, "of PEFT"), "different_answers": different}


def _share_row(case: str, shares: Shares, unit: str) -> Row:
    return {
        "case": case,
        "value": shares.ratio,
        "unit": f"throughput {unit}",
        "baseline": shares.tokens / shares.baseline,
        "ratio": shares.ratio,
        "tokens_per_cpu_second": shares.tokens / shares.adapters,
    }


def _under_load(size: Size, wanted: Sequence[str], phase: Phase) -> Iterator[Row]:
    if FAILED in wanted or MIXED in wanted:
        phase(f"{size.swaps} swaps under load")
        swaps = measure_swaps(size.swaps)
        if FAILED in wanted:
            yield _count_row(FAILED, swaps.failed, swaps)
        if MIXED in wanted:
            yield _count_row(MIXED, swaps.mixed, swaps)
    if MANY in wanted:
        phase(f"{size.adapters} adapters")
        many = measure_many(size.adapters, size.requests)
        yield _count_row(MANY, many.failed, many)


def _count_row(case: str, value: int, found: Swaps | Many) -> Row:
    """A count that should be 0, out of all answers."""
    row = {
        "case": case,
        "value": value,
        "unit": "answers",
        "baseline": found.answers,
        "ratio": value / found.answers,
    }
    return row | (_many_facts(found) if isinstance(found, Many) else asdict(found))


def _many_facts(many: Many) -> Row:
    stats = many.stats
    return {
        "adapters": many.adapters,
        "slot_hit_rate": many.hit_rate,
        "slots": stats.slots,
        "slot_evictions": stats.slot_evictions,
        "cache_mb": stats.cache_bytes / 1e6,
        "cache_limit_mb": stats.cache_limit / 1e6,
        "cache_evictions": stats.cache_evictions,
        "latency_p50": many.seconds[0],
        "latency_p99": many.seconds[1],
        "first_error": many.first_error,
    }


def page(report: dict[str, Any]) -> str:
    """A report as a Markdown page: where its figures come from, then its table."""
    lines = [
        "# meadow bench serve",
        "",
        f"`meadow bench serve` on {report['hardware']}; commit {report['commit']}, "
        f"{report['date']}. Throughput is of CPU time, medians, both sides in one process.",
        "",
        "| case | value | | beside it |",
        "|---|--:|---|---|",
    ]
    for row in report["rows"]:
        value = row["value"] if isinstance(row["value"], int) else f"{row['value']:.3f}"
        lines.append(f"| {row['case']} | {value} | {row['unit']} | {_beside(row)} |")
    return "\n".join([*lines, ""])


def _beside(row: Row) -> str:
    if "tokens_per_cpu_second" in row:
        found = f"{row['tokens_per_cpu_second']:.0f} against {row['baseline']:.0f} tokens/s"
        different = row.get("different_answers")
        return found if different is None else f"{found}; {different} answers differ"
    if "swaps" in row:
        return f"of {row['answers']} during {row['swaps']} swaps of {row['versions']} versions"
    return (
        f"of {row['baseline']}; slot hits {row['slot_hit_rate']:.2f}, "
        f"{row['cache_mb']:.1f} of {row['cache_limit_mb']:.1f} MB cached, "
        f"{row['latency_p50']:.2f} s in the middle, {row['latency_p99']:.2f} s for the slowest 1 %"
    )
