"""The load of the memory benchmark: its sizes, its model and its answers."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Message

from meadow.errors import StorageError, UpdateError
from meadow.peft_adapters.blueprint import open_blueprint
from meadow.server.app import wrap
from meadow.server.run_beginning import check_deployable
from meadow.simulation import deploy_memory, flower_identity
from meadow.simulation.deploy_memory import Load, measure, write_base
from meadow.simulation.load_generator import answer_to
from meadow.strategies.base import Turn
from meadow.strategies.messages import (
    check_contribution,
    pack_update,
    turn_to_json,
    unpack_update,
)
from meadow.strategies.registry import strategy_of

SMALL = Load(3, 2.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "base"
    write_base(folder, SMALL.layers)
    return folder


def test_an_update_has_the_size_that_is_asked_for(base: Path) -> None:
    config = SMALL.config(base)
    blueprint = open_blueprint(config.model)
    check_deployable(config, blueprint)
    strategy = strategy_of(config, blueprint.layers, blueprint.digest)
    turn = Turn(1, 1, 1, client="anna", cohort=("anna",))
    shapes = strategy.template(strategy.broadcast(strategy.init(1), turn), turn).values()
    layer = sum(4 * rows * columns for rows, columns in shapes) / SMALL.layers
    assert SMALL.layers == 1 and layer == pytest.approx(1.9e6, rel=0.05)
    assert Load(4, 50.0).layers * layer == pytest.approx(50e6, rel=0.02)


def test_answers_are_such_as_a_coordinator_counts(base: Path) -> None:
    config = SMALL.config(base)
    blueprint = open_blueprint(config.model)
    strategy = strategy_of(config, blueprint.layers, blueprint.digest)
    turn = Turn(1, 1, 1, client="anna", cohort=("anna",))
    sent = strategy.broadcast(strategy.init(1), turn)
    message = asked(pack_update(sent, turn=turn_to_json(turn)), "train")
    answers = [answer_to(message, seed) for seed in (0, 1000)]
    assert answers[0] != answers[1], "or the SuperLink would keep one for both"
    for answer in answers:
        update = check_contribution(answer, strategy.template(sent, turn), "anna")
        strategy.validate(update, turn)
        assert all(tensor.any() for tensor in update.tensors.values())
        assert strategy.step(strategy.init(1), update, turn).tensors


def test_held_out_losses_are_such_as_a_coordinator_counts() -> None:
    notes = unpack_update(answer_to(asked(b"", "evaluate"), 0))[0].notes
    assert notes == {"loss": 1.0, "tokens": 100}


def asked(payload: bytes, kind: str) -> Message:
    flower_identity.assume()
    return Message(wrap(payload), dst_node_id=1, message_type=kind)


def test_a_full_disk_is_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(place: Any) -> Any:
        return SimpleNamespace(free=5e9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(StorageError, match="64 contributions of 50 MB need 14 GB in .*has 5 GB"):
        measure(Load(64, 50.0), lambda text: None)


def test_nothing_is_left_of_a_round_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*arguments: Any) -> Any:
        raise UpdateError("no")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(deploy_memory, "_round", fails)
    with pytest.raises(UpdateError):
        measure(SMALL, lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_the_same_each_time(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    write_base(tmp_path / "again", SMALL.layers)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (base, tmp_path / "again")]
    assert weights[0] == weights[1]
