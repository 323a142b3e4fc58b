"""`meadow bench zo`, learning: what directions from a pool cost, beside fresh ones, one client
beside many, first order beside zeroth.

Every arm of a case reads the same text.  On the first seed it chooses its learning rate from the
grid that all zeroth-order (or all first-order) arms share, and keeps it for the others: it walks
from the grid's middle to whichever side is better, until the next rate is worse.  A share is the
arm's improvement of the held-out loss over that of the case's reference, seed by seed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from ..config import Config
from ..errors import UpdateError
from . import demo
from .bench import tasks, unless_diverged
from .bench_request import Phase, Row
from .engine import Lab, open_lab
from .kept_results import KeptResults
from .zo_arms import Arm, Outcome, domain, federated, full_rank, mezo, rank_one, ranked, zeroth

ZEROTH_RATES = (3e-5, 6e-5, 8.5e-5, 1.2e-4, 1.7e-4, 2.4e-4, 5e-4, 1e-3)  # closer where arms end
FIRST_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = 5
MORE_SEEDS = 10  # where one draw of directions and another are far apart
FEWER_SEEDS = 3  # of cases that promise nothing to be paired over five
STEPS = 600  # of one client that holds all text
ROUNDS = 10
ADDED = {"first_share": "first_order"}


@dataclass(frozen=True)
class Case:
    """Arms on one text; shares are of the first arm's improvement, differences to the last arm's
    loss."""

    name: str
    config: Config
    arms: tuple[Arm, ...]
    bars: dict[str, float]  # by arm: the least share that the project promises
    seeds: int = SEEDS  # that it is measured with where nobody asks for another number

    def measure(self, seeds: Sequence[int], phase: Phase, kept: KeptResults) -> list[Row]:
        """A row for each arm.  Raises UpdateError where one diverged at every rate."""
        found: dict[str, list[Outcome]] = {arm.name: [] for arm in self.arms}
        chosen: dict[str, float] = {}
        for seed in seeds:
            config = self.config.replace(rounds={"seed": seed})
            lab = open_lab(config)
            for arm in self.arms:
                phase(f"{self.name}, seed {seed}: {arm.name}")
                rates = (chosen[arm.name],) if arm.name in chosen else arm.rates
                chosen[arm.name], outcome = self._best(arm, lab, config, rates, kept)
                found[arm.name].append(outcome)
        return [self._row(arm, chosen[arm.name], found) for arm in self.arms]

    def _best(
        self, arm: Arm, lab: Lab, config: Config, rates: Sequence[float], kept: KeptResults
    ) -> tuple[float, Outcome]:
        """The rate with the lowest loss on the way, and what it led to."""
        found: dict[float, Outcome] = {}

        def loss(lr: float) -> float:
            key = {"case": self.name, "arm": arm.name, "lr": lr, "config": config.digest()}
            outcome = kept.result(key, partial(_outcome, arm, lab, config, lr))
            if outcome is None:  # it diverged
                return math.inf
            found[lr] = Outcome(**outcome)
            return found[lr].loss

        best = lowest(loss, rates)
        if best not in found:
            raise UpdateError(f"{arm.name} diverged at every learning rate")
        return best, found[best]

    def _row(self, arm: Arm, lr: float, found: dict[str, list[Outcome]]) -> Row:
        outcomes = found[arm.name]
        first, last = found[self.arms[0].name], found[self.arms[-1].name]
        shares = [own.gain / of.gain for own, of in zip(outcomes, first, strict=True)]
        below = [of.loss - own.loss for own, of in zip(outcomes, last, strict=True)]
        losses = [outcome.loss for outcome in outcomes]
        return {
            "case": f"{self.name}/{arm.name}",
            "value": mean(shares),
            "unit": f"share of {self.arms[0].name}",
            "baseline": 1.0,
            "ratio": mean(shares),
            "bar": self.bars.get(arm.name),
            "spread": _half_range(shares),
            "shares": shares,
            "below_last": below,
            "base_loss": mean(outcome.base for outcome in outcomes),
            "loss": mean(losses),
            "loss_spread": _half_range(losses),
            "seeds": len(outcomes),
            "lr": lr,
            "bytes_up": outcomes[0].bytes_up,
        }


def lowest(loss: Callable[[float], float], rates: Sequence[float]) -> float:
    """Where a loss with one valley over a rising grid is lowest, found by walking from its middle.

    Training that diverges has an infinite loss: from there the way is down, to smaller rates.
    """
    at = (len(rates) - 1) // 2
    here = loss(rates[at])
    for towards in (1, -1):
        begun = at
        while 0 <= at + towards < len(rates):
            there = loss(rates[at + towards])
            if there >= here and not (here == math.inf and towards < 0):
                break
            at, here = at + towards, there
        if at != begun:
            break
    return rates[at]


def run(
    phase: Phase,
    kept: KeptResults,
    only: Sequence[str] = (),
    seeds: int = 0,
    steps: int = STEPS,
    quick: bool = False,
) -> list[Row]:
    """The rows of all cases, or of those named; quick is one rate and two rounds of two steps.

    With 0 `seeds` each case has its own number of them.

    Raises DataError where the text or the models that a case needs are missing.
    """
    found: list[Row] = []
    for name, make in CASES.items():
        if not only or name in only:
            for case in make(steps):
                shown = _shortened(case) if quick else case
                found += shown.measure(range(1, 1 + (seeds or case.seeds)), phase, kept)
    return found


def fresh_or_pool(name: str, config: Config, steps: int) -> Case:
    """One client that holds all text: a pool's directions beside fresh ones, at equal passes.

    A step's rows share one direction, as MeZO's do, or have one each.
    """
    config = _stepped(config, steps, 1)
    rank, rows = config.model.rank, config.clients.batch
    arms = [("MeZO, fresh Gaussian", mezo()), ("MeZO, fresh rank-one signs", rank_one())]
    arms += [("full-rank signs, fresh", full_rank())]
    arms += [(f"pool, r = {rank}", zeroth(rank, stands_for=1))]
    arms += [(f"{arms[-1][0]}, a direction a row", zeroth(rank, stands_for=1, directions=rows))]
    promised = name == "nano"
    bars = dict.fromkeys((arm for arm, _ in arms[-2:]), 0.95) if promised else {}
    seeds = MORE_SEEDS if promised else FEWER_SEEDS
    return Case(f"fresh_or_pool, {name}", config, _arms(arms, ZEROTH_RATES), bars, seeds)


def federated_or_alone(name: str, config: Config, steps: int, clients: int) -> Case:
    """Many clients beside one that holds all text and makes all their steps."""
    arms = [
        ("one client, all text", zeroth(64, stands_for=clients)),
        (f"{clients} clients", zeroth(64)),
    ]
    config = _stepped(config, steps, clients)
    bars = {f"{clients} clients": 0.9}
    return Case(f"federated_or_alone, {name}", config, _arms(arms, ZEROTH_RATES), bars)


def cores_or_factors(name: str, config: Config) -> Case:
    """`pool_lora` of several sizes beside `fedavg_lora`, at the config's own steps."""
    arms = [("fedavg_lora, r = 8", federated("fedavg_lora", 8))]
    for rank, cores in ((32, "shared"), (64, "shared"), (32, "per_layer"), (64, "per_layer")):
        train = federated("pool_lora", rank, cores=cores, unit=30)
        arms.append((f"pool_lora, r = {rank}, {cores}", train))
    return Case(f"cores_or_factors, {name}", config, _arms(arms, FIRST_RATES), {}, FEWER_SEEDS)


