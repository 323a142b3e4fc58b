"""`meadow bench strategies`: all strategies on real text, several seeds, one table.
`meadow bench refine`: which refinement and outer optimiser deserve to be the default.

Text and model are looked for where MEADOW_DATA and MEADOW_MODELS point (default ../shared/data
and ../shared/models); they are not part of meadow.  Every arm chooses from one grid of five
learning rates on the first seed and keeps its choice for the others.  A cell is mean +- half the
range over the seeds.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from ..config import Config
from ..errors import DataError, QuorumError, UpdateError
from . import baselines
from .bench_request import BenchRequest, Report, Row
from .engine import Lab, open_lab, simulate
from .kept_results import KeptResults

SEEDS = 3
GRID = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
"""Factors of the case's learning rate that every arm chooses from."""


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


def run(request: BenchRequest) -> Report:
    """The report and the table of "strategies" or "refine"; both also written into its folder."""
    data = Path(os.environ.get("MEADOW_DATA", "../shared/data"))
    models = Path(os.environ.get("MEADOW_MODELS", "../shared/models"))
    base = request.model or str((models / "stories260K").resolve())
    every_strategy = request.name == "strategies"
    found = tasks(base, data) if every_strategy else refine_task(base, data)
    wanted, kept = request.wanted(list(found)), request.kept()
    rows: list[Row] = []
    for case in wanted:
        with tempfile.TemporaryDirectory() as runs:
            measured = _Case(case, found[case], Path(runs), request.phase, kept)
            for seed in range(1, 1 + (request.seeds or SEEDS)):
                measured.measure(seed, ARMS if every_strategy else REFINEMENTS)
            rows += measured.rows()
    return request.publish(rows, page, kept.others)


@dataclass(frozen=True)
class Trained:
    """Held-out losses after training and before it, and the bytes sent; None: not measured."""

    loss: float
    base: float | None = None
    bytes_up: int | None = None


class _Case:
    """The arms of one case, over all seeds: their losses, and the rates that they chose."""

    def __init__(
        self,
        case: str,
        config: Config,
        runs: Path,
        phase: Callable[[str], None],
        kept: KeptResults,
    ) -> None:
        self.case, self.config, self.runs, self.phase = case, config, runs, phase
        self.kept = kept
        self.losses: dict[str, list[float]] = {}
        self.chosen: dict[str, float] = {}
        self.bytes_up: dict[str, int] = {}

    def measure(self, seed: int, arms: Sequence[Arm]) -> None:
        config = self.config.replace(rounds={"seed": seed})
        lab = open_lab(config)
        self._arm(
            seed,
            "centralised",
            lambda lr: Trained(baselines.centralised(lab, config, [lr]).loss),
        )
        self._arm(
            seed,
            "alone",
            lambda lr: Trained(baselines.local_only(lab, config.replace(clients={"lr": lr})).loss),
        )
        for arm in arms:
            self._arm(seed, arm.name, partial(self._federated, lab, config, arm))

    def _arm(self, seed: int, name: str, train: Callable[[float], Trained]) -> None:
        """The arm's loss at its rate: the grid's best, chosen on the first seed."""
        self.phase(f"{self.case}, seed {seed}: {name}")
        rates = [self.chosen[name]] if name in self.chosen else rates_of(self.config)
        found = {lr: self._trained(seed, name, train, lr) for lr in rates}
        finite = {lr: trained for lr, trained in found.items() if trained is not None}
        if not finite:
            raise UpdateError(f"{self.case}: {name} diverged at every learning rate")
        lr = self.chosen[name] = min(finite, key=lambda lr: finite[lr].loss)
        self.losses.setdefault(name, []).append(finite[lr].loss)
        base, bytes_up = finite[lr].base, finite[lr].bytes_up
        if bytes_up is not None:
            self.bytes_up[name] = bytes_up
        bases = self.losses.setdefault("base", [])
        if base is not None and len(bases) < len(self.losses["alone"]):
            bases.append(base)

    def _trained(
        self, seed: int, name: str, train: Callable[[float], Trained], lr: float
    ) -> Trained | None:
        """What the arm led to at a rate, now or in an earlier start of the same command."""
        config = self.config.replace(rounds={"seed": seed})
        key = {"case": self.case, "arm": name, "lr": lr, "config": config.digest()}

        found = self.kept.result(key, lambda: unless_diverged(lambda: asdict(train(lr))))
        return None if found is None else Trained(**found)

    def _federated(self, lab: Lab, config: Config, arm: Arm, lr: float) -> Trained:
        strategy = {"name": arm.strategy, "options": arm.options}
        folder = self.runs / "run"
        result = simulate(config.replace(clients={"lr": lr}, strategy=strategy), folder, lab)
        shutil.rmtree(folder)
        return Trained(result.loss, result.base_loss, result.total("bytes_up"))

    def rows(self) -> Iterator[dict[str, Any]]:
        first = {"base": self.losses["base"], **self.losses}
        return _rows(self.case, first, self.chosen, self.bytes_up)


def rates_of(config: Config) -> list[float]:
    """The grid of a benchmark: wide enough that an arm's choice is not at its edge."""
    return [float(f"{config.clients.lr * factor:.3g}") for factor in GRID]


def unless_diverged(train: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What training led to (its `loss` among it); None where it broke down."""
    try:
        found = train()
    except (QuorumError, UpdateError):
        return None
    return found if math.isfinite(found["loss"]) else None


def _rows(
    case: str,
    losses: dict[str, list[float]],
    chosen: dict[str, float],
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
            "lr": chosen.get(name),
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
