"""The GPU's table on a tiny model on a CPU, where batched products compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from step_recorders import cpu_kernels, tape
from torch import Tensor

from meadow.cli import main as meadow
from meadow.errors import ConfigError, ModelError
from meadow.peft_adapters.base_model import ALL_LINEAR, sites
from meadow.peft_adapters.serving_slots import Place
from meadow.simulation import gpu_check, serve_gpu, serve_gpu_bench
from meadow.simulation.bench_request import BenchRequest
from meadow.simulation.device_report import told
from meadow.simulation.random_llama import Size, random_base
from meadow.simulation.serve_gpu import REHEARSAL, Load, Steps, check, check_machine, run
from meadow.simulation.slot_check import TOLERANCE, Case, served

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


def test_wrong_sums_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And make no table."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.0)
    report = run("cpu", TINY)
    assert not report["passed"] and report["rows"] == []
    with pytest.raises(ModelError, match="sums differ: by .* of a layer's"):
        serve_gpu_bench.run(BenchRequest("serve-gpu", tmp_path), "cpu", TINY)
    assert not list(tmp_path.iterdir())


def test_the_table_has_each_step_beside_its_limit(tmp_path: Path) -> None:
    phases: list[str] = []
    request = BenchRequest("serve-gpu", tmp_path, phases.append)
    report, page = serve_gpu_bench.run(request, "cpu", TINY)
    cases = [f"products_{step}_{n}" for step in ("decode", "prefill") for n in (1, 3)]
    assert [row["case"] for row in report["rows"]] == cases and phases
    for row in report["rows"]:
        assert row["value"] == row["share"] and row["ratio"] == row["value"] / row["baseline"]
        assert row["baseline"] == row.get("limit", 1.0)
        assert f"| {row['case']} |" in page
    assert json.loads((tmp_path / "serve-gpu.json").read_text()) == report
    assert (tmp_path / "serve-gpu.md").read_text() == page
    for only, model in (("products_decode_1", ""), ("", "nano")):
        with pytest.raises(ConfigError, match="one model and all cases"):
            request = BenchRequest("serve-gpu", tmp_path, model=model, only=only)
            serve_gpu_bench.run(request, "cpu", TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert meadow(["bench", "serve-gpu", "--out", str(tmp_path)]) == 2
    assert "no usable GPU found" in capsys.readouterr().err.splitlines()[-1]
    for measure in (run, gpu_check.run):
        status, text = told(measure, [])
        assert status == 2 and "no usable GPU found" in text and "\n" not in text
    assert "'tpu' is no device to measure" in told(run, ["tpu"])[1]


def test_a_gpu_without_kernels_or_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else products would be timed in their place, or memory run out after minutes."""
    room = 40 * 10**9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (room, room))
    monkeypatch.setattr(serve_gpu, "has_kernels", lambda device, dtype: False)
    with pytest.raises(ConfigError, match="Triton.s kernels cannot be used here"):
        check_machine("cuda", Load())
    monkeypatch.setattr(serve_gpu, "has_kernels", lambda device, dtype: True)
    check_machine("cuda", Load())
    room = 20 * 10**9
    with pytest.raises(ConfigError, match="the GPU has 20 GB free, and 3. are needed"):
        check_machine("cuda", Load())


def test_the_room_that_is_asked_for_is_what_is_held() -> None:
    """All but the norms, of 2 hidden layers and one that comes last."""
    base, load = random_base(TINY.size), TINY
    own = sum(parameter.numel() for parameter in base.model.parameters()) - 3 * 32
    layers = sites(base.model, ALL_LINEAR)
    adapter = load.rank * sum(site.rows + site.columns for site in layers)
    past = 5 * 17 * 1 * 2 * 16
    assert load.bytes == 4 * (own + past + 2 * 3 * adapter)


def test_a_rehearsal_runs_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = told(run, ["cpu"])
    report = json.loads(text)
    assert status == 0 and report["load"] == str(REHEARSAL) and report["passed"]
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.0)
    assert told(run, ["cpu"])[0] == 1
