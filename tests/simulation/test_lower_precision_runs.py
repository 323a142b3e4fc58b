"""Zeroth- and first-order runs over bases of less precision: bfloat16, 4 and 8 bits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from meadow.config import Config
from meadow.peft_adapters.adapter_reader import load_adapter
from meadow.simulation.engine import Lab, measure, open_lab, simulate

QUANTISED = [pytest.param(bits, marks=pytest.mark.long) for bits in ("4bit", "8bit")]
CASES: dict[str, dict[str, Any]] = {
    "fedkseed": {"lr": 3e-3, "epsilon": -7},
    "pool_lora": {"lr": 3e-3, "epsilon": -7, "zeroth": ["eve"]},
    "fedavg_lora": {},
}


@pytest.fixture(scope="module", params=["bfloat16", *QUANTISED])
def small(tiny: Config, request: pytest.FixtureRequest) -> tuple[Config, Lab]:
    """The tiny llama in less precision, three rounds of ten steps."""
    if request.param == "bfloat16":
        model = {"dtype": request.param}
    else:
        pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
        model = {"quantize": request.param}
    config = tiny.replace(
        model={"rank": 8, "alpha": 8 * tiny.scaling, **model},
        clients={"steps": 10, "batch": 4},
        rounds={"count": 3},
    )
    return config, open_lab(config)


def weights(lab: Lab) -> str:
    """A digest of what the base is stored as, quantised or not."""
    found = hashlib.sha256()
    for name, tensor in sorted(lab.base.model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("strategy", CASES)
def test_a_run_helps_and_leaves_the_base_alone(
    small: tuple[Config, Lab], strategy: str, tmp_path: Path
) -> None:
    config = small[0].replace(strategy={"name": strategy, "options": CASES[strategy]})
    before = weights(small[1])
    done = simulate(config, tmp_path / "out", small[1])
    assert done.loss < done.base_loss - 1e-3 and weights(small[1]) == before
    assert all(row["contributions"] == 3 and not row["refused"] for row in done.metrics[1:])
    adapter = load_adapter(done.adapter)
    assert all(tensor.dtype == torch.float32 for tensor in adapter.tree.values())
    assert measure(small[1], config, done.adapter)["loss"] == pytest.approx(done.loss, abs=1e-3)


def test_the_same_run_twice_is_the_same(small: tuple[Config, Lab], tmp_path: Path) -> None:
    config = small[0].replace(strategy={"name": "fedkseed", "options": CASES["fedkseed"]})
    runs = [simulate(config, tmp_path / name, small[1]).adapter for name in ("one", "two")]
    one, two = (load_adapter(run).tree for run in runs)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
