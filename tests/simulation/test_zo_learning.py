"""The learning benchmark: every arm trains what it says, on the same text, and rows say what was
found.  Figures themselves are measured, not asserted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import config_over

from meadow.config import Config
from meadow.errors import DataError, UpdateError
from meadow.peft_adapters.full_rank import FullRank
from meadow.simulation import zo_arms, zo_learning
from meadow.simulation.batches import batch_of, mean_loss
from meadow.simulation.bench_request import BenchRequest
from meadow.simulation.engine import Lab, open_lab
from meadow.simulation.kept_results import KeptResults
from meadow.simulation.mezo import gaussian, signs
from meadow.simulation.zo_arms import EPSILON, Arm, Outcome, Train, ranked, single
from meadow.simulation.zo_learning import Case
from meadow.strategies.base import Loss
from meadow.strategies.zeroth_order import run_id_of


@pytest.fixture(scope="module")
def config(tiny: Config) -> Config:
    """Two rounds of two steps, at the arms' one scaling."""
    return ranked(tiny, 2)


@pytest.fixture
def kept(tmp_path: Path) -> KeptResults:
    return BenchRequest("zo-learning", tmp_path).kept()


@pytest.fixture(scope="module")
def bench(config: Config) -> Lab:
    return open_lab(config)


ARMS: dict[str, Callable[[], Train]] = {
    "mezo": zo_arms.mezo,
    "rank one": zo_arms.rank_one,
    "full rank": zo_arms.full_rank,
    "pool": lambda: zo_arms.zeroth(2, stands_for=1),
    "federated": lambda: zo_arms.zeroth(2),
    "fedavg": lambda: zo_arms.federated("fedavg_lora", 2),
    "pool_lora": lambda: zo_arms.federated("pool_lora", 2, cores="per_layer"),
    "absent": lambda: zo_arms.domain("eve", "absent", 2),
    "zeroth": lambda: zo_arms.domain("eve", "zeroth", 2),
    "first": lambda: zo_arms.domain("eve", "first", 2),
}


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_trains_the_same_each_time_and_leaves_the_base(
    bench: Lab, config: Config, name: str
) -> None:
    before = {n: p.clone() for n, p in bench.base.model.named_parameters()}
    first, again = (ARMS[name]()(bench, config, 1e-3) for _ in range(2))
    assert first == again and math.isfinite(first.loss) and first.loss != first.base
    after = dict(bench.base.model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    sent = {"pool": 4, "federated": 3 * 4}  # bytes of content: a byte a step and client
    if name in sent:
        assert first.bytes_up is not None and first.bytes_up > sent[name]


def test_gaussian_mezo_follows_its_formula(bench: Lab, config: Config) -> None:
    """Step by step on a copy: the loss and its two evaluations, written out."""
    lab, lr = single(bench), 1e-3
    outcome = zo_arms.mezo()(bench, config, lr)
    weights = zo_arms._weights(lab)
    kept = {name: weight.data.clone() for name, weight in weights.items()}
    person = lab.participants[0]
    with torch.no_grad():
        for step, seed in enumerate(zo_arms.mezo_seeds(config)):
            rows = batch_of(person, config.clients.batch, step)
            generator = torch.Generator().manual_seed(seed)
            z = {n: torch.normal(0.0, 1.0, w.shape, generator=generator) for n, w in kept.items()}
            losses = []
            for sign in (1, -1):
                for name, weight in weights.items():
                    weight.copy_(kept[name] + sign * EPSILON * z[name])
                losses.append(float(mean_loss(lab, rows)))
            gradient = (losses[0] - losses[1]) / (2 * EPSILON)
            kept = {n: w - lr * gradient * z[n] for n, w in kept.items()}
        start = {n: w.clone() for n, w in open_lab(config).base.model.named_parameters()}
        for name, weight in weights.items():
            weight.copy_(kept[name])
        try:
            assert zo_arms._held_out(lab, config) == pytest.approx(outcome.loss, abs=1e-5)
        finally:
            for name, weight in weights.items():
                weight.copy_(start[f"{name}.base.weight"])


def test_no_two_seeds_of_a_pair_share_a_direction(config: Config) -> None:
    """Their generators read 32 bits of a seed: what differs in others alone is the same."""
    long = config.replace(rounds={"count": 10}, clients={"steps": 60})
    seeds = [zo_arms.mezo_seeds(long.replace(rounds={"seed": seed})) for seed in range(1, 6)]
    assert all(len(set(drawn)) == 600 for drawn in seeds)
    shared = [len({*one} & {*other}) for one, other in itertools.combinations(seeds, 2)]
    assert sum(shared) <= 2, "about 0.004 are expected"
    like = torch.zeros(50)
    for draw in (gaussian, signs):
        drawn = {tuple(draw(torch.Generator().manual_seed(s[0]), like).tolist()) for s in seeds}
        assert len(drawn) == 5


def test_full_rank_steps_are_those_of_dense_matrices(bench: Lab, config: Config) -> None:
    lab, lr = single(bench), 1e-3
    outcome = zo_arms.full_rank()(bench, config, lr)
    sites = tuple(sorted(lab.layers, key=lambda site: site.name))
    directions = FullRank(run_id_of(config.rounds.seed), lab.base.digest, sites, 4)
    weights = zo_arms._weights(lab)
    start = {name: weight.clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for step in range(4):
                rows = batch_of(lab.participants[0], config.clients.batch, step)
                z = {site.name: directions.direction(i, step) for i, site in enumerate(sites)}
                losses = []
                for move in (EPSILON, -2 * EPSILON, EPSILON):
                    for name, weight in weights.items():
                        weight.add_(z[name], alpha=move)
                    losses.append(float(mean_loss(lab, rows)))
                gradient = (losses[0] - losses[1]) / (2 * EPSILON)
                for name, weight in weights.items():
                    weight.add_(z[name], alpha=-lr * gradient)
            assert zo_arms._held_out(lab, config) == pytest.approx(outcome.loss, abs=1e-4)
    finally:
        for name, weight in weights.items():
            weight.data.copy_(start[name])


def test_one_client_makes_the_steps_of_all(bench: Lab, config: Config) -> None:
    """Equal total forward passes: one byte a step, whoever makes it."""
    whole = config.replace(clients={"steps": 3 * config.clients.steps})
    stands = zo_arms.zeroth(2, stands_for=3)(bench, config, 1e-3)
    assert stands == zo_arms.zeroth(2, stands_for=1)(bench, whole, 1e-3)


def test_an_absent_domain_is_measured_and_not_trained_on(bench: Lab, config: Config) -> None:
    """Its training text may be anything; its held-out rows are what the loss is about."""
    absent = zo_arms.domain("eve", "absent", 2)
    people = tuple(
        replace(person, train=person.train[:1]) if person.name == "eve" else person
        for person in bench.participants
    )
    assert absent(replace(bench, participants=people), config, 1e-3) == absent(bench, config, 1e-3)
    only_eve = tuple(person for person in bench.participants if person.name == "eve")
    trainer = bench.trainer(config)
    blank = {
        f"{site.name}.{factor}": torch.zeros(site.shape(factor, 1))
        for site in bench.layers
        for factor in ("lora_A", "lora_B")
    }
    own = trainer.loss(Loss(blank), only_eve[0].held_out).loss
    assert absent(bench, config, 1e-3).base == pytest.approx(own)
    losses = {kind: zo_arms.domain("eve", kind, 2)(bench, config, 1e-3).loss
              for kind in ("absent", "zeroth", "first")}  # fmt: skip
    assert len(set(losses.values())) == 3


# --- choosing and telling ------------------------------------------------------------------------


def scripted(table: dict[float, float], calls: list[tuple[int, float]]) -> Train:
    """An arm whose loss is known; NaN stands for one that diverges."""

    def train(lab: Lab, config: Config, lr: float) -> Outcome:
        calls.append((config.rounds.seed, lr))
        if table[lr] > 100:
            raise UpdateError("diverged")
        return Outcome(4.0, table[lr] + 0.1 * config.rounds.seed, 7)

    return train


def test_rates_are_chosen_on_the_first_seed_and_stay(config: Config, kept: KeptResults) -> None:
    calls: list[tuple[int, float]] = []
    arms = (
        Arm("reference", scripted({1.0: 1.9}, []), (1.0,)),
        Arm("own", scripted({1.0: 3.0, 2.0: 2.9, 3.0: math.nan, 4.0: 999}, calls), (1, 2, 3, 4)),
    )
    said: list[str] = []
    rows = Case("c", config, arms, {"own": 0.4}).measure([1, 2], said.append, kept)
    assert calls == [(1, 2), (1, 3), (1, 1), (2, 2)]
    assert len(said) == 4
    own = rows[1]
    shares = [(4 - 3.0) / (4 - 2.0), (4 - 3.1) / (4 - 2.1)]
    assert own["shares"] == pytest.approx(shares)
    assert own["value"] == pytest.approx(sum(shares) / 2)
    assert own["spread"] == pytest.approx((shares[0] - shares[1]) / 2)
    assert (own["lr"], own["bar"], own["seeds"], own["bytes_up"]) == (2, 0.4, 2, 7)
    assert own["below_last"] == [0.0, 0.0] and rows[0]["below_last"] == pytest.approx([1.0, 1.0])
    assert rows[0]["value"] == 1.0 and own["unit"] == "share of reference"
    page = zo_learning.markdown(rows)
    assert (
        "| own | 3.0500 ± 0.0500 | 0.487 ± 0.013 | ≥ 0.4 | 0.0000 ± 0.0000 | 2 | 0.0 kB |" in page
    )


def test_an_arm_that_always_diverges_is_named(config: Config, kept: KeptResults) -> None:
    arms = (Arm("wild", scripted({1.0: 999}, []), (1.0,)),)
    with pytest.raises(UpdateError, match="wild diverged"):
        Case("c", config, arms, {}).measure([1], lambda text: None, kept)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True), st.data())
