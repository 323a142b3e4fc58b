"""`meadow bench strategies`: all strategies on real text, several seeds, one table.
`meadow bench refine`: which refinement and outer optimiser deserve to be the default.

Text and model are looked for where MEADOW_DATA and MEADOW_MODELS point (default ../shared/data
and ../shared/models); they are not part of meadow.  Every arm chooses from one grid of three
learning rates on the first seed and keeps its choice for the others.  A cell is mean +- half the
range over the seeds.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ..config import Config
from ..errors import ConfigError, DataError
from . import baselines
from .engine import Lab, Result, open_lab, simulate


@dataclass(frozen=True)
class Arm:
    """One line of a table: a strategy with its options."""

    name: str
    strategy: str
    options: dict[str, Any]


ARMS = (
    Arm("fedavg_lora", "fedavg_lora", {}),
    Arm("fedavg_lora, refine product_svd", "fedavg_lora", {"refine": "product_svd"}),
    Arm("fedavg_lora, refine rotate", "fedavg_lora", {"refine": "rotate"}),
    Arm("ffa_lora", "ffa_lora", {}),
    Arm("rolora", "rolora", {}),
    Arm("flora", "flora", {}),
    Arm("fedex_lora", "fedex_lora", {}),
    Arm("fedsa_lora (personal)", "fedsa_lora", {}),
    Arm("diloco", "diloco", {}),
)

REFINEMENTS = (
    *(
        Arm(f"refine {refine}", "fedavg_lora", {"refine": refine})
        for refine in ("none", "product_svd", "rotate")
    ),
    Arm(
        "product_svd + FedAvgM",
        "fedavg_lora",
        {"refine": "product_svd", "server_optimizer": "avgm", "server_lr": 0.5},
    ),
    Arm(
        "product_svd + FedAdam",
        "fedavg_lora",
        {"refine": "product_svd", "server_optimizer": "adam"},
    ),
    Arm("diloco average", "diloco", {"outer": "average"}),
    Arm("diloco nesterov, ramp 10", "diloco", {"outer": "nesterov", "ramp": 10}),
)


def _config(
    model: str, source: Path, rounds: dict[str, Any], clients: dict[str, Any], **data: Any
) -> Config:
    if not source.exists():
        raise DataError(f"{source} does not exist", "set MEADOW_DATA to the folder that holds it")
    return Config().replace(
        model={"base": model},
        data={"source": str(source), "max_length": 96, "held_out_rows": 16, **data},
        rounds=rounds,
        clients=clients,
        simulation={"engine": "fused", "threads": 1},
    )


def tasks(model: str, data: Path) -> dict[str, Config]:
    """The two data sets of `meadow bench strategies`."""
    return {
        "dolly_small": _config(
            model,
            data / "dolly_small.jsonl.gz",
            rounds={"count": 8, "evaluate_every": 8},
            clients={"steps": 8, "batch": 4, "lr": 3e-3},
        ),
        "tinyshakespeare": _config(
            model,
            data / "tinyshakespeare_speakers.jsonl.gz",
            participants=16,
            rounds={"count": 8, "evaluate_every": 8},
            clients={"steps": 6, "batch": 4, "lr": 3e-3},
        ),
    }


def refine_task(model: str, data: Path) -> dict[str, Config]:
    """32 non-IID clients, a quarter of them in each round."""
    return {
        "32 clients, 25 % a round": _config(
            model,
            data / "dolly_small.jsonl.gz",
            participants=32,
            partition="dirichlet",
            dirichlet_alpha=0.3,
            rounds={"count": 14, "fraction": 0.25, "evaluate_every": 14},
            clients={"steps": 6, "batch": 4, "lr": 3e-3},
        ),
    }


def run(
    name: str, out: Path, model: str, seeds: int, only: str, phase: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """The report (JSON) and the table (Markdown); both also written into `out`."""
    data = Path(os.environ.get("MEADOW_DATA", "../shared/data"))
    models = Path(os.environ.get("MEADOW_MODELS", "../shared/models"))
    base = model or str((models / "stories260K").resolve())
    found = tasks(base, data) if name == "strategies" else refine_task(base, data)
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in found]
    if unknown:
        raise ConfigError(f"bench {name} has no case {unknown[0]!r}", f"known: {', '.join(found)}")
    out.mkdir(parents=True, exist_ok=True)  # a mistake in --out shows before hours of measuring
    arms = ARMS if name == "strategies" else REFINEMENTS
    rows: list[dict[str, Any]] = []
    for case, config in found.items():
        if not wanted or case in wanted:
            with tempfile.TemporaryDirectory() as runs:
                rows += _measure(case, config, arms, range(1, seeds + 1), Path(runs), phase)
    report = {"bench": name, **provenance(), "rows": rows}
    text = page(report)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    return report, text


def provenance() -> dict[str, Any]:
    """Where and when a figure was measured; a changed checkout's commit ends in -dirty."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    cores, threads = os.cpu_count(), torch.get_num_threads()
    hardware = f"{platform.machine()}, {cores} cores, torch {torch.__version__}, {threads} thread"
    return {
        "hardware": hardware,
        "commit": git.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _measure(
    case: str,
    config: Config,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    runs: Path,
    phase: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """All arms of one case over all seeds."""
    rates = baselines.grid_of(config)
    chosen: dict[str, list[float]] = {
        "centralised": list(rates),
        **{arm.name: list(rates) for arm in arms},
    }
    losses: dict[str, list[float]] = {name: [] for name in ("base", "alone", *chosen)}
    bytes_up: dict[str, int] = {}
    for seed in seeds:
        seeded = config.replace(rounds={"seed": seed})
        lab = open_lab(seeded)
        phase(f"{case}, seed {seed}: centralised")
        pooled = baselines.centralised(lab, seeded, chosen["centralised"])
        chosen["centralised"], ceiling = [pooled.lr], pooled.loss
        losses["centralised"].append(ceiling)
        phase(f"{case}, seed {seed}: alone")
        losses["alone"].append(
            baselines.local_only(lab, seeded.replace(clients={"lr": pooled.lr})).loss
        )
        for arm in arms:
            phase(f"{case}, seed {seed}: {arm.name}")
            lr, result = _best(
                lab,
                seeded,
                arm,
                chosen[arm.name],
                runs / f"{case}-{arm.name}-{seed}".replace(" ", "-"),
            )
            chosen[arm.name] = [lr]
            losses[arm.name].append(result.loss)
            bytes_up[arm.name] = result.total("bytes_up")
        losses["base"].append(result.base_loss)
    yield from _rows(case, losses, chosen, bytes_up)


def _best(
    lab: Lab, config: Config, arm: Arm, rates: Sequence[float], folder: Path
) -> tuple[float, Result]:
    """The best of some learning rates, by the final held-out loss."""
    tried = []
    for lr in rates:
        own = config.replace(
            clients={"lr": lr}, strategy={"name": arm.strategy, "options": arm.options}
        )
        target = folder / f"lr-{lr:g}"
        tried.append((lr, simulate(own, target, lab)))
        shutil.rmtree(target)
    return min(tried, key=lambda pair: pair[1].loss)


def _rows(
    case: str,
    losses: dict[str, list[float]],
    chosen: dict[str, list[float]],
    bytes_up: dict[str, int],
) -> Iterator[dict[str, Any]]:
    for name, values in losses.items():
        shares = [
            baselines.share(base, value, best)
            for base, value, best in zip(losses["base"], values, losses["centralised"], strict=True)
        ]
        yield {
            "case": f"{case}/{name}",
            "value": mean(shares),
            "unit": "share",
            "baseline": 1.0,
            "ratio": mean(shares),
            "spread": (max(shares) - min(shares)) / 2,
            "loss": mean(values),
            "loss_spread": (max(values) - min(values)) / 2,
            "seeds": len(values),
            "lr": chosen.get(name, [None])[0],
            "bytes_up": bytes_up.get(name),
        }


def page(report: dict[str, Any]) -> str:
    """A report as a Markdown page: where its figures come from, then its tables."""
    seeds = max(row["seeds"] for row in report["rows"])
    head = (
        f"# meadow bench {report['bench']}\n\n"
        f"`meadow bench {report['bench']} --seeds {seeds}` on {report['hardware']}; "
        f"commit {report['commit']}, {report['date']}. A cell is the mean over {seeds} seeds "
        "± half their range; share = (base − arm) / (base − centralised).\n\n"
    )
    return head + markdown(report["rows"])


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table a case."""
    lines: list[str] = []
    for case in dict.fromkeys(row["case"].partition("/")[0] for row in rows):
        lines += [
            f"### {case}",
            "",
            "| arm | held-out loss | share | lr | sent up |",
            "|---|--:|--:|--:|--:|",
        ]
        for row in rows:
            if row["case"].partition("/")[0] == case:
                size = "" if row["bytes_up"] is None else f"{row['bytes_up'] / 1e6:.1f} MB"
                lr = "" if row["lr"] is None else f"{row['lr']:g}"
                lines.append(
                    f"| {row['case'].partition('/')[2]} "
                    f"| {row['loss']:.4f} ± {row['loss_spread']:.4f} "
                    f"| {row['value']:.3f} ± {row['spread']:.3f} | {lr} | {size} |"
                )
        lines.append("")
    return "\n".join(lines)