def mixed_order(name: str, config: Config, holder: str) -> Case:
    """The loss on a domain that one client alone holds, who has zeroth-order steps (weighed with
    the others' or added to their mean), or first-order ones (the reference), or is not there."""
    first, absent = (
        Arm(f"{holder}: {label}", domain(holder, kind, 64), ZEROTH_RATES[:1])
        for label, kind in (("first order", "first"), ("absent", "absent"))
    )
    own, beside = (
        Arm(f"{holder}: zeroth order{label}", domain(holder, "zeroth", 64, **option), ZEROTH_RATES)
        for label, option in (("", {}), (", added to the others' mean", ADDED))
    )
    return Case(f"mixed_order, {name}", config, (first, own, beside, absent), {})


def nano(participants: int = 4) -> Config:
    """The demo's base and participants."""
    return ranked(demo.FULL.replace(data={"participants": participants}), 64)


def texts(base: str, rank: int = 64) -> dict[str, Config]:
    """The data sets of `meadow bench strategies` on a base model."""
    data = Path(os.environ.get("MEADOW_DATA", "../shared/data"))
    return {name: ranked(config, rank) for name, config in tasks(base, data).items()}


def stories() -> str:
    """The small llama that learning is reported on without a bar; its ranks go up to 32."""
    models = Path(os.environ.get("MEADOW_MODELS", "../shared/models"))
    return str((models / "stories260K").resolve())


