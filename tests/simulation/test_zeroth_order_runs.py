"""Whole runs of the pool's strategies over the tiny llama: engines, base, restart, adapter."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import Numbered
from safetensors.torch import load_file

from meadow.config import Config
from meadow.errors import ConfigError
from meadow.events import Event
from meadow.journal import Journal, RunIdentity
from meadow.peft_adapters.adapter_reader import load_adapter
from meadow.peft_adapters.layout import FACTORS
from meadow.server.run_folder import environment
from meadow.simulation.engine import Lab, Result, measure, open_lab, simulate
from meadow.strategies.messages import unpack_state

BYTES: dict[str, Any] = {"lr": 3e-3, "epsilon": -7}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("fedkseed", {**BYTES, "momentum": 0.5, "importance": True}),
    ("fedkseed", {**BYTES, "combine": "median", "gain": 3.0, "directions": 2}),
    ("pool_lora", {**BYTES, "zeroth": ["eve"]}),
    ("pool_lora", {"cores": "per_layer"}),
]


def named(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(key for key in case[1] if key not in BYTES)])


@pytest.fixture(params=CASES, ids=named)
def config(tiny: Config, request: pytest.FixtureRequest) -> Config:
    """Three rounds of ten steps; a rank of 8 at the tiny run's own scaling."""
    name, options = request.param
    return tiny.replace(
        model={"rank": 8, "alpha": 8 * tiny.scaling},
        strategy={"name": name, "options": options},
        clients={"steps": 10, "batch": 4},
        rounds={"count": 3},
    )


def run(config: Config, folder: Path, lab: Lab, **more: Any) -> Result:
    return simulate(config, folder, lab, disk=Numbered(folder.parent), **more)


def weights(lab: Lab) -> str:
    state = sorted(lab.base.model.state_dict().items())
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in state)).hexdigest()


def last_state(config: Config, lab: Lab, folder: Path) -> dict[str, Any]:
    """The state tensors and data in a run's journal, as bytes that can be compared."""
    identity = RunIdentity(config.digest(), lab.base.digest, environment())
    with Journal.open(folder, identity, Numbered(folder.parent)) as journal:
        last = journal.last()
    assert last is not None
    state = unpack_state(last[1])
    tensors = {name: (t.dtype, t.numpy().tobytes()) for name, t in state.tensors.items()}
    return {"round": last[0], **tensors, **state.data}


def test_a_run_helps_and_leaves_the_base_alone(config: Config, lab: Lab, tmp_path: Path) -> None:
    before = weights(lab)
    done = run(config, tmp_path / "out", lab)
    assert done.loss < done.base_loss - 1e-3 and weights(lab) == before
    assert all(row["contributions"] == 3 and not row["refused"] for row in done.metrics[1:])


def test_the_adapter_reproduces_the_loss(config: Config, lab: Lab, tmp_path: Path) -> None:
    """Measured as an ordinary adapter: signs in A, whole numbers times a power of two in B."""
    done = run(config, tmp_path / "out", lab)
    assert measure(lab, config, done.adapter)["loss"] == pytest.approx(done.loss, abs=1e-6)
    loaded = load_adapter(done.adapter)
    assert (loaded.rank, loaded.scaling) == (8, config.scaling)
    a, b = (
        torch.cat([t.flatten() for n, t in loaded.tree.items() if n.endswith(factor)])
        for factor in FACTORS
    )
    assert set(a.tolist()) == {1.0, -1.0} and bool(b.any())
    whole = b.double() * config.scaling * 2.0**30
    assert torch.equal(whole, whole.round())


def test_fused_equals_sequential(config: Config, lab: Lab, tmp_path: Path) -> None:
    """Up to a byte that a loss's last bits rounded the other way."""
    fused = config.replace(simulation={"engine": "fused", "group": 2})
    one, many = run(config, tmp_path / "one", lab), run(fused, tmp_path / "many", lab)
    trees = [load_adapter(result.adapter).tree for result in (one, many)]
    for name, tensor in trees[0].items():
        assert float((tensor - trees[1][name]).norm()) <= 0.03 * float(tensor.norm())
    for row, other in zip(one.metrics, many.metrics, strict=True):
        assert row["losses"] == pytest.approx(other["losses"], abs=2e-4)


class Stop(Exception):
    """The coordinator's process ends."""


def stop_after(number: int) -> Any:
    def observe(event: Event) -> None:
        if event.kind == "round_closed" and event.round == number:
            raise Stop

    return observe


def test_another_coordinator_goes_on_bit_for_bit(config: Config, lab: Lab, tmp_path: Path) -> None:
    """Stopped after rounds 1 and 2, each time continued by new objects from the journal alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    reference = run(config, whole, lab)
    for number in (1, 2):
        with pytest.raises(Stop):
            run(config, parts, lab, observer=stop_after(number))
        assert last_state(config, lab, parts)["round"] == number
    resumed = run(config, parts, lab)
    assert last_state(config, lab, parts) == last_state(config, lab, whole)
    one, other = (
        load_file(result.adapter / "adapter_model.safetensors") for result in (reference, resumed)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert resumed.metrics == reference.metrics


def test_what_a_state_holds(tiny: Config, lab: Lab, tmp_path: Path) -> None:
    config = tiny.replace(
        model={"rank": 8, "alpha": 8 * tiny.scaling},
        strategy={"name": "fedkseed", "options": {**BYTES, "momentum": 0.5, "importance": True}},
    )
    run(config, tmp_path / "out", lab)
    found = last_state(config, lab, tmp_path / "out")
    assert set(found) == {"round", "q", "velocity", "amplitude", "draws", "scale", "seed"}


def test_mistakes_show_before_the_model_is_loaded(tiny: Config) -> None:
    nowhere = tiny.replace(model={"base": "/nowhere"})
    options = {"directions": 3}
    with pytest.raises(ConfigError, match="cannot be dealt evenly"):
        open_lab(nowhere.replace(strategy={"name": "fedkseed", "options": options}))
    with pytest.raises(ConfigError, match="neither clipped nor rounded"):
        pool = nowhere.replace(strategy={"name": "pool_lora"})
        open_lab(pool.replace(clients={"wire": "bfloat16"}))
