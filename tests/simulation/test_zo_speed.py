"""The speed benchmark on a tiny shape: what is timed does what it says, and rows are complete.
Figures themselves are measured, not asserted."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meadow.errors import MeadowError
from meadow.peft_adapters import philox
from meadow.peft_adapters.pool import directions, fold
from meadow.simulation import gpu_check, zo_memory, zo_sizes, zo_speed
from meadow.simulation.zo_setup import FULL, HEADER, Setup, Shape

TINY = Shape(hidden=16, intermediate=24, layers=1, heads=2, vocabulary=32, rows=4, length=8)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup(TINY, rank=4)


def test_the_named_shape_is_what_the_issue_asks_for() -> None:
    embedding = FULL.vocabulary * FULL.hidden
    layer = 4 * FULL.hidden**2 + 3 * FULL.hidden * FULL.intermediate
    assert 23e6 < embedding + FULL.layers * layer < 25e6
    assert FULL.vocabulary <= 8192 and (FULL.rows, FULL.length) == (8, 128)


def test_forward_passes_are_of_the_named_model(setup: Setup) -> None:
    """Bare: transformers' own loss.  With the state: that of merged weights."""
    plain = TINY.model()
    assert setup.loss(copies=2) == pytest.approx(reference(plain, setup), abs=1e-5)
    tree = setup.pool.adapter(setup.q)
    for site in setup.pool.sites:
        weight = plain.get_submodule(site.name).get_parameter("weight")
        weight.data += tree[f"{site.name}.lora_B"] @ tree[f"{site.name}.lora_A"]
    with setup.adapted():
        assert setup.loss() == pytest.approx(reference(plain, setup), abs=1e-5)


def reference(model: torch.nn.Module, setup: Setup) -> float:
    with torch.no_grad():
        return float(model(input_ids=setup.ids, labels=setup.labels).loss)


