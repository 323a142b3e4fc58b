"""`meadow bench serve-gpu`: what many adapters cost a server on a GPU, as a table.

kernels_decode_32, ...   throughput of a decoding step by 32 adapters in units of the base's,
                         as a server takes it; beside it the most that memory allows
kernels_prefill_32, ...  the same of a step of as many prompts
products_...             the same by batched products, where there are no kernels
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ..errors import ConfigError, ModelError
from .bench_request import BenchRequest, Report, Row
from .serve_gpu import CUDA, Load
from .serve_gpu import run as measure

_SHARES = ("server_share", "graph_share", "share")  # what is nearest to a server's comes first


def run(request: BenchRequest, device: str = CUDA, load: Load | None = None) -> Report:
    """The report and the page, also in its folder.

    Raises ConfigError for a model or a choice of cases and where there is no GPU for it, and
    ModelError where not all sums agree: then no figure counts.
    """
    if request.model or request.only:
        said = f"bench {request.name} has one model and all cases"
        raise ConfigError(said, "leave both options out")
    request.at_once()
    request.phase("kernels and steps")
    report = measure(device, load)
    if not report["passed"]:
        raise ModelError(
            f"sums differ: by {_widest(report)} of a layer's, {report['logits_gap']:.1e} of logits",
            f"`python -m meadow.simulation.serve_gpu {device}` has them all",
        )
    rows = list(map(_row, report["rows"]))
    return request.publish(rows, partial(_page, measured=report))


def _row(found: Row) -> Row:
    share = next(found[kind] for kind in _SHARES if kind in found)
    most = found.get("limit", 1.0)
    return {
        "case": f"{found['path']}_{found['step']}_{found['adapters']}",
        "value": share,
        "unit": "throughput of base",
        "baseline": most,
        "ratio": share / most,
        **found,
    }


def _page(report: dict[str, Any], measured: dict[str, Any]) -> str:
    """A report as a Markdown page: where its figures come from, then its table."""
    exact = max(one["from_float64"] for one in measured["gaps"])
    lines = [
        "# meadow bench serve-gpu",
        "",
        f"`meadow bench serve-gpu` on {report['hardware']}; commit {report['commit']}, "
        f"{report['date']}. Median milliseconds of a step of the base and with adapters: as it "
        "is computed, as a CUDA graph, and as a server replays it. The limit is the share of the "
        "base's throughput that the adapters' bytes allow, each read once.",
        "",
        f"`{measured['load']}`. A layer's sums are {exact:.1e} from float64's, a model's logits "
        f"{measured['logits_gap']:.1e} apart; a copy moves {measured['copy_gb_per_second']} GB/s.",
        "",
        "| case | computed | graph | server | share | limit |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        times = [_times(row, kind) for kind in ("", "graph_", "server_")]
        shares = [f"{row[key]:.3f}" if key in row else "" for key in ("value", "limit")]
        lines.append(f"| {' | '.join([row['case'], *times, *shares])} |")
    return "\n".join([*lines, ""])


def _times(row: Row, kind: str) -> str:
    if f"{kind}ms" not in row:
        return ""
    return f"{row[f'base_{kind}ms']:.2f}, {row[f'{kind}ms']:.2f}"


def _widest(report: dict[str, Any]) -> str:
    return f"{max(max(one['from_float64'], one['from_products']) for one in report['gaps']):.1e}"