def test_the_walk_ends_in_the_valley(losses: list[int], data: st.DataObject) -> None:
    """Of any grid with one valley, whose upper end may diverge; no rate is tried twice."""
    low = data.draw(st.integers(0, len(losses) - 1))
    wild = data.draw(st.integers(low + 1, len(losses)))
    down, up = sorted(losses[:low], reverse=True), sorted(losses[low + 1 :])
    valley = [*down, -1, *up]
    table: list[float] = [x if at < wild else math.inf for at, x in enumerate(valley)]
    tried: list[int] = []

    def loss(rate: float) -> float:
        tried.append(int(rate))
        return table[int(rate)]

    assert zo_learning.lowest(loss, range(len(table))) == low
    assert len(tried) == len(set(tried))


def test_of_the_grid_only_the_way_is_tried() -> None:
    tried: list[float] = []

    def loss(rate: float) -> float:
        tried.append(rate)
        return abs(rate - 2)

    assert zo_learning.lowest(loss, range(9)) == 2 and tried == [4, 5, 3, 2, 1]


# --- the cases of the issue ----------------------------------------------------------------------


@pytest.fixture
def here(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cases on the tiny base, at ranks that it has."""
    small = ranked(config_over(Path(tiny.model.base), Path(tiny.data.source)), 4)
    monkeypatch.setattr(zo_learning, "nano", lambda participants=4: small)
    monkeypatch.setattr(zo_learning, "texts", lambda base, rank=64: {"dolly_small": small})
    monkeypatch.setattr(zo_learning, "stories", lambda: "")
    for name in ("zeroth", "federated", "domain"):
        honest = getattr(zo_arms, name)
        monkeypatch.setattr(zo_learning, name, smaller(honest))
    mixed = zo_learning.mixed_order
    monkeypatch.setattr(zo_learning, "mixed_order", lambda name, c, holder: mixed(name, c, "eve"))


def smaller(make: Callable[..., Train]) -> Callable[..., Train]:
    """Ranks a sixteenth as large."""

    def made(*arguments: object, **options: object) -> Train:
        small = [max(1, a // 16) if isinstance(a, int) else a for a in arguments]
        return make(*small, **options)

    return made


@pytest.mark.long
def test_every_case_runs_to_its_rows(here: None, kept: KeptResults) -> None:
    rows = zo_learning.run(lambda text: None, kept, seeds=1, quick=True)
    cases = {row["case"].partition("/")[0] for row in rows}
    assert cases == {
        "fresh_or_pool, nano",
        "fresh_or_pool, dolly_small",
        "federated_or_alone, nano",
        "cores_or_factors, nano",
        "cores_or_factors, dolly_small",
        "mixed_order, dolly_small",
    }
    for row in rows:
        assert {"case", "value", "unit", "baseline", "ratio", "bar", "spread"} <= set(row)
        assert math.isfinite(row["value"]) and row["seeds"] == 1
    bars = {row["case"]: row["bar"] for row in rows if row["bar"] is not None}
    assert bars == {"fresh_or_pool, nano/pool, r = 4": 0.95,
                    "fresh_or_pool, nano/pool, r = 4, a direction a row": 0.95,
                    "federated_or_alone, nano/8 clients": 0.9}  # fmt: skip


def test_equal_passes_for_all_arms_that_are_compared() -> None:
    case = zo_learning.federated_or_alone("nano", zo_learning.nano(8), 600, 8)
    assert case.config.rounds.count * case.config.clients.steps * 8 == pytest.approx(600, rel=0.1)
    case = zo_learning.fresh_or_pool("nano", zo_learning.nano(), 600)
    assert case.config.rounds.count * case.config.clients.steps == 600


def test_missing_text_is_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: KeptResults
) -> None:
    monkeypatch.setenv("MEADOW_DATA", str(tmp_path))
    with pytest.raises(DataError, match="MEADOW_DATA"):
        zo_learning.run(lambda text: None, kept, only=["cores_or_factors"], seeds=1, quick=True)