CASES: dict[str, Callable[[int], list[Case]]] = {
    "fresh_or_pool": lambda steps: [
        fresh_or_pool("nano", nano(), steps),
        *(fresh_or_pool(name, config, steps) for name, config in texts(stories(), 32).items()),
    ],
    "federated_or_alone": lambda steps: [federated_or_alone("nano", nano(8), steps, 8)],
    "cores_or_factors": lambda steps: [
        cores_or_factors("nano", nano(8)),
        cores_or_factors("dolly_small", texts("nano")["dolly_small"]),
    ],
    "mixed_order": lambda steps: [
        mixed_order("dolly_small", texts("nano")["dolly_small"], "summarization"),
    ],
}


def markdown(rows: Sequence[Row]) -> str:
    """One table a case."""
    lines: list[str] = []
    for case in dict.fromkeys(row["case"].partition("/")[0] for row in rows):
        own = [row for row in rows if row["case"].partition("/")[0] == case]
        lines += [
            f"### {case}",
            "",
            f"Base loss {own[0]['base_loss']:.4f}; {own[0]['seeds']} seeds.",
            "",
            f"| arm | held-out loss | {own[0]['unit']} | bar | below the last | lr | sent up |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *map(_line, own),
            "",
        ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    size = "" if row["bytes_up"] is None else f"{row['bytes_up'] / 1e3:,.1f} kB"
    bar = "" if row["bar"] is None else f"≥ {row['bar']:g}"
    below = row["below_last"]
    return (
        f"| {row['case'].partition('/')[2]} | {row['loss']:.4f} ± {row['loss_spread']:.4f} "
        f"| {row['value']:.3f} ± {row['spread']:.3f} | {bar} "
        f"| {mean(below):.4f} ± {_half_range(below):.4f} | {row['lr']:g} | {size} |"
    )


def _outcome(arm: Arm, lab: Lab, config: Config, lr: float) -> dict[str, Any] | None:
    return unless_diverged(lambda: asdict(arm.train(lab, config, lr)))


def _stepped(config: Config, steps: int, clients: int) -> Config:
    """ROUNDS rounds in which so many clients make `steps` steps in all."""
    each = max(1, round(steps / ROUNDS / clients))
    return config.replace(
        rounds={"count": ROUNDS, "evaluate_every": ROUNDS}, clients={"steps": each}
    )


def _shortened(case: Case) -> Case:
    """The same arms, too briefly to mean anything."""
    config = case.config.replace(rounds={"count": 2, "evaluate_every": 2}, clients={"steps": 2})
    arms = tuple(Arm(arm.name, arm.train, arm.rates[:1]) for arm in case.arms)
    return Case(case.name, config, arms, case.bars)


def _arms(named: Sequence[tuple[str, Any]], rates: tuple[float, ...]) -> tuple[Arm, ...]:
    return tuple(Arm(name, train, rates) for name, train in named)


def _half_range(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / 2
