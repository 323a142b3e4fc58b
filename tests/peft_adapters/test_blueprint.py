"""A coordinator's view of a base is the loaded base's, without its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meadow.client.workbench import open_workbench
from meadow.config import Config
from meadow.errors import ConfigError, ModelError
from meadow.peft_adapters.base_model import load_skeleton
from meadow.peft_adapters.blueprint import check_shape, open_blueprint
from meadow.peft_adapters.layout import Site


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "down_proj"]])
def test_it_is_that_of_the_loaded_base(tiny: Config, targets: list[str]) -> None:
    config = tiny.replace(model={"targets": targets})
    assert open_blueprint(config.model) == open_workbench(config).blueprint


def test_no_weights_are_loaded(tiny: Config) -> None:
    skeleton, _ = load_skeleton(tiny.model.base)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_a_folder_without_a_model_is_named(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        open_blueprint(replace(tiny.model, base=str(tmp_path)))


@pytest.mark.parametrize(
    ("rank", "integers", "says"),
    [(9, False, "more than layer"), (17, True, "larger than every"), (1000, True, "exported")],
)
def test_a_rank_that_cannot_be_is_refused_before_the_work(
    rank: int, integers: bool, says: str
) -> None:
    layers = [Site("a", 8, 16), Site("b", 16, 16)]
    with pytest.raises(ConfigError, match=says):
        check_shape(rank, layers, integers)
    check_shape(8, layers, integers)
