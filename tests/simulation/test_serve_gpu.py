"""The GPU's table on a tiny model on a CPU, where batched products compute."""

from __future__ import annotations

import pytest
import torch
from step_recorders import cpu_kernels, tape
from torch import Tensor

from meadow.peft_adapters.serving_slots import Place
from meadow.simulation import serve_gpu
from meadow.simulation.random_llama import Size, random_base
from meadow.simulation.serve_gpu import Load, Steps, check, run
from meadow.simulation.slot_check import Case, served

TINY = Load(
    Size(32, 48, 1, 4, vocabulary=128, length=64, shared=2, tied=False),
    torch.float32, rank=8, adapters=(1, 3), rows=4, past=5, prompt=12, repeats=1,
)  # fmt: skip
CASE = Case(20, 12, (Place(8, 1), None), ())


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_gpu, "_cases", lambda: iter([CASE]))


def test_the_report_is_whole_and_passes() -> None:
    report = run("cpu", TINY)
    assert report["passed"] and report["logits_gap"] == 0 and report["copy_gb_per_second"] > 0
    assert [(row["step"], row["adapters"]) for row in report["rows"]] == [
        ("decode", 1), ("decode", 3), ("prefill", 1), ("prefill", 3),
    ]  # fmt: skip
    assert all(row["path"] == "products" and row["share"] > 0 for row in report["rows"])
    assert len(report["gaps"]) == 1 and report["gaps"][0]["same_again"]


def test_the_limit_is_the_share_of_bytes() -> None:
    """By hand: attention 32 x (32 + 16 + 16 + 32), MLP 3 x 32 x 48, norms 3 x 32, head 128 x 32."""
    own = 32 * 96 + 3 * 32 * 48 + 3 * 32 + 128 * 32
    adapter = 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    limits = [row["limit"] for row in run("cpu", TINY)["rows"] if "limit" in row]
    assert limits == [round(own / (own + n * adapter), 4) for n in (1, 3)]


def test_steps_compute_what_adapters_change() -> None:
    """A row's logits are its own adapter's, and the base's where there is none."""
    base = random_base(TINY.size)
    with Steps(base, TINY, kernels=False) as steps, torch.inference_mode():
        all_of = steps.logits()
        one = steps._decode(1)[0]().double()
        bare = steps._decode(3, bare=True)[0]().double()
    torch.testing.assert_close(all_of[[0, 3]], one[[0, 3]])  # rows of the first adapter
    assert not torch.allclose(all_of[1], one[1]) and not torch.allclose(one, bare)


def test_a_servers_replay_is_timed_and_its_logits_are_the_steps() -> None:
    with cpu_kernels(), Steps(random_base(TINY.size), TINY, kernels=True, recorder=tape) as steps:
        rows = steps.rows()
        (replayed,) = steps.replayed_logits()
        torch.testing.assert_close(replayed, steps.logits(), rtol=1e-4, atol=1e-4)
    timed = [(row["step"], "server_ms" in row, row.get("server_share", 0) > 0) for row in rows]
    assert timed == [("decode", True, True)] * 2 + [("prefill", False, False)] * 2
    with Steps(random_base(TINY.size), TINY, kernels=False) as steps:
        assert steps.replayed_logits() == []


def test_a_wrong_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("cpu")[0]["passed"]

    def wrong(case: Case, device: str, kernels: bool | None = None) -> Tensor:
        found = served(case, device, kernels)
        return found if kernels is False else found.roll(1, dims=0)

    monkeypatch.setattr(serve_gpu, "served", wrong)
    assert not check("cpu")[0]["passed"] and not run("cpu", TINY)["passed"]