def test_a_step_measures_both_signs_and_folds_its_byte(setup: Setup) -> None:
    before = [parameter.clone() for parameter in setup.parameters.values()]
    walked = setup.step()
    k = int(directions(setup.pool.run_id, b"bench", 0, 1, setup.pool.size)[0])
    plus, minus = (merged_loss(setup, k, sign) for sign in (1, -1))
    gradient = (plus - minus) / 2 / 2.0**HEADER.epsilon
    byte = int(walked.bytes[0])
    assert abs(byte - gradient * 2.0**-HEADER.scale) < 1.5, "rounded to a neighbour"
    expected = setup.q.clone()
    expected[0, k // 4, k % 4] -= byte * HEADER.multiplier
    assert torch.equal(walked.q, expected)
    after = setup.parameters.values()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def merged_loss(setup: Setup, k: int, sign: int) -> float:
    """In float64, so that the small difference is not lost."""
    plain = TINY.model().double()
    for index, site in enumerate(setup.pool.sites):
        u, v = setup.pool.left(index).double(), setup.pool.right(index).double()
        change = u.T @ setup.q[0].double() @ v * 2.0**-setup.pool.unit
        change += sign * 2.0**HEADER.epsilon * torch.outer(u[k // 4], v[k % 4])
        plain.get_submodule(site.name).get_parameter("weight").data += change
    return reference(plain, setup)


def test_a_rebuild_gives_the_state_that_was_folded(setup: Setup) -> None:
    q = setup.pool.zero()
    for k, value in zip(*setup.pairs, strict=True):
        fold(q, k[None], [int(value)])
    assert torch.equal(q, setup.q)
    tree = setup.pool.adapter(q)
    assert all(torch.equal(tensor, tree[name]) for name, tensor in setup.rebuild().items())


def test_every_case_has_a_row_with_its_bar_and_baseline() -> None:
    said: list[str] = []
    rows = zo_speed.run(said.append, repeats=1, shape=TINY, rank=4, only=zo_speed.CASES[:6])
    assert [row["case"] for row in rows] == list(zo_speed.CASES[:6])
    assert said == ["steps", "rebuilds", "sizes"]
    for row in rows:
        assert {"case", "value", "unit", "baseline", "ratio", "bar"} <= set(row)
        assert row["value"] > 0 and row["ratio"] == pytest.approx(row["value"] / row["baseline"])
    assert {row["case"]: row["bar"] for row in rows} == {
        "step_over_forward": 1.05,
        "step_over_bare_forward": 1.25,
        "rebuild_over_forward": 0.1,
        "full_rank_rebuild": None,
        "record_bytes": 400,
        "join_bytes": 17_000,
    }


def test_only_named_cases_are_measured() -> None:
    rows = zo_speed.run(lambda part: None, only=["record_bytes"], shape=TINY, rank=4)
    assert [row["case"] for row in rows] == ["record_bytes"]


def test_baselines_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Setup] = []
    before: list[dict[str, torch.Tensor]] = []

    class Watched(Setup):
        def __init__(self, *arguments: object) -> None:
            super().__init__(TINY, 4)
            kept.append(self)
            before.append(copy.deepcopy(self.model.state_dict()))

    monkeypatch.setattr(zo_speed, "Setup", Watched)
    zo_speed.steps(1, TINY, 4)
    zo_speed.rebuilds(1, TINY, 4)
    for setup, state in zip(kept, before, strict=True):
        after = setup.model.state_dict()
        assert len(after) == len(state) and all(torch.equal(after[n], state[n]) for n in state)


def test_sizes_keep_to_their_bounds() -> None:
    """Sizes are exact, so here the bounds themselves are held."""
    record, join = zo_sizes.rows(64)
    assert record["value"] == 377 <= record["bar"]
    assert join["value"] == join["at_half_the_history"] <= join["bar"]
    assert join["value"] > 4 * 64 * 64, "the least favourable state"


def test_time_is_taken_in_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = iter(range(100))
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock)))
    times = zo_speed.in_turns({name: lambda n=name: order.append(n) for name in "ab"}, 2)  # type: ignore[misc]
    assert order == list("abbaab"), "every other turn backwards"
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_growth_counts_what_was_there_only_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**28
    monkeypatch.setitem(zo_memory.KINDS, "brief", lambda setup: torch.ones(size // 4).sum())
    assert zo_memory.growth("brief", TINY, 4) > 0.9 * size
    monkeypatch.setattr(zo_memory, "_STATUS", Path("no such account"))
    with pytest.raises(MeadowError, match="Linux"):
        zo_memory.growth("brief", TINY, 4)


@pytest.mark.long
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    """The growth holds at least the weights."""
    wide = replace(TINY, hidden=512, vocabulary=8192)
    weights = sum(p.numel() * 4 for p in Setup(wide, 4).parameters.values())
    assert weights < zo_memory.growth_apart("step", wide, 4) < 10 * weights


@pytest.mark.long
def test_a_failure_in_that_process_is_one_clear_line() -> None:
    with pytest.raises(MeadowError, match="measures memory failed: KeyError"):
        zo_memory.growth_apart("nothing", TINY, 4)


@pytest.mark.long
def test_the_memory_row_is_complete() -> None:
    (row,) = zo_speed.memory(1, replace(TINY, hidden=512, vocabulary=8192), 4)
    assert row["case"] == "peak_memory_over_forward" and row["bar"] == 1.1
    assert row["value"] == row["step_bytes"] / row["forward_bytes"]


def test_the_gpu_check_finds_this_cpu_equal_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_REPEATS", 2)
    report = gpu_check.run("cpu", TINY, 4)
    assert report["passed"] and report["equal"] == {"signs": True, "pool": True}
    assert report["loss_difference"] == 0.0
    assert all(value > 0 for value in report["milliseconds"].values())


def test_the_gpu_check_notices_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = philox.signs
    monkeypatch.setattr(gpu_check, "_REPEATS", 2)
    monkeypatch.setattr(
        gpu_check,
        "signs",
        lambda seed, tensor, part, count, device=None: (
            honest(seed, tensor, part, count) if device is None else -honest(seed, 3, part, count)
        ),
    )
    assert not gpu_check.run("cpu", TINY, 4)["passed"]
