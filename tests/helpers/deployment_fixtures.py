"""A deployed run over people in memory: see tests/helpers/deployment_stage.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deployment_stage import Stage, opened

from meadow.config import Config
from meadow.simulation.engine import Lab


@pytest.fixture
def stage(tiny: Config, lab: Lab, tmp_path: Path) -> Iterator[Stage]:
    torch.set_num_threads(1)
    with opened(tmp_path / "c", tiny, lab) as stage:
        yield stage
